"""`refit`: fit the factors once more, layer by layer, to what the low-rank layers before them really give."""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from hf_reparam.calibrate.batches import Batches, prepare
from hf_reparam.calibrate.fits import check_fit
from hf_reparam.calibrate.inputs import same_draws, without_cache
from hf_reparam.calibrate.objective import divergence, examples_in, unit_of
from hf_reparam.calibrate.padding import Padding, Part, unlabelled, warn_of_repeats
from hf_reparam.calibrate.predictions import compared, problem_of
from hf_reparam.calibrate.replay import Replay
from hf_reparam.calibrate.watch import inputs_of, order_of, rows
from hf_reparam.config import LowRankConfig
from hf_reparam.errors import TargetError
from hf_reparam.layers.copies import frozen_copy
from hf_reparam.layers.dense import dense_matrix
from hf_reparam.layers.linear import LowRankLinear
from hf_reparam.layers.progress import each, one_bar
from hf_reparam.layers.surgery import set_bias, set_factors
from hf_reparam.linalg.calibration import Calibration, HeldOut
from hf_reparam.linalg.factorize import decompose
from hf_reparam.linalg.moments import SHRINKAGES, Shrinkage
from hf_reparam.linalg.paired import PairedMoments
from hf_reparam.model.build import apply
from hf_reparam.model.checks import check_no_adapters, outside_inference_mode
from hf_reparam.model.config import note_refit
from hf_reparam.model.host import called, check_model, hosts, layer_name, metric_of, opened, own_tokenizer
from hf_reparam.model.sites import entries_of, select
from hf_reparam.plan import RankPlan
from hf_reparam.report import RefitReport
from hf_reparam.structures import STRUCTURES
from hf_reparam.structures.source import Source

_NOT_ONCE = "which a pass reaches more than once, or not at all"
_UNEVEN = "which do not get the same tokens in both models"
HOLD_OUT = 5  # every fifth batch judges, the others fit
_ROOM = 1 << 30  # bytes of each model's outputs that are kept

Distance = Callable[[Any, Any], float]


def refit(
    model: nn.Module,
    dense: nn.Module,
    data: Batches,
    *,
    calibration: Calibration | None = None,
    tokenizer: Any = None,
    max_length: int | None = None,
    max_samples: int | None = None,
    distance: Distance | None = None,
) -> RefitReport:
    """Fit the factors of a converted model again, against the dense model's outputs; changes `model` in place.

    Conversion fits every layer to inputs of the dense model. Here layer after layer, in the order of the forward pass,
    minimises E ||W x - W' x'||^2 with x the input in the dense model and x' the input in the converted one. Layers with
    one and the same input are fitted together, first with the least of three shrinkages, then with the next while
    each is better or none was kept. A fit is kept if it brings the model's predictions nearer to the dense
    model's on held-out batches, every fifth, which took no part in it. Ranks and forms stay. Layers that a pass reaches
    more than once or not at all, and those that get a choice of tokens which differs between the models, keep their
    factors. If anything fails, or is interrupted, the layers in work are as they were, or as the best fit so far.

    Args:
        model: a converted model.
        dense: the dense model that it was made from.
        data: calibration data, as for `calibrate`; held in memory.
        calibration: of `dense`; with gradients they weigh the errors of outputs. Needed where heads are narrower.
        tokenizer, max_length, max_samples: for texts, and how much of the data is used, as for `calibrate`.
        distance: (what the model returned, what the dense model returned for the same batch) -> number, summed over the
            batch, instead of the divergence of logits, hidden states or whatever they return.

    Returns:
        A RefitReport: layers that were fitted anew, those that cannot be and why, and the divergence on held-out
        batches before and after, which chose among the fits: it looks better there than elsewhere.

    Raises:
        TargetError: no model, one with adapters, no low-rank layer, a layer that `dense` has not, fewer than two
            batches, or narrower heads and no calibration.
        WeightError: moments of another model, or weights made inside `torch.inference_mode()`.

    Cost: for each group of layers with one input, a forward pass of its block in both models over the data, and two or
    three of what follows it over the held-out part. Up to 1 GiB of outputs of each model's blocks are kept; beyond, or
    where a model has no lists of blocks, whole passes are run.

    Source: AA-SVD, arXiv 2604.02119.

    >>> from hf_reparam.compress.convert import convert
    >>> _ = torch.manual_seed(0)
    >>> net = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8))
    >>> small = convert(net, rank=2)
    >>> report = refit(small, net, [{"input": torch.randn(50, 8)} for _ in range(5)])
    >>> report.after < report.before
    True
    """
    for given in (model, dense):
        check_model(given)
        check_no_adapters(given)
    with outside_inference_mode(), one_bar():
        full, calibration = _as_narrow(dense, model, calibration)
        low = frozen_copy(opened(model).model)
        reads, desc = tokenizer or own_tokenizer(model), "reading"
        read = prepare(called(low), data, reads, max_length=max_length, max_samples=max_samples, desc=desc)
        report = _refit(low, full, read, calibration, distance)
        for start, host in hosts(model).items():
            note_refit(host.config, sum(name.startswith(start) for name in report.layers))
        return report


