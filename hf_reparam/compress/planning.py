"""`make_plan`: ranks for every layer from one budget, without touching the model."""

import math
from collections.abc import Iterable, Mapping, Sequence

from torch import nn

from hf_reparam.calibrate.collect import layer_name
from hf_reparam.compress.choices import Steps, ways_to_build
from hf_reparam.compress.decomposition import Decompositions, as_decompositions, check_fit
from hf_reparam.errors import PlanError, RankError, TargetError
from hf_reparam.layers.patterns import as_patterns
from hf_reparam.layers.targets import Skipped, Target, no_layer
from hf_reparam.linalg import Alternative, Moments, allocate, choose
from hf_reparam.model.host import base_type, check_model
from hf_reparam.model.inspection import check_no_adapters, count_parameters, find_layers, with_projections
from hf_reparam.model.tables import TableGroup, table_groups
from hf_reparam.plan import FORMS, LayerSpec, RankPlan

__all__ = ["Chosen", "check_budget", "fit_plan", "make_plan"]

Chosen = tuple[Mapping[str, LayerSpec], tuple[Skipped, ...]]
"""Path -> rank and form of the layers to convert, and why the others stay."""

ALLOCATIONS = ("global", "uniform")
MIN_RANK = 8
"""Least rank that a budget gives to a layer: kernels and quantizers work on columns by the eight or more."""


@with_projections
def make_plan(
    model: nn.Module,
    moments: Moments | Decompositions | None = None,
    *,
    keep: float | None = None,
    target_params: int | None = None,
    metric: str | None = None,
    allocation: str | None = None,
    form: str = "pivoted",
    multiple_of: int = 1,
    min_rank: int = MIN_RANK,
    joint: bool | None = None,
    embeddings: bool = False,
    include: str | Iterable[str] | None = None,
    exclude: str | Iterable[str] = (),
) -> RankPlan:
    """Choose a rank for every layer so that together they stay within a budget.

    In the fisher metric the squared singular values that a layer drops are its predicted increase of the loss, in one
    unit for all layers: allocation "global" minimises their sum under the budget, with staying dense as one of the
    choices. "uniform" gives every layer the same share.

    Args:
        model: a dense model; a dense model's moments may be used for many plans.
        moments: what `collect_moments` or `decompose` returned; None for plain SVD.
        keep: in (0, 1], share of the *targeted* layers' weights, biases not counted.
        target_params: instead of `keep`: parameters that the *whole* model may have, everything counted.
        metric: "svd", "activation" or "fisher"; the richest that the moments serve by default.
        allocation: "global" (default with fisher) or "uniform" (default otherwise).
        form: "pivoted", or "pair", which holds r^2 more numbers at the same rank r.
        multiple_of: ranks are multiples of this; 8 suits tensor cores.
        min_rank: no lower rank is chosen; layers that would not become smaller at this rank, or at the first multiple
            above it, stay dense.
        joint: whether heads may become narrower where that is predicted to cost less: queries with keys, and values
            with outputs, are approximated as wholes before each is factored. For attentions that are registered (see
            `hf_reparam.layers.heads`), all four projections of which are targeted. With global allocation and the
            fisher metric only, in which what heads and layers lose has one unit, and by default with them.
        embeddings: also choose ranks for the table of the input embeddings, which an output head that is tied to it
            shares, and for an untied head; their numbers are then part of what is targeted.
        include, exclude: as in `convert`; heads, poolers and routers stay dense unless `include` matches them.

    Returns:
        A RankPlan. Layers that it does not name stay dense; at keep=1.0 these are all.

    Raises:
        RankError: the budget is out of range, or so small that the least rank everywhere exceeds it.
        TargetError: unknown metric, allocation or form, patterns as in `convert`, or no layer to choose a rank for.
        WeightError: a weight or its moments are not finite, the metric needs moments that are not there, or they are of
            another model.

    Cost: with global allocation one symmetric eigenvalue problem, without vectors, for each layer that is not
    decomposed yet, and for each of eight widths of heads one for each of the four layers of an attention.

    >>> plan = make_plan(nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)), keep=0.5, form="pair")
    >>> [spec.rank for spec in plan.modules.values()]
    [16, 16]
    """
    check_model(model)
    check_no_adapters(model)
    check_budget(keep, target_params, multiple_of, min_rank)
    include, exclude = as_patterns(include, "include"), as_patterns(exclude, "exclude") or ()
    source = as_decompositions(moments, metric)
    allocation = allocation or ("global" if source.metric == "fisher" else "uniform")
    if allocation not in ALLOCATIONS or form not in FORMS:
        raise TargetError(f"allocation is one of {ALLOCATIONS} and form of {FORMS}; got {allocation!r}, {form!r}")
    found = find_layers(model, include=include, exclude=exclude)
    targets = found.selected
    if any(t.spec is not None or t.stock_shape is not None for t in targets):
        raise TargetError("the model is converted already: make plans from the dense model")
    if not targets:
        raise no_layer(found)
    if any(not t.name for t in targets):
        raise TargetError(
            "the model is itself one dense layer, and a plan needs a name: put it in nn.Sequential(layer)"
        )
    check_fit(model, targets, source)
    if joint and allocation != "global":
        raise TargetError(f"joint=True needs the global allocation, which compares losses; got {allocation!r}")
    if joint and source.metric != "fisher":
        raise TargetError(f"joint=True needs the fisher metric, in which losses compare; got {source.metric!r}")
    tables = _tables(model) if embeddings else {}
    extra = sum(group.size for group in tables.values())
    budget = _budget(model, targets, keep, target_params, extra)
    steps = Steps(form, multiple_of, min_rank)
    _check_reachable(targets, tables, budget, steps)
    share = budget / (sum(t.weights() for t in targets) + extra)
    widths: dict[str, int] = {}
    if allocation == "global":
        narrow = joint is not False and source.metric == "fisher"
        specs, widths = _global(model, targets, tables, source, share, steps, joint=narrow)
    else:
        specs = {name: _table_of_share(group, share, steps) for name, group in tables.items()}
        left = budget - sum(_table_weights(group, specs[name]) for name, group in tables.items())
        layers = _uniform(targets, min(share * sum(t.weights() for t in targets), left), steps)
        specs = {layer_name(model, n): spec for n, spec in layers.items()} | specs
    modules = {name: spec for name, spec in specs.items() if spec is not None}
    low = {name: spec.rank for name in tables if (spec := modules.pop(name, None)) is not None}
    return RankPlan(modules, base_type(model), source.metric, head_widths=widths, embeddings=low)


