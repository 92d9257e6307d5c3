"""`search_plan`: the smallest size whose score is within a tolerance of the dense model's."""

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from torch import nn

from hf_reparam.compress.planning import plan_for
from hf_reparam.config import LowRankConfig, is_number
from hf_reparam.errors import RankError, TargetError
from hf_reparam.layers.progress import each, one_bar
from hf_reparam.linalg.calibration import Calibration
from hf_reparam.model.build import apply
from hf_reparam.model.checks import check_no_adapters, count_parameters, outside_inference_mode
from hf_reparam.model.host import check_model, opened
from hf_reparam.plan import RankPlan
from hf_reparam.report import TriedSize
from hf_reparam.structures.source import Source

Evaluate = Callable[[Any], float]

_HALVINGS = 7


def search_plan(
    model: nn.Module,
    evaluate: Evaluate,
    tolerance: float,
    calibration: Calibration | None = None,
    config: LowRankConfig | None = None,
) -> RankPlan:
    """Find the smallest size whose score is within a tolerance of the dense model's, by bisection over `keep`.

    Args:
        model: a dense model; it is not changed.
        evaluate: model -> score, higher is better. It gets the model, and low-rank ones that share its memory.
        tolerance: how much lower than the dense model's the score may be.
        calibration: what `calibrate` returned; None for plain SVD.
        config: without a size.

    Returns:
        A plan for `convert`, in steps of 1/128 of the targeted weights. `print(plan)` also shows the dense model's
        score and that of every size that was tried, which `plan.report.tried` holds.

    Raises:
        TargetError: the configuration has a size, or `evaluate` gives no number.
        RankError: the tolerance is no number of at least 0, or no size holds it.

    Cost: eight evaluations; for each size what `make_plan` costs without trying whole plans; and one decomposition of
    each layer, kept in 8 min(in, out) (in + out) bytes; beyond 1 GiB they are made again for each size.

    >>> net = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    >>> plan = search_plan(net, lambda model: -sum(p.numel() == 4096 for p in model.parameters()), 1.0)
    >>> len(plan.modules)
    2
    """
    check_model(model)
    check_no_adapters(model)
    config = config or LowRankConfig()
    if not isinstance(config, LowRankConfig) or config.sized:
        raise TargetError("search_plan finds the size: give a LowRankConfig without one")
    if not callable(evaluate):
        raise TargetError(f"evaluate must be a function model -> number, got {evaluate!r}")
    if not is_number(tolerance) or not 0 <= tolerance < math.inf:
        raise RankError(f"tolerance must be a number of at least 0, got {tolerance!r}")
    with outside_inference_mode(), one_bar():
        source = replace(Source.of(calibration, config.metric, config.solver), kept={})
        dense = TriedSize(1.0, count_parameters(model), aim := _score(evaluate, model))
        floor = aim - tolerance
        low, high, best, nearest = 0.0, 1.0, None, -math.inf
        tried = [dense]
        for _ in each(range(_HALVINGS), "searching", "size"):
            keep = (low + high) / 2
            work = opened(model)
            try:
                plan = plan_for(work.model, replace(config, keep=keep), source, whole=False)
            except RankError:  # below the smallest size
                tried.append(TriedSize(keep))
                low = keep
                continue
            apply(work, plan, source)
            nearest = max(nearest, score := _score(evaluate, work.model))
            tried.append(TriedSize(keep, None if plan.report is None else plan.report.parameters_after, score))
            if score >= floor:
                high, best = keep, plan
            else:
                low = keep
    if best is None:
        raise RankError(
            f"no size has a score of {floor:.6g} or above; the best had {nearest:.6g}: allow more tolerance"
        )
    tried = [dense, *(replace(size, chosen=size.keep == high) for size in tried[1:])]
    return replace(best, report=best.report and replace(best.report, tried=tried))


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
