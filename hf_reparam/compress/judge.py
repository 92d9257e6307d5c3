"""Plans judged on held-out calibration data: layers cut alone, and whole models."""

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch import Tensor, nn

from hf_reparam.calibrate.inputs import same_draws, without_cache
from hf_reparam.calibrate.objective import IGNORED, divergence, examples_in, position_mask, unit_of
from hf_reparam.calibrate.padding import decodes, predicts_next, rows_of, splits, taken_by
from hf_reparam.calibrate.predictions import compared, problem_of
from hf_reparam.calibrate.replay import Replay
from hf_reparam.compat.accelerate import execution_device
from hf_reparam.linalg.calibration import HeldOut
from hf_reparam.linalg.fingerprint import fingerprint
from hf_reparam.model.host import called

_FEW, _MORE, _TOKENS = 16, 64, 2048  # examples that a layer alone is judged on, and about as many tokens
_MOST_ROWS = 4096  # of a layer's input, when layers alone are judged
_MOST_BYTES = 1 << 30  # that the dense model's predictions may take


class Judge:
    """How far models are from a dense one on some batches.

    Args:
        dense: a frozen copy of the dense model.
        batches: with their padding masks. Positions whose label is -100 do not count.
        alone: whether layers are judged alone, with `after`, which takes no more than 4,096 rows.
    """

    def __init__(self, dense: nn.Module, batches: Sequence[HeldOut], *, alone: bool = False) -> None:
        inner = called(dense)
        plain, self.problem = without_cache(inner), problem_of(inner)  # what is skipped fills no cache
        self.batches: list[HeldOut] = []
        self.passes: list[Replay] = []
        self.references: list[dict[str, Tensor]] = []
        self.unit, self.size, self.examples, skips = "", 0.0, 0, alone
        for batch, masks in batches:
            taken, masks = send_to_device((taken_by(inner, batch) | plain, masks), execution_device(inner))
            one, run = Replay(_MOST_BYTES if skips else 0), partial(same_draws()(inner), **taken)
            with torch.no_grad():
                reference = compared(one.first(inner, run), self.problem)
                skips = skips and (bool(self.passes) or one.repeats(run))
            masks = labelled(inner, batch, masks, reference) or masks
            self.batches.append((taken, masks))
            self.passes.append(one)
            self.references.append(reference)
            self.unit, size = unit_of(reference, masks)
            self.size += size
            self.examples += examples_in(taken)
            held = sum(value.nbytes for known in self.references for value in known.values())
            if held > _MOST_BYTES or (alone and sum(known.rows for known in self.passes) > _MOST_ROWS):
                break
        self.fingerprint = fingerprint(*self.references)

    @torch.no_grad()
    def __call__(self, model: nn.Module, after: nn.Module | None = None) -> float:
        """The divergence of a model's predictions, in `unit`.

        Args:
            model: to be judged.
            after: a module of the dense model that differs, with all that is called later: what was complete before
                it is not computed again.
        """
        found, inner = 0.0, called(model)
        for one, reference, (batch, masks) in zip(self.passes, self.references, self.batches, strict=True):
            run = partial(same_draws()(inner), **batch)
            outputs = run() if after is None else one(run, [after])
            found += float(divergence(outputs, reference, masks, self.problem))
        return found / self.size


def labelled(
    model: nn.Module, batch: Mapping[str, Any], masks: tuple[Tensor, ...], outputs: Mapping[str, Tensor]
) -> tuple[Tensor, ...]:
    """The mask of the positions whose predictions are asked for, where each has a label; none otherwise."""
    labels = batch.get("labels")
    if not isinstance(labels, Tensor) or labels.is_floating_point() or decodes(model):
        return ()
    if "last_hidden_state" in outputs or any(value.shape[:-1] != labels.shape for value in outputs.values()):
        return ()
    counts = labels != IGNORED
    if predicts_next(model):  # position t is for label t + 1
        counts = torch.cat([counts[..., 1:], torch.zeros_like(counts[..., :1])], -1)
    known = position_mask(next(iter(outputs.values())), masks)
    counts = counts if known is None else counts.to(known.device) & known
    return (counts,) if counts.any() else ()


def few(batches: Sequence[HeldOut]) -> list[HeldOut]:
    """From 16 to 64 examples of batches of all lengths, as many as have 2,048 tokens; 16 of batches of one."""
    most = max(examples_in(batch) for batch, _ in batches)
    sizes = [[v[0].numel() for v in batch.values() if isinstance(v, Tensor) and v.dim()] for batch, _ in batches]
    tokens = sum(max(numbers, default=1) for numbers in sizes) / len(batches)  # of an example
    count = _FEW if most == 1 else min(max(int(_TOKENS / tokens), _FEW), _MORE)
    size = min(most, max(count // 4, math.ceil(count / len(batches))))
    step = math.ceil(len(batches) * size / count)
    parts: list[HeldOut] = []
    for batch, masks in batches[::step]:
        examples = examples_in(batch)
        if splits(batch) and all(len(mask) % examples == 0 for mask in masks):
            chosen = list(range(min(size, examples)))
            rows = tuple(mask[: len(mask) // examples * len(chosen)] for mask in masks)
            parts.append((rows_of(batch, chosen), rows))
    return parts or list(batches[:1])
