"""`convert`: the whole flow, top to bottom."""

import functools
import math
import os
import warnings
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal, TypeVar, overload

from torch import nn
from transformers import PreTrainedModel
from transformers.utils.logging import tqdm

from hf_reparam.calibrate.batches import kept
from hf_reparam.calibrate.collect import LossFunction, collect_moments, layer_name
from hf_reparam.calibrate.items import check_data
from hf_reparam.compress.decomposition import Decompositions, as_decompositions, check_fit
from hf_reparam.compress.factoring import factor_layers, factor_tables
from hf_reparam.compress.narrowing import narrowed
from hf_reparam.compress.planning import MIN_RANK, Chosen, check_budget, fit_plan, make_plan
from hf_reparam.errors import RankError, TargetError
from hf_reparam.layers.attention import join_dense
from hf_reparam.layers.patterns import as_patterns
from hf_reparam.layers.ranks import Rank, choose_ranks
from hf_reparam.layers.surgery import check_copyable, replace_modules, undone_on_error
from hf_reparam.layers.targets import Target, Targets, no_layer
from hf_reparam.linalg import Moments
from hf_reparam.model.auto import check_loadable
from hf_reparam.model.host import check_model, unwrapped
from hf_reparam.model.inspection import (
    check_convertible,
    check_no_adapters,
    check_unquantized,
    count_parameters,
    find_layers,
    named_by,
    with_projections,
)
from hf_reparam.model.offload import mark_offloaded, recall
from hf_reparam.model.processes import distributed
from hf_reparam.model.retype import retype
from hf_reparam.model.summary import heads_reports, layer_report, skipped_reports
from hf_reparam.model.tables import check_tables
from hf_reparam.plan import FORMS, RankPlan
from hf_reparam.record import ConversionRecord
from hf_reparam.recover.refit import refit
from hf_reparam.report import ConversionReport, LayerReport, RefitReport, SkippedReport

__all__ = ["convert"]

M = TypeVar("M", bound=nn.Module)
Calibration = Moments | Decompositions | Iterable[Mapping[str, Any]] | Iterable[str]
Evaluate = Callable[[Any], float]

_HALVINGS = 7


