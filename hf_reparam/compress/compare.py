"""`compare`: two models beside each other on the same data, such as a dense one and what became of it."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import version
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch import Tensor, nn
from torch.nn import functional as F

from hf_reparam.calibrate.batches import Batches, prepare
from hf_reparam.calibrate.inputs import forward_names, positions, same_draws, vocabulary, with_names
from hf_reparam.calibrate.items import examples
from hf_reparam.calibrate.objective import (
    IGNORED,
    MASKS,
    batch_masks,
    divergence,
    examples_in,
    position_mask,
    predicts,
    unit_of,
)
from hf_reparam.calibrate.padding import ANSWERS, CANNOT_BE_TRIED, Padding, decodes, predicts_next
from hf_reparam.calibrate.predictions import compared, problem_of
from hf_reparam.calibrate.texts import checked_tokenizer
from hf_reparam.compat.accelerate import execution_device, ran_out_of_memory
from hf_reparam.compress.clock import medians
from hf_reparam.compress.judge import labelled
from hf_reparam.errors import TargetError
from hf_reparam.layers.progress import each, one_bar
from hf_reparam.linalg.calibration import HeldOut
from hf_reparam.model.checks import count_parameters
from hf_reparam.model.host import called, check_model, own_tokenizer
from hf_reparam.tables import Part, Readable

_LONGEST = 2048  # tokens of a block, if the model has room for so many
_BATCHES = (1, 32)  # texts in a call that is timed
_LENGTH = 128  # of these texts
_NEAR_ZERO = 1e-6  # of what is rounding, a ratio says nothing
_NEW = 32  # tokens that are generated after as many
_OF_TEXTS = {"input_ids", "token_type_ids", "position_ids", "decoder_input_ids", *ANSWERS, *MASKS}
"""What batches of texts have; a model that gets more may need it."""
_DIFFERENT = "the models predict different things: compare models of one task and one vocabulary"

Evaluate = Callable[[nn.Module], float | Mapping[str, float]]
Call = tuple[Callable[[Any, Any], Any], Any]
"""What is called with a model, and what it is called with beside that."""


@dataclass(frozen=True)
class Comparison(Readable):
    """What two models are and do, beside each other.

    Args:
        figures: what was measured -> the first model's and the second's; None where it has no meaning of its own.
        data: what they were compared on.
        machine: where times were measured.
    """

    figures: Mapping[str, tuple[float | None, float | None]]
    data: str
    machine: str

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers and strings, ready for JSON."""
        return asdict(self)

    def parts(self) -> list[Part]:
        """What is printed: a table, and a line about data and machine."""
        rows = [["", "dense", "converted", "ratio"]]
        for name, (first, second) in self.figures.items():
            ratio = f"{second / first:.2f}" if first and second is not None and abs(first) > _NEAR_ZERO else ""
            rows.append([name, shown(first), shown(second), ratio])
        return [rows, f"Compared on {self.data}; {self.machine}."]


