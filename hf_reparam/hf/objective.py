"""The scalar whose gradient the Fisher metric measures: the log-likelihood of labels, summed over tokens.

Without labels they are drawn from the model's own predictions, which makes the second moment of the gradient the true
Fisher information; a model that predicts nothing gets a random projection of its last hidden states. Draws depend on an
example's own content alone, so that neither batch size nor order nor padding changes a result.
"""

import zlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from hf_reparam.errors import TargetError

__all__ = ["IGNORED", "batch_masks", "divergence", "is_multi_label", "logits_of", "objective", "position_mask"]

IGNORED = -100  # Transformers' label of positions without a label


def batch_masks(batch: Mapping[str, Any]) -> tuple[Tensor, ...]:
    """The padding masks of a batch as booleans, (batch, length), decoder's and encoder's."""
    masks = (batch.get("decoder_attention_mask"), batch.get("attention_mask"))
    return tuple(mask.bool() for mask in masks if isinstance(mask, Tensor) and mask.dim() == 2)


def objective(
    outputs: Any, batch: Mapping[str, Any], masks: tuple[Tensor, ...], *, multi_label: bool = False
) -> Tensor:
    """Summed loss of a batch: the model's own if it has labels, otherwise that of labels drawn from its predictions.

    Args:
        outputs: what the model returned.
        batch: what it was called with.
        masks: as `batch_masks` gives them.
        multi_label: the model's logits are independent yes-or-no answers.

    Raises:
        TargetError: the outputs hold neither a loss, logits nor hidden states.
    """
    labels = batch.get("labels")
    if labels is not None and outputs.get("loss") is not None:  # a mean: over labels, or over rows of a regression
        count = labels.shape[0] if labels.is_floating_point() else int((labels != IGNORED).sum())
        return outputs["loss"] * max(count, 1)
    seeds = _seeds(batch, masks)
    logits = logits_of(outputs)
    if logits:
        draw = _drawn_answers if multi_label else _drawn
        return torch.stack([draw(key, value, seeds, masks) for key, value in logits.items()]).sum()
    hidden = outputs.get("last_hidden_state")
    if hidden is None:
        raise TargetError("the model returned no loss, logits or last_hidden_state: give a loss_fn(model, batch)")
    return (_mask(hidden, masks) * _noise(hidden, seeds, masks)).sum()


def logits_of(outputs: Any) -> dict[str, Tensor]:
    """Every kind of logits that a model returned, by its name."""
    return {key: value for key, value in outputs.items() if key.endswith("logits") and isinstance(value, Tensor)}


def is_multi_label(model: Any) -> bool:
    """Whether a model's logits are independent yes-or-no answers."""
    return getattr(getattr(model, "config", None), "problem_type", None) == "multi_label_classification"


def divergence(outputs: Any, reference: Any, masks: tuple[Tensor, ...]) -> float:
    """How far predictions are from a reference's, summed over real tokens.

    The Kullback-Leibler divergence from the reference for logits, half the squared difference for hidden states,
    regressions and plain tensors.

    Args:
        outputs, reference: what two models returned for the same batch.
        masks: as `batch_masks` gives them.

    Raises:
        TargetError: the outputs hold neither logits nor hidden states.
    """
    if isinstance(outputs, Tensor):
        return float((_wide(outputs) - _wide(reference)).square().sum()) / 2
    keys = list(logits_of(outputs))
    if not keys and outputs.get("last_hidden_state") is None:
        raise TargetError("the model returned neither logits nor last_hidden_state: it cannot be refitted")
    return sum(
        _distance(key, _wide(outputs[key]), _wide(reference[key]), masks) for key in keys or ["last_hidden_state"]
    )


def _wide(value: Tensor) -> Tensor:
    return value.to(torch.promote_types(value.dtype, torch.float32))


def _distance(key: str, value: Tensor, reference: Tensor, masks: tuple[Tensor, ...]) -> float:
    if key == "last_hidden_state" or value.shape[-1] == 1:
        return float(_mask((value - reference).square(), masks).sum()) / 2
    if key in ("start_logits", "end_logits"):
        value, reference = (_over_positions(logits, masks) for logits in (value, reference))
    log_p, log_q = reference.log_softmax(-1), value.log_softmax(-1)
    return float(_mask(log_p.exp() * (log_p - log_q), masks).sum())