@overload
def convert(
    model: M,
    *,
    rank: Rank | None = ...,
    keep: float | None = ...,
    target_params: int | None = ...,
    tolerance: float | None = ...,
    plan: RankPlan | None = ...,
    calibration: Calibration | None = ...,
    evaluate: Evaluate | None = ...,
    metric: str | None = ...,
    allocation: str | None = ...,
    form: str | None = ...,
    multiple_of: int = ...,
    min_rank: int = ...,
    joint: bool | None = ...,
    embeddings: bool = ...,
    refit: bool = ...,
    solver: str = ...,
    tokenizer: Any = ...,
    max_length: int | None = ...,
    max_samples: int | None = ...,
    loss_fn: LossFunction | None = ...,
    include: str | Iterable[str] | None = ...,
    exclude: str | Iterable[str] = ...,
    inplace: bool = ...,
    allow_larger: bool = ...,
    max_memory: int | str | None = ...,
    offload_folder: str | os.PathLike[str] | None = ...,
    return_report: Literal[False] = ...,
) -> M: ...
@overload
def convert(
    model: M,
    *,
    rank: Rank | None = ...,
    keep: float | None = ...,
    target_params: int | None = ...,
    tolerance: float | None = ...,
    plan: RankPlan | None = ...,
    calibration: Calibration | None = ...,
    evaluate: Evaluate | None = ...,
    metric: str | None = ...,
    allocation: str | None = ...,
    form: str | None = ...,
    multiple_of: int = ...,
    min_rank: int = ...,
    joint: bool | None = ...,
    embeddings: bool = ...,
    refit: bool = ...,
    solver: str = ...,
    tokenizer: Any = ...,
    max_length: int | None = ...,
    max_samples: int | None = ...,
    loss_fn: LossFunction | None = ...,
    include: str | Iterable[str] | None = ...,
    exclude: str | Iterable[str] = ...,
    inplace: bool = ...,
    allow_larger: bool = ...,
    max_memory: int | str | None = ...,
    offload_folder: str | os.PathLike[str] | None = ...,
    return_report: Literal[True],
) -> tuple[M, ConversionReport]: ...
@with_projections
def convert(
    model: M,
    *,
    rank: Rank | None = None,
    keep: float | None = None,
    target_params: int | None = None,
    tolerance: float | None = None,
    plan: RankPlan | None = None,
    calibration: Calibration | None = None,
    evaluate: Evaluate | None = None,
    metric: str | None = None,
    allocation: str | None = None,
    form: str | None = None,
    multiple_of: int = 1,
    min_rank: int = MIN_RANK,
    joint: bool | None = None,
    embeddings: bool = False,
    refit: bool = False,
    solver: str = "exact",
    tokenizer: Any = None,
    max_length: int | None = None,
    max_samples: int | None = None,
    loss_fn: LossFunction | None = None,
    include: str | Iterable[str] | None = None,
    exclude: str | Iterable[str] = (),
    inplace: bool = False,
    allow_larger: bool = False,
    max_memory: int | str | None = None,
    offload_folder: str | os.PathLike[str] | None = None,
    return_report: bool = False,
) -> M | tuple[M, ConversionReport]:
    """Replace dense layers by low-rank products W ~ up @ down.

    A `PreTrainedModel` comes back as its derived class (`BertForMaskedLM` -> `ReparamBertForMaskedLM`, still a
    `BertForMaskedLM`), ready for `save_pretrained`, `Trainer`, `generate` and `pipeline`. dtype, device,
    `requires_grad` and training mode are kept, shared modules stay shared, and a low-rank model can be converted again
    to lower ranks. If anything fails, the model is as it was.

    Give one of `rank`, `keep`, `target_params`, `tolerance` and `plan`. With calibration data the factors minimise the
    error on that data instead of the error of the weights, and the budget is spent where it lowers the loss most;
    without, they are truncated SVDs.

    Args:
        model: any `PreTrainedModel` or `nn.Module`. Transformers models inside another object (SentenceTransformer,
            CrossEncoder, `torch.compile`, DataParallel, a container or a class of your own) get derived classes and
            plans of their own, and save as such. Outside of them the projections of an `nn.MultiheadAttention` are
            layers, too; what an object with a `save_pretrained` saves by itself stays dense. One that accelerate has
            dispatched (`device_map=`) gets its new layers on the devices where the old ones compute.
        rank: an int; a float in (0, 1] for that fraction of min(in, out); or a mapping of name patterns to either, in
            which the first match decides and layers that none matches stay dense.
        keep: in (0, 1], share of the *targeted* layers' weights that together they may hold; ranks are chosen. At 1.0
            nothing has to be factored: the result has no low-rank layer, and works as any other.
        target_params: parameters that the *whole* model may have; ranks are chosen.
        tolerance: how much lower than the dense model's the score of `evaluate` may be; the smallest size that holds it
            is sought by bisection over `keep`, in steps of 1/128.
        plan: ranks from `make_plan`, or edited by hand.
        calibration: Moments from `collect_moments`, or what it takes (dicts for `model(**batch)`, a `datasets.Dataset`,
            texts), or what `decompose` returned.
        evaluate: model -> score, higher is better; with `tolerance`.
        metric: "svd", "activation" or "fisher" (the default with calibration data).
        allocation, multiple_of, min_rank, joint, embeddings: how the budget is spent, and on what, as in `make_plan`.
        form: "pair" (default with `rank`), or "pivoted" (default otherwise): the same function of x in fewer numbers.
        refit: fit the factors once more to the inputs that the low-rank layers before them give, as `refit` does; takes
            the calibration data itself, which is then held in memory.
        solver: "exact", or "randomized": faster where ranks are small, see `hf_reparam.linalg.decompose`.
        tokenizer, max_length, max_samples: for calibration texts, and how much of the data is used, as for
            `collect_moments`.
        loss_fn: (model, batch) -> scalar summed over the batch, for calibration in the fisher metric, as for
            `collect_moments`.
        include: patterns of layers to convert, globs or `re:` expressions over the whole name. None for all, except
            what stays dense by default in Transformers models: task heads, poolers and the routers of experts. They are
            converted where `include` matches them, or where `rank` or a plan names them.
        exclude: patterns of layers to leave alone; wins over include.
        inplace: change `model` itself; new layers wait in a temporary folder until the old ones are freed. Otherwise
            the result is a copy, without a copy of the replaced tensors.
        allow_larger: with `rank`, also convert layers whose product would hold no fewer numbers than the layer.
        max_memory: what moments of calibration data may take, as for `collect_moments`; they are kept in a temporary
            folder.
        offload_folder: where new layers stay until they compute, for models that exceed memory, loaded with a
            `device_map` that leaves layers on disk. A layer that is there from an earlier, broken run of the same
            conversion (the same weights, moments and options, to the last bit) is not made again.
        return_report: also return what was done, layer by layer, and what was left alone and why.

    Returns:
        The converted model, or the model and a ConversionReport.

    Raises:
        TargetError: no model, or one that cannot be copied, is sharded, has adapters that are not merged, or came with
            `trust_remote_code` and is not registered with the Auto classes; a pattern matches nothing, or nothing would
            change; none or several sizes were given.
        RankError: a size is out of range, or higher than a low-rank layer's own, or no size holds the tolerance.
        WeightError: a weight is not finite, on the meta device, or quantized, or moments are of another model.
        PlanError: the plan does not fit the model.
        CheckpointError: `offload_folder` holds layers of another conversion, or another process is filling it.

    Cost: one Gram matrix and one symmetric eigenproblem of order min(in, out) for each layer, and what
    `collect_moments` and `make_plan` cost; with `tolerance` eight evaluations. Memory: with `inplace`, that of the
    model and two to four times the largest layer in float64, in the metric of calibration data its moments, too. In a
    distributed run every process has to call this; layers are shared out, and all get the whole model.

    >>> net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    >>> small, report = convert(net, rank=16, return_report=True)
    >>> small[0], report.factored_before, report.factored_after
    (LowRankLinear(
      in_features=64, out_features=64, rank=16, form=pair
      (down): Linear(in_features=64, out_features=16, bias=False)
      (up): Linear(in_features=16, out_features=64, bias=True)
    ), 4160, 2112)
    """
    check_model(model)
    sizes = (rank, keep, target_params, tolerance, plan)
    _check_options(*sizes, evaluate, form, multiple_of, min_rank, embeddings=embeddings)
    reading = {"tokenizer": tokenizer, "max_length": max_length, "max_samples": max_samples}
    _check_calibration(calibration, max_length, max_samples)
    data = _kept_for_refit(model, calibration, max_samples, offload_folder) if refit else None
    include, exclude = as_patterns(include, "include"), as_patterns(exclude, "exclude") or ()
    find = functools.partial(find_layers, model, include=include, exclude=exclude, asked=named_by(model, rank, plan))
    targets = _targets(model, find, plan, inplace=inplace)
    chosen: Chosen | None = None  # ranks that are given are judged before any long work
    if rank is not None:
        chosen = choose_ranks(targets.selected, rank, form=form or "pair", allow_larger=allow_larger)
    elif plan is not None and not plan.head_widths:
        fit_plan(model, targets.selected, plan)
    with ExitStack() as scratch:
        watched = {**reading, "loss_fn": loss_fn, "include": [target.name for target in targets.selected]}
        moments = _moments(model, calibration if data is None else data, metric, watched, max_memory, scratch)
        source = as_decompositions(moments, metric or (plan.method if plan is not None else None), solver)
        check_fit(model, targets.selected, source)
        if chosen is None and plan is None:
            plan_for = functools.partial(make_plan, model, form=form or "pivoted", multiple_of=multiple_of)
            plan_for = functools.partial(plan_for, min_rank=min_rank)
            plan_for = functools.partial(plan_for, allocation=allocation, include=include, exclude=exclude)
            plan_for = functools.partial(plan_for, joint=joint, embeddings=embeddings)
            if tolerance is not None and evaluate is not None:
                plan = _search(model, targets.selected, source, tolerance, evaluate, plan_for)
            else:
                plan = plan_for(source, keep=keep, target_params=target_params)
        before, name, whole = count_parameters(model), type(model).__name__, source.moments
        folder = _folder(offload_folder, scratch, temporary=inplace and not refit)
        widths, on_disk = {} if plan is None else plan.head_widths, None if offload_folder is None else folder
        source, narrowing = scratch.enter_context(narrowed(model, widths, source, on_disk, keep=inplace))
        if plan is not None:
            if widths:
                targets = find()
            chosen = fit_plan(model, targets.selected, plan)
            if not (plan.modules or widths or plan.embeddings):
                warnings.warn("nothing was factored: the size leaves every layer dense", stacklevel=3)
        layers, rows, skipped = _factor(model, targets, chosen or ({}, ()), plan, source, folder)
        refitted = None if data is None else _refit(model, layers, data, source.moments, reading)
        record = _record(model, replace(source, moments=whole), rows, refitted, narrowing)
        result = _install(model, layers, source.metric, record, inplace=inplace)
        if offload_folder is not None:
            mark_offloaded(result, {row.name for row in rows})
        elif folder is not None:
            del targets
            _bring_in(layers)
    if not return_report:
        return result
    after, heads = count_parameters(result), heads_reports(result, narrowing)
    return result, ConversionReport(name, source.metric, rows, skipped, before, after, refitted, heads)


