"""`convert`: the whole flow, top to bottom. `summarize`: the same report for a model as it stands."""

from collections.abc import Iterable
from typing import Literal, TypeVar, overload

from torch import nn
from transformers import PreTrainedModel
from transformers.utils.logging import tqdm

from hf_reparam.hf.retype import check_unquantized, protected_layers, to_reparam
from hf_reparam.nn.ranks import Rank, choose_ranks
from hf_reparam.nn.surgery import factor, replace_modules
from hf_reparam.nn.targets import Skipped, Target, find_targets
from hf_reparam.report import ConversionReport, LayerReport, SkippedReport

__all__ = ["convert", "summarize"]

M = TypeVar("M", bound=nn.Module)


@overload
def convert(
    model: M,
    *,
    rank: Rank,
    include: str | Iterable[str] | None = ...,
    exclude: str | Iterable[str] = ...,
    inplace: bool = ...,
    allow_larger: bool = ...,
    return_report: Literal[False] = ...,
) -> M: ...
@overload
def convert(
    model: M,
    *,
    rank: Rank,
    include: str | Iterable[str] | None = ...,
    exclude: str | Iterable[str] = ...,
    inplace: bool = ...,
    allow_larger: bool = ...,
    return_report: Literal[True],
) -> tuple[M, ConversionReport]: ...
def convert(
    model: M,
    *,
    rank: Rank,
    include: str | Iterable[str] | None = None,
    exclude: str | Iterable[str] = (),
    inplace: bool = False,
    allow_larger: bool = False,
    return_report: bool = False,
) -> M | tuple[M, ConversionReport]:
    """Replace dense layers by low-rank products W ~ up @ down, from the truncated SVD of each weight.

    A `PreTrainedModel` comes back as its derived class (`BertForMaskedLM` -> `ReparamBertForMaskedLM`, still a
    `BertForMaskedLM`), ready for `save_pretrained`, `Trainer`, `generate` and `pipeline`. dtype, device,
    `requires_grad` and training mode are kept, shared modules stay shared, and a low-rank model can be converted again
    to lower ranks. If anything fails, the model is as it was.

    Args:
        model: any `PreTrainedModel` or `nn.Module`.
        rank: an int; a float in (0, 1] for that fraction of min(in, out); or a mapping of name patterns to either, in
            which the first match decides and layers that none matches stay dense.
        include: patterns of layers to convert, globs or `re:` expressions over the whole name; None for all.
        exclude: patterns of layers to leave alone; wins over include.
        inplace: change `model` itself. Otherwise the result is a copy, without a copy of the replaced tensors.
        allow_larger: also convert layers whose product would hold no fewer numbers than the layer.
        return_report: also return what was done, layer by layer, and what was left alone and why.

    Returns:
        The converted model, or the model and a ConversionReport.

    Raises:
        TargetError: a pattern matches nothing, or nothing would change.
        RankError: a rank is out of range, or higher than a low-rank layer's own.
        WeightError: a weight is not finite, on the meta device, or quantized.

    Cost: one Gram matrix and one symmetric eigenproblem of order min(in, out) for each layer.

    >>> net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    >>> small, report = convert(net, rank=16, return_report=True)
    >>> small[0], report.factored_before, report.factored_after
    (LowRankLinear(
      in_features=64, out_features=64, rank=16
      (down): Linear(in_features=64, out_features=16, bias=False)
      (up): Linear(in_features=16, out_features=64, bias=True)
    ), 4160, 2112)
    """
    pretrained = isinstance(model, PreTrainedModel)
    if pretrained:
        check_unquantized(model)
    targets = find_targets(
        model, include=include, exclude=exclude, protected=protected_layers(model) if pretrained else None
    )
    ranks, useless = choose_ranks(targets.selected, rank, allow_larger=allow_larger)
    chosen = [target for target in targets.selected if target.name in ranks]
    before = count_parameters(model)
    layers, rows = {}, []
    for target in tqdm(chosen, desc="Factoring layers", unit="layer"):
        layer, error = factor(target, ranks[target.name])
        layers[target.module] = layer
        rows.append(_row(target, ranks[target.name], target.pair_parameters(ranks[target.name]), error))
    name = type(model).__name__
    result = replace_modules(model, layers, inplace=inplace)
    if pretrained:
        result = to_reparam(result, method="svd")
    if not return_report:
        return result
    skipped = _skipped([*useless, *targets.skipped])
    return result, ConversionReport(name, "svd", tuple(rows), skipped, before, count_parameters(result))


def summarize(model: nn.Module) -> ConversionReport:
    """Report on a model as it stands, from shapes alone: its low-rank layers, or the layers that could be converted.

    Args:
        model: any module, on any device, the meta device included.

    Returns:
        A ConversionReport without errors. For a converted model, `parameters_before` are those of the dense model.

    >>> print(summarize(convert(nn.Sequential(nn.Linear(64, 64)), rank=16)))
    Sequential: 1 low-rank layers (svd)
    factored layers:  4,160 -> 2,112 parameters (50.8%)
    whole model:      4,160 -> 2,112 parameters (50.8%)
    <BLANKLINE>
    layer  type    in x out  rank  parameters      error
    ----------------------------------------------------
    0      Linear  64 x 64   16    4,160 -> 2,112  -
    """
    protected = protected_layers(model) if isinstance(model, PreTrainedModel) else None
    targets = find_targets(model, protected=protected)
    low = [t for t in targets.selected if t.rank is not None]
    dense = [t for t in targets.selected if t.rank is None]
    after = count_parameters(model)
    before = after + sum(t.dense_parameters - t.parameters for t in low)
    rows = tuple(_row(t, t.rank, t.parameters, None) for t in low or dense)
    left = [Skipped(t.name, t.kind, t.parameters, "dense") for t in dense] if low else []
    return ConversionReport(type(model).__name__, "svd", rows, _skipped([*left, *targets.skipped]), before, after)


def count_parameters(model: nn.Module) -> int:
    """Numbers in a model's parameters, shared ones counted once."""
    return sum(p.numel() for p in model.parameters())


def _row(target: Target, rank: int | None, after: int, error: float | None) -> LayerReport:
    shape = (target.in_features, target.out_features)
    return LayerReport(target.name, target.kind, *shape, rank, target.dense_parameters, after, error)


def _skipped(items: Iterable[Skipped]) -> tuple[SkippedReport, ...]:
    return tuple(SkippedReport(item.name, item.kind, item.parameters, item.reason) for item in items)