def _over_positions(logits: Tensor, masks: tuple[Tensor, ...]) -> Tensor:
    """(batch, length) scores of positions as (batch, 1, length), padding out of reach."""
    for mask in masks:
        if mask.shape == logits.shape:
            logits = logits.masked_fill(~mask.to(logits.device), torch.finfo(logits.dtype).min)
    return logits[:, None]


def _drawn(key: str, logits: Tensor, seeds: list[int], masks: tuple[Tensor, ...]) -> Tensor:
    """Negative log-likelihood of labels drawn from the predictions, summed."""
    if key in ("start_logits", "end_logits"):
        logits = _over_positions(logits, masks)
    if logits.shape[-1] == 1:  # a regression, of unit variance
        return (_mask(logits, masks) * _noise(logits, seeds, masks)).sum()
    log_p = logits.float().log_softmax(-1)
    uniform = _uniform(log_p, seeds, masks)
    labels = (log_p.detach().exp().cumsum(-1) < uniform).sum(-1, keepdim=True).clamp_max(log_p.shape[-1] - 1)
    return -_mask(log_p.gather(-1, labels), masks).sum()


def _drawn_answers(key: str, logits: Tensor, seeds: list[int], masks: tuple[Tensor, ...]) -> Tensor:
    """Negative log-likelihood of a yes or no drawn for each logit, summed."""
    logits = logits.float()
    uniform = _fill(logits, logits.shape[-1], seeds, masks, _rand)
    losses = F.binary_cross_entropy_with_logits(logits, (uniform < logits.detach().sigmoid()).float(), reduction="none")
    return _mask(losses, masks).sum()


def _seeds(batch: Mapping[str, Any], masks: tuple[Tensor, ...]) -> list[int]:
    """One seed for each example, from the bytes of its unpadded inputs."""
    name = next(key for key, value in batch.items() if isinstance(value, Tensor) and not key.endswith("mask"))
    rows = batch[name].detach().cpu()
    mask = next((m.cpu() for m in masks if m.shape == rows.shape[:2]), None)
    kept = [row if mask is None else row[mask[i]] for i, row in enumerate(rows)]
    return [zlib.crc32(row.contiguous().view(torch.uint8).numpy().tobytes()) for row in kept]


def position_mask(like: Tensor, masks: tuple[Tensor, ...]) -> Tensor | None:
    """The mask (batch, length) that belongs to values (batch, length, ...); None if there is none."""
    return next((mask for mask in masks if like.dim() > 2 and mask.shape == like.shape[:2]), None)


def _mask(values: Tensor, masks: tuple[Tensor, ...]) -> Tensor:
    mask = position_mask(values, masks)
    return values if mask is None else values * mask[..., None].to(values.device)


def _fill(like: Tensor, width: int, seeds: list[int], masks: tuple[Tensor, ...], draw: Any) -> Tensor:
    """Numbers (..., width) drawn example by example, in the order of the unpadded positions."""
    out = torch.zeros(*like.shape[:-1], width)
    mask = position_mask(like, masks)
    for row, seed in enumerate(seeds):
        generator = torch.Generator().manual_seed(seed)
        if mask is None:
            out[row] = draw(out[row].shape, generator)
        else:
            kept = mask[row].cpu()
            out[row, kept] = draw((int(kept.sum()), width), generator)
    return out.to(like.device)


def _uniform(like: Tensor, seeds: list[int], masks: tuple[Tensor, ...]) -> Tensor:
    return _fill(like, 1, seeds, masks, _rand)


def _rand(shape: Any, generator: torch.Generator) -> Tensor:
    return torch.rand(shape, generator=generator)


def _noise(like: Tensor, seeds: list[int], masks: tuple[Tensor, ...]) -> Tensor:
    draws = _fill(like, like.shape[-1], seeds, masks, lambda shape, g: torch.randn(shape, generator=g))
    return draws.to(like.dtype)