def _check_options(
    rank: Rank | None,
    keep: float | None,
    target_params: int | None,
    tolerance: float | None,
    plan: RankPlan | None,
    evaluate: Evaluate | None,
    form: str | None,
    multiple_of: int,
    min_rank: int,
    *,
    embeddings: bool,
) -> None:
    if sum(option is not None for option in (rank, keep, target_params, tolerance, plan)) != 1:
        raise TargetError("give exactly one of rank, keep, target_params, tolerance and plan")
    if form is not None and (form not in FORMS or plan is not None):
        raise TargetError(f"form must be one of {list(FORMS)}, and a plan has forms of its own; got {form!r}")
    if keep is not None or target_params is not None:
        check_budget(keep, target_params, multiple_of, min_rank)
    if (tolerance is None) != (evaluate is None):
        raise TargetError("tolerance= and evaluate= belong together: evaluate(model) gives a score, higher is better")
    if tolerance is not None and not (isinstance(tolerance, (int, float)) and 0 <= tolerance < math.inf):
        raise RankError(f"tolerance must be a number of at least 0, got {tolerance!r}")
    if embeddings and (rank is not None or plan is not None):
        raise TargetError("embeddings=True goes with keep, target_params or tolerance; a plan says it by itself")


def _targets(model: nn.Module, find: Callable[[], Targets], plan: RankPlan | None, *, inplace: bool) -> Targets:
    """The layers, if the model is one that can be converted: what would fail at the end fails here, before any work."""
    check_no_adapters(model)
    check_convertible(model, inplace=inplace)
    check_unquantized(model)
    check_loadable(model)
    check_tables(model)
    targets = find()
    if not targets.selected and plan is None:
        raise no_layer(targets)
    if not inplace:
        check_copyable(unwrapped(model), [target.module for target in targets.selected])
    elif any(target.module is model for target in targets.selected):
        raise TargetError("a model that is itself one dense layer cannot be changed in place: use inplace=False")
    return targets


