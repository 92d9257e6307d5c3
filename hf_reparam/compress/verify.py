"""The best plan for a budget: ranks by measured errors beside uniform ones, judged on held-out calibration data."""

import math
from collections.abc import Mapping
from dataclasses import replace
from statistics import geometric_mean

from torch import nn

from hf_reparam.compat.accelerate import is_offloaded
from hf_reparam.compress.budget import Budget, Ways
from hf_reparam.compress.judge import Judge, few
from hf_reparam.compress.probe import Prober, probed
from hf_reparam.config import LowRankConfig
from hf_reparam.layers.copies import WorkingCopy, frozen_copy
from hf_reparam.layers.progress import each
from hf_reparam.layers.warn import warn
from hf_reparam.linalg.calibration import Calibration
from hf_reparam.model.build import apply
from hf_reparam.model.sites import select
from hf_reparam.plan import Entry, Judgement, RankPlan
from hf_reparam.structures.source import Source

_MEASURED = "measured ranks"

Chosen = tuple[dict[str, Entry], str, Judgement | None]
"""Entries, their metric, and how they were judged."""


def can_be_judged(work: nn.Module, config: LowRankConfig, source: Source) -> bool:
    """Whether there is held-out data, and a model in memory to run it through; a warning where only that is missing.

    Not with narrower heads, whose layers cannot be cut alone.
    """
    batches = () if source.calibration is None else source.calibration.batches
    if not batches or not config.verify or config.heads:
        return False
    offloaded = any(map(is_offloaded, work.modules()))
    if offloaded:
        warn(
            "layers are streamed or offloaded, so ranks are predicted, not measured on held-out data, and may lose "
            "more: make the plan where the model fits in memory, and pass it (verify=False, --no-verify: no warning)"
        )
    return not offloaded


def best_plan(
    work: nn.Module, config: LowRankConfig, budget: Budget, ways: Ways, source: Source, *, whole: bool
) -> Chosen:
    """The plan of the least divergence on held-out data, of factors that were made without it.

    Tried are ranks by measured errors, ranks by predicted ones, and uniform ranks in both metrics.

    Args:
        work: a dense model as `opened` shows it.
        config: what is asked.
        budget: of it.
        ways: as predicted.
        source: a metric and moments with a held-out part.
        whole: whether whole plans are tried; without, the ranks by measured errors are taken.
    """
    calibration = source.calibration or Calibration(source.metric)
    fitting, batches = replace(source, fitting=True, kept={}), calibration.batches
    dense = frozen_copy(work)
    found = {item.name: item for item in select(dense, config).selected}
    judge = Judge(dense, few(batches), alone=True)
    measured = probed(ways, budget.spent, budget.uniform(), Prober(found, dense, judge, fitting, calibration.probes))
    budget = budget.as_measured(lambda known: known.spent(measured))
    uniform = budget.uniform()
    plans = {
        _MEASURED: (budget.spent(measured), source.metric),
        "predicted ranks": (budget.spent(ways), source.metric),
        f"uniform ranks ({source.metric})": (uniform, source.metric),
        "uniform ranks (activation)": (uniform, "activation"),
    }
    if not whole:
        return *plans[_MEASURED], None
    judge, judged = Judge(dense, batches), {}
    for name, (entries, metric) in each(plans.items(), "judging", "plan"):
        tried, same = WorkingCopy(dense), metric == source.metric
        apply(tried, RankPlan(entries), fitting if same else replace(fitting, metric=metric, kept=None))
        if math.isfinite(apart := judge(tried.model)):  # it rules out nothing that the dense model predicts
            judged[name] = apart
    if not judged:
        return *plans[_MEASURED], None
    best = min(judged, key=lambda name: judged[name])
    predicted = _predicted(best, plans, judged, measured) if plans[best][1] == source.metric else None
    seen = {name: float(f"{value:.4g}") for name, value in judged.items()}
    return *plans[best], Judgement(judge.unit, best, predicted and float(f"{predicted:.4g}"), seen, judge.examples)


def _predicted(
    chosen: str, plans: Mapping[str, tuple[dict[str, Entry], str]], judged: Mapping[str, float], ways: Ways
) -> float:
    """What the parts of a plan lose alone, times how much more than their parts the other plans of its metric lose, in
    the geometric mean."""
    entries, metric = plans[chosen]
    alone = {name: _alone(others, ways) for name, (others, its) in plans.items() if its == metric and name in judged}
    others = [name for name in alone if plans[name][0] != entries]
    more = [judged[name] / alone[name] for name in others if judged[name] > 0 and alone[name] > 0]  # not so by rounding
    return alone[chosen] * (geometric_mean(more) if more else 1.0)


def _alone(entries: dict[str, Entry], ways: Ways) -> float:
    """The sum of what these entries lose, each alone."""
    total = 0.0
    for group in ways.values():
        for name, options in group[0].sites.items():
            if (entry := entries.get(name)) in options.entries:  # of full rank otherwise
                total += float(options.errors[options.entries.index(entry)])
    return total
