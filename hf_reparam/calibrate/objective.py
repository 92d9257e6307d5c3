"""The scalar whose gradient the Fisher metric measures: the log-likelihood of labels, summed over tokens.

Without labels they are drawn from the model's own predictions, so that the second moment of the gradient is the true
Fisher information; a model without logits gets a random projection of what its head gives, or else of its last hidden
states, or else of all that it returns. Draws depend on an example's own content alone, so that neither batch size nor
order nor padding changes a result. With labels every head's own loss is taken, as a sum over what it counts.
"""

import inspect
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from hf_reparam.calibrate.items import INPUTS, LABELS
from hf_reparam.calibrate.predictions import by_name, compared, floating, logits_of, without_logits
from hf_reparam.errors import TargetError
from hf_reparam.linalg.sums import widened

IGNORED = -100  # Transformers' label of positions without a label
MASKS = ("decoder_attention_mask", "attention_mask")
_STEP = -0x61C8864680B583EB  # of SplitMix64, 2^64 over the golden ratio


def batch_masks(batch: Mapping[str, Any]) -> tuple[Tensor, ...]:
    """The padding masks of a batch as booleans, (examples, length), decoder's and encoder's.

    Masks (batch, choices, length) have one row for each choice; of masks (batch, 1, length, length), boolean or added
    to scores, a position is padding if nothing may see it.
    """
    masks = map(batch.get, MASKS)
    return tuple(_flat_mask(mask) for mask in masks if isinstance(mask, Tensor) and 2 <= mask.dim() <= 4)


def _flat_mask(mask: Tensor) -> Tensor:
    if mask.dim() == 4:
        seen = mask > torch.finfo(mask.dtype).min / 2 if mask.is_floating_point() else mask.bool()
        return seen.any(2).any(1)
    return mask.bool().reshape(-1, mask.shape[-1])


_LOSSES = {f for f in vars(F).values() if inspect.isfunction(f) and "reduction" in inspect.signature(f).parameters}


class SummedLosses(TorchFunctionMode):
    """PyTorch's losses as sums while the block lasts, in the place of means.

    A mean over the labels that count (all but the first of a causal model's texts, masked tokens, spans, pairs) makes
    gradients depend on how texts are batched. What is counted differs from head to head, and a head may add several
    losses; the sum of each needs no count.

    >>> with SummedLosses() as losses:
    ...     print(F.mse_loss(torch.ones(3), torch.zeros(3)), losses.met)
    tensor(3.) True
    """

    def __init__(self) -> None:
        super().__init__()
        self.met = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func in _LOSSES:
            self.met = True
            if kwargs.get("reduction", "mean") != "none":
                kwargs["reduction"] = "sum"
        return func(*args, **kwargs)


def objective(
    outputs: Any,
    batch: Mapping[str, Any],
    masks: tuple[Tensor, ...],
    *,
    problem: str | None = None,
    summed: bool = True,
    seeds: Sequence[int] | None = None,
) -> Tensor:
    """Summed loss of a batch: the model's own if it gives one, otherwise that of labels drawn from its predictions.

    Args:
        outputs: what the model returned.
        batch: what it was called with.
        masks: as `batch_masks` gives them.
        problem: what the logits are, as `problem_of` gives it.
        summed: the model's own loss is a sum, as `SummedLosses` makes those of PyTorch; otherwise it is taken for a
            mean over examples.
        seeds: as `seeds_of` gives them, where they are known.

    Raises:
        TargetError: the outputs hold no floating-point tensor.
    """
    outputs = by_name(outputs)
    spans = _span_losses(outputs, batch, masks)
    if spans:
        return torch.stack(spans).sum()
    loss = outputs.get("loss")
    if isinstance(loss, Tensor):
        return loss.sum() * (1 if summed else examples_in(batch))
    seeds = seeds or seeds_of(batch, masks)
    logits = logits_of(outputs, problem)
    if logits:
        heads = enumerate(logits.items())  # which draw apart
        return torch.stack([_drawn(k, value, [s + i for s in seeds], masks) for i, (k, value) in heads]).sum()
    return projection(without_logits(outputs), seeds, masks)


def _span_losses(outputs: Mapping[str, Any], batch: Mapping[str, Any], masks: tuple[Tensor, ...]) -> list[Tensor]:
    """Losses of labelled spans over real positions; those of the models are over padding, too."""
    found = []
    for end in ("start", "end"):
        logits, place = outputs.get(f"{end}_logits"), batch.get(f"{end}_positions")
        if isinstance(logits, Tensor) and isinstance(place, Tensor) and logits.dim() == 2:
            inside = place.reshape(-1).clamp(0, logits.shape[1])  # as the models do: one behind the end is not counted
            real = _over_positions(logits.float(), masks)[:, 0]
            found.append(F.cross_entropy(real, inside, ignore_index=logits.shape[1], reduction="sum"))
    return found


