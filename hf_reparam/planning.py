"""`make_plan`: ranks for every layer from one budget, without touching the model."""

import math
from collections.abc import Iterable, Mapping

from torch import nn

from hf_reparam.calibration import layer_name
from hf_reparam.choices import ways_to_build
from hf_reparam.decomposition import Decompositions, as_decompositions
from hf_reparam.errors import PlanError, RankError, TargetError
from hf_reparam.hf.host import base_type, check_model
from hf_reparam.hf.inspection import check_no_adapters, count_parameters, protected_layers, with_projections
from hf_reparam.hf.tables import TableGroup, table_groups
from hf_reparam.linalg import Alternative, Moments, allocate, choose
from hf_reparam.nn.patterns import as_patterns
from hf_reparam.nn.targets import Skipped, Target, find_targets
from hf_reparam.plan import FORMS, LayerSpec, RankPlan

__all__ = ["Chosen", "check_budget", "fit_plan", "make_plan"]

Chosen = tuple[Mapping[str, LayerSpec], tuple[Skipped, ...]]
"""Path -> rank and form of the layers to convert, and why the others stay."""

ALLOCATIONS = ("global", "uniform")


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
        multiple_of: ranks are multiples of this; 8 suits tensor cores. Layers too narrow for one multiple, or for their
            share of the budget, take a lower rank.
        joint: whether heads may become narrower where that is predicted to cost less: queries with keys, and values
            with outputs, are approximated as wholes before each is factored. For attentions that are registered (see
            `hf_reparam.nn.heads`), all four projections of which are targeted. With global allocation and the fisher
            metric only, in which what heads and layers lose has one unit, and by default with them.
        embeddings: also choose ranks for the table of the input embeddings, which an output head that is tied to it
            shares, and for an untied head; their numbers are then part of what is targeted.
        include, exclude: as in `convert`.

    Returns:
        A RankPlan. Layers that it does not name stay dense.

    Raises:
        RankError: the budget is out of range, or so small that rank `multiple_of` everywhere exceeds it.
        TargetError: unknown metric, allocation or form, patterns as in `convert`, or no layer to choose a rank for.
        WeightError: a weight or its moments are not finite, or the metric needs moments that are not there.

    Cost: with global allocation one symmetric eigenvalue problem, without vectors, for each layer that is not
    decomposed yet, and for each of eight widths of heads one for each of the four layers of an attention.

    >>> plan = make_plan(nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)), keep=0.5, form="pair")
    >>> [spec.rank for spec in plan.modules.values()]
    [16, 16]
    """
    check_model(model)
    check_no_adapters(model)
    check_budget(keep, target_params, multiple_of)
    include, exclude = as_patterns(include, "include"), as_patterns(exclude, "exclude") or ()
    source = as_decompositions(moments, metric)
    allocation = allocation or ("global" if source.metric == "fisher" else "uniform")
    if allocation not in ALLOCATIONS or form not in FORMS:
        raise TargetError(f"allocation is one of {ALLOCATIONS} and form of {FORMS}; got {allocation!r}, {form!r}")
    targets = find_targets(model, include=include, exclude=exclude, protected=protected_layers(model)).selected
    if any(t.spec is not None or t.stock_shape is not None for t in targets):
        raise TargetError("the model is converted already: make plans from the dense model")
    if not targets:
        raise TargetError("the model has no dense layer that can be factored")
    if any(not t.name for t in targets):
        raise TargetError("the model is itself one dense layer, and a plan needs a name: put it in nn.Sequential(layer)")
    if joint and allocation != "global":
        raise TargetError(f"joint=True needs the global allocation, which compares losses; got {allocation!r}")
    if joint and source.metric != "fisher":
        raise TargetError(f"joint=True needs the fisher metric, in which losses compare; got {source.metric!r}")
    tables = _tables(model) if embeddings else {}
    extra = sum(group.size for group in tables.values())
    budget = _budget(model, targets, keep, target_params, extra)
    share = budget / (sum(t.weights() for t in targets) + extra)
    uniform = _uniform(targets, share * sum(t.weights() for t in targets), form, multiple_of)
    specs = {layer_name(model, n): spec for n, spec in uniform.items()}
    specs |= {name: _table_of_share(group, share) for name, group in tables.items()}
    widths: dict[str, int] = {}
    if allocation == "global":
        narrow = joint is not False and source.metric == "fisher"
        widths = _global(model, targets, tables, source, share, form, multiple_of, specs, joint=narrow)
    modules = {name: spec for name, spec in specs.items() if spec is not None}
    low = {name: spec.rank for name in tables if (spec := modules.pop(name, None)) is not None}
    return RankPlan(modules, base_type(model), source.metric, head_widths=widths, embeddings=low)


def check_budget(keep: float | None, target_params: int | None, multiple_of: int) -> None:
    """Raise RankError unless one of keep, in (0, 1], and target_params, an int, is given; multiple_of an int >= 1."""
    if (keep is None) == (target_params is None):
        raise RankError("give one of keep and target_params")
    if keep is not None and (isinstance(keep, bool) or not isinstance(keep, (int, float)) or not 0 < keep <= 1):
        raise RankError(f"keep must be in (0, 1], the share of the targeted layers' weights, got {keep!r}")
    if target_params is not None and (isinstance(target_params, bool) or not isinstance(target_params, int)):
        raise RankError(f"target_params must be an int, the parameters of the whole model, got {target_params!r}")
    if isinstance(multiple_of, bool) or not isinstance(multiple_of, int) or multiple_of < 1:
        raise RankError(f"multiple_of must be an int of at least 1, got {multiple_of!r}")


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


def _table_of_share(group: TableGroup, share: float) -> LayerSpec | None:
    """The rank at which a table holds at most this share of its numbers; None to stay dense."""
    rank = int(share * group.size / sum(group.shape))
    return LayerSpec(max(rank, 1)) if share < 1 and rank < group.shape[1] else None


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


def _uniform(targets: tuple[Target, ...], budget: float, form: str, multiple_of: int) -> dict[str, LayerSpec | None]:
    """The same share for every layer; None where a layer stays dense.

    Layers too narrow for one multiple take any rank. What rounding up to rank 1 or staying dense costs a narrow layer,
    such as a classifier of two classes, is taken from the widest ones.
    """
    total = sum(t.weights() for t in targets)
    if budget >= total:
        return {t.name: None for t in targets}
    specs: dict[str, LayerSpec | None] = {}
    for t in targets:
        rank = _rank_of_share(t, budget / total, form)
        rounded = LayerSpec(rank // multiple_of * multiple_of or max(rank, 1), form)
        specs[t.name] = rounded if t.weights(rounded) < t.weights() else None
    while sum(t.weights(specs[t.name]) for t in targets) > budget:
        low = [(t.weights(spec), t.name, spec.rank) for t in targets if (spec := specs[t.name]) is not None]
        _, name, rank = max(low, default=(0, "", 0))
        if rank <= multiple_of:
            raise RankError(f"the budget of {budget:,.0f} weights is below the smallest size: keep more of {total:,}")
        specs[name] = LayerSpec(rank - multiple_of, form)
    return specs


def _global(
    model: nn.Module,
    targets: tuple[Target, ...],
    tables: Mapping[str, TableGroup],
    source: Decompositions,
    share: float,
    form: str,
    multiple_of: int,
    specs: dict[str, LayerSpec | None],
    *,
    joint: bool,
) -> dict[str, int]:
    """Put ranks by one Lagrangian into `specs`, for what has a common unit of error; None where it stays dense. Returns
    widths of heads, and takes layers that they replace out of `specs`."""
    named = {layer_name(model, t.name): t for t in targets}
    ways = ways_to_build(model, named, tables, source, form, multiple_of, joint=joint)
    sizes = {name: t.weights() for name, t in named.items()} | {name: group.size for name, group in tables.items()}
    available = share * sum(sizes[name] for group in ways.values() for name in group[0].layers)
    groups = {n: [Alternative(w.error, [o for _, o in w.layers.values()]) for w in way] for n, way in ways.items()}
    best = {name: ways[name][i] for name, i in choose(groups, available).items()}
    final = {name: found for way in best.values() for name, found in way.layers.items()}
    chosen = allocate({name: options for name, (_, options) in final.items()}, available)
    for name, way in best.items():
        if way.width is not None:
            for replaced in ways[name][0].layers:
                del specs[replaced]
    specs.update({name: final[name][0][option] for name, option in chosen.items()})
    return {name: way.width for name, way in best.items() if way.width is not None}


def fit_plan(model: nn.Module, targets: tuple[Target, ...], plan: RankPlan) -> Chosen:
    """The layers to convert by a plan, and the reason why the others stay.

    Raises:
        PlanError: the plan names what is no layer of these, or a rank that its layer cannot have.
        TargetError: the plan names nothing.
    """
    named = {layer_name(model, target.name): target for target in targets}
    unknown = sorted(set(plan.modules) - set(named))
    if unknown:
        raise PlanError(f"the plan names {len(unknown)} layers that cannot be converted here, among them {unknown[:3]}")
    if not plan.modules and not plan.head_widths and not plan.embeddings:
        raise TargetError("the plan makes no layer low-rank: there is nothing to convert")
    for name, spec in plan.modules.items():
        target = named[name]
        most = spec.limit(target.in_features, target.out_features) if target.spec is None else target.spec.rank
        if spec.rank > most:
            raise PlanError(f"{name}: the plan gives it rank {spec.rank}, above the {most} it can have")
    specs = {named[name].name: spec for name, spec in plan.modules.items()}
    dense = [t for t in targets if t.name not in specs]
    return specs, tuple(Skipped(t.name, t.kind, t.parameters, "the plan leaves it dense") for t in dense)
