"""`make_plan`: ranks for every layer from one budget, without touching the model."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_reparam.calibration import layer_name
from hf_reparam.decomposition import Decompositions, as_decompositions
from hf_reparam.errors import PlanError, RankError, TargetError
from hf_reparam.hf.inspection import count_parameters, protected_layers, with_projections
from hf_reparam.hf.processes import spread
from hf_reparam.hf.tables import table_groups
from hf_reparam.linalg import Alternative, Moments, Options, allocate, choose
from hf_reparam.narrowing import NarrowHeads, attentions_by_name
from hf_reparam.nn.heads import ROLES, Attention
from hf_reparam.nn.targets import SHARES, Skipped, Target, find_targets
from hf_reparam.plan import FORMS, LayerSpec, RankPlan
from hf_reparam.sharing import same_inputs, stack_losses

__all__ = ["Chosen", "check_budget", "fit_plan", "make_plan"]

Chosen = tuple[Mapping[str, LayerSpec], tuple[Skipped, ...]]
"""Path -> rank and form of the layers to convert, and why the others stay."""

ALLOCATIONS = ("global", "uniform")
_WIDTHS = 8  # of heads that are tried, in equal steps
_CAUTION = 1.5  # what narrower heads and tables lose counts for more: it meets the errors of other layers


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
    shared: bool | None = None,
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
            `hf_reparam.nn.heads`), all four projections of which are targeted. With global allocation only, and by
            default with it.
        shared: whether layers that got the same inputs, such as queries, keys and values, or the gate and the up
            projection of an MLP, may use one `down` where that is predicted to cost less. With global allocation only,
            and by default with it.
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
    decomposed yet, and for each group of layers with the same inputs; and for each of eight widths of heads one for
    each of the four layers of an attention.

    >>> plan = make_plan(nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)), keep=0.5, form="pair")
    >>> [spec.rank for spec in plan.modules.values()]
    [16, 16]
    """
    check_budget(keep, target_params, multiple_of)
    source = as_decompositions(moments, metric)
    allocation = allocation or ("global" if source.metric == "fisher" else "uniform")
    if allocation not in ALLOCATIONS or form not in FORMS:
        raise TargetError(f"allocation is one of {ALLOCATIONS} and form of {FORMS}; got {allocation!r}, {form!r}")
    targets = find_targets(model, include=include, exclude=exclude, protected=protected_layers(model)).selected
    if any(t.spec is not None or t.stock_shape is not None for t in targets):
        raise TargetError("the model is converted already: make plans from the dense model")
    if not targets:
        raise TargetError("the model has no dense layer that can be factored")
    for option, value in (("joint", joint), ("shared", shared)):
        if value and allocation != "global":
            raise TargetError(f"{option}=True needs the global allocation, which compares losses; got {allocation!r}")
    tables = _tables(model) if embeddings else []
    extra = sum(table.size for table in tables)
    budget = _budget(model, targets, keep, target_params, extra)
    share = budget / (sum(map(_size, targets)) + extra)
    uniform = _uniform(targets, share * sum(map(_size, targets)), form, multiple_of)
    specs = {layer_name(model, n): spec for n, spec in uniform.items()}
    specs |= {table.name: table.of_share(share) for table in tables}
    widths: dict[str, int] = {}
    if allocation == "global":
        options = {"joint": joint is not False, "shared": shared is not False}
        widths = _global(model, targets, tables, source, share, form, multiple_of, specs, **options)
    base = model.config.model_type if isinstance(model, PreTrainedModel) else None
    modules = {name: spec for name, spec in specs.items() if spec is not None}
    low = {table.name: spec.rank for table in tables if (spec := modules.pop(table.name, None)) is not None}
    return RankPlan(modules, base, source.metric, head_widths=widths, embeddings=low)


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


