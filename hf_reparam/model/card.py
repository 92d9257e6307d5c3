"""Model cards, and one commit to the Hub of a model with its card.

A card says what a converted model is, from its plan and its record, in one marked section of `README.md`.
"""

import contextlib
import re
from collections.abc import Callable, Collection, Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, HfApi, ModelCard, ModelCardData
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, LocalEntryNotFoundError

from hf_reparam.compat.auto import auto_class_of
from hf_reparam.errors import TargetError
from hf_reparam.model.config import ReparamConfigMixin, plan_of
from hf_reparam.model.summary import report
from hf_reparam.plan import ConversionRecord, RankPlan, is_hub_id

_TAGS = ("hf_reparam", "low-rank")
_SECTION = (
    "<!-- hf_reparam: this section is written anew with the model; text outside of it is yours -->",
    "<!-- hf_reparam: end -->",
)
_COMPARED = ("<!-- hf_reparam: comparison -->", "<!-- hf_reparam: end of the comparison -->")
_METHODS = {
    "svd": "truncated singular value decomposition of the weights, without data",
    "activation": "SVD in the metric of the layers' inputs",
    "fisher": "SVD in the Fisher metric (K-FAC) of inputs and output gradients",
}
_WITHOUT_PACKAGE = """
Or without hf_reparam, with the code in this repository:

```python
from transformers import {kind}

model = {kind}.from_pretrained("THIS_REPOSITORY", trust_remote_code=True)
```
"""
_FROM_BASE = ("license", "license_name", "license_link", "pipeline_tag", "language")


def model_card(
    model: Any,
    *,
    card: ModelCard | None = None,
    base_model: str | None = None,
    base_card: ModelCard | None = None,
    remote_code: bool = False,
) -> ModelCard:
    """The card of a converted model, for `card.save("OUT/README.md")` or `card.push_to_hub("me/small")`.

    `push_to_hub` and `hf-reparam convert` write it themselves.

    Args:
        model: a converted `PreTrainedModel`.
        card: an existing card. Only the section between this package's marks is replaced, or added at the end; metadata
            that is there stays, tags are added.
        base_model: Hub id of the dense model, if `convert` could not know it: the model came from a folder.
        base_card: the dense model's card, whose licence, pipeline and language are taken over, and its library, such
            as sentence-transformers, for a folder made from its folder; None to read it from the Hub, if that can be
            reached.
        remote_code: whether the model is saved with the file that loads it where hf_reparam is not installed.

    Raises:
        TargetError: the model is not a converted one, or `base_model` is no Hub id.

    >>> from transformers import BertConfig, BertModel
    >>> from hf_reparam.compress.convert import convert
    >>> shape = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64, vocab_size=99)
    >>> card = model_card(convert(BertModel(BertConfig(**shape)), rank=4))
    >>> card.data.tags, card.data.library_name
    (['hf_reparam', 'low-rank'], 'transformers')
    """
    if not isinstance(getattr(model, "config", None), ReparamConfigMixin):
        raise TargetError(f"{type(model).__name__} is no converted Transformers model: there is nothing to say of it")
    if base_model is not None and not is_hub_id(base_model):
        raise TargetError(f"base_model must be a Hub id such as 'google-bert/bert-base-uncased', got {base_model!r}")
    plan = plan_of(model.config)
    record = plan.record or ConversionRecord()
    base_model = base_model or record.base_model
    library = "transformers" if base_card is None else base_card.data.get("library_name", "transformers")
    if base_card is None and base_model is not None:
        with contextlib.suppress(HfHubHTTPError, OSError, ValueError):  # not needed, and not worth a failure
            base_card = ModelCard.load(base_model)
    theirs = {} if base_card is None else base_card.data.to_dict()
    known = {key: theirs[key] for key in _FROM_BASE if key in theirs}
    data = ModelCardData(base_model=base_model, library_name=library, tags=list(_TAGS), **known)
    if card is None:
        name = (base_model or model.base_class.__name__).rpartition("/")[2]
        card = ModelCard(f"---\n{data.to_yaml()}\n---\n\n# {name}, low-rank\n")
    for key, value in data.to_dict().items():
        if key == "tags":
            _add_tags(card, _TAGS)
        elif card.data.get(key) is None:
            card.data[key] = value
    return _put(card, _SECTION, _section(model, plan, record, base_model, remote_code=remote_code))


def with_comparison(card: ModelCard, table: str) -> ModelCard:
    """The card with a table of its own below what it says, or in the place of the one that it has; changes the card."""
    return _put(card, _COMPARED, f"## Beside the dense model\n\n{table}")


def _put(card: ModelCard, marks: tuple[str, str], text: str) -> ModelCard:
    section = "\n\n".join([marks[0], text, marks[1]])
    whole, found = re.subn(".*?".join(map(re.escape, marks)), lambda _: section, card.text, count=1, flags=re.DOTALL)
    card.text = whole if found else f"{card.text.rstrip()}\n\n{section}\n"
    return card


