"""`convert`: the whole flow, top to bottom."""

import os
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

from torch import nn

from hf_reparam.calibrate.collect import calibrate
from hf_reparam.calibrate.fits import check_fit
from hf_reparam.calibrate.inputs import same_draws
from hf_reparam.calibrate.items import check_data
from hf_reparam.compat.accelerate import is_offloaded, recall
from hf_reparam.compress.planning import check_dense, plan_for, warn_without_data
from hf_reparam.config import ONE_SIZE, LowRankConfig, Rank
from hf_reparam.errors import TargetError
from hf_reparam.layers.processes import distributed
from hf_reparam.layers.progress import one_bar
from hf_reparam.layers.surgery import check_copyable
from hf_reparam.layers.warn import warn
from hf_reparam.linalg.calibration import Calibration
from hf_reparam.model.auto import check_loadable
from hf_reparam.model.build import Made, apply, finished
from hf_reparam.model.checks import (
    check_convertible,
    check_no_adapters,
    check_unquantized,
    fresh_heads,
    optional_layers,
    outside_inference_mode,
)
from hf_reparam.model.host import check_model, layer_name, opened, unwrapped
from hf_reparam.model.retype import retype
from hf_reparam.model.sites import Selection, check_forms, fit, live_sites, no_site, select
from hf_reparam.plan import ConversionRecord, RankPlan
from hf_reparam.report import Report
from hf_reparam.structures import STRUCTURES
from hf_reparam.structures.source import Source

M = TypeVar("M", bound=nn.Module)
Data = Calibration | Iterable[Mapping[str, Any]] | Iterable[str]


def convert(
    model: M,
    config: LowRankConfig | RankPlan | None = None,
    *,
    rank: Rank | None = None,
    keep: float | None = None,
    target_params: int | float | None = None,
    speedup: float | None = None,
    calibration: Data | None = None,
    tokenizer: Any = None,
    inplace: bool = False,
    workdir: str | os.PathLike[str] | None = None,
) -> M:
    """Represent dense layers, and what else is asked for, with fewer parameters: W ~ up @ down.

    A `PreTrainedModel` comes back as its derived class (`BertForMaskedLM` -> `ReparamBertForMaskedLM`, still a
    `BertForMaskedLM`), ready for `save_pretrained`, `Trainer`, `generate` and `pipeline`. dtype, device,
    `requires_grad` and training mode are kept, shared modules stay shared, and a low-rank model can be converted again
    to lower ranks. If anything fails, the model is as it was.

    Give one size, or a plan. With calibration data the factors minimise the error on that data instead of the error of
    the weights, and the budget is spent where it lowers the loss most; without, they are truncated SVDs.
    `hf_reparam.report(model)` says what was done. A task head that is still random gets a warning.

    Args:
        model: any `PreTrainedModel` or `nn.Module`. Transformers models inside another object (SentenceTransformer,
            CrossEncoder, `torch.compile`, DataParallel, a container or a class of your own) get derived classes and
            plans of their own, and save as such. Outside of them the projections of an `nn.MultiheadAttention` are
            layers, too; what an object with a `save_pretrained` saves by itself stays dense. One that accelerate has
            dispatched (`device_map=`) gets its new layers on the devices where the old ones compute.
        config: what is asked, or a plan from `make_plan` or `search_plan`, edited or not.
        rank, keep, target_params, speedup: short for a configuration of one size, as in `LowRankConfig`.
        calibration: what `calibrate` returned, or what it takes: texts, dicts for `model(**batch)`, a
            `datasets.Dataset`.
        tokenizer: for calibration texts.
        inplace: change `model` itself; new layers wait in a temporary folder until the old ones are freed. Otherwise
            the result is a copy; replaced weights are not copied.
        workdir: a folder for new layers, for long work and for models that exceed memory. A layer that is there from an
            earlier, broken run of the same conversion (the same weights, calibration and options, to the last bit) is
            not made again. Layers that were on disk stay there until they compute.

    Returns:
        The converted model.

    Raises:
        TargetError: no model, or one that cannot be copied, is sharded, has adapters that are not merged, or came with
            `trust_remote_code` and is not registered with the Auto classes; a pattern matches nothing, or nothing would
            change; none or several sizes were given.
        RankError: a size is out of range, or higher than a low-rank layer's own.
        WeightError: a weight is not finite, on the meta device, or quantized, or the calibration is of another model.
        PlanError: the plan does not fit the model.
        CheckpointError: `workdir` holds layers of another conversion, or another process is filling it.

    Cost: one Gram matrix and one symmetric eigenproblem of order min(in, out) for each layer, and what `calibrate` and
    `make_plan` cost. Memory: with `inplace`, that of the model and two to four times the largest layer in float64, in
    the metric of calibration data its moments, too. In a distributed run every process has to call this; layers are
    shared out, and all get the whole model.

    >>> net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    >>> convert(net, rank=16)
    Sequential(
      (0): LowRankLinear(
        in_features=64, out_features=64, rank=16, form=pair
        (down): Linear(in_features=64, out_features=16, bias=False)
        (up): Linear(in_features=16, out_features=64, bias=True)
      )
      (1): ReLU()
      (2): Linear(in_features=64, out_features=10, bias=True)
    )
    """
    sizes: dict[str, Any] = {"rank": rank, "keep": keep, "target_params": target_params, "speedup": speedup}
    asked, plan = asked_for(config, **sizes)
    check_model(model)
    if calibration is not None and not isinstance(calibration, Calibration):
        check_data(calibration)
        if asked.metric == "svd":
            raise TargetError('metric="svd" looks at the weights alone: leave out calibration=, or metric=')
    elif tokenizer is not None:
        raise TargetError("tokenizer= reads calibration texts: give calibration=texts")
    reading: dict[str, Any] = {"calibration": calibration, "tokenizer": tokenizer, "workdir": workdir}
    sites = (site for structure in STRUCTURES for site in structure.sites(model))
    if not all(site.name for site in sites):  # the model is itself a layer, for which a plan has no name
        if inplace:
            raise TargetError("a model that is itself one dense layer cannot be changed in place: use inplace=False")
        whole: Any = carry_out(nn.Sequential(model), asked, plan, **reading)
        return whole[0]
    return carry_out(model, asked, plan, inplace=inplace, **reading)


