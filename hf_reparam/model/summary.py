"""`report`: what a model holds in fewer numbers, and what it could."""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from torch import nn

from hf_reparam.config import LowRankConfig
from hf_reparam.layers.copies import working_copy
from hf_reparam.layers.factored import Factored
from hf_reparam.model.checks import count_parameters
from hf_reparam.model.config import ReparamConfigMixin, plan_of
from hf_reparam.model.host import check_model, hosts, layer_name, metric_of, opened
from hf_reparam.model.sites import Found, Selection, fit, select
from hf_reparam.plan import Entry, RankPlan
from hf_reparam.record import ConversionRecord
from hf_reparam.report import LayerReport, Report, SkippedReport
from hf_reparam.structures import STRUCTURES
from hf_reparam.structures.structure import Site

__all__ = ["planned", "report", "row"]


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
    whole model:      4,160 -> 2,112 parameters (50.8%)
    <BLANKLINE>
    layer  type    in x out  rank  parameters      error
    ----------------------------------------------------
    0      Linear  64 x 64   16    4,160 -> 2,112  0...
    """
    check_model(model)
    work = opened(model).model
    low = [(structure, site) for structure in STRUCTURES for site in structure.sites(work) if site.entry is not None]
    selection = select(work, LowRankConfig())
    dense = [found for found in selection.selected if found.site.entry is None]
    known = _records(model)
    after = count_parameters(model)
    if not low:
        return _report(model, [row(found, None) for found in dense], selection.skipped, after, after)
    rows = []
    for structure, site in low:
        name = layer_name(work, site.name)
        made = row(Found(name, structure, site), site.entry)
        rows.append(replace(made, **_made(name, site, known)))
    left = [SkippedReport(f.site.name, f.site.kind, f.site.weights + f.site.others, "dense") for f in dense]
    before = after + sum(item.parameters_before - item.parameters_after for item in rows)
    made_again = sum(record.refitted_layers for record in known.values())
    whole = _report(model, rows, [*left, *selection.skipped], before, after)
    return replace(whole, refitted_layers=made_again)


def planned(model: nn.Module, plan: RankPlan, selection: Selection) -> Report:
    """What a plan will make of a model.

    Args:
        model: as `opened` shows it.
        plan: the plan.
        selection: what could have been chosen.
    """
    work, rows = working_copy(model), []
    taken: set[str] = set()
    for structure in STRUCTURES:
        for found, entry in fit(plan, work, structure, strict=True).values():
            rows.append(row(found, entry))
            taken.update(found.site.names)
            if structure.changes_moments:
                structure.skeleton(found.site, entry).install(work)
    modules = dict(work.named_modules(remove_duplicate=False))
    left = [
        SkippedReport(f.site.name, f.site.kind, f.site.weights + f.site.others, "the plan leaves it dense")
        for f in selection.selected
        if f.site.weights and f.site.name not in taken and f.site.name in modules
    ]
    skipped = [item for item in selection.skipped if item.name not in taken]
    before = count_parameters(model)
    after = before - sum(item.parameters_before - item.parameters_after for item in rows)
    return replace(_report(model, rows, [*left, *skipped], before, after), metric=plan.metric)


def row(found: Found, entry: Entry | None) -> LayerReport:
    """What the report says of a site that has, or would have, an entry."""
    site = found.site
    before = site.dense_numbers(entry)
    after = before if entry is None else found.structure.cost(site, entry) + site.others
    rank, form = (None, None) if entry is None else (entry.rank, entry.form)
    return LayerReport(site.name, site.kind, site.in_features, site.out_features, rank, before, after, None, form)


def _report(
    model: nn.Module, rows: Iterable[LayerReport], skipped: Iterable[SkippedReport], before: int, after: int
) -> Report:
    return Report(type(model).__name__, metric_of(model), tuple(rows), tuple(skipped), before, after)


def _records(model: nn.Module) -> dict[str, ConversionRecord]:
    """Start of names in a plan -> the record of the Transformers model there."""
    found = {f"{path}." if path else "": host.config for path, host in hosts(model).items()}
    records = {start: plan_of(c).record for start, c in found.items() if isinstance(c, ReparamConfigMixin)}
    return {start: record for start, record in records.items() if record is not None}


def _made(name: str, site: Site, records: Mapping[str, ConversionRecord]) -> dict[str, Any]:
    """Error, metric and former rank of a site, from the module itself or from the record of its model."""
    module = site.module
    if isinstance(module, Factored) and (module.error is not None or module.from_rank is not None):
        return {"error": module.error, "metric": module.metric, "from_rank": module.from_rank}
    for start, record in records.items():
        if name.startswith(start) and (local := name.removeprefix(start)) in record.errors:
            return {"error": record.errors[local], "metric": record.metrics.get(local)}
    return {}