def projection(outputs: Any, seeds: Sequence[int], masks: tuple[Tensor, ...]) -> Tensor:
    """A random projection of all that a model returned in floating-point numbers.

    Raises:
        TargetError: that is nothing.
    """
    found = floating(outputs)
    if not found:
        raise TargetError("the model returned no loss and no floating-point tensor: give a loss_fn(model, batch)")
    return torch.stack([_projected(v, [s + i for s in seeds], masks) for i, v in enumerate(found.values())]).sum()


def examples_in(batch: Mapping[str, Any]) -> int:
    """How many examples a batch holds: the length of its first tensor."""
    return next((len(value) for value in batch.values() if isinstance(value, Tensor) and value.dim()), 1)


def divergence(outputs: Any, reference: Mapping[str, Tensor], masks: tuple[Tensor, ...], problem: str | None) -> Tensor:
    """How far predictions are from a reference's, a scalar summed over real tokens.

    The Kullback-Leibler divergence from the reference for logits, half the squared difference for hidden states,
    regressions, plain tensors, and whatever else a model returns that has neither logits nor hidden states.

    Args:
        outputs: what a model returned for a batch.
        reference: what `compared` gives of another model's.
        masks: as `batch_masks` gives them.
        problem: what the logits are, as `problem_of` gives it.

    Raises:
        TargetError: the outputs hold no floating-point tensor.
    """
    mine = compared(outputs, problem)
    apart = [_distance(k, widened(v), widened(reference[k]), masks) for k, v in mine.items()]
    return torch.stack(apart).sum().clamp_min(0)  # below zero by rounding alone


def _distance(key: str, value: Tensor, reference: Tensor, masks: tuple[Tensor, ...]) -> Tensor:
    if key.endswith("answers"):
        yes = expected(F.logsigmoid(reference), F.logsigmoid(value))
        return _mask(yes + expected(F.logsigmoid(-reference), F.logsigmoid(-value)), masks).sum()
    if not predicts(key, value):
        return _squares(value, reference, masks)
    if key in ("start_logits", "end_logits"):
        value, reference = (_over_positions(logits, masks) for logits in (value, reference))
    return _mask(expected(reference.log_softmax(-1), value.log_softmax(-1)), masks).sum()


def expected(log_p: Tensor, log_q: Tensor) -> Tensor:
    """p (log p - log q); 0 where p is, as for classes that a model rules out with a logit of minus infinity."""
    p = log_p.exp()
    return (p * (log_p - log_q)).masked_fill(p == 0, 0)


def predicts(key: str, value: Tensor) -> bool:
    """Whether what `compared` calls so are probabilities of classes or answers."""
    return key.endswith("answers") or (key.endswith("logits") and value.shape[-1] > 1)


def _squares(value: Tensor, reference: Tensor, masks: tuple[Tensor, ...]) -> Tensor:
    return _mask((value - reference).square(), masks).sum() / 2


def unit_of(reference: Mapping[str, Tensor], masks: tuple[Tensor, ...]) -> tuple[str, float]:
    """In which unit people read a `divergence` from what `compared` gives, and what is one unit of that sum: the
    positions or examples for predictions, or else half the squares of the outputs themselves."""
    key, value = next(iter(reference.items()))
    mask = position_mask(value, masks)
    count = max(float(value.shape[:-1].numel() if mask is None else mask.sum()), 1.0)
    if predicts(key, value):
        place = "pixel" if "pixel_" in key else "token" if value.dim() > 2 else "example"
        return f"nats per {place}", count
    squares = sum(float(_squares(widened(v), torch.zeros_like(v), masks)) for v in reference.values())
    what = "hidden states" if key == "last_hidden_state" else "outputs"
    return f"of the squared {what}", squares or count


def _over_positions(logits: Tensor, masks: tuple[Tensor, ...]) -> Tensor:
    """(batch, length) scores of positions as (batch, 1, length), padding out of reach."""
    for mask in masks:
        if mask.shape == logits.shape:
            logits = logits.masked_fill(~mask.to(logits.device), torch.finfo(logits.dtype).min)
    return logits[:, None]


def _drawn(key: str, logits: Tensor, seeds: Sequence[int], masks: tuple[Tensor, ...]) -> Tensor:
    """A sum whose gradient has the second moment of that of the log-likelihood of labels drawn from the predictions.

    Of classes, one is drawn with probability q ~ p (1 - p), and its log-likelihood gets the weight +-(p / q)^1/2, with
    a sign of its own: p alone nearly always draws the class that a model is sure of, whose gradient vanishes. Answers
    get +- their standard deviation, numbers a normal one.
    """
    answers = key.endswith("answers")
    if not answers and (key.endswith("values") or logits.shape[-1] == 1):  # a regression
        return _projected(logits, seeds, masks)
    if key in ("start_logits", "end_logits"):
        logits = _over_positions(logits, masks)
    logits = logits.float()
    uniform = uniforms(logits, logits.shape[-1] if answers else 2, seeds, masks)
    signs = torch.where(uniform < 0.5, -1.0, 1.0)
    if answers:
        yes = logits.detach().sigmoid()
        deviation = (yes * (1 - yes)).sqrt()
        return _mask(logits.masked_fill(deviation == 0, 0) * signs * deviation, masks).sum()
    log_p = logits.log_softmax(-1)
    others = -torch.expm1(log_p.detach())  # 1 - p
    sums = log_p.detach().exp().mul_(others).cumsum(-1)
    labels = (sums < uniform[..., :1] * sums[..., -1:]).sum(-1, keepdim=True).clamp_max(log_p.shape[-1] - 1)
    least = torch.finfo(others.dtype).tiny  # of a class that the model is certain of
    weights = (sums[..., -1:] / others.gather(-1, labels).clamp_min(least)).clamp_max(2).sqrt()  # p / q is at most 2
    chosen = log_p.gather(-1, labels).clamp_min(torch.finfo(log_p.dtype).min)  # minus infinity times 0 is NaN
    return _mask(chosen * weights * signs[..., 1:], masks).sum()


