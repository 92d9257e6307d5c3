"""`make_plan`: ranks for every layer from one budget, without touching the model."""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils.logging import tqdm

from hf_reparam.calibration import layer_name
from hf_reparam.errors import RankError, TargetError, WeightError
from hf_reparam.hf.retype import protected_layers
from hf_reparam.linalg import LayerMoments, Metric, Moments, Options, allocate, spectrum
from hf_reparam.linalg.moments import METRICS
from hf_reparam.nn.dense import dense_matrix
from hf_reparam.nn.targets import Target, find_targets
from hf_reparam.plan import LayerSpec, RankPlan

__all__ = ["check_budget", "layer_metric", "make_plan"]

ALLOCATIONS = ("global", "uniform")


def make_plan(
    model: nn.Module,
    moments: Moments | None = None,
    *,
    keep: float,
    metric: str | None = None,
    allocation: str | None = None,
    multiple_of: int = 1,
    include: str | Iterable[str] | None = None,
    exclude: str | Iterable[str] = (),
) -> RankPlan:
    """Choose a rank for every layer so that together they hold at most `keep` of their dense weights.

    In the fisher metric the squared singular values that a layer drops are its predicted increase of the loss, in one
    unit for all layers: allocation "global" minimises their sum under the budget, with staying dense as one of the
    choices. "uniform" gives every layer the same share.

    Args:
        model: a dense model; a dense model's moments may be used for many plans.
        moments: what `collect_moments` returned; None for plain SVD.
        keep: in (0, 1], share of the *targeted* layers' weights, biases not counted.
        metric: "svd", "activation" or "fisher"; the richest that the moments serve by default.
        allocation: "global" (default with fisher) or "uniform" (default otherwise).
        multiple_of: ranks are multiples of this; 8 suits tensor cores.
        include, exclude: as in `convert`.

    Returns:
        A RankPlan. Layers that it does not name stay dense.

    Raises:
        RankError: keep is out of range, or so small that rank `multiple_of` everywhere exceeds it.
        TargetError: unknown metric or allocation, patterns as in `convert`, or no layer to choose a rank for.
        WeightError: a weight or its moments are not finite, or the metric needs moments that are not there.

    Cost: one symmetric eigenvalue problem, without vectors, for each layer with global allocation.

    >>> plan = make_plan(nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)), keep=0.5)
    >>> [spec.rank for spec in plan.modules.values()]
    [16, 16]
    """
    check_budget(keep, multiple_of)
    metric = metric or (moments.metric if moments is not None else "svd")
    allocation = allocation or ("global" if metric == "fisher" else "uniform")
    if metric not in METRICS or allocation not in ALLOCATIONS:
        raise TargetError(f"metric is one of {METRICS} and allocation of {ALLOCATIONS}; got {metric!r}, {allocation!r}")
    targets = find_targets(model, include=include, exclude=exclude, protected=protected_layers(model)).selected
    if any(t.rank is not None for t in targets):
        raise TargetError("the model is converted already: make plans from the dense model")
    if not targets:
        raise TargetError("the model has no dense layer that can be factored")
    ranks = _uniform(targets, keep, multiple_of)
    if allocation == "global":
        ranks.update(_global(model, targets, moments, metric, keep, multiple_of))
    base = model.config.model_type if isinstance(model, PreTrainedModel) else None
    modules = {layer_name(model, t): LayerSpec(ranks[t.name]) for t in targets if ranks[t.name] > 0}
    return RankPlan(modules, base, metric)


def check_budget(keep: float, multiple_of: int) -> None:
    """Raise RankError unless keep is in (0, 1] and multiple_of an int of at least 1."""
    if isinstance(keep, bool) or not isinstance(keep, (int, float)) or not 0 < keep <= 1:
        raise RankError(f"keep must be in (0, 1], the share of the targeted layers' weights, got {keep!r}")
    if isinstance(multiple_of, bool) or not isinstance(multiple_of, int) or multiple_of < 1:
        raise RankError(f"multiple_of must be an int of at least 1, got {multiple_of!r}")


