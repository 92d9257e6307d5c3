"""`decompose`: every layer of a model decomposed once, in one metric, to be cut at any rank in no time."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from importlib.metadata import version

import torch
from torch import Tensor, nn

from hf_reparam.calibrate.collect import layer_name
from hf_reparam.errors import TargetError, WeightError
from hf_reparam.layers.dense import dense_matrix
from hf_reparam.layers.targets import Target
from hf_reparam.linalg import (
    Decomposition,
    LayerMoments,
    Metric,
    Moments,
    Table,
    TableMoments,
    decompose_table,
    fingerprint,
    spectrum,
    working_device,
)
from hf_reparam.linalg import decompose as decompose_weight
from hf_reparam.linalg.factorize import SOLVERS
from hf_reparam.linalg.moments import METRICS, shapes_of_layers
from hf_reparam.model.host import check_model, hosts
from hf_reparam.model.inspection import check_no_adapters, find_layers, with_projections
from hf_reparam.model.offload import aligned
from hf_reparam.model.processes import distributed, spread

__all__ = ["Decompositions", "as_decompositions", "check_fit", "decompose"]


@contextmanager
def _at_hand(name: str, module: nn.Module) -> Iterator[None]:
    """Have a module's weights in memory, offloaded ones for the while; a WeightError of the block names the module."""
    try:
        with aligned(module):
            yield
    except WeightError as error:
        raise WeightError(f"{name}: {error}") from None


@dataclass(frozen=True)
class Decompositions:
    """The layers of one model in the coordinates of one metric.

    Args:
        metric: "svd", "activation" or "fisher".
        moments: what the metric was made of; None for "svd".
        layers: layer name -> Decomposition, names as in a plan. A layer that is not there is decomposed when it is
            asked for, and not kept.
        solver: "exact" or "randomized", for layers that are not there.
        origins: layer name -> fingerprint of what its weight and moments were computed from, where they were computed.
    """

    metric: str
    moments: Moments | None = None
    layers: Mapping[str, Decomposition] = field(default_factory=dict)
    solver: str = "exact"
    origins: Mapping[str, str] = field(default_factory=dict)

    def made_of(self, name: str, target: Target) -> str:
        """A fingerprint of all that a layer's factors come from: its weights, its moments, metric, solver, version."""
        with aligned(target.module):
            weights = fingerprint(type(target.module).__qualname__, target.module.state_dict())
        known, moments = self.layers.get(name), self.origins.get(name) or self.moments_of(name)
        values = None if known is None else known.singular_values
        return fingerprint(weights, moments, self.metric, self.solver, values, version("hf-reparam"))

    def moments_of(self, name: str) -> str | None:
        """A fingerprint of the moments that the metric has of a layer."""
        moments = self.layer_moments(name)
        return None if moments is None else moments.fingerprint()

    def layer(self, name: str, target: Target, *, max_rank: int | None = None) -> Decomposition:
        """The decomposition of a layer, up to `max_rank` or further.

        Raises:
            WeightError: weight or moments are not finite, or the weight has no data; names the layer.
        """
        if name in self.layers:
            return self.layers[name]
        with _at_hand(target.name, target.module):
            weight = dense_matrix(target.module)
            metric = self._coordinates(name, target, working_device(weight))
            return decompose_weight(weight, max_rank=max_rank, metric=metric, solver=self.solver)

    def complete(self, targets: Mapping[str, Target]) -> "Decompositions":
        """The same with every one of these layers decomposed and kept."""

        def work(name: str) -> Decomposition:
            made = self.layer(name, targets[name])
            return made.to(torch.device("cpu")) if distributed() else made

        return replace(self, layers=spread(self.costs(targets), work, desc="Decomposing"))

    def costs(self, targets: Mapping[str, Target]) -> dict[str, float]:
        """Relative costs of decomposing layers: products, the eigenproblem, and the roots of moments."""
        costs = {}
        for name, t in targets.items():
            roots = 0.0 if self.metric == "svd" else (t.in_features**3 + t.out_features**3) / 3
            costs[name] = t.full_rank**2 * (t.in_features + t.out_features + 10 * t.full_rank) + roots
        return costs

    def losses(self, name: str, target: Target) -> Tensor | None:
        """What dropping each direction costs, (min(in, out),) float64 on the CPU, descending; one unit for all layers.

        None for a layer without a gradient in the fisher metric: it has no such unit.
        """
        moments = self.layer_moments(name)
        if self.metric == "fisher" and not (moments is not None and moments.has_gradient()):
            return None
        if name in self.layers:
            squares = self.layers[name].singular_values.square()
        else:
            with _at_hand(target.name, target.module):
                weight = dense_matrix(target.module)
                squares = spectrum(weight, self._coordinates(name, target, working_device(weight)))
        return squares.cpu() * (1 if moments is None else moments.tokens)

    def table(self, name: str, module: nn.Module) -> Table:
        """The decomposition of the input embeddings; raises WeightError, which names them."""
        with _at_hand(name, module):
            return decompose_table(module.get_parameter("weight"), self._table_moments(name))

    def table_tokens(self, name: str) -> float | None:
        """How many tokens calibration saw of the input embeddings; None without a gradient."""
        known = self._table_moments(name)
        return None if known is None else known.tokens

    def _table_moments(self, name: str) -> TableMoments | None:
        return self.moments.tables.get(name) if self.moments is not None and self.metric == "fisher" else None

    def mean(self, name: str, target: Target) -> Tensor | None:
        """E x (in,), where a bias can absorb the error in it."""
        moments = self.layer_moments(name)
        return None if moments is None or not target.bias_parameters else moments.mean()

    def layer_moments(self, name: str) -> LayerMoments | None:
        """What the metric knows of a layer; None if nothing."""
        layer = self.moments.layers.get(name) if self.moments is not None and self.metric != "svd" else None
        return layer if layer is not None and layer.tokens else None

    def metric_of(self, name: str) -> str:
        """The metric of a layer: "svd" if it saw no data, "activation" if no gradient came back to it."""
        moments = self.layer_moments(name)
        return "svd" if moments is None else self.metric if moments.has_gradient() else "activation"

    def _coordinates(self, name: str, target: Target, device: torch.device) -> Metric:
        moments = self.layer_moments(name)
        if moments is None:
            return Metric()
        return moments.metric(self.metric_of(name), centred=target.bias_parameters > 0, device=device)


