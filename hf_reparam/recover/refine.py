"""`refine`: gradient steps on factors, biases and norms towards the dense model's predictions, judged as they go."""

import math
import random
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from hf_reparam.calibrate.batches import Batches, prepare
from hf_reparam.calibrate.inputs import same_draws, with_names
from hf_reparam.calibrate.objective import divergence, examples_in, unit_of
from hf_reparam.calibrate.padding import Part, warn_of_repeats
from hf_reparam.calibrate.predictions import compared, problem_of
from hf_reparam.errors import TargetError
from hf_reparam.layers.copies import frozen_copy
from hf_reparam.layers.factored import Factored
from hf_reparam.layers.progress import one_bar, stage
from hf_reparam.model.checks import check_no_adapters, outside_inference_mode
from hf_reparam.model.host import called, check_model, opened, own_tokenizer
from hf_reparam.recover.refit import HOLD_OUT, parts_of
from hf_reparam.recover.synthetic import synthetic_parts
from hf_reparam.report import RefineReport

_RATES = tuple(4e-3 * 2.0**i for i in range(4, -7, -1))  # relative: of the root mean square of a matrix
_FIRST = 4  # which of them is tried first
_VECTORS = 0.3  # what counts as that of a vector: norms are near 1, biases near 0
_STEPS = 40  # an epoch at least, where batches can be split
_JUDGING = 2  # of five batches: the first chose the fits of `refit`, which look better by it than they are
_CACHE = 2**30  # bytes of dense predictions that are kept


def refine(
    model: nn.Module,
    dense: nn.Module,
    data: Batches,
    *,
    epochs: int = 8,
    synthetic: int = 4,
    tokenizer: Any = None,
    max_length: int | None = None,
    max_samples: int | None = None,
) -> RefineReport:
    """Train a converted model towards the dense model's predictions, without labels; changes `model` in place.

    Muon on matrices among the factors, AdamW on other factors (of experts) and on every vector (norms, biases). Every
    fifth batch, none of those that chose the fits of `refit`, is held out to judge: the learning rate, relative to the
    root mean square of each matrix, is the one that does best there after one epoch. First 4e-3 is tried, then its
    halves down to 6.25e-5 or its doubles up to 6.4e-2, while each does better than the one before. From there the other
    epochs go on; in that first epoch as in these the rate falls to zero in a straight line. After each epoch the
    weights and their mean over its steps are judged, and the model keeps what did best, the weights that it came with
    included. Batches are split where an epoch would have fewer than 40 steps. Dropout is off. It goes well after
    `refit`; training with labels is the `Trainer`'s.

    Args:
        model: a converted model. Of half precision, its weights follow float32 ones, in which the steps are made.
        dense: the dense model that it was made from.
        data: calibration data, as for `calibrate`; held in memory.
        epochs: passes over the data, at least 1.
        synthetic: new texts for each that is given, where the data are token ids alone. A language model writes them
            itself; for others they are made anew in every epoch: of the beginning of one and the end of another, with
            near tokens in the place of some.
        tokenizer, max_length, max_samples: for texts, and how much of the data is used, as for `calibrate`.

    Returns:
        A RefineReport: the learning rate, and the divergence on held-out batches before and after each epoch.

    Raises:
        TargetError: no model, one with adapters, no low-rank layer, fewer than two batches, `epochs` below 1, or
            `synthetic` below 0.
        WeightError: weights made inside `torch.inference_mode()`.

    Cost: a token is generated for each token of the texts that a language model writes. `epochs` + 2, at most `epochs`
    + 6 times, a forward and a backward pass of the model over all texts, and a forward pass of the dense model, again
    in every epoch for texts that are new and predictions beyond 1 GiB. Memory: the optimizers' and the weights that are
    kept, about six times the trained parameters, those predictions, and the ones for the held-out batches.

    Source: Muon, K. Jordan et al., https://kellerjordan.github.io/posts/muon/, with steps of AdamW's size, arXiv
    2502.16982; texts from the model itself, LLM-QAT, arXiv 2305.17888; relative steps from Adafactor, arXiv 1804.04235;
    means of weights from SWA, arXiv 1803.05407; linear schedules, S. Bergsma et al., arXiv 2502.15938, one after
    another as in SGDR, arXiv 1608.03983.

    >>> from hf_reparam.compress.convert import convert
    >>> _ = torch.manual_seed(0)
    >>> net = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8))
    >>> small = convert(net, rank=2)
    >>> report = refine(small, net, [{"input": torch.randn(50, 8)} for _ in range(10)], epochs=1)
    >>> report.after < report.before
    True
    """
    for given in (model, dense):
        check_model(given)
        check_no_adapters(given)
    if isinstance(epochs, bool) or not isinstance(epochs, int) or epochs < 1:
        raise TargetError(f"epochs must be an int of at least 1, got {epochs!r}")
    if isinstance(synthetic, bool) or not isinstance(synthetic, int) or synthetic < 0:
        raise TargetError(f"synthetic must be an int of at least 0, got {synthetic!r}")
    with outside_inference_mode(), torch.enable_grad(), one_bar():
        low, full = called(frozen_copy(opened(model).model)), called(frozen_copy(opened(dense).model))
        reads, desc = tokenizer or own_tokenizer(model), "reading"
        read = prepare(low, data, reads, max_length=max_length, max_samples=max_samples, desc=desc)
        parts = parts_of(full, {}, read)
        first = min(_JUDGING, len(parts) - 1)
        judging = parts[first::HOLD_OUT]
        fitting = [part for i, part in enumerate(parts) if i % HOLD_OUT != first]
        warn_of_repeats(judging, fitting)
        return _Refining(low, full, judging, fitting, synthetic_parts(full, fitting, synthetic)).run(epochs)


