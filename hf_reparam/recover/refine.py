"""`refine`: gradient steps on factors, biases and norms towards the dense model's predictions, judged as they go."""

import math
import random
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils.logging import tqdm

from hf_reparam.calibrate.batches import Batches, prepare
from hf_reparam.calibrate.objective import compared, divergence, examples_in
from hf_reparam.calibrate.padding import Part
from hf_reparam.errors import TargetError
from hf_reparam.layers.copies import frozen_copy
from hf_reparam.layers.factored import Factored
from hf_reparam.model.checks import check_no_adapters, outside_inference_mode
from hf_reparam.model.host import called, check_model, opened, own_tokenizer
from hf_reparam.recover.refit import HOLD_OUT, parts_of
from hf_reparam.report import RefineReport

__all__ = ["refine"]

_RATES = (1e-3, 3e-4, 1e-4)


def refine(
    model: nn.Module,
    dense: nn.Module,
    data: Batches,
    *,
    epochs: int = 4,
    tokenizer: Any = None,
    max_length: int | None = None,
    max_samples: int | None = None,
) -> RefineReport:
    """Train a converted model towards the dense model's predictions, without labels; changes `model` in place.

    AdamW on the factors, their biases, and every other vector (norms, biases), with a cosine schedule. Every fifth
    batch is held out: after each epoch it judges, the learning rate is the one of 1e-3, 3e-4 and 1e-4 that does best
    there in the first epoch, and the model keeps the weights that did best, those that it came with included. Dropout
    is off. It goes well after `refit`; training with labels is the `Trainer`'s.

    Args:
        model: a converted model, best in float32: half precision swallows small steps.
        dense: the dense model that it was made from.
        data: calibration data, as for `calibrate`; held in memory.
        epochs: passes over the data, at least 1.
        tokenizer, max_length, max_samples: for texts, and how much of the data is used, as for `calibrate`.

    Returns:
        A RefineReport: the learning rate, and the divergence on held-out batches before and after each epoch.

    Raises:
        TargetError: no model, one with adapters, no low-rank layer, fewer than two batches, or `epochs` below 1.
        WeightError: weights made inside `torch.inference_mode()`.

    Cost: `epochs` + 2 times a forward pass of both models and a backward pass over the data; memory of AdamW: three
    times the trained parameters, and the dense predictions for the held-out batches.

    >>> from hf_reparam.compress.convert import convert
    >>> _ = torch.manual_seed(0)
    >>> net = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8))
    >>> small = convert(net, rank=2)
    >>> report = refine(small, net, [{"input": torch.randn(50, 8)} for _ in range(10)])
    >>> report.after < report.before
    True
    """
    for given in (model, dense):
        check_model(given)
        check_no_adapters(given)
    if isinstance(epochs, bool) or not isinstance(epochs, int) or epochs < 1:
        raise TargetError(f"epochs must be an int of at least 1, got {epochs!r}")
    with outside_inference_mode(), torch.enable_grad():
        low, full = called(frozen_copy(opened(model).model)), called(frozen_copy(opened(dense).model))
        reads, desc = tokenizer or own_tokenizer(model), "Reading batches"
        read = prepare(low, data, reads, max_length=max_length, max_samples=max_samples, desc=desc)
        parts = parts_of(full, {}, read)
        return _Refining(low, full, parts[::HOLD_OUT], [p for i, p in enumerate(parts) if i % HOLD_OUT]).run(epochs)


class _Refining:
    """The training of one model.

    Args:
        model: a frozen copy, whose parameters are views of those that are trained.
        dense: a frozen copy.
        judging: held-out batches.
        fitting: the others.
    """

    def __init__(self, model: nn.Module, dense: nn.Module, judging: Sequence[Part], fitting: Sequence[Part]) -> None:
        self.model, self.dense, self.judging, self.fitting = model, dense, judging, fitting
        self.trained = _trained(model)
        with torch.no_grad():
            self.references = [compared(dense(**part.batch)) for part in judging]

    def run(self, epochs: int) -> RefineReport:
        """Train, and leave the best weights in the model."""
        start = best = self._state()
        before = lowest = self._judged()
        tried: dict[float, tuple[list[float], list[Tensor]]] = {}
        try:
            bar = tqdm(total=(epochs + len(_RATES) - 1) * len(self.fitting), desc="Refining", unit="batch")
            runs = {rate: self._run(rate, epochs, bar) for rate in _RATES}
            for rate, run in runs.items():
                self._set(start)
                tried[rate] = ([next(run)], self._state())
                if tried[rate][0][0] < lowest:
                    lowest, best = tried[rate][0][0], tried[rate][1]
            chosen = min(tried, key=lambda rate: tried[rate][0][0])
            after, state = tried[chosen]
            self._set(state)
            run = runs.pop(chosen)
            runs.clear()  # and what their optimizers hold
            for now in run:
                after.append(now)
                if now < lowest:
                    lowest, best = now, self._state()
        finally:  # also when it is interrupted
            self._set(best)
        return RefineReport(chosen, before, tuple(after))

    def _run(self, rate: float, epochs: int, bar: Any) -> Any:
        """The divergence after each epoch."""
        optimizer = torch.optim.AdamW(self.trained, lr=rate, weight_decay=0.0)
        steps = epochs * len(self.fitting)
        warmup = math.ceil(steps / 50)
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: min((step + 1) / warmup, (1 + math.cos(math.pi * step / steps)) / 2)
        )
        order = list(range(len(self.fitting)))
        shuffle = random.Random(0)
        for _ in range(epochs):
            shuffle.shuffle(order)
            for i in order:
                part = self.fitting[i]
                with torch.no_grad():
                    reference = compared(self.dense(**part.batch))
                for parameter in self.trained:
                    parameter.requires_grad_(True)
                loss = divergence(self.model(**part.batch), reference, part.masks) / examples_in(part.batch)
                loss.backward()
                torch.nn.utils.clip_grad_norm_(self.trained, 1.0)
                optimizer.step()
                optimizer.zero_grad()
                schedule.step()
                bar.update()
            yield self._judged()

    @torch.no_grad()
    def _judged(self) -> float:
        pairs = zip(self.judging, self.references, strict=True)
        total = sum(float(divergence(self.model(**part.batch), theirs, part.masks)) for part, theirs in pairs)
        return total / sum(examples_in(part.batch) for part in self.judging)

    def _state(self) -> list[Tensor]:
        return [parameter.detach().clone() for parameter in self.trained]

    @torch.no_grad()
    def _set(self, state: Sequence[Tensor]) -> None:
        for parameter, value in zip(self.trained, state, strict=True):
            parameter.copy_(value)


def _trained(model: nn.Module) -> list[nn.Parameter]:
    """What is of low rank, and every vector."""
    parts = [module for module in model.modules() if isinstance(module, Factored)]
    if not parts:
        raise TargetError("the model has no low-rank layer: there is nothing to refine")
    own = {p: None for part in parts for p in part.parameters()}
    own |= {p: None for p in model.parameters() if p.dim() == 1}
    return [p for p in own if p.is_floating_point()]