def compare(
    dense: nn.Module,
    small: nn.Module,
    data: Batches,
    *,
    tokenizer: Any = None,
    evaluate: Evaluate | None = None,
    max_length: int | None = None,
    max_samples: int | None = None,
    times: bool = True,
) -> Comparison:
    """Set two models beside each other: sizes, predictions on the same data, times.

    Predictions: the second model's mean divergence from the first (Kullback-Leibler, nats) and how often both have the
    same first choice, where there are logits; otherwise the mean cosine of hidden states, of each output where there
    are several, or of the sentence embeddings of a SentenceTransformer. Positions whose label is -100 do not count. The
    loss, where batches have labels. Models that draw numbers draw the same ones. Texts for a causal model are read as
    perplexities are published: joined by blank lines, cut into blocks of the model's length (2,048 tokens at most),
    every token but the first of a block predicted; what remains after the last block is left out. Those for a masked
    language model have 15 % of their tokens masked, as in `calibrate`.

    Times are medians of rounds in which both take turns: one text and 32 texts of 128 tokens, and 32 tokens generated
    after 32 others; of data that are not token ids alone, one batch. What a model cannot be called for is left out.

    Args:
        dense, small: models for the same inputs: dense, converted, merged or quantized; each on a device of its own.
        data: as for `calibrate`.
        tokenizer: for texts.
        evaluate: model -> a number, or names with numbers; called with both.
        max_length: tokens of a text, or of a block.
        max_samples: texts or examples that are used, the first ones.
        times: whether times are measured.

    Returns:
        A Comparison.

    Raises:
        TargetError: no model, data that cannot be read, no data, or models that predict different things.

    Cost: a forward pass of both models over the data, example by example where masks do not tell which predictions are
    of padding (sound); about fifty more with `times`.

    >>> from hf_reparam.compress.convert import convert
    >>> net = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    >>> found = compare(net, convert(net, rank=8), [{"input": torch.randn(5, 64)}], times=False)
    >>> found.figures["parameters"]
    (8320, 2176)
    """
    both: list[Any] = [dense, small]
    for model in both:
        check_model(model)
    pair = [called(dense), called(small)]
    tokenizer = checked_tokenizer(tokenizer or own_tokenizer(dense))
    figures: dict[str, tuple[float | None, float | None]] = {
        "parameters": (count_parameters(dense), count_parameters(small)),
        "MB in memory": (megabytes(dense), megabytes(small)),
    }
    with _evaluating(dense, small), torch.no_grad(), one_bar():
        found = list(examples(data, forward_names(pair[0]), max_samples))
        texts = [words for _, words in found if isinstance(words, str)]
        texts = texts if len(texts) == len(found) else []
        if texts and tokenizer is not None and predicts_next(pair[0]):
            read: list[HeldOut] = [(b, batch_masks(b)) for b in _blocks(pair[0], texts, tokenizer, max_length)]
            what = "{} blocks of {} tokens"
        else:
            rows = [row for row, _ in found]
            read = list(prepare(pair[0], rows, tokenizer, max_length=max_length, desc="reading"))
            count = sum(examples_in(batch) for batch, _ in read)
            what = "{} examples" if len(texts) in (0, count) else f"{{}} rows of {len(texts)} texts"
        batches = [batch for batch, _ in read]
        if not batches:
            raise TargetError("there is no data to compare the models on: give at least one text or batch")
        ids = [batch["input_ids"] for batch in batches if isinstance(batch.get("input_ids"), Tensor)]
        highest = max((int(some.max()) for some in ids if some.numel()), default=0)
        if highest >= vocabulary(pair[0]):
            known = f"{type(pair[0]).__name__} knows {vocabulary(pair[0]):.0f}"
            raise TargetError(f"the data have token id {highest}, and {known}: give the tokenizer of this model")
        if highest >= vocabulary(pair[1]):
            raise TargetError(_DIFFERENT)
        figures |= _predictions(pair, read)
        if texts and all(hasattr(model, "encode") for model in both):
            told: list[Any] = [torch.as_tensor(m.encode(texts, convert_to_tensor=True)).float().cpu() for m in both]
            figures["cosine of sentence embeddings"] = (
                None,
                float(F.cosine_similarity(told[0], told[1], dim=-1).mean()),
            )
        if evaluate is not None:
            figures |= _evaluated(dense, small, evaluate)
        if times:
            figures |= _times(pair, batches[0])
    length = next((value.shape[-1] for value in batches[0].values() if isinstance(value, Tensor) and value.dim()), 0)
    return Comparison(figures, what.format(sum(map(examples_in, batches)), length), _machine(pair[0]))


def shown(value: float | None) -> str:
    """A figure of a Comparison; an empty string for None."""
    if value is None:
        return ""
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


@contextmanager
def _evaluating(*models: nn.Module) -> Iterator[None]:
    """Have models in evaluation mode while the block runs."""
    before = [(module, module.training) for model in models for module in model.modules()]
    for model in models:
        model.eval()
    try:
        yield
    finally:
        for module, training in before:
            module.training = training


