"""`summarize`: a report of a model as it stands."""

from collections.abc import Iterable, Mapping

from torch import nn

from hf_reparam.layers.embedding import LowRankEmbedding, Tables
from hf_reparam.layers.heads import find_attentions
from hf_reparam.layers.targets import Skipped, Target
from hf_reparam.model.host import check_model, layer_name, method_of
from hf_reparam.model.inspection import count_parameters, find_layers, with_projections
from hf_reparam.model.tables import TableGroup, table_groups
from hf_reparam.plan import LayerSpec
from hf_reparam.report import ConversionReport, HeadsReport, LayerReport, SkippedReport

__all__ = ["heads_reports", "layer_report", "skipped_reports", "summarize", "table_report"]


@with_projections
def summarize(model: nn.Module) -> ConversionReport:
    """Report on a model as it stands, from shapes alone: its low-rank layers, or the layers that could be converted.

    Args:
        model: any module, on any device, the meta device included.

    Returns:
        A ConversionReport without errors. For a converted model, `parameters_before` are those of the dense model.

    >>> from hf_reparam.compress.convert import convert
    >>> print(summarize(convert(nn.Sequential(nn.Linear(64, 64)), rank=16)))
    Sequential: 1 low-rank layers (svd)
    factored layers:  4,160 -> 2,112 parameters (50.8%)
    whole model:      4,160 -> 2,112 parameters (50.8%)
    <BLANKLINE>
    layer  type    in x out  rank  parameters      error
    ----------------------------------------------------
    0      Linear  64 x 64   16    4,160 -> 2,112  -
    """
    check_model(model)
    targets = find_layers(model)
    low = [t for t in targets.selected if t.spec is not None or t.stock_shape is not None]
    dense = [t for t in targets.selected if t.spec is None and t.stock_shape is None]
    after = count_parameters(model)
    before = after + sum(t.stock_parameters - t.parameters for t in low)
    low_tables = [group for group in table_groups(model) if isinstance(group.module, Tables)]
    tables = tuple(table_report(group, group.module.rank, None) for group in low_tables)
    before += sum(row.parameters_before - row.parameters_after for row in tables)
    done = low or tables
    rows = (*(layer_report(t, t.spec, t.parameters, None) for t in (low if done else dense)), *tables)
    left = [Skipped(t.name, t.kind, t.parameters, "dense") for t in dense] if done else []
    return ConversionReport(
        type(model).__name__,
        method_of(model),
        rows,
        skipped_reports([*left, *targets.skipped]),
        before,
        after,
        heads=heads_reports(model),
    )


def table_report(group: TableGroup, rank: int, error: float | None) -> LayerReport:
    """What the report says of a table of this rank."""
    tokens, width = group.shape
    kind = "Embedding" if isinstance(group.module, (nn.Embedding, LowRankEmbedding)) else "Linear"
    bias = 0 if (found := getattr(group.module, "bias", None)) is None else found.numel()
    sizes = (tokens * width + bias, rank * (tokens + width) + bias)
    shape = (tokens, width) if kind == "Embedding" else (width, tokens)
    return LayerReport(group.path, kind, *shape, rank, *sizes, error, "pair")


def heads_reports(model: nn.Module, errors: Mapping[str, float] | None = None) -> tuple[HeadsReport, ...]:
    """What the report says of attentions with narrower heads; `errors` by their names in a plan."""
    narrow = [attention for attention in find_attentions(model) if attention.narrowed]
    known = errors or {}
    return tuple(
        HeadsReport(a.name, a.heads, a.stock_width, a.width, known.get(layer_name(model, a.name))) for a in narrow
    )


def layer_report(
    target: Target, spec: LayerSpec | None, after: int, error: float | None, metric: str | None = None
) -> LayerReport:
    """What the report says of a layer that has, or would have, this spec and so many parameters."""
    shape = (target.in_features, target.out_features)
    rank, form = (None, None) if spec is None else (spec.rank, spec.form)
    return LayerReport(target.name, target.kind, *shape, rank, target.stock_parameters, after, error, form, metric)


def skipped_reports(items: Iterable[Skipped]) -> tuple[SkippedReport, ...]:
    """What the report says of weights that are left alone."""
    return tuple(SkippedReport(item.name, item.kind, item.parameters, item.reason) for item in items)