class _Refining:
    """The training of one model; of frozen copies, where the model's parameters are views of those that are trained.

    Learns from `fitting` and from what `more` gives for an epoch, as many each time; is judged by `judging`.
    """

    def __init__(
        self,
        model: nn.Module,
        dense: nn.Module,
        judging: Sequence[Part],
        fitting: Sequence[Part],
        more: Callable[[int], list[Part]] = lambda epoch: [],
    ) -> None:
        self.model, self.dense, self.judging, self.problem = model, dense, judging, problem_of(dense)
        self.more, self.made = more, list[Part]()
        self.count = math.ceil(_STEPS / (len(fitting) + len(more(0))))
        self.given = self.fitting = self._pieces(fitting)
        self.trained = _trained(model)
        # what the optimizers step: the trained parameters themselves, or float32 copies of those of half precision
        self.exact = [p if p.dtype.itemsize > 2 else nn.Parameter(p.float()) for p in self.trained]
        self.known: dict[int, dict[str, Tensor]] = {}
        self.room = _CACHE
        with torch.no_grad():
            self.references = [compared(_outputs(dense, part), self.problem) for part in judging]
        units = [unit_of(theirs, part.masks) for theirs, part in zip(self.references, judging, strict=True)]
        self.unit, self.size = units[0][0], sum(size for _, size in units)
        self._begin(0)

    def _pieces(self, parts: Sequence[Part]) -> list[Part]:
        return [piece for part in parts for piece in part.pieces(self.count)]

    def _begin(self, epoch: int) -> None:
        """Learn from texts that were made for this epoch."""
        made = self.more(epoch)
        if made is not self.made:
            self.made, self.fitting = made, self.given + self._pieces(made)
            for i in range(len(self.given), len(self.fitting)):
                self.room += sum(value.nbytes for value in self.known.pop(i, {}).values())

    def run(self, epochs: int) -> RefineReport:
        """Train, and leave the best weights in the model."""
        self.best = self._state()
        before = self.lowest = self._judged()
        try:
            chosen, first, state = self._first_epoch(self.best)
            after = [first]
            if epochs > 1 and math.isfinite(first):
                self._set(state)
                with stage("refining", (epochs - 1) * len(self.fitting), "step") as advance:
                    for now, state in self._run(chosen, range(1, epochs), advance):
                        after.append(now)
                        self._keep(now, state)
        finally:  # also when it is interrupted
            self._set(self.best)
        return RefineReport(chosen, before, tuple(after), self.unit)

    def _first_epoch(self, start: list[Tensor]) -> tuple[float, float, list[Tensor]]:
        """The learning rate that does best in one epoch, with the divergence and the weights after that."""

        def tried(i: int) -> tuple[float, list[Tensor]]:
            self._set(start)
            with stage(f"trying a learning rate of {_RATES[i]:g}", len(self.fitting), "step") as advance:
                found, state = next(self._run(_RATES[i], range(1), advance))
            self._keep(found, state)
            return math.inf if math.isnan(found) else found, state

        at, best = _FIRST, tried(_FIRST)
        for others in (range(_FIRST + 1, len(_RATES)), reversed(range(_FIRST))):  # lower ones, or else higher ones
            for i in others:
                if (new := tried(i))[0] >= best[0] and best[0] < math.inf:
                    break
                at, best = i, new
            if at != _FIRST:
                break
        return _RATES[at], *best

    def _keep(self, found: float, state: list[Tensor]) -> None:
        """Remember weights that do better than all before."""
        if found < self.lowest or math.isnan(self.lowest):
            self.lowest, self.best = found, state

    def _run(self, rate: float, epochs: range, advance: Callable[[int], None]) -> Iterator[tuple[float, list[Tensor]]]:
        """After each epoch of a schedule, the divergence and the weights: the last, or the mean over its steps."""
        steps = len(epochs) * len(self.fitting)
        warmup = math.ceil(steps / 50)
        share = lambda step: min((step + 1) / warmup, 1 - step / steps)  # noqa: E731
        optimizers = _optimizers(self.exact, rate)
        schedules = [torch.optim.lr_scheduler.LambdaLR(optimizer, share) for optimizer in optimizers]
        order = list(range(len(self.fitting)))
        shuffle = random.Random(0)
        for epoch in epochs:
            self._begin(epoch)
            shuffle.shuffle(order)
            mean = [torch.zeros_like(parameter) for parameter in self.exact]
            for count, i in enumerate(order, 1):
                part = self.fitting[i]
                reference = self._reference(i)
                for parameter in self.trained:
                    parameter.requires_grad_(True)
                outputs = _outputs(self.model, part)
                loss = divergence(outputs, reference, part.masks, self.problem) / examples_in(part.batch)
                loss.backward()
                for parameter, exact in zip(self.trained, self.exact, strict=True):
                    if exact is not parameter and parameter.grad is not None:
                        exact.grad, parameter.grad = parameter.grad.float(), None
                torch.nn.utils.clip_grad_norm_(self.exact, 1.0)
                for optimizer, schedule in zip(optimizers, schedules, strict=True):
                    optimizer.step()
                    optimizer.zero_grad()
                    schedule.step()
                self._set(self.exact)  # weights of half precision follow
                for average, parameter in zip(mean, self.exact, strict=True):
                    average.lerp_(parameter.detach(), 1 / count)
                advance(1)
            yield self._better(mean)

    def _better(self, mean: list[Tensor]) -> tuple[float, list[Tensor]]:
        """The divergence and the weights, the last or their mean, whichever is nearer; the model keeps the last."""
        last = self._state()
        of_last = self._judged()
        self._set(mean)
        of_mean = self._judged()
        self._set(last)
        return (of_mean, mean) if of_mean < of_last else (of_last, last)

    @torch.no_grad()
    def _reference(self, i: int) -> dict[str, Tensor]:
        """What the dense model predicts; kept while there is room."""
        if i in self.known:
            return self.known[i]
        found = compared(_outputs(self.dense, self.fitting[i]), self.problem)
        size = sum(value.nbytes for value in found.values())
        if size <= self.room:
            self.known[i] = found
            self.room -= size
        return found

    @torch.no_grad()
    def _judged(self) -> float:
        pairs = zip(self.judging, self.references, strict=True)
        apart = (divergence(_outputs(self.model, p), theirs, p.masks, self.problem) for p, theirs in pairs)
        return sum(map(float, apart)) / self.size

    def _state(self) -> list[Tensor]:
        return [parameter.detach().clone() for parameter in self.exact]

    @torch.no_grad()
    def _set(self, state: Sequence[Tensor]) -> None:
        for parameter, exact, value in zip(self.trained, self.exact, state, strict=True):
            exact.copy_(value)
            parameter.copy_(value)


