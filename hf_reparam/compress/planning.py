"""`make_plan`: what becomes of every part of a model, from one size, without touching the model."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

from torch import nn

from hf_reparam.compress.fits import check_fit
from hf_reparam.compress.ranks import given_ranks
from hf_reparam.config import LowRankConfig, Rank
from hf_reparam.errors import RankError, TargetError
from hf_reparam.linalg import Alternative, Calibration, allocate
from hf_reparam.model.checks import check_no_adapters, count_parameters
from hf_reparam.model.host import base_type, check_model, opened
from hf_reparam.model.sites import Found, Selection, no_site, select
from hf_reparam.model.summary import planned
from hf_reparam.plan import Entry, RankPlan
from hf_reparam.structures import STRUCTURES
from hf_reparam.structures.source import Source
from hf_reparam.structures.structure import Choices, Steps, Way

__all__ = ["make_plan", "plan_for"]


def make_plan(
    model: nn.Module,
    config: LowRankConfig | None = None,
    calibration: Calibration | None = None,
    *,
    rank: Rank | None = None,
    keep: float | None = None,
    target_params: int | float | None = None,
) -> RankPlan:
    """Decide what becomes of every part of a model. `print(plan)` shows it, with why the rest stays dense.

    In the fisher metric the squared singular values that a layer drops are its predicted increase of the loss, in one
    unit for all layers: allocation "global" minimises their sum under the budget, with staying dense as one of the
    choices. "uniform" gives every layer the same share.

    Args:
        model: a dense model; one calibration of it may be used for many plans. With `rank` it may be converted already.
        config: what is asked.
        calibration: what `calibrate` returned; None for plain SVD.
        rank, keep, target_params: short for a configuration of one size, as in `LowRankConfig`.

    Returns:
        A RankPlan. Layers that it does not name stay dense; at keep=1.0 these are all.

    Raises:
        RankError: the size is out of range, or so small that the least rank everywhere exceeds it.
        TargetError: a pattern matches nothing, or there is no layer to choose a rank for; or as `LowRankConfig`.
        WeightError: a weight or its moments are not finite, the metric needs moments that are not there, or they are of
            another model.

    Cost: for a budget with global allocation one symmetric eigenvalue problem, without vectors, for each layer that was
    not planned with this calibration before; with heads=True eight more for each of the four layers of an attention.

    >>> plan = make_plan(nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)), LowRankConfig(keep=0.5, form="pair"))
    >>> [entry.rank for entry in plan.modules.values()]
    [16, 16]
    """
    config = LowRankConfig.asked(config, rank=rank, keep=keep, target_params=target_params)
    check_model(model)
    check_no_adapters(model)
    work = opened(model).model
    return plan_for(work, config, Source.of(calibration, config.metric, config.solver))


def plan_for(work: nn.Module, config: LowRankConfig, source: Source) -> RankPlan:
    """As `make_plan`, of a model as `opened` shows it."""
    asked = config.rank if isinstance(config.rank, Mapping) else ()
    selection = select(work, config, asked)
    found = selection.selected
    if not any(item.site.weights for item in found):
        raise no_site(selection)
    if any(not item.site.name for item in found):
        raise TargetError(
            "the model is itself one dense layer, and a plan needs a name: put it in nn.Sequential(layer)"
        )
    if config.rank is None:
        _check_dense(work, found)
    check_fit(work, found, source)
    if config.rank is not None:
        entries, skipped = given_ranks(found, config)
        selection = Selection((), (*skipped, *selection.skipped))
    else:
        entries = _budgeted(work, selection, config, source)
    plan = RankPlan(entries, base_type(work), source.metric)
    return replace(plan, report=planned(work, plan, selection))


def _check_dense(work: nn.Module, found: Sequence[Found]) -> None:
    """Refuse a model that is converted already, also by narrower heads, whose layers have other shapes."""
    shaped = [site for structure in STRUCTURES if structure.changes_moments for site in structure.sites(work)]
    if any(site.entry is not None for site in (*shaped, *(item.site for item in found))):
        raise TargetError("the model is converted already: make plans from the dense model")


def _budgeted(work: nn.Module, selection: Selection, config: LowRankConfig, source: Source) -> dict[str, Entry]:
    found = selection.selected
    _check_options(work, selection, config, source)
    counted = [item for item in found if item.site.weights]
    total = sum(item.site.weights for item in counted)
    budget = _budget(work, total, config)
    steps = Steps(config.stored_form, config.multiple_of, config.min_rank)
    _check_reachable(counted, budget, steps)
    if (config.allocation or ("global" if source.metric == "fisher" else "uniform")) == "global":
        return _global(found, source, budget / total, steps)
    return _uniform(counted, budget, steps)


def _check_options(work: nn.Module, selection: Selection, config: LowRankConfig, source: Source) -> None:
    """Refuse options that ask for what cannot be here."""
    if config.heads and source.metric != "fisher":
        raise TargetError(f"heads=True needs the fisher metric, in which losses compare; got {source.metric!r}")
    for structure in STRUCTURES:
        option = structure.option
        if option is None or not getattr(config, option):
            continue
        if not any(item.structure is structure for item in selection.selected):
            why = "".join(f": {site.reason}" for site in structure.sites(work)[:1] if site.reason)
            raise TargetError(f"{option}=True, and there are none here that can be held in fewer numbers{why}")


def _budget(work: nn.Module, total: int, config: LowRankConfig) -> float:
    """Weights that the targeted sites may hold."""
    if config.keep is not None:
        return config.keep * total
    whole = count_parameters(work)
    target = config.target_params or 0
    wanted = target if isinstance(target, int) else target * whole
    if wanted <= whole - total:
        raise RankError(
            f"target_params={target:,} cannot be reached: {whole - total:,} parameters lie outside of the targeted "
            "layers"
        )
    return float(min(wanted - (whole - total), total))


def _cost(item: Found, entry: Entry | None) -> float:
    """As the structure says; infinite where it cannot be."""
    try:
        return item.structure.cost(item.site, entry)
    except RankError:
        return math.inf


def _check_reachable(found: Sequence[Found], budget: float, steps: Steps) -> None:
    """Raise RankError if the sites exceed the budget at their least ranks; dense where that is smaller."""
    least = sum(min(_cost(f, steps.entry(steps.least, f.structure.forms)), f.site.weights) for f in found)
    total = sum(item.site.weights for item in found)
    if least > budget:
        raise RankError(
            f"the budget of {budget:,.0f} weights is below the smallest size, {least:,} of {total:,} at rank "
            f"{steps.least}: keep at least {math.ceil(1000 * least / total) / 1000:.3f}, or allow lower ranks with "
            f"min_rank= (now {steps.min_rank}; multiple_of is {steps.multiple_of})"
        )


def _uniform(found: Sequence[Found], budget: float, steps: Steps) -> dict[str, Entry]:
    """The same share for every site; those that are left out stay dense.

    What the least rank or staying dense costs a narrow layer is taken from the widest ones. The budget is not below
    what all need at their least.
    """
    total = sum(item.site.weights for item in found)
    if budget >= total:
        return {}
    entries: dict[str, Entry] = {}
    for item in found:
        most = _highest(item, budget / total * item.site.weights, steps)
        entry = steps.entry(most, item.structure.forms)
        if _cost(item, entry) < item.site.weights:
            entries[item.name] = entry
    named = {item.name: item for item in found}
    while sum(_cost(item, entries.get(item.name)) for item in found) > budget:
        _, name = max((_cost(named[n], e), n) for n, e in entries.items() if e.rank > steps.least)
        entries[name] = steps.entry(entries[name].rank - steps.multiple_of, named[name].structure.forms)
    return entries


def _highest(item: Found, share: float, steps: Steps) -> int:
    """The highest rank at which a site holds no more numbers than its share; the least one if none does."""
    ranks = steps.up_to(item.site.full_rank)
    low, high = 0, len(ranks)  # costs rise with the rank
    while low < high:
        middle = (low + high) // 2
        if _cost(item, steps.entry(ranks[middle], item.structure.forms)) <= share:
            low = middle + 1
        else:
            high = middle
    return ranks[low - 1] if low else steps.least


def _global(found: Sequence[Found], source: Source, share: float, steps: Steps) -> dict[str, Entry]:
    """Ranks by one Lagrangian. What has no common unit of error gets the same share as the others have together."""
    ways = _ways(found, source, steps)
    sizes = {item.name: item.site.weights for item in found}
    inside = {name for group in ways.values() for name in group[0].sites}
    apart = [item for item in found if item.name not in inside and item.site.weights]
    entries = _uniform(apart, share * sum(item.site.weights for item in apart), steps) if apart else {}
    groups = {n: [Alternative(w.error, [o for _, o in w.sites.values()]) for w in way] for n, way in ways.items()}
    chosen = allocate(groups, share * sum(sizes[name] for name in inside)) if groups else {}
    for group, (way, options) in chosen.items():
        best = ways[group][way]
        entries |= best.entries
        picked = zip(best.sites.items(), options, strict=True)
        entries |= {name: entry for (name, (known, _)), i in picked if (entry := known[i]) is not None}
    return entries


def _ways(found: Sequence[Found], source: Source, steps: Steps) -> dict[str, list[Way]]:
    """Name of a group of sites -> ways to build it. A group of several sites takes the place of their own groups."""
    ways: dict[str, list[Way]] = {}
    taken: dict[str, Choices] = {}
    for structure in reversed(STRUCTURES):  # dense layers first: narrower heads offer other choices for them
        sites = {item.name: item.site for item in found if item.structure is structure}
        offered = structure.ways(sites, source, steps, taken) if sites else {}
        claimed = {name for group in offered.values() for name in group[0].sites}
        ways = {name: group for name, group in ways.items() if claimed.isdisjoint(group[0].sites)} | offered
        taken |= {name: choices for group in offered.values() for name, choices in group[0].sites.items()}
    return ways