def check_budget(keep: float | None, target_params: int | None, multiple_of: int, min_rank: int) -> None:
    """Raise RankError unless one of keep, in (0, 1], and target_params, an int, is given; the others ints >= 1."""
    if (keep is None) == (target_params is None):
        raise RankError("give one of keep and target_params")
    if keep is not None and (isinstance(keep, bool) or not isinstance(keep, (int, float)) or not 0 < keep <= 1):
        raise RankError(f"keep must be in (0, 1], the share of the targeted layers' weights, got {keep!r}")
    if target_params is not None and (isinstance(target_params, bool) or not isinstance(target_params, int)):
        raise RankError(f"target_params must be an int, the parameters of the whole model, got {target_params!r}")
    for option, value in (("multiple_of", multiple_of), ("min_rank", min_rank)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise RankError(f"{option} must be an int of at least 1, got {value!r}")


def _check_reachable(
    targets: tuple[Target, ...], tables: Mapping[str, TableGroup], budget: float, steps: Steps
) -> None:
    """Raise RankError if the layers and tables exceed the budget at their least ranks; dense where that is smaller."""
    sizes = [(t.weights(steps.lowest), t.weights()) for t in targets if t.full_rank >= steps.least]
    sizes += [(t.weights(), t.weights()) for t in targets if t.full_rank < steps.least]
    sizes += [(_table_weights(group, LayerSpec(steps.least)), group.size) for group in tables.values()]
    least, total = sum(map(min, sizes)), sum(dense for _, dense in sizes)
    if least > budget:
        raise RankError(
            f"the budget of {budget:,.0f} weights is below the smallest size, {least:,} of {total:,} at rank "
            f"{steps.least}: keep at least {math.ceil(1000 * least / total) / 1000:.3f}, or allow lower ranks with "
            f"min_rank= (now {steps.min_rank}; multiple_of is {steps.multiple_of})"
        )


def _tables(model: nn.Module) -> dict[str, TableGroup]:
    """Name in a plan -> table, of those that can be of low rank.

    Raises:
        TargetError: none can.
    """
    groups = table_groups(model)
    reasons = [group.why_not() for group in groups] or ["only those of Transformers models are known"]
    if all(reasons):
        raise TargetError(f"embeddings=True, and they cannot be of low rank: {reasons[0]}")
    fit = [group for group, reason in zip(groups, reasons, strict=True) if reason is None]
    return {layer_name(model, group.path): group for group in fit}


def _table_of_share(group: TableGroup, share: float, steps: Steps) -> LayerSpec | None:
    """The rank at which a table holds at most this share of its numbers, or the least; None to stay dense."""
    spec = LayerSpec(max(int(share * group.size / sum(group.shape)), steps.least))
    return spec if share < 1 and _table_weights(group, spec) < group.size else None


def _table_weights(group: TableGroup, spec: LayerSpec | None) -> int:
    return group.size if spec is None else spec.rank * sum(group.shape)


def _budget(
    model: nn.Module, targets: tuple[Target, ...], keep: float | None, target_params: int | None, extra: int
) -> float:
    """Weights that the targeted layers may hold, and `extra` numbers of embeddings."""
    total = sum(t.weights() for t in targets) + extra
    if target_params is None:
        return (keep or 1.0) * total
    rest = count_parameters(model) - total
    if target_params <= rest:
        raise RankError(
            f"target_params={target_params:,} cannot be reached: {rest:,} parameters lie outside of the targeted layers"
        )
    return float(min(target_params - rest, total))


def _rank_of_share(target: Target, share: float, form: str) -> int:
    """The largest rank at which a layer holds at most this share of its dense weight."""
    width, budget = target.in_features + target.out_features, share * target.weights()
    if form == "pair":
        return int(budget / width)
    return int((width - math.sqrt(max(width**2 - 4 * budget, 0.0))) / 2)  # r width - r^2 = budget


def _uniform(targets: Sequence[Target], budget: float, steps: Steps) -> dict[str, LayerSpec | None]:
    """The same share for every layer; None where a layer stays dense.

    What the least rank or staying dense costs a narrow layer is taken from the widest ones. The budget is not below
    what all layers need at their least.
    """
    total = sum(t.weights() for t in targets)
    if budget >= total:
        return {t.name: None for t in targets}
    specs: dict[str, LayerSpec | None] = {}
    for t in targets:
        rank = _rank_of_share(t, budget / total, steps.form) // steps.multiple_of * steps.multiple_of
        spec = LayerSpec(max(rank, steps.least), steps.form)
        fits = spec.rank <= t.full_rank and t.weights(spec) < t.weights()
        specs[t.name] = spec if fits else None
    while sum(t.weights(specs[t.name]) for t in targets) > budget:
        low = [(t.weights(s), t.name, s.rank) for t in targets if (s := specs[t.name]) and s.rank > steps.least]
        _, name, rank = max(low)
        specs[name] = LayerSpec(rank - steps.multiple_of, steps.form)
    return specs


def _global(
    model: nn.Module,
    targets: tuple[Target, ...],
    tables: Mapping[str, TableGroup],
    source: Decompositions,
    share: float,
    steps: Steps,
    *,
    joint: bool,
) -> tuple[dict[str, LayerSpec | None], dict[str, int]]:
    """Ranks by one Lagrangian, None where a layer stays dense, and widths of heads.

    What has no common unit of error gets the same share as the others have together.
    """
    named = {layer_name(model, t.name): t for t in targets}
    ways = ways_to_build(model, named, tables, source, steps, joint=joint)
    sizes = {name: t.weights() for name, t in named.items()} | {name: group.size for name, group in tables.items()}
    inside = {name for group in ways.values() for name in group[0].layers}
    alone = {t.name: name for name, t in named.items() if name not in inside}
    shared = _uniform([named[n] for n in alone.values()], share * sum(sizes[n] for n in alone.values()), steps)
    specs = {alone[path]: spec for path, spec in shared.items()}
    specs |= {name: _table_of_share(group, share, steps) for name, group in tables.items() if name not in inside}
    available = share * sum(sizes[name] for name in inside)
    groups = {n: [Alternative(w.error, [o for _, o in w.layers.values()]) for w in way] for n, way in ways.items()}
    best = {name: ways[name][i] for name, i in choose(groups, available).items()}
    final = {name: found for way in best.values() for name, found in way.layers.items()}
    chosen = allocate({name: options for name, (_, options) in final.items()}, available)
    specs |= {name: final[name][0][option] for name, option in chosen.items()}
    return specs, {name: way.width for name, way in best.items() if way.width is not None}


def fit_plan(model: nn.Module, targets: tuple[Target, ...], plan: RankPlan) -> Chosen:
    """The layers to convert by a plan, and the reason why the others stay.

    Raises:
        PlanError: the plan names what is no layer of these, or a rank that its layer cannot have.
    """
    named = {layer_name(model, target.name): target for target in targets}
    unknown = sorted(set(plan.modules) - set(named))
    if unknown:
        raise PlanError(f"the plan names {len(unknown)} layers that cannot be converted here, among them {unknown[:3]}")
    for name, spec in plan.modules.items():
        target = named[name]
        most = spec.limit(target.in_features, target.out_features) if target.spec is None else target.spec.rank
        if spec.rank > most:
            raise PlanError(f"{name}: the plan gives it rank {spec.rank}, above the {most} it can have")
    specs = {named[name].name: spec for name, spec in plan.modules.items()}
    dense = [t for t in targets if t.name not in specs]
    return specs, tuple(Skipped(t.name, t.kind, t.parameters, "the plan leaves it dense") for t in dense)