def _as_narrow(
    dense: nn.Module, model: nn.Module, calibration: Calibration | None
) -> tuple[nn.Module, Calibration | None]:
    """A frozen copy of the dense model whose dense layers have the shapes of the converted model's, and its moments."""
    work = opened(dense)
    live = RankPlan(entries_of(opened(model).model))
    if calibration is not None:
        found = [item for item in select(work.model, LowRankConfig()).selected if item.name in live.modules]
        check_fit(work.model, found, Source.of(calibration, None))
    shaping = {n: e for s in STRUCTURES if s.changes_moments for n, e in live.of(s.forms).items()}
    if shaping:
        if calibration is None:
            raise TargetError("the model has narrower heads: give the calibration= that it was converted with")
        source = Source.of(calibration, metric_of(model) if hosts(model) else None)
        calibration = apply(work, RankPlan(shaping), source)[1].calibration
    return frozen_copy(work.model), calibration


def _refit(
    model: nn.Module,
    dense: nn.Module,
    batches: Iterable[HeldOut],
    calibration: Calibration | None,
    distance: Distance | None,
) -> RefitReport:
    """As `refit`, of frozen copies: what is written into their layers is written into the model's."""
    layers = {name: module for name, module in model.named_modules() if isinstance(module, LowRankLinear)}
    originals = _originals(layers, dense)
    low, full = called(model), called(dense)
    kept: list[str] = []
    with torch.no_grad():
        data = parts_of(full, originals, batches)
        passes = [_Passes(low, full, data[0], _ROOM // len(data))]
        room = _ROOM // len(data) if passes[0].repeat() else 0
        passes += [_Passes(low, full, part, room) for part in data[1:]]
        judging, fitting = passes[::HOLD_OUT], [one for i, one in enumerate(passes) if i % HOLD_OUT]
        warn_of_repeats([one.part for one in judging], [one.part for one in fitting])
        unit, size = _unit(judging, distance)
        before = best = sum(one.divergence(distance, layers.values()) for one in judging)
        order = order_of(layers, passes[0].low)
        skipped = dict.fromkeys(layers.keys() - {name for names in order for name in names}, _NOT_ONCE)
        for names in each(order, "refitting", "group"):
            group = {name: layers[name] for name in names}
            paired, uneven = _collect(group, originals, fitting)
            skipped |= dict.fromkeys(uneven, _UNEVEN)
            if not paired:
                continue
            weights = {name: _gradient(calibration, layer_name(model, name)) for name in paired}
            saved, better = _states(layers, paired), False
            try:
                for shrinkage in SHRINKAGES:
                    for name, pairs in paired.items():
                        _fit(layers[name], originals[name], pairs, weights[name], shrinkage)
                    now = sum(one.divergence(distance, group.values()) for one in judging)
                    if now < best:
                        best, better, saved = now, True, _states(layers, paired)
                    elif better:
                        break
            finally:  # also when it is interrupted
                for name, state in saved.items():
                    layers[name].load_state_dict(state)
            kept += paired if better else ()
    order_in_model = {name: skipped[name] for name in layers if name in skipped}
    return RefitReport(tuple(kept), len(layers), before / size, best / size, order_in_model, unit)


def parts_of(dense: nn.Module, layers: Mapping[str, nn.Module], batches: Iterable[HeldOut]) -> list[Part]:
    """The data without labels, in parts in which padding can be told."""
    read = list(batches)
    if len(read) < 2:
        raise TargetError(f"every fifth batch is held out, and {len(read)} were given: give at least two")
    return list(Padding(dense, layers).parts((unlabelled(dense, batch), masks) for batch, masks in read))


def _originals(layers: Mapping[str, LowRankLinear], dense: nn.Module) -> dict[str, nn.Module]:
    if not layers:
        raise TargetError("the model has no low-rank layer: there is nothing to refit")
    modules = dict(dense.named_modules(remove_duplicate=False))
    for name, layer in layers.items():
        module = modules.get(name)
        if module is None or type(module) is not layer.dense_type or dense_matrix(module).shape != layer.weight.shape:
            raise TargetError(f"{name}: the dense model has no {layer.dense_type.__name__} of this shape by that name")
    return {name: modules[name] for name in layers}


class _Passes:
    """Passes of both models over one part of the data.

    What is complete in the converted model before the layers in work, and all that the dense model computes, is kept
    while there is room.
    """

    def __init__(self, low: nn.Module, full: nn.Module, part: Part, room: int) -> None:
        plain = without_cache(full)  # what is kept fills none
        self.part, self.problem = part, problem_of(full)
        drawing = same_draws(sum(part.seeds))
        self.low, self.full = (partial(drawing(model), **{**part.batch, **plain}) for model in (low, full))
        self.low_replay, self.full_replay = Replay(room), Replay(room)
        self.low_replay.first(low, self.low)
        self.full_replay.first(full, self.full)

    def repeat(self) -> bool:
        """Whether passes that skip what is known give what they give without."""
        return all([self.low_replay.repeats(self.low), self.full_replay.repeats(self.full)])

    def divergence(self, distance: Distance | None, changed: Collection[nn.Module]) -> float:
        """How far the converted model's predictions are from the dense model's."""
        if distance is not None:  # it may look at what blocks give beside
            return float(distance(self.low(), self.full()))
        return float(divergence(self.low_replay(self.low, changed), self.reference(), self.part.masks, self.problem))

    def reference(self) -> dict[str, Tensor]:
        """What the dense model predicts."""
        return compared(self.full_replay(self.full), self.problem)

    def inputs(
        self, layers: Mapping[str, nn.Module], originals: Mapping[str, nn.Module]
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """What goes into layers that change and into their originals."""
        low = inputs_of(layers, partial(self.low_replay, self.low, layers.values()))
        return low, inputs_of(originals, partial(self.full_replay, self.full, originals.values()))


def _collect(
    layers: Mapping[str, LowRankLinear], originals: Mapping[str, nn.Module], passes: Iterable[_Passes]
) -> tuple[dict[str, PairedMoments], set[str]]:
    """What both models' layers get of the same tokens, and the layers that do not get the same tokens."""
    paired = {name: PairedMoments.zeros(layer.in_features) for name, layer in layers.items()}
    uneven: set[str] = set()
    dense_layers = {name: originals[name] for name in layers}
    for one in passes:
        low, full = one.inputs(layers, dense_layers)
        uneven |= {n for n in layers if n not in low or n not in full or low[n].shape != full[n].shape}
        for name in layers.keys() - uneven:
            follows = None if one.part.follows is None else one.part.follows.get(name)
            paired[name].add(rows(full[name], one.part.masks, follows), rows(low[name], one.part.masks, follows))
    return {name: paired[name] for name in layers if name not in uneven}, uneven


def _unit(judging: Sequence[_Passes], distance: Distance | None) -> tuple[str, float]:
    """In which unit distances are told, and how many of it they are sums over."""
    if distance is not None:
        return "per example", sum(examples_in(one.part.batch) for one in judging)
    units = [unit_of(one.reference(), one.part.masks) for one in judging]
    return units[0][0], sum(size for _, size in units)


def _gradient(calibration: Calibration | None, name: str) -> Tensor | None:
    known = None if calibration is None else calibration.layers.get(name)
    return known.gradient_products if known is not None and known.has_gradient() else None


def _states(layers: Mapping[str, nn.Module], names: Iterable[str]) -> dict[str, dict[str, Tensor]]:
    return {name: {key: value.clone() for key, value in layers[name].state_dict().items()} for name in names}


def _fit(
    layer: LowRankLinear, original: nn.Module, paired: PairedMoments, gradient: Tensor | None, shrinkage: Shrinkage
) -> None:
    weight = dense_matrix(original).to(paired.products.device, torch.float64)
    gradient = None if gradient is None else gradient.to(weight.device)
    best, metric = paired.refit(weight, gradient, shrinkage, centred=original.bias is not None)
    set_factors(layer, *decompose(best, max_rank=layer.rank, metric=metric).cut(layer.rank))
    if original.bias is not None:
        set_bias(layer, original, *paired.means())