def prepare_upload(
    model: Any,
    folder: Path,
    repo_id: str,
    *,
    commit_message: str = "Upload model",
    commit_description: str | None = None,
    private: bool | None = None,
    token: bool | str | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    tags: Collection[str] = (),
    remote_code: bool = False,
    card: ModelCard | None = None,
) -> Callable[..., Any]:
    """Make a repository where it is not there, and the card, from this or the one that it has: what can fail before the
    long work fails here. What it returns commits the card and what has been written into the folder since."""
    api = HfApi(token=token, library_name="hf_reparam")
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    card = model_card(model, card=card or _published_card(repo_id, token), remote_code=remote_code)
    _add_tags(card, [*(model.model_tags or ()), *tags])
    if revision is not None and not revision.startswith("refs/pr"):
        api.create_branch(repo_id, branch=revision, exist_ok=True)

    def written() -> set[tuple[Path, int]]:
        return {(path, path.stat().st_mtime_ns) for path in folder.rglob("*") if path.is_file()}

    before = written()

    def send(files: Iterable[Path] | None = None) -> Any:
        if files is None:
            card.save(folder / "README.md")
            files = sorted(path for path, _ in written() - before)
        content: dict[str, Any] = {path.relative_to(folder).as_posix(): path for path in files}
        return api.create_commit(
            repo_id,
            [CommitOperationAdd(*one) for one in (content | {"README.md": str(card).encode()}).items()],
            commit_message=commit_message,
            commit_description=commit_description,
            revision=revision,
            create_pr=create_pr,
        )

    return send


def _add_tags(card: ModelCard, tags: Iterable[str]) -> None:
    card.data["tags"] = list(dict.fromkeys([*(card.data.get("tags") or []), *tags]))


def _published_card(repo_id: str, token: Any) -> ModelCard | None:
    """The card that a repository has; None if it has none. Raises if the Hub cannot be asked."""
    try:
        return ModelCard.load(repo_id, token=token)
    except EntryNotFoundError as error:
        if isinstance(error, LocalEntryNotFoundError):  # the Hub was not reached
            raise
        return None


def _section(model: Any, plan: RankPlan, record: ConversionRecord, base_model: str | None, *, remote_code: bool) -> str:
    whole = report(model)
    auto = auto_class_of(model.base_class)
    kind = auto or type(model).__name__
    source = "a dense model" if base_model is None else f"[{base_model}](https://huggingface.co/{base_model})"
    errors = sorted(error for error in record.errors.values() if error is not None)
    measured = (
        f"{errors[0]:.3f} to {errors[-1]:.3f}, median {errors[len(errors) // 2]:.3f}" if errors else "not recorded"
    )
    rows = {
        "parameters of the low-rank layers": _change(whole.factored_before, whole.factored_after),
        "parameters of the whole model": _change(whole.parameters_before, whole.parameters_after),
        "method": _METHODS.get(plan.metric, plan.metric),
        "calibration": "none" if record.calibration_tokens is None else f"{record.calibration_tokens:,} tokens",
        **_without_data(record),
        "layers fitted again afterwards": str(record.refitted_layers),
        "relative error of a layer in that metric, as converted": measured,
    }
    table = "\n".join(["| | |", "|---|---|", *(f"| {key} | {value} |" for key, value in rows.items())])
    return f"""## Low-rank layers

`{model.base_class.__name__}` made from {source} with [hf_reparam](https://pypi.org/project/hf-reparam/)
{version("hf-reparam")}: {len(whole.layers)} dense layers are products of two smaller ones, W ~ up @ down.

{table}

### Load

```python
import hf_reparam  # pip install hf-reparam
from {"transformers" if auto else "hf_reparam"} import {kind}

model = {kind}.from_pretrained("THIS_REPOSITORY")
```
{_WITHOUT_PACKAGE.format(kind=auto) if remote_code and auto else ""}
### Merge

```python
dense = hf_reparam.merge(model)  # the plain {model.base_class.__name__}; saved, it needs no hf_reparam
```

<details>
<summary>Ranks, layer by layer</summary>

{whole.layer_table()}

</details>"""


def _without_data(record: ConversionRecord) -> dict[str, str]:
    texts = {"svd": "layers that saw no data, by plain SVD", "activation": "layers without a gradient, by inputs alone"}
    found = {text: [n for n, metric in record.metrics.items() if metric == key] for key, text in texts.items()}
    return {text: f"{len(names)}, among them {', '.join(names[:3])}" for text, names in found.items() if names}


def _change(before: int, after: int) -> str:
    return f"{before:,} dense, {after:,} here ({after / before:.1%})"