def layer_metric(moments: Moments | None, name: str, metric: str, *, has_bias: bool) -> tuple[Metric, Tensor | None]:
    """The Metric of one layer and, where a bias can absorb it, the mean input (in,)."""
    layer = moments.layers.get(name) if moments is not None else None
    if metric == "svd" or layer is None or layer.tokens == 0:
        return Metric(), None
    if metric == "fisher" and moments is not None and moments.metric != "fisher":
        raise WeightError("the fisher metric needs gradients: collect moments with metric='fisher'")
    kind = metric if _has_gradient(layer) or metric != "fisher" else "activation"
    try:
        return layer.metric(kind, centred=has_bias), layer.mean() if has_bias else None
    except WeightError as error:
        raise WeightError(f"{name}: {error}") from None


def _has_gradient(layer: LayerMoments) -> bool:
    return layer.gradient_products is not None and bool(layer.gradient_products.diagonal().sum() > 0)


def _size(target: Target) -> int:
    return target.in_features * target.out_features


def _uniform(targets: tuple[Target, ...], keep: float, multiple_of: int) -> dict[str, int]:
    """The same share for every layer; 0 where a layer stays dense.

    Layers too narrow for one multiple take any rank. What rounding up to rank 1 or staying dense costs a narrow layer,
    such as a classifier of two classes, is taken from the widest ones.
    """
    if keep == 1:
        return {t.name: 0 for t in targets}
    ranks, width = {}, {t.name: t.in_features + t.out_features for t in targets}
    for t in targets:
        share = int(keep * _size(t) / width[t.name])
        rank = share // multiple_of * multiple_of or max(share, 1)
        ranks[t.name] = rank if rank * width[t.name] < _size(t) else 0
    budget = keep * sum(_size(t) for t in targets)
    while sum(ranks[t.name] * width[t.name] or _size(t) for t in targets) > budget:
        widest = max(ranks, key=lambda name: ranks[name] * width[name])
        if ranks[widest] <= multiple_of:
            raise RankError(f"keep={keep} is below the smallest size: a pair of rank {multiple_of} in every layer")
        ranks[widest] -= multiple_of
    return ranks


def _global(
    model: nn.Module, targets: tuple[Target, ...], moments: Moments | None, metric: str, keep: float, multiple_of: int
) -> Mapping[str, int]:
    """Ranks by one Lagrangian, for the layers whose error is known in the common unit; 0 for layers that stay dense."""
    options: dict[str, Options] = {}
    choices: dict[str, Tensor] = {}
    for t in tqdm(targets, desc="Spectra", unit="layer"):
        name = layer_name(model, t)
        layer = moments.layers.get(name) if moments is not None else None
        if metric == "fisher" and (layer is None or not _has_gradient(layer)):
            continue  # no gradient, no common unit: the layer keeps its uniform share
        coordinates, _ = layer_metric(moments, name, metric, has_bias=t.bias_parameters > 0)
        squares = spectrum(dense_matrix(t.module), coordinates) * coordinates.scale
        choices[t.name], options[t.name] = _options(t, squares.cpu(), multiple_of)
    budget = keep * sum(_size(t) for t in targets if t.name in options)
    chosen = allocate(options, budget)
    return {name: int(choices[name][option]) for name, option in chosen.items()}


def _options(target: Target, squares: Tensor, multiple_of: int) -> tuple[Tensor, Options]:
    """Every rank whose pair is smaller than the dense layer, and 0 for the dense layer itself."""
    width = target.in_features + target.out_features
    step = multiple_of if multiple_of * width < _size(target) else 1  # too narrow for one multiple
    ranks = torch.arange(step, target.full_rank + 1, step)
    ranks = ranks[ranks * width < _size(target)]
    tails = squares.sum() - squares.cumsum(0)
    errors = torch.cat([tails[ranks - 1].clamp_min(0), torch.zeros(1, dtype=torch.float64)])
    costs = torch.cat([ranks * width, torch.tensor([_size(target)])]).double()
    return torch.cat([ranks, torch.zeros(1, dtype=torch.long)]), Options(errors, costs)