@with_projections
def decompose(
    model: nn.Module,
    moments: Moments | None = None,
    *,
    metric: str | None = None,
    include: str | Iterable[str] | None = None,
    exclude: str | Iterable[str] = (),
) -> Decompositions:
    """Decompose every layer that can be factored, for any number of plans and conversions.

    Args:
        model: a dense model.
        moments: what `collect_moments` returned; None for plain SVD.
        metric: "svd", "activation" or "fisher"; the richest that the moments serve by default.
        include, exclude: as in `convert`.

    Returns:
        Decompositions, to be given to `make_plan` and `convert` in the place of the moments.

    Raises:
        TargetError: unknown metric, or patterns as in `convert`.
        WeightError: a weight or its moments are not finite, the metric needs moments that are not there, or they are of
            another model.

    Cost: one symmetric eigenproblem of order min(in, out) for each layer; 8 min(in, out) (in + out) bytes each, on
    the weight's device.

    >>> net = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    >>> decompose(net).layers["1"].singular_values.shape
    torch.Size([64])
    """
    check_model(model)
    check_no_adapters(model)
    lazy = as_decompositions(moments, metric)
    targets = find_layers(model, include=include, exclude=exclude).selected
    check_fit(model, targets, lazy)
    return lazy.complete({layer_name(model, target.name): target for target in targets})


def as_decompositions(
    source: Moments | Decompositions | None, metric: str | None, solver: str = "exact"
) -> Decompositions:
    """Decompositions in a metric, made when they are asked for; those that are made already stay.

    Raises:
        TargetError: unknown metric or solver, or not the metric of the decompositions.
        WeightError: the metric needs moments, or gradients, that are not there.
    """
    metric = metric or (source.metric if source is not None else "svd")
    if metric not in METRICS:
        raise TargetError(f"metric must be one of {list(METRICS)}, got {metric!r}")
    if solver not in SOLVERS:
        raise TargetError(f"solver must be one of {list(SOLVERS)}, got {solver!r}")
    if isinstance(source, Decompositions):
        if metric != source.metric:
            raise TargetError(f"the decompositions were made in the {source.metric} metric, not in {metric}")
        return replace(source, solver=solver)
    if metric != "svd" and source is None:
        raise TargetError(f"the metric {metric!r} needs calibration data: give calibration=")
    if metric == "fisher" and source is not None and source.metric != "fisher":
        raise WeightError("the fisher metric needs gradients: collect moments with metric='fisher'")
    return Decompositions(metric, source, solver=solver)


def check_fit(model: nn.Module, targets: Iterable[Target], source: Decompositions) -> None:
    """Raise WeightError for moments, or decompositions, of another model than the one that these layers are in.

    Of a Transformers model whole parts may be without data: a head, where its base was calibrated without it, and the
    other way round. A part of which only some layers are known, or layers of another shape, are of another model.
    """
    named = {layer_name(model, target.name): target for target in targets}
    moments = source.moments if source.metric != "svd" else None
    known: dict[str, tuple[int, int | None]] = {} if moments is None else shapes_of_layers(moments.layers)
    known |= {name: (layer.right.shape[1], len(layer.left)) for name, layer in source.layers.items()}
    if not known:
        return
    what = "moments" if moments is not None else "decompositions"
    for name in named.keys() & known.keys():
        theirs, own = known[name], (named[name].in_features, named[name].out_features)
        if theirs[0] != own[0] or theirs[1] not in (None, own[1]):
            shape = " x ".join(str(size) for size in theirs if size is not None)
            raise WeightError(
                f"{name}: the {what} are of a layer of {shape}, and here it is {own[0]} x {own[1]}: {_OTHER}"
            )
    every = {layer_name(model, name) for name, _ in model.named_modules(remove_duplicate=False)}
    missing, foreign = sorted(named.keys() - known.keys()), sorted(known.keys() - every)
    starts = [f"{path}." if path else "" for path in hosts(model)]
    if starts and named.keys() & known.keys():
        ours, theirs_parts = ({_part(name, starts) for name in names} for names in (named, known))
        missing = [name for name in missing if _part(name, starts) in theirs_parts]
        foreign = [name for name in foreign if _part(name, starts) in ours]
    if missing or foreign:
        mine, theirs_too = _example(missing or named, "layers"), _example(foreign or known, "layers")
        raise WeightError(
            f"the {what} do not fit {type(model).__name__}, which has {mine}"
            f"{' that they do not have' if missing else ''}; they have {theirs_too}"
            f"{' that it does not have' if foreign else ''}: {_OTHER}"
        )


_OTHER = "they are of another model, or of another version of it; use collect_moments with this one"


def _part(name: str, starts: Sequence[str]) -> str:
    """The part of a Transformers model that a layer is in; the layer's own name outside of these."""
    start = next((start for start in starts if name.startswith(start)), None)
    return name if start is None else start + name.removeprefix(start).partition(".")[0]


def _example(names: Iterable[str], what: str) -> str:
    listed = sorted(names)
    return f"{len(listed)} {what}, among them {listed[:2]},"