def megabytes(model: nn.Module) -> float:
    """Of parameters and buffers, each counted once; of a quantized tensor, what it holds inside."""
    tensors = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return sum(map(_bytes, tensors.values())) / 1e6


def _bytes(tensor: Any) -> int:
    if hasattr(tensor, "__tensor_flatten__"):
        return sum(_bytes(getattr(tensor, name)) for name in tensor.__tensor_flatten__()[0])
    return int(tensor.numel() * tensor.element_size())


def _blocks(model: nn.Module, texts: Sequence[str], tokenizer: Any, max_length: int | None) -> list[dict[str, Any]]:
    """Batches of one block of consecutive tokens, which are their own labels."""
    ids = tokenizer("\n\n".join(texts), return_tensors="pt", verbose=False)["input_ids"][0]
    length = int(min(max_length or _LONGEST, positions(model), len(ids)))
    parts = [ids[i : i + length][None] for i in range(0, len(ids) - length + 1, length)] if length > 1 else []
    return [{"input_ids": part, "labels": part} for part in parts]


def _predictions(pair: Sequence[nn.Module], read: Sequence[HeldOut]) -> dict[str, Any]:
    """What the second model predicts beside the first, and what both lose where there are labels."""
    sums: dict[str, Tensor] = {}
    losses, weights = [0.0, 0.0], 0
    for part in Padding(pair[0], {}).parts(each(read, "comparing", "batch")):  # examples alone where it cannot be told
        batch, masks = part.batch, part.masks
        outputs = [send_to_device(same_draws()(_run)(model, batch), "cpu") for model in pair]
        own = [out.loss for out in outputs if isinstance(getattr(out, "loss", None), Tensor)]
        if len(own) == len(pair):
            weight = _counted(pair[0], batch)
            if weight:  # the mean over no label is not a number
                losses = [total + float(one.mean()) * weight for total, one in zip(losses, own, strict=True)]
                weights += weight
        for name, value in _distances(pair[0], outputs, *send_to_device((batch, masks), "cpu")).items():
            sums[name] = sums.get(name, torch.zeros(2)) + value
    found: dict[str, Any] = {}
    if weights:
        first, second = (total / weights for total in losses)
        found["loss"] = (first, second)
        if predicts_next(pair[0]):
            found["perplexity"] = (math.exp(first), math.exp(second))
    return found | {name: (None, float(value[0] / value[1])) for name, value in sums.items()}


def _counted(model: nn.Module, batch: Mapping[str, Any]) -> int:
    """Over how many labels the loss of a batch is a mean; examples, where it has no labels that are classes."""
    labels = batch.get("labels")
    if not isinstance(labels, Tensor) or labels.is_floating_point():
        return examples_in(batch)
    return int(((labels[..., 1:] if predicts_next(model) else labels) != IGNORED).sum())


def _distances(
    model: nn.Module, outputs: Sequence[Any], batch: Mapping[str, Any], known: tuple[Tensor, ...]
) -> dict[str, Tensor]:
    """Sums over positions or examples, and how many these are."""
    problem = problem_of(model)
    theirs, mine = (compared(found, problem) for found in outputs)
    if theirs.keys() != mine.keys() or any(theirs[key].shape != value.shape for key, value in mine.items()):
        raise TargetError(_DIFFERENT)
    labels = batch.get("labels")
    some = isinstance(labels, Tensor) and bool((labels == IGNORED).any())
    masks = (labelled(model, batch, known, theirs) if some else ()) or known
    found: dict[str, Tensor] = {}
    for key, one in theirs.items():
        mask = position_mask(one, masks)
        real = torch.ones(one.shape[:-1], dtype=torch.bool) if mask is None else mask
        name, value = _likeness(key, one, mine[key])
        found[name] = found.get(name, torch.zeros(2)) + torch.tensor([float(value[real].sum()), int(real.sum())])
    key, one = next(iter(theirs.items()))
    if predicts(key, one):
        unit, count = unit_of(theirs, masks)
        distance = float(divergence(outputs[1], theirs, masks, problem))
        return {f"divergence from dense, {unit}": torch.tensor([distance, count]), **found}
    return found


