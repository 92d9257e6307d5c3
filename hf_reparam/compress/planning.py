"""`make_plan`: what becomes of every part of a model, from one size, without touching the model."""

from collections.abc import Sequence
from dataclasses import replace

from torch import nn
from transformers import PreTrainedModel

from hf_reparam.calibrate.fits import check_fit
from hf_reparam.compress.budget import Budget
from hf_reparam.compress.clock import speed_of
from hf_reparam.compress.ranks import given_ranks
from hf_reparam.compress.units import Seconds, Unit, unit_of
from hf_reparam.compress.verify import best_plan, can_be_judged
from hf_reparam.config import LowRankConfig, Rank
from hf_reparam.errors import RankError, TargetError
from hf_reparam.layers.progress import one_bar
from hf_reparam.layers.warn import warn
from hf_reparam.linalg.calibration import Calibration
from hf_reparam.model.checks import check_no_adapters, count_parameters
from hf_reparam.model.host import check_model, opened
from hf_reparam.model.sites import Found, Selection, no_site, select
from hf_reparam.model.summary import planned
from hf_reparam.plan import Entry, Judgement, RankPlan
from hf_reparam.structures import STRUCTURES
from hf_reparam.structures.source import Source
from hf_reparam.structures.structure import Steps

_REACHED = 0.9  # of a speedup that was asked; timings vary by some percent


def make_plan(
    model: nn.Module,
    config: LowRankConfig | None = None,
    calibration: Calibration | None = None,
    *,
    rank: Rank | None = None,
    keep: float | None = None,
    target_params: int | float | None = None,
    speedup: float | None = None,
) -> RankPlan:
    """Decide what becomes of every part of a model. `print(plan)` shows it, with why the rest stays dense.

    In the fisher metric what a layer drops is its predicted increase of the loss, in one unit for all layers:
    allocation "global" minimises their sum under the budget, with staying dense as one of the choices. "uniform" gives
    every layer the same share. With held-out data in the calibration each layer is truncated on its own and measured,
    and the plan compared with uniform ranks in both metrics; the best is taken. `plan.report.judgement` says what was
    predicted and measured.

    Args:
        model: a dense model; one calibration of it may be used for many plans. With `rank` it may be converted already.
        config: what is asked.
        calibration: what `calibrate` returned; None for plain SVD.
        rank, keep, target_params, speedup: short for a configuration of one size, as in `LowRankConfig`.

    Returns:
        A RankPlan. Layers that it does not name stay dense; at keep=1.0 these are all.

    Raises:
        RankError: the size is out of range, or so small that the least rank everywhere exceeds it.
        TargetError: a pattern matches nothing, or there is no layer to choose a rank for; or as `LowRankConfig`.
        WeightError: a weight or its moments are not finite, the metric needs moments that are not there, or they are of
            another model.

    Cost: for a budget with global allocation one to three full decompositions of each layer that was not planned with
    this calibration before, up to two forward passes over 16 to 64 held-out examples for each layer, and four
    conversions with a forward pass over all held-out ones (not with `verify=False`). With heads=True, which is not
    tried, seven or eight eigenvalue problems for each of the four layers of an attention.

    >>> plan = make_plan(nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)), LowRankConfig(keep=0.5, form="pair"))
    >>> [entry.rank for entry in plan.modules.values()]
    [16, 16]
    """
    config = LowRankConfig.asked(config, rank=rank, keep=keep, target_params=target_params, speedup=speedup)
    check_model(model)
    check_no_adapters(model)
    warn_without_data(config, calibration)
    work = opened(model).model
    with one_bar():
        return plan_for(work, config, Source.of(calibration, config.metric, config.solver))