@dataclass(frozen=True)
class _Table:
    """A table, one row for each token.

    Args:
        name: in the plan.
        module: what holds it.
        tokens, width: their shape.
    """

    name: str
    module: nn.Module
    tokens: int
    width: int

    @property
    def size(self) -> int:
        """Numbers in the dense table."""
        return self.tokens * self.width

    def of_share(self, share: float) -> LayerSpec | None:
        """The rank at which it holds at most this share of its numbers; None to stay dense."""
        rank = int(share * self.size / (self.tokens + self.width))
        return LayerSpec(max(rank, 1)) if share < 1 and rank < self.width else None

    def options(self, squares: Tensor, tokens: float, multiple_of: int) -> "_Choices":
        """Every rank at which it is smaller than dense, and None for the dense table."""
        most = math.ceil(self.size / (self.tokens + self.width)) - 1
        specs = [LayerSpec(rank) for rank in range(min(multiple_of, most), most + 1, multiple_of)]
        kept = squares.cumsum(0)[[spec.rank - 1 for spec in specs]]
        errors = torch.cat(
            [(squares.sum() - kept).clamp_min(0) * tokens * _CAUTION, torch.zeros(1, dtype=torch.float64)]
        )
        sizes = [spec.rank * (self.tokens + self.width) for spec in specs]
        return [*specs, None], Options(errors, torch.tensor([*sizes, self.size], dtype=torch.float64))


def _tables(model: nn.Module) -> list[_Table]:
    groups = table_groups(model)
    reasons = [group.why_not() for group in groups] or ["only those of Transformers models are known"]
    if all(reasons):
        raise TargetError(f"embeddings=True, and they cannot be of low rank: {reasons[0]}")
    fit = [group for group, reason in zip(groups, reasons, strict=True) if reason is None]
    return [_Table(layer_name(model, group.path), group.module, *group.shape) for group in fit]


def _budget(
    model: nn.Module, targets: tuple[Target, ...], keep: float | None, target_params: int | None, extra: int
) -> float:
    """Weights that the targeted layers may hold, and `extra` numbers of embeddings."""
    total = sum(map(_size, targets)) + extra
    if target_params is None:
        return (keep or 1.0) * total
    rest = count_parameters(model) - total
    if target_params <= rest:
        raise RankError(
            f"target_params={target_params:,} cannot be reached: {rest:,} parameters lie outside of the targeted layers"
        )
    return float(min(target_params - rest, total))


def _size(target: Target) -> int:
    return target.in_features * target.out_features


def _weights(target: Target, spec: LayerSpec | None) -> int:
    return _size(target) if spec is None else spec.weights(target.in_features, target.out_features)


def _rank_of_share(target: Target, share: float, form: str) -> int:
    """The largest rank at which a layer holds at most this share of its dense weight."""
    width, budget = target.in_features + target.out_features, share * _size(target)
    if form == "pair":
        return int(budget / width)
    return int((width - math.sqrt(max(width**2 - 4 * budget, 0.0))) / 2)  # r width - r^2 = budget


