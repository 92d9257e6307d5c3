"""`report`: what a model holds with fewer parameters, and what it could."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import nn

from hf_reparam.config import LowRankConfig
from hf_reparam.layers.copies import WorkingCopy
from hf_reparam.layers.factored import Factored
from hf_reparam.model.checks import count_parameters
from hf_reparam.model.config import plan_of
from hf_reparam.model.host import check_model, hosts, layer_name, metric_of, opened
from hf_reparam.model.sites import Found, Selection, fit, select
from hf_reparam.plan import ConversionRecord, Entry, RankPlan
from hf_reparam.report import LEFT, LayerReport, Report, SkippedReport
from hf_reparam.structures import STRUCTURES


def report(model: nn.Module) -> Report:
    """Report on a model as it stands, from shapes alone: what is of low rank, or the layers that could be converted.

    Args:
        model: any module, on any device, the meta device included.

    Returns:
        A Report. For a converted model `parameters_before` are those of the dense model, and errors are those with
        which its factors were made, where they are known.

    Raises:
        TargetError: no model.

    >>> from hf_reparam.compress.convert import convert
    >>> print(report(convert(nn.Sequential(nn.Linear(64, 64)), rank=16)))  # doctest: +ELLIPSIS
    Sequential: 1 low-rank layers (svd)
    factored layers:  4,160 -> 2,112 parameters (50.8%)
    <BLANKLINE>
    layer  in x out  rank  parameters      error
    --------------------------------------------
    0      64 x 64   16    4,160 -> 2,112  0...
    <BLANKLINE>
    whole model:      4,160 -> 2,112 parameters (50.8%)
    """
    check_model(model)
    work = opened(model).model
    found = [Found(layer_name(work, site.name), kind, site) for kind in STRUCTURES for site in kind.sites(work)]
    found = [item for item in found if item.site.entry is not None]
    selection = select(work, LowRankConfig())
    dense = [item for item in selection.selected if item.site.entry is None]
    plans = {start: plan_of(host.config) for start, host in hosts(model).items()}
    records = [plan.record for plan in plans.values() if plan.record is not None]
    rows = [replace(_row(item, item.site.entry), **_made(item, plans)) for item in found]
    left = _left(dense) if rows else []
    rows = rows or [_row(item, None) for item in dense]
    after = count_parameters(model)
    before = after + sum(item.parameters_before - item.parameters_after for item in rows)
    again = sum(record.refitted_layers for record in records)
    skipped = (*left, *selection.skipped)
    judgement = next((record.judgement for record in records if record.judgement), None)
    speed = next((record.speed for record in records if record.speed), None)
    whole = Report(type(model).__name__, metric_of(model), tuple(rows), skipped, before, after, again)
    return replace(whole, judgement=judgement, speed=speed)


def planned(model: nn.Module, plan: RankPlan, selection: Selection) -> Report:
    """What a plan will make of a model, as `opened` shows it, of which this could have been selected."""
    narrowed = any(structure.changes_moments and plan.of(structure.forms) for structure in STRUCTURES)
    work, rows = WorkingCopy(model).model if narrowed else model, []
    taken: set[str] = set()
    for structure in STRUCTURES:
        for found, entry in fit(plan, work, structure, strict=True).values():
            rows.append(_row(found, entry))
            taken.update(found.site.names)
            if structure.changes_moments:
                structure.skeleton(found.site, entry).install(work)
    there = {name for named in (work.named_modules, work.named_parameters) for name, _ in named(remove_duplicate=False)}
    free = there - taken
    dense = [found for found in selection.selected if found.site.weights and found.site.name in free]
    left = (*_left(dense), *(item for item in selection.skipped if item.name not in taken))
    before = count_parameters(model)
    after = before - sum(item.parameters_before - item.parameters_after for item in rows)
    return Report(type(model).__name__, plan.metric, tuple(rows), left, before, after)


def _left(dense: list[Found]) -> list[SkippedReport]:
    return [SkippedReport(f.site.name, f.site.kind, f.site.weights + f.site.others, LEFT) for f in dense]


def _row(found: Found, entry: Entry | None) -> LayerReport:
    """What the report says of a site that has, or would have, an entry."""
    site = found.site
    before = site.dense_numbers(entry)
    after = before if entry is None else found.structure.cost(site, entry) + site.others
    rank, form = (None, None) if entry is None else (entry.rank, entry.form)
    return LayerReport(site.name, site.kind, site.in_features, site.out_features, rank, before, after, None, form)


def _made(found: Found, plans: Mapping[str, RankPlan]) -> dict[str, Any]:
    """Error, metric and former rank of a site, from the module itself or from the record of its model."""
    module = found.site.module
    if isinstance(module, Factored) and (module.error is not None or module.from_rank is not None):
        return {"error": module.error, "metric": module.metric, "from_rank": module.from_rank}
    for start, plan in plans.items():
        local, record = found.name.removeprefix(start), plan.record or ConversionRecord()
        if found.name.startswith(start) and local in record.errors:
            return {"error": record.errors[local], "metric": record.metrics.get(local, plan.metric)}
    return {}
