"""Model folders: find, load, and build a skeleton from."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import ModelCard, snapshot_download
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]  # not in its list
from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig, PreTrainedModel
from yaml import YAMLError

from hf_reparam.compat.accelerate import meant_for_disk
from hf_reparam.compat.auto import default_model
from hf_reparam.compat.loading import unexpected_names
from hf_reparam.errors import CheckpointError, PlanError, ReparamError, TargetError
from hf_reparam.layers.offload import check_stored
from hf_reparam.model.auto import generated_class
from hf_reparam.model.config import PREFIX, ReparamConfigMixin
from hf_reparam.model.stored import check_folder

OTHER_FOLDERS = ("onnx", "openvino", "coreml", "original", "checkpoint-*", "global_step*")  # the weights once more
_OTHER_FORMATS = ["tf_model*", "flax_model*", "*.ot", "*model*.onnx*", "*.gguf", "*.tflite"]
_OTHER_FORMATS += [f"{name}/*" for name in OTHER_FOLDERS]


def locate(source: str, *, revision: str | None = None, token: str | None = None) -> Path:
    """The folder of a model: itself, or the local snapshot of a Hub id (downloaded, or from the cache when offline)."""
    if os.path.isdir(source):
        if revision is not None:
            raise CheckpointError(f"{source} is a folder, which has no revision {revision!r}: leave it out")
        return Path(source)
    if os.path.exists(source):
        raise CheckpointError(f"{source} is a file; give a model folder or a Hub id")
    _check_name(source)
    try:
        return Path(snapshot_download(source, revision=revision, token=token, ignore_patterns=_OTHER_FORMATS))
    except LocalEntryNotFoundError as error:
        at = "" if revision is None else f" at {revision}"
        why = one_line(error).partition(" An error happened")[0]
        raise CheckpointError(
            f"there is no folder {source!r}, the cache has no {source}{at}, and the Hub did not give it: {why}"
        ) from None
    except OSError as error:  # all that the Hub raises
        raise CheckpointError(
            f"{source} is neither a folder nor a model that the Hub or its cache has: {one_line(error)}"
        ) from None


def _check_name(source: str) -> None:
    """Refuse what can be no Hub id, and say of a path that there is no such folder."""
    if source.startswith(("/", ".", "~")) or "\\" in source or source.count("/") > 1 or source.endswith("/"):
        raise CheckpointError(f"no such folder: {source}")
    try:
        validate_repo_id(source)
    except HFValidationError:
        message = f"{source!r} is neither a folder nor a Hub id such as 'google-bert/bert-base-uncased'"
        raise CheckpointError(message) from None


def model_place(folder: Path) -> Path:
    """Where in a folder the Transformers model is: the folder itself, or a subfolder that sentence-transformers lists.

    Raises CheckpointError if it lists several models.
    """
    if (folder / "config.json").is_file():
        return folder
    try:
        paths = [Path(entry["path"]) for entry in read_json(folder / "modules.json")]
        inside = [folder / path for path in paths if str(path) == path.name != ".."]
        configs = [place / "config.json" for place in inside]
        places = [c.parent for c in configs if c.is_file() and "model_type" in read_json(c)]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return folder
    if len(places) > 1:
        raise CheckpointError(
            f"{folder} holds {len(places)} models, {[place.name for place in places]}: convert each by its own path"
        )
    return places[0] if places else folder


def read_json(path: Path) -> Any:
    """What a JSON file holds; raises OSError and ValueError."""
    return json.loads(path.read_text(encoding="utf-8"))


def load(
    folder: Path, *, offload_folder: Path | None = None, dtype: str | None = None, device: str | None = None
) -> tuple[PreTrainedModel, tuple[str, ...]]:
    """A model as the class that saved it, and the names of tensors it has no place for.

    Its dtype is that in which it was saved, unless another is asked for.

    With an `offload_folder` every weight stays on disk until it is used: in the model's own files where it is used as
    it is stored, else in this folder. Raises CheckpointError for a folder that cannot be loaded, or lacks weights, and
    PlanError for a plan that is malformed or does not fit, and TargetError
    for a device that is not there.
    """
    check_folder(folder)
    check_device(device)
    with checked(f"{folder} cannot be loaded", BrokenPipeError):  # nobody reads the progress bar any more
        kind = _saved_class(AutoConfig.from_pretrained(folder))
        on_disk = {} if offload_folder is None else {"device_map": {"": "disk"}, "offload_folder": str(offload_folder)}
        with meant_for_disk(), unexpected_names(kind) as found:
            model, info = kind.from_pretrained(folder, dtype=dtype or "auto", output_loading_info=True, **on_disk)
        if info["missing_keys"]:
            missing = sorted(info["missing_keys"])
            raise CheckpointError(
                f"{folder}: {len(missing)} weights are missing for {kind.__name__}, among them {missing[:3]}"
            )
        if on_disk:
            check_stored(model)
            model.tie_weights()  # tied weights that were stored twice
        elif device is not None:
            model.to(device)
    return model, _left_out(model, set(info["unexpected_keys"]), found)


def check_device(device: str | None) -> None:
    """Raise TargetError for a device that is not here."""
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise TargetError(f"there is no device {device!r} here: {one_line(error)}") from None


def _left_out(model: PreTrainedModel, unexpected: set[str], found: set[str]) -> tuple[str, ...]:
    """The names that are worth telling. Of those that the class ignores: weights of modules that it does not have."""
    modules = dict(model.named_modules(remove_duplicate=False))
    ignored = {name for name in found - unexpected if name.rpartition(".")[0] not in modules}  # no old buffers
    absent = {name.rpartition(".")[0] for name in ignored if name.endswith(".weight")}
    return tuple(sorted(unexpected | {name for name in ignored if name.rpartition(".")[0] in absent}))


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer of a model folder, with a padding token; CheckpointError without one that can be loaded."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        if len(tokenizer) <= len(tokenizer.all_special_ids):  # Transformers makes up an empty one
            raise ValueError("its vocabulary is empty")
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise CheckpointError(f"{folder} has no tokenizer to read calibration texts with: {one_line(error)}") from None
    if tokenizer.pad_token is None:  # GPT-2 and Llama; padding is masked
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def lines_of(path: str | os.PathLike[str]) -> list[str]:
    """The lines of a text file that are not empty; CheckpointError for what cannot be read as text, or has none."""
    try:
        lines = [line for line in Path(path).read_text(encoding="utf-8").splitlines() if line.strip()]
    except FileNotFoundError:
        raise CheckpointError(f"no such file: {path}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} cannot be read as text: {error}") from None
    if not lines:
        raise CheckpointError(f"{path} has no text: write one a line")
    return lines


def card_of(folder: Path, *, strict: bool = False) -> ModelCard:
    """The model card of a folder; an empty one if it has none that can be read. `strict`, where a card is written back:
    CheckpointError for one that is there and cannot be read."""
    path = folder / "README.md"
    try:
        return ModelCard.load(path)
    except (OSError, ValueError, YAMLError) as error:
        if strict and path.exists():
            raise CheckpointError(f"{path} cannot be read as a model card, mend it first: {one_line(error)}") from None
        return ModelCard("---\n\n---\n")  # an empty text is warned of


def skeleton(
    source: str, *, revision: str | None = None, token: str | None = None, dtype: str | None = None
) -> PreTrainedModel:
    """The model of a folder or Hub id on the meta device: every shape, no weight read. Raises as `load`."""
    refusal = f"{source} cannot be read"
    if os.path.exists(source):
        source = str(model_place(locate(source, revision=revision)))
    else:
        _check_name(source)
        refusal = f"there is no folder {source!r}, and no model of this name could be read from the Hub or its cache"
    check_folder(Path(source))
    with checked(refusal):
        config = AutoConfig.from_pretrained(source, revision=revision or "main", token=token)
        with torch.device("meta"):
            model = _saved_class(config)(config)
    model.tie_weights()
    saved = getattr(torch, dtype) if dtype is not None else config.dtype
    return model if saved is None else model.to(saved)


def _saved_class(config: PreTrainedConfig) -> Any:
    names = config.architectures or [None]
    name = names[0] if isinstance(names, list) else names
    if name is None:
        found: Any = default_model(type(config))
        if found is None:
            kind = type(config).__name__
            raise CheckpointError(f"config.json names no architecture, and {kind} has no default model")
        return found
    name, found = str(name)[:80], None
    with suppress(AttributeError):
        found = generated_class(name) if name.startswith(PREFIX) else getattr(transformers, name, None)
    if not (isinstance(found, type) and issubclass(found, PreTrainedModel)):
        raise CheckpointError(
            f"its architecture {name!r} is no class of Transformers {transformers.__version__}; if it is one of yours, "
            "import the module that defines it, and register a configuration of your own with AutoConfig"
        )
    if isinstance(config, ReparamConfigMixin) and not name.startswith(PREFIX):
        raise PlanError(f"config.json has a plan, and its architecture {name!r} is a stock class")
    return found


@contextmanager
def checked(refusal: str, *others: type[Exception]) -> Iterator[None]:
    """Whatever fails in the block becomes a CheckpointError that begins so, but errors of this package, and others."""
    kept: tuple[type[Exception], ...] = (ReparamError, *others)
    try:
        yield
    except kept:
        raise
    except Exception as error:  # a tampered folder makes Transformers stumble, a Hub its client
        raise CheckpointError(f"{refusal}: {one_line(error)}") from error


def one_line(error: BaseException) -> str:
    """What an error says, as part of a message of one line."""
    text = " ".join(str(error).split())[:300]
    plain = isinstance(error, (OSError, ValueError, RuntimeError)) and text
    return text if plain else f"{type(error).__name__}: {text}"
