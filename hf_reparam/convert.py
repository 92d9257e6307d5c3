"""`convert`: the whole flow, top to bottom. `summarize`: the same report for a model as it stands."""

from collections.abc import Iterable, Mapping
from typing import Any, Literal, TypeVar, overload

from torch import nn
from transformers import PreTrainedModel
from transformers.utils.logging import tqdm

from hf_reparam.calibration import collect_moments, layer_name
from hf_reparam.errors import PlanError, TargetError
from hf_reparam.hf.configuration import plan_of
from hf_reparam.hf.retype import check_unquantized, protected_layers, to_reparam
from hf_reparam.linalg import Moments
from hf_reparam.linalg.moments import METRICS
from hf_reparam.nn.ranks import Rank, choose_ranks
from hf_reparam.nn.surgery import factor, replace_modules
from hf_reparam.nn.targets import Skipped, Target, find_targets
from hf_reparam.plan import RankPlan
from hf_reparam.planning import check_budget, layer_metric, make_plan
from hf_reparam.report import ConversionReport, LayerReport, SkippedReport

__all__ = ["convert", "summarize"]

M = TypeVar("M", bound=nn.Module)
Calibration = Moments | Iterable[Mapping[str, Any]] | Iterable[str]


@overload
def convert(
    model: M,
    *,
    rank: Rank | None = ...,
    keep: float | None = ...,
    plan: RankPlan | None = ...,
    calibration: Calibration | None = ...,
    metric: str | None = ...,
    allocation: str | None = ...,
    multiple_of: int = ...,
    tokenizer: Any = ...,
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
    rank: Rank | None = ...,
    keep: float | None = ...,
    plan: RankPlan | None = ...,
    calibration: Calibration | None = ...,
    metric: str | None = ...,
    allocation: str | None = ...,
    multiple_of: int = ...,
    tokenizer: Any = ...,
    include: str | Iterable[str] | None = ...,
    exclude: str | Iterable[str] = ...,
    inplace: bool = ...,
    allow_larger: bool = ...,
    return_report: Literal[True],
) -> tuple[M, ConversionReport]: ...
def convert(
    model: M,
    *,
    rank: Rank | None = None,
    keep: float | None = None,
    plan: RankPlan | None = None,
    calibration: Calibration | None = None,
    metric: str | None = None,
    allocation: str | None = None,
    multiple_of: int = 1,
    tokenizer: Any = None,
    include: str | Iterable[str] | None = None,
    exclude: str | Iterable[str] = (),
    inplace: bool = False,
    allow_larger: bool = False,
    return_report: bool = False,
) -> M | tuple[M, ConversionReport]:
    """Replace dense layers by low-rank products W ~ up @ down.

    A `PreTrainedModel` comes back as its derived class (`BertForMaskedLM` -> `ReparamBertForMaskedLM`, still a
    `BertForMaskedLM`), ready for `save_pretrained`, `Trainer`, `generate` and `pipeline`. dtype, device,
    `requires_grad` and training mode are kept, shared modules stay shared, and a low-rank model can be converted again
    to lower ranks. If anything fails, the model is as it was.

    Give one of `rank`, `keep` and `plan`. With calibration data the factors minimise the error on that data instead of
    the error of the weights, and `keep` is spent where it lowers the loss most; without, they are truncated SVDs.

    Args:
        model: any `PreTrainedModel` or `nn.Module`.
        rank: an int; a float in (0, 1] for that fraction of min(in, out); or a mapping of name patterns to either, in
            which the first match decides and layers that none matches stay dense.
        keep: in (0, 1], share of the *targeted* layers' weights that together they may hold; ranks are chosen.
        plan: ranks from `make_plan`, or edited by hand.
        calibration: Moments from `collect_moments`, or what it takes: dicts for `model(**batch)`, or texts.
        metric: "svd", "activation" or "fisher" (the default with calibration data).
        allocation, multiple_of: how `keep` is spent, as in `make_plan`.
        tokenizer: for calibration texts.
        include: patterns of layers to convert, globs or `re:` expressions over the whole name; None for all.
        exclude: patterns of layers to leave alone; wins over include.
        inplace: change `model` itself. Otherwise the result is a copy, without a copy of the replaced tensors.
        allow_larger: with `rank`, also convert layers whose product would hold no fewer numbers than the layer.
        return_report: also return what was done, layer by layer, and what was left alone and why.

    Returns:
        The converted model, or the model and a ConversionReport.

    Raises:
        TargetError: a pattern matches nothing, or nothing would change; none or several of rank, keep and plan.
        RankError: a rank or `keep` is out of range, or higher than a low-rank layer's own.
        WeightError: a weight is not finite, on the meta device, or quantized.
        PlanError: the plan does not fit the model.

    Cost: one Gram matrix and one symmetric eigenproblem of order min(in, out) for each layer, and what
    `collect_moments` and `make_plan` cost.

    >>> net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    >>> small, report = convert(net, rank=16, return_report=True)
    >>> small[0], report.factored_before, report.factored_after
    (LowRankLinear(
      in_features=64, out_features=64, rank=16
      (down): Linear(in_features=64, out_features=16, bias=False)
      (up): Linear(in_features=16, out_features=64, bias=True)
    ), 4160, 2112)
    """
    if sum(option is not None for option in (rank, keep, plan)) != 1:
        raise TargetError("give exactly one of rank, keep and plan")
    pretrained = isinstance(model, PreTrainedModel)
    if pretrained:
        check_unquantized(model)
    targets = find_targets(model, include=include, exclude=exclude, protected=protected_layers(model))
    if keep is None:
        ranks, left = _ranks(model, targets.selected, rank, plan, allow_larger)  # errors before any long work
    else:
        check_budget(keep, multiple_of)
    moments = _moments(model, calibration, metric, tokenizer)
    if keep is not None:
        plan = make_plan(
            model,
            moments,
            keep=keep,
            metric=metric,
            allocation=allocation,
            multiple_of=multiple_of,
            include=include,
            exclude=exclude,
        )
        ranks, left = _ranks(model, targets.selected, None, plan, allow_larger)
    method = _method(metric, plan, moments)
    before, name = count_parameters(model), type(model).__name__
    layers, rows = {}, []
    for target in tqdm([t for t in targets.selected if t.name in ranks], desc="Factoring layers", unit="layer"):
        has_bias = target.bias_parameters > 0
        coordinates, mean = layer_metric(moments, layer_name(model, target), method, has_bias=has_bias)
        layer, error = factor(target, ranks[target.name], metric=coordinates, mean=mean)
        layers[target.module] = layer
        rows.append(_row(target, ranks[target.name], target.pair_parameters(ranks[target.name]), error))
    result = replace_modules(model, layers, inplace=inplace)
    if pretrained:
        result = to_reparam(result, method=method)
    if not return_report:
        return result
    skipped = _skipped([*left, *targets.skipped])
    return result, ConversionReport(name, method, tuple(rows), skipped, before, count_parameters(result))