def carry_out(
    model: M,
    asked: LowRankConfig,
    plan: RankPlan | None,
    *,
    calibration: Calibration | Data | None,
    tokenizer: Any = None,
    inplace: bool = False,
    workdir: str | os.PathLike[str] | None = None,
) -> M:
    """As `convert`: what is asked, or a plan, of which the configuration says the metric and the solver."""
    with outside_inference_mode(), same_draws(), one_bar(), ExitStack() as scratch:
        _check(model, inplace=inplace)
        work = opened(model)
        selection = selection_of(work.model, asked, plan)
        if not inplace:
            parts = [found.site.module for found in selection.selected]  # of those shown in split form is no original
            check_copyable(unwrapped(model), [work.originals[part] for part in parts if part in work.originals])
        if not isinstance(calibration, Calibration) and calibration is not None:
            wanted = asked_of(selection)
            calibration = calibrate(model, calibration, metric=asked.metric or "fisher", tokenizer=tokenizer, **wanted)
        if plan is None:
            warn_without_data(asked, calibration)
        source = Source.of(calibration, asked.metric, asked.solver)
        check_fit(work.model, selection.selected, source)
        del selection  # what is replaced can be freed
        if plan is None:
            plan = plan_for(work.model, asked, source)
            source = replace(source, metric=plan.metric)
        folder = None if workdir is None else Path(workdir)
        if inplace and folder is None and not distributed():  # processes need not share their temporary folders
            folder = Path(scratch.enter_context(TemporaryDirectory(prefix="hf_reparam-")))
        on_disk = workdir is not None and any(map(is_offloaded, model.modules()))
        made, source = apply(work, plan, source, folder)
        if not plan.modules:
            warn("nothing was factored: the size leaves every layer dense")
        if not on_disk:
            made.stored.clear()
        record = _record(made, source, plan.report)
        retyped = partial(retype, new=made.modules, metric=source.metric, record=record)
        result = finished(model, work, made, retyped, inplace=inplace)
        if folder is not None and not on_disk:
            for module in made.modules:
                recall(module)
        return result


def asked_for(config: LowRankConfig | RankPlan | None, **sizes: Any) -> tuple[LowRankConfig, RankPlan | None]:
    """A configuration of one size; or, for a plan, its metric, and the plan. TargetError for none or several sizes."""
    if not isinstance(config, RankPlan):
        return LowRankConfig.asked(config, **sizes), None
    if any(size is not None for size in sizes.values()):
        raise TargetError(ONE_SIZE)
    return LowRankConfig(metric=None if config.metric == "svd" else config.metric), config  # "svd": made without data


def asked_of(selection: Selection) -> dict[str, Any]:
    """What `calibrate` is asked for, for these sites."""
    names = [found.site.name for found in selection.selected if found.structure.option is None]
    options = {found.structure.option for found in selection.selected}
    return {"target_modules": names, "embeddings": "embeddings" in options}


def _check(model: nn.Module, *, inplace: bool) -> None:
    """What would fail at the end fails here, before any work; what calibration cannot know is told."""
    check_no_adapters(model)
    check_convertible(model, inplace=inplace)
    check_unquantized(model)
    check_loadable(model)
    live_sites(model)
    if fresh := fresh_heads(model):
        warn(
            f"{', '.join(fresh)}: not in the checkpoint, so these are random. Fine-tune first, then convert: "
            "calibration then knows the task, and less is lost",
        )


def selection_of(work: nn.Module, config: LowRankConfig, plan: RankPlan | None) -> Selection:
    """The sites that may change, judged before any long work."""
    if plan is None:
        selection = select(work, config)
        if not selection.selected:
            raise no_site(selection)
        if config.rank is not None:
            plan_for(work, config, Source.of(None, None))  # the ranks are judged
        else:
            check_dense(work, selection.selected)
        return selection
    check_forms(plan)
    if not any(structure.changes_moments and plan.of(structure.forms) for structure in STRUCTURES):
        for structure in STRUCTURES:
            fit(plan, work, structure, strict=True)
    return select(work, config, {name for name in optional_layers(work) if layer_name(work, name) in plan.modules})


def _record(made: Made, source: Source, planned: Report | None) -> ConversionRecord:
    tokens = None if source.calibration is None or source.metric == "svd" else source.calibration.tokens
    metrics = {name: metric for name, metric in made.metrics.items() if metric != source.metric}
    judged = (None, None) if planned is None else (planned.judgement, planned.speed)
    return ConversionRecord(None, tokens, 0, made.errors, metrics, *judged)