def seeds_of(batch: Mapping[str, Any], masks: tuple[Tensor, ...]) -> list[int]:
    """One seed for each example, from the bytes of its unpadded inputs, whatever their order."""
    contents = {k: v for k, v in batch.items() if isinstance(v, Tensor) and v.dim() and not k.endswith("mask")}
    first = next((k for k in contents if k not in LABELS), next(iter(contents), None))
    if first is None:
        return [0]
    seeds = [0] * len(contents[first])
    main = sorted(k for k, v in contents.items() if k in INPUTS and len(v) == len(seeds))
    for rows in [contents[key].detach().cpu() for key in main or [first]]:
        shapes = (rows.shape[:2], rows.shape[:3])  # of texts, and of texts to choose from
        mask = next((m.cpu().reshape(s) for m in masks for s in shapes if (s[:-1].numel(), s[-1]) == m.shape), None)
        kept = [row if mask is None else row[mask[i]] for i, row in enumerate(rows)]
        raw = [row.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() for row in kept]
        seeds = [zlib.crc32(content, seed) for content, seed in zip(raw, seeds, strict=True)]
    return seeds


def position_mask(like: Tensor, masks: tuple[Tensor, ...]) -> Tensor | None:
    """The mask (batch, length) that belongs to values (batch, length, ...), or (batch, choices, length) to those of
    texts to choose from; None if there is none."""
    for mask in masks:
        if like.dim() > mask.dim() > 1 and mask.shape == like.shape[: mask.dim()]:
            return mask
        if like.dim() > 3 and mask.shape == (like.shape[:2].numel(), like.shape[2]):
            return mask.reshape(like.shape[:3])
    return None


def _mask(values: Tensor, masks: tuple[Tensor, ...]) -> Tensor:
    mask = position_mask(values, masks)
    return values if mask is None else values * mask[..., None].to(values.device)


def uniforms(like: Tensor, width: int, seeds: Sequence[int], masks: tuple[Tensor, ...]) -> Tensor:
    """Numbers (..., width) in (0, 1), float32: each is a hash of its example's seed and of its place among the unpadded
    positions, so that every device draws the same.

    What has not one row for each example, such as the patches of all images in one sequence, counts as one example.

    Source: SplitMix64, G. Steele et al., Fast splittable pseudorandom number generators, 2014.
    """
    shape, mask = like.shape[:-1], position_mask(like, masks)
    if not shape or shape[0] != len(seeds):
        seeds, shape, mask = [zlib.crc32(repr(list(seeds)).encode())], torch.Size([1, *shape]), None
    real = torch.ones(shape, dtype=torch.bool) if mask is None else mask
    inner = shape[real.dim() :]
    places = real.to(like.device).reshape(len(seeds), -1).cumsum(1).sub(1).reshape(*real.shape, *[1] * len(inner))
    places = places * inner.numel() + torch.arange(inner.numel(), device=like.device).reshape(inner)
    columns = torch.arange(width, device=like.device)
    seed = torch.tensor(seeds).to(like.device).reshape(-1, *[1] * len(shape))
    bits = _mixed(_mixed(seed) + (places[..., None] * width + columns) * _STEP)
    drawn = bits.bitwise_right_shift_(41).bitwise_and_((1 << 23) - 1).float()
    return drawn.add_(0.5).div_(1 << 23).reshape(*like.shape[:-1], width)


def _mixed(number: Tensor) -> Tensor:
    """A hash of int64 numbers, which it overwrites: each bit depends on every bit of theirs."""
    for shift, factor in ((30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15), (31, None)):
        number ^= (number >> shift).bitwise_and_((1 << (64 - shift)) - 1)
        if factor is not None:
            number *= factor
    return number


def _projected(values: Tensor, seeds: Sequence[int], masks: tuple[Tensor, ...]) -> Tensor:
    """The sum over real positions of values times standard normal numbers."""
    return (_mask(values, masks) * _noise(values, seeds, masks)).sum()


def _noise(like: Tensor, seeds: Sequence[int], masks: tuple[Tensor, ...]) -> Tensor:
    """Standard normal numbers of the shape and dtype of `like`."""
    return torch.special.ndtri(uniforms(like, like.shape[-1], seeds, masks)).to(like.dtype)