def _moments(
    model: nn.Module,
    calibration: Calibration | None,
    metric: str | None,
    reading: dict[str, Any],
    max_memory: int | str | None,
    scratch: ExitStack,
) -> Moments | Decompositions | None:
    if calibration is None or isinstance(calibration, (Moments, Decompositions)):
        if reading["loss_fn"] is not None:
            raise TargetError("loss_fn= goes with calibration data: collect_moments(model, data, loss_fn=...)")
        return calibration
    folder = None if max_memory is None else scratch.enter_context(TemporaryDirectory(prefix="hf_reparam-"))
    metric = metric or "fisher"
    return collect_moments(model, calibration, metric=metric, folder=folder, max_memory=max_memory, **reading)


def _folder(given: str | os.PathLike[str] | None, scratch: ExitStack, *, temporary: bool) -> Path | None:
    """Where new layers go: the folder that was given, a temporary one, or None for into memory."""
    if given is not None:
        Path(given).mkdir(parents=True, exist_ok=True)
        return Path(given)
    if temporary and not distributed():  # processes need not share their temporary folders
        return Path(scratch.enter_context(TemporaryDirectory(prefix="hf_reparam-")))
    return None


def _search(
    model: nn.Module,
    targets: tuple[Target, ...],
    source: Decompositions,
    tolerance: float,
    evaluate: Evaluate,
    plan_for: Callable[..., RankPlan],
) -> RankPlan:
    """The plan of the smallest size, found by bisection, whose score is within the tolerance of the dense model's."""
    source = source.complete({layer_name(model, target.name): target for target in targets})
    floor = _score(evaluate, model) - tolerance
    low, high, best, nearest = 0.0, 1.0, None, -math.inf
    for _ in tqdm(range(_HALVINGS), desc="Searching a size", unit="size"):
        keep = (low + high) / 2
        try:
            plan = plan_for(source, keep=keep)
        except RankError:  # below the smallest size
            low = keep
            continue
        with narrowed(model, plan.head_widths, source, keep=False) as (narrow, _):
            found = find_layers(model, asked=named_by(model, None, plan)).selected
            found = tuple(t for t in found if layer_name(model, t.name) in plan.modules)
            layers, _ = factor_layers(model, found, fit_plan(model, found, plan)[0], narrow)
            layers |= factor_tables(model, plan.embeddings, narrow)[0]
            small = _install(model, layers, source.metric, ConversionRecord(), inplace=False)
        nearest = max(nearest, score := _score(evaluate, small))
        if score >= floor:
            high, best = keep, plan
        else:
            low = keep
    if best is None:
        raise RankError(
            f"no size has a score of {floor:.6g} or above; the best had {nearest:.6g}: allow more tolerance"
        )
    return best