def _likeness(key: str, one: Tensor, other: Tensor) -> tuple[str, Tensor]:
    """How alike two outputs are, (positions or examples), by a name for it."""
    if key.endswith("answers"):
        return "same answers", ((one > 0) == (other > 0)).float().mean(-1)
    if predicts(key, one):
        return "same first choice", one.argmax(-1) == other.argmax(-1)
    what = key.replace("_", " ")
    if one.shape[-1] == 1:  # scores, of which a cosine sees the sign alone
        return f"mean difference of {what}", (one.float() - other.float()).abs()[..., 0]
    return f"cosine of {what}", F.cosine_similarity(one.float(), other.float(), dim=-1)


def _evaluated(dense: nn.Module, small: nn.Module, evaluate: Evaluate) -> dict[str, Any]:
    found = [evaluate(model) for model in (dense, small)]
    first, second = (given if isinstance(given, Mapping) else {"evaluate": given} for given in found)
    return {name: (float(value), float(second[name])) for name, value in first.items()}


def _times(pair: Sequence[nn.Module], batch: Mapping[str, Any]) -> dict[str, Any]:
    """Milliseconds of a forward pass, and tokens generated in a second."""
    ids: Any = batch.get("input_ids")
    of_texts = isinstance(ids, Tensor) and ids.dim() == 2 and batch.keys() <= _OF_TEXTS
    calls = _calls_with_texts(pair, ids) if of_texts else {"ms for a batch of the data": (_run, batch)}
    devices = [execution_device(model) for model in pair]
    device = next((device for device in devices if device.type != "cpu"), devices[0])
    times: dict[str, Any] = {}
    for name, (call, given) in each(calls.items(), "timing", "figure"):
        turns = {i: partial(call, model, given) for i, model in enumerate(pair)}
        try:
            took = medians(turns, device, wall=True).values()
        except CANNOT_BE_TRIED as error:  # a model that wants more than ids: this figure is left out
            if ran_out_of_memory(error):
                raise
            continue
        times[name] = tuple(1000 * s if name.startswith("ms") else _NEW / s for s in took)
    return times


def _calls_with_texts(pair: Sequence[nn.Module], ids: Tensor) -> dict[str, Call]:
    """Name of a time -> its call."""
    length = int(min(_LENGTH, *map(positions, pair)))
    row = ids.flatten().repeat(math.ceil(length / ids.numel()))[:length][None]
    names = ["input_ids", "decoder_input_ids"] if decodes(pair[0]) else ["input_ids"]
    calls: dict[str, Call] = {}
    for count in _BATCHES:
        texts = "1 text" if count == 1 else f"{count} texts"
        calls[f"ms for {texts} of {length} tokens"] = _run, dict.fromkeys(names, row.repeat(count, 1))
    prompt = int(min(_NEW, length, *(positions(model) - _NEW for model in pair)))
    if prompt > 0 and all(getattr(model, "can_generate", bool)() for model in pair):
        calls["tokens per second when generating"] = _generate, row[:, :prompt]
    return calls


def _run(model: nn.Module, batch: Mapping[str, Any]) -> Any:
    return model(**with_names(model), **send_to_device(dict(batch), execution_device(model)))


def _generate(model: Any, prompt: Tensor) -> Any:
    return model.generate(
        prompt.to(execution_device(model)), min_new_tokens=_NEW, max_new_tokens=_NEW, do_sample=False, num_beams=1
    )


def _machine(model: nn.Module) -> str:
    device = execution_device(model)
    count = torch.get_num_threads()
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{count} thread{'s' * (count > 1)}"
    return f"{device.type} ({name}), torch {version('torch')}, transformers {version('transformers')}"