def _outputs(model: nn.Module, part: Part) -> Any:
    """What a model gives for a part, of which both models draw the same numbers."""
    return same_draws(sum(part.seeds))(model)(**with_names(model), **part.batch)


def _trained(model: nn.Module) -> list[nn.Parameter]:
    """What is of low rank, and every vector."""
    parts = [module for module in model.modules() if isinstance(module, Factored)]
    if not parts:
        raise TargetError("the model has no low-rank layer: there is nothing to refine")
    own = {p: None for part in parts for p in part.parameters()}
    own |= {p: None for p in model.parameters() if p.dim() == 1}
    return [p for p in own if p.is_floating_point()]


def _optimizers(parameters: Sequence[nn.Parameter], rate: float) -> list[torch.optim.Optimizer]:
    """Muon for matrices, AdamW for the rest, at rates relative to each parameter."""
    muon = partial(torch.optim.Muon, adjust_lr_fn="match_rms_adamw")
    kinds: list[tuple[Callable[..., torch.optim.Optimizer], list[nn.Parameter]]] = [
        (muon, [parameter for parameter in parameters if parameter.dim() == 2]),
        (torch.optim.AdamW, [parameter for parameter in parameters if parameter.dim() != 2]),
    ]
    groups = lambda some: [{"params": [p], "lr": rate * _unit(p)} for p in some]  # noqa: E731
    return [optimizer(groups(some), weight_decay=0.0) for optimizer, some in kinds if some]


def _unit(parameter: Tensor) -> float:
    """What a learning rate is relative to."""
    if parameter.dim() == 1:
        return _VECTORS
    return max(float(parameter.detach().float().square().mean().sqrt()), 1e-3)