def plan_for(work: nn.Module, config: LowRankConfig, source: Source, *, whole: bool = True) -> RankPlan:
    """As `make_plan`, of a model as `opened` shows it; `whole` plans need not be tried."""
    selection = select(work, config)
    found = selection.selected
    if not any(item.site.weights for item in found):
        raise no_site(selection)
    if any(not item.site.name for item in found):
        raise TargetError(
            "the model is itself one dense layer, and a plan needs a name: put it in nn.Sequential(layer)"
        )
    if config.rank is None:
        check_dense(work, found)
    check_fit(work, found, source)
    metric, judgement, speed = source.metric, None, None
    if config.rank is not None:
        entries, skipped = given_ranks(found, config)
        selection = Selection((), (*skipped, *selection.skipped))
    else:
        unit = unit_of(config, found, source.calibration)
        entries, metric, judgement = _budgeted(work, selection, config, source, unit, whole=whole)
        if entries and config.speedup is not None and isinstance(unit, Seconds):
            speed = speed_of(work, found, entries, unit.clock, config.speedup, source.calibration)
            if speed.layers < _REACHED * speed.asked:
                warn(f"speedup={speed.asked:g} was not reached: {speed}; another program may have run beside")
    plan = RankPlan(entries, work.config.model_type if isinstance(work, PreTrainedModel) else None, metric)
    return replace(plan, report=replace(planned(work, plan, selection), judgement=judgement, speed=speed))


def warn_without_data(config: LowRankConfig, calibration: Calibration | None) -> None:
    """Warn of a size that plain SVDs are to meet, unless they were asked for."""
    if calibration is None and config.rank is None and config.metric is None:
        warn(
            "a size without calibration data cuts the weights by plain SVDs, which lose much more: give "
            "calibration=texts, or metric='svd' if that is meant"
        )


def check_dense(work: nn.Module, found: Sequence[Found]) -> None:
    """Raise TargetError for a model, or targets in it, that are converted already: a budget starts from dense ones."""
    shaped = [site for structure in STRUCTURES if structure.changes_moments for site in structure.sites(work)]
    if any(site.entry is not None for site in (*shaped, *(item.site for item in found))):  # layers have other shapes
        raise TargetError("the model is converted already: convert the dense model, or merge this one first")


def _budgeted(
    work: nn.Module, selection: Selection, config: LowRankConfig, source: Source, unit: Unit, *, whole: bool
) -> tuple[dict[str, Entry], str, Judgement | None]:
    """Entries, their metric, and how they were judged."""
    _check_options(work, selection, config, source)
    found = [item for item in selection.selected if item.site.weights or item.structure.changes_moments]
    if config.speedup is not None:
        found = [item for item in found if item.structure.of_rows]
        if not found:
            raise TargetError("speedup counts the time of dense layers, and none of them is targeted")
    steps = Steps("pivoted" if config.speedup else config.stored_form, config.multiple_of, config.min_rank)
    budget = Budget(found, _share(work, found, config), steps, unit)
    if budget.share >= 1:
        return {}, source.metric, None
    if (config.allocation or ("global" if source.metric == "fisher" else "uniform")) == "uniform":
        return budget.as_measured(Budget.uniform).uniform(), source.metric, None
    ways = budget.ways(source)
    if can_be_judged(work, config, source):
        return best_plan(work, config, budget, ways, source, whole=whole)
    return budget.as_measured(lambda known: known.spent(ways)).spent(ways), source.metric, None


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
            raise TargetError(f"{option}=True, and there are none here that can be held with fewer parameters{why}")
    if source.metric != "fisher" or source.calibration is None:
        return
    for item in selection.selected:
        option = item.structure.option
        needed = item.structure.sums(item.name, item.site, gradients=True) if option else {}
        for name in needed.keys() - source.calibration.tables.keys():
            raise TargetError(f"{option}=True, and {name} was not watched: calibrate(model, data, {option}=True)")


def _share(work: nn.Module, found: Sequence[Found], config: LowRankConfig) -> float:
    """Of what the targeted sites cost dense, what they may cost."""
    if config.keep is not None:
        return config.keep
    if config.speedup is not None:
        return 1 / config.speedup
    whole, total = count_parameters(work), sum(item.site.weights for item in found)
    target = config.target_params or 0
    wanted = target if isinstance(target, int) else target * whole
    if wanted <= whole - total:
        raise RankError(
            f"target_params={target:,} cannot be reached: {whole - total:,} of {whole:,} parameters lie outside of the "
            f"targeted layers{'' if config.embeddings else '; embeddings=True targets embeddings, too'}"
        )
    return min((wanted - (whole - total)) / total, 1.0)