def _score(evaluate: Evaluate, model: nn.Module) -> float:
    """What `evaluate` gives, as one number; TargetError for anything else."""
    score = evaluate(model)
    advice = "return one number, higher is better, such as metrics['eval_accuracy'] or -metrics['eval_loss']"
    if isinstance(score, Mapping):
        raise TargetError(f"evaluate(model) gave a {type(score).__name__} of {sorted(map(str, score))}: {advice}")
    try:
        number = float(score)
    except (TypeError, ValueError, RuntimeError):
        raise TargetError(f"evaluate(model) gave {str(score)[:80]!r}, a {type(score).__name__}: {advice}") from None
    if math.isnan(number):
        raise TargetError(f"evaluate(model) gave NaN, which no size can be compared with: {advice}")
    return number


def _factor(
    model: nn.Module,
    targets: Targets,
    chosen: Chosen,
    plan: RankPlan | None,
    source: Decompositions,
    folder: Path | None,
) -> tuple[dict[nn.Module, nn.Module], tuple[LayerReport, ...], tuple[SkippedReport, ...]]:
    """New modules in the place of old ones, and what the report says of what changes and what does not."""
    specs, left = chosen
    layers, rows = factor_layers(model, targets.selected, specs, source, folder)
    tables, table_rows, done = factor_tables(model, {} if plan is None else plan.embeddings, source)
    narrow = [t for t in targets.selected if t.stock_shape is not None]
    rows += table_rows + tuple(layer_report(t, None, t.parameters, None) for t in narrow if t.name not in specs)
    done |= {t.name for t in narrow}
    return layers | tables, rows, skipped_reports(s for s in (*left, *targets.skipped) if s.name not in done)


def _check_calibration(calibration: Calibration | None, max_length: int | None, max_samples: int | None) -> None:
    if calibration is None or isinstance(calibration, (Moments, Decompositions)):
        if max_length is not None or max_samples is not None:
            raise TargetError("max_length= and max_samples= say how calibration data is read: give calibration=data")
    else:
        check_data(calibration)


def _kept_for_refit(
    model: nn.Module, calibration: Calibration | None, max_samples: int | None, offload_folder: object
) -> list[Any]:
    if calibration is None or isinstance(calibration, (Moments, Decompositions)):
        raise TargetError(
            "refit=True needs the calibration data itself: give calibration=batches, or call refit() with it afterwards"
        )
    if offload_folder is not None:
        raise TargetError("refit=True fits layers in memory: leave offload_folder out")
    return kept(model, calibration, max_samples)


def _refit(
    model: nn.Module,
    layers: Mapping[nn.Module, nn.Module],
    data: list[Any],
    moments: Moments | None,
    reading: dict[str, Any],
) -> RefitReport:
    """Refit new layers in a copy of the model, which holds these very layers."""
    trial = replace_modules(model, layers, inplace=False)
    return refit(trial, model, data, moments=moments, **reading)


def _record(
    model: nn.Module,
    source: Decompositions,
    rows: Iterable[LayerReport],
    refitted: RefitReport | None,
    narrowing: Mapping[str, float],
) -> ConversionRecord:
    tokens = None if source.moments is None or source.metric == "svd" else source.moments.tokens
    named = {layer_name(model, row.name): row for row in rows if row.rank is not None}
    errors = {name: row.error for name, row in named.items()}
    metrics = {name: row.metric for name, row in named.items() if row.metric not in (None, source.metric)}
    count = 0 if refitted is None else len(refitted.layers)
    return ConversionRecord(None, tokens, count, {**narrowing, **errors}, metrics)


def _bring_in(layers: dict[nn.Module, nn.Module]) -> None:
    """Empty dense layer -> low-rank layer, so that the dense weights are freed before their successors take memory."""
    made = list(layers.values())
    layers.clear()
    for layer in made:
        recall(layer)


def _install(
    model: M, layers: Mapping[nn.Module, nn.Module], method: str, record: ConversionRecord, *, inplace: bool
) -> M:
    """Put the layers in place, and give every Transformers model its derived class; all of it, or nothing."""
    result = model if inplace else replace_modules(model, layers, inplace=False)
    with undone_on_error(result):
        if inplace:
            replace_modules(model, layers, inplace=True)
        elif not isinstance(result, PreTrainedModel):
            join_dense(result)
        retype(result, layers.values(), method, record)
    return result