def _uniform(targets: tuple[Target, ...], budget: float, form: str, multiple_of: int) -> dict[str, LayerSpec | None]:
    """The same share for every layer; None where a layer stays dense.

    Layers too narrow for one multiple take any rank. What rounding up to rank 1 or staying dense costs a narrow layer,
    such as a classifier of two classes, is taken from the widest ones.
    """
    total = sum(map(_size, targets))
    if budget >= total:
        return {t.name: None for t in targets}
    specs: dict[str, LayerSpec | None] = {}
    for t in targets:
        rank = _rank_of_share(t, budget / total, form)
        rounded = LayerSpec(rank // multiple_of * multiple_of or max(rank, 1), form)
        specs[t.name] = rounded if _weights(t, rounded) < _size(t) else None
    while sum(_weights(t, specs[t.name]) for t in targets) > budget:
        low = [(_weights(t, spec), t.name, spec.rank) for t in targets if (spec := specs[t.name]) is not None]
        _, name, rank = max(low, default=(0, "", 0))
        if rank <= multiple_of:
            raise RankError(f"the budget of {budget:,.0f} weights is below the smallest size: keep more of {total:,}")
        specs[name] = LayerSpec(rank - multiple_of, form)
    return specs


_Choices = tuple[list[LayerSpec | None], Options]


@dataclass(frozen=True)
class _Way:
    """One way to build some layers together: ranks to choose from, for each of them.

    Args:
        error: predicted loss of this way at full ranks.
        layers: layer name -> its choices, and what they cost and lose.
        width: of the heads that they belong to; None for the stock width.
        users: name of one of them -> other layers, which use its `down`, and whose choices and losses are among its.
    """

    error: float
    layers: Mapping[str, _Choices]
    width: int | None = None
    users: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


def _global(
    model: nn.Module,
    targets: tuple[Target, ...],
    tables: Sequence[_Table],
    source: Decompositions,
    share: float,
    form: str,
    multiple_of: int,
    specs: dict[str, LayerSpec | None],
    *,
    joint: bool,
    shared: bool,
) -> dict[str, int]:
    """Put ranks by one Lagrangian into `specs`, for the layers that have a common unit of error; None where a layer
    stays dense. Returns widths of heads, and takes layers that they replace out of `specs`."""
    named = {layer_name(model, t.name): t for t in targets}
    spectra = spread(source.costs(named), lambda name: source.losses(name, named[name]), desc="Spectra")
    # without the common unit a layer keeps its uniform share
    options = {n: _options(t, s, form, multiple_of) for n, t in named.items() if (s := spectra[n]) is not None}
    ways = {name: [_Way(0.0, {name: found})] for name, found in options.items()}
    available = share * sum(_size(named[name]) for name in options)
    for table in tables:
        tokens = source.table_tokens(table.name)
        if tokens is not None:
            squares = source.table(table.name, table.module).squares
            ways[table.name] = [_Way(0.0, {table.name: table.options(squares, tokens, multiple_of)})]
            available += share * table.size
    if joint:
        heads = _ways_of_heads(model, named, options, source, form, multiple_of)
        inside = {name for group in heads.values() for name in group[0].layers}
        ways = {name: group for name, group in ways.items() if name not in inside} | heads
    if shared:
        dense = {name: named[name] for name in options}
        stacks = same_inputs(dense, source)
        for names, losses in zip(stacks, stack_losses(stacks, dense, source).values(), strict=True):
            _add_stack(ways, names, _stack_options(names, dense, losses, form, multiple_of))
    groups = {n: [Alternative(w.error, [o for _, o in w.layers.values()]) for w in way] for n, way in ways.items()}
    best = {name: ways[name][i] for name, i in choose(groups, available).items()}
    final = {name: found for way in best.values() for name, found in way.layers.items()}
    chosen = allocate({name: options for name, (_, options) in final.items()}, available)
    for name, way in best.items():
        if way.width is not None:
            for replaced in ways[name][0].layers:
                del specs[replaced]
    specs.update({name: final[name][0][option] for name, option in chosen.items()})
    for lender, others in ((lender, others) for way in best.values() for lender, others in way.users.items()):
        spec, last = specs[lender], lender.rpartition(".")[2]
        specs.update(dict.fromkeys(others, None if spec is None else replace(spec, down_of=last)))
    return {name: way.width for name, way in best.items() if way.width is not None}


def _add_stack(ways: dict[str, list[_Way]], names: tuple[str, ...], choices: _Choices) -> None:
    """Let layers with one input also use one `down`, that of the first of them."""
    touched = [key for key, group in ways.items() if set(names) & set(group[0].layers)]
    if len(touched) > 1 and any(len(ways[key]) > 1 for key in touched):
        return  # part of an attention, with layers outside of it
    separate = [ways.pop(key) for key in touched]
    layers = {name: found for group in separate for name, found in group[0].layers.items()}
    rest = {name: found for name, found in layers.items() if name not in names}
    way = _Way(0.0, {**rest, names[0]: choices}, users={names[0]: names[1:]})
    ways[touched[0]] = [*separate[0], way] if len(separate) == 1 else [_Way(0.0, layers), way]


def _stack_options(
    names: tuple[str, ...], named: Mapping[str, Target], losses: Tensor, form: str, multiple_of: int
) -> _Choices:
    """As `_options`, for layers that use the `down` of the first of them, whose rank cannot exceed its outputs."""
    lender = named[names[0]]
    whole = replace(lender, out_features=sum(named[name].out_features for name in names))
    specs, found = _options(whole, losses, form, multiple_of)
    fit = [i for i, spec in enumerate(specs) if spec is None or spec.rank <= lender.full_rank]
    return [specs[i] for i in fit], Options(found.errors[fit], found.costs[fit])


def _ways_of_heads(
    model: nn.Module,
    named: Mapping[str, Target],
    options: Mapping[str, _Choices],
    source: Decompositions,
    form: str,
    multiple_of: int,
) -> dict[str, list[_Way]]:
    """Attention -> its layers as they are, and with heads of every width that is tried."""
    found: dict[str, dict[str, str]] = {}
    heads = attentions_by_name(model)
    for name, attention in heads.items():
        parts = {role: layer_name(model, attention.path(role, split=False)) for role in ROLES}
        # a projection that hangs elsewhere, too, cannot change its shape
        alone = all(part in options and len(named[part].names) == len(attention.names) for part in parts.values())
        if alone:
            found[name] = parts

    def work(name: str) -> list[tuple[int, float, dict[str, Tensor]]]:
        return NarrowHeads(model, heads[name], source).losses(_widths(heads[name], multiple_of))

    costs = {name: float(heads[name].heads * heads[name].width) ** 3 for name in found}
    ways = {}
    for name, narrow in spread(costs, work, desc="Widths of heads").items() if found else ():
        attention = heads[name]
        ways[name] = [_Way(0.0, {part: options[part] for part in found[name].values()})]
        for width, error, losses in narrow:
            layers = {}
            for role in ROLES:
                n_in, n_out = attention.shape(role, width)
                like = replace(named[found[name][role]], in_features=n_in, out_features=n_out)
                path = layer_name(model, attention.path(role, split=True))
                layers[path] = _options(like, losses[role], form, multiple_of)
            ways[name].append(_Way(_CAUTION * error, layers, width))
    return ways


def _widths(attention: Attention, multiple_of: int) -> list[int]:
    """Widths in equal steps; the full one only where it splits a fused layer."""
    step = math.ceil(attention.width / _WIDTHS / multiple_of) * multiple_of
    return list(range(step, attention.width + attention.kind.fused, step))


def _options(target: Target, losses: Tensor, form: str, multiple_of: int) -> _Choices:
    """Every rank at which the layer is smaller than dense, and None for the dense layer itself."""
    least = _weights(target, LayerSpec(multiple_of, form)) if multiple_of <= target.full_rank else _size(target)
    step = multiple_of if least < _size(target) else 1  # too narrow for one multiple
    specs = [LayerSpec(rank, form) for rank in range(step, target.full_rank + 1, step)]
    specs = [spec for spec in specs if _weights(target, spec) < _size(target)]
    kept = losses.cumsum(0)[[spec.rank - 1 for spec in specs]]
    errors = torch.cat([(losses.sum() - kept).clamp_min(0), torch.zeros(1, dtype=torch.float64)])
    costs = torch.tensor([*(_weights(target, spec) for spec in specs), _size(target)], dtype=torch.float64)
    return [*specs, None], Options(errors, costs)


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
        if target.shares:
            raise PlanError(f"{name}: {SHARES}")
        most = spec.limit(target.in_features, target.out_features) if target.spec is None else target.spec.rank
        if spec.rank > most:
            raise PlanError(f"{name}: the plan gives it rank {spec.rank}, above the {most} it can have")
        lender = spec.lender(name)
        if lender is not None and named[lender].in_features != target.in_features:
            raise PlanError(f"{name}: the plan lets it use the `down` of {lender}, which has another width of inputs")
    specs = {named[name].name: spec for name, spec in plan.modules.items()}
    dense = [t for t in targets if t.name not in specs]
    return specs, tuple(Skipped(t.name, t.kind, t.parameters, "the plan leaves it dense") for t in dense)