def _moments(model: nn.Module, calibration: Calibration | None, metric: str | None, tokenizer: Any) -> Moments | None:
    if calibration is None or isinstance(calibration, Moments):
        if metric not in (None, "svd") and calibration is None:
            raise TargetError(f"the metric {metric!r} needs calibration data: give calibration=")
        return calibration
    return collect_moments(model, calibration, metric=metric or "fisher", tokenizer=tokenizer)


def _method(metric: str | None, plan: RankPlan | None, moments: Moments | None) -> str:
    method = metric or (plan.method if plan is not None else moments.metric if moments is not None else "svd")
    if method not in METRICS:
        raise TargetError(f"metric must be one of {list(METRICS)}, got {method!r}")
    if method != "svd" and moments is None:
        raise TargetError(f"the plan was made in the {method} metric: give the same moments as calibration=")
    return method


def _ranks(
    model: nn.Module, targets: tuple[Target, ...], rank: Rank | None, plan: RankPlan | None, allow_larger: bool
) -> tuple[dict[str, int], list[Skipped]]:
    """The rank of each layer to convert, and the reason why the others stay."""
    if plan is None:
        if rank is None:
            raise TargetError("give exactly one of rank, keep and plan")
        chosen, skipped = choose_ranks(targets, rank, allow_larger=allow_larger)
        return chosen, list(skipped)
    named = {layer_name(model, target): target for target in targets}
    unknown = sorted(set(plan.modules) - set(named))
    if unknown:
        raise PlanError(f"the plan names {len(unknown)} layers that cannot be converted here, among them {unknown[:3]}")
    if not plan.modules:
        raise TargetError("the plan makes no layer low-rank: there is nothing to convert")
    ranks = {}
    for name, spec in plan.modules.items():
        if spec.rank > (named[name].rank or named[name].full_rank):
            raise PlanError(
                f"{name}: the plan gives it rank {spec.rank}, above the {named[name].full_rank} it can have"
            )
        ranks[named[name].name] = spec.rank
    dense = [t for t in targets if t.name not in ranks]
    return ranks, [Skipped(t.name, t.kind, t.parameters, "the plan leaves it dense") for t in dense]


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
    targets = find_targets(model, protected=protected_layers(model))
    low = [t for t in targets.selected if t.rank is not None]
    dense = [t for t in targets.selected if t.rank is None]
    after = count_parameters(model)
    before = after + sum(t.dense_parameters - t.parameters for t in low)
    rows = tuple(_row(t, t.rank, t.parameters, None) for t in low or dense)
    left = [Skipped(t.name, t.kind, t.parameters, "dense") for t in dense] if low else []
    method = plan_of(model.config).method if isinstance(model, PreTrainedModel) else "svd"
    return ConversionReport(type(model).__name__, method, rows, _skipped([*left, *targets.skipped]), before, after)


def count_parameters(model: nn.Module) -> int:
    """Numbers in a model's parameters, shared ones counted once."""
    return sum(p.numel() for p in model.parameters())


def _row(target: Target, rank: int | None, after: int, error: float | None) -> LayerReport:
    shape = (target.in_features, target.out_features)
    return LayerReport(target.name, target.kind, *shape, rank, target.dense_parameters, after, error)


def _skipped(items: Iterable[Skipped]) -> tuple[SkippedReport, ...]:
    return tuple(SkippedReport(item.name, item.kind, item.parameters, item.reason) for item in items)
