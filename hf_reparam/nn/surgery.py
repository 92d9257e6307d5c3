"""Replacing modules: factor one layer, swap by shape, install, restore. Shared modules stay shared."""

import copy
from collections.abc import Mapping
from typing import TypeVar

import torch
from torch import Tensor, nn

from hf_reparam.errors import TargetError, WeightError
from hf_reparam.linalg import Decomposition, Metric, decompose
from hf_reparam.nn.dense import dense_matrix
from hf_reparam.nn.linear import LowRankLinear
from hf_reparam.nn.targets import Target

__all__ = ["factor", "low_rank_like", "replace_modules"]

M = TypeVar("M", bound=nn.Module)


def low_rank_like(dense: nn.Module, rank: int) -> LowRankLinear:
    """A LowRankLinear of a layer's shape, dtype, device, training mode and `requires_grad`; its numbers are not set.

    Args:
        dense: a registered dense layer, or a LowRankLinear (to change its rank).
        rank: the inner width.
    """
    if isinstance(dense, LowRankLinear):
        n_out, n_in, kind, like = dense.out_features, dense.in_features, dense.dense_type, dense.up.weight
    else:
        (n_out, n_in), kind, like = dense_matrix(dense).shape, type(dense), dense.get_parameter("weight")
    bias = dense.bias if isinstance(dense.bias, nn.Parameter) else None
    down, up = _empty_linear(n_in, rank, like, None), _empty_linear(rank, n_out, like, bias)
    return LowRankLinear(down, up, dense_type=kind).train(dense.training)


def _empty_linear(n_in: int, n_out: int, like: Tensor, bias: nn.Parameter | None) -> nn.Linear:
    """An nn.Linear whose numbers are not set: drawing them is most of what building a skeleton costs."""
    linear = nn.Linear.__new__(nn.Linear)
    nn.Module.__init__(linear)
    linear.in_features, linear.out_features = n_in, n_out
    linear.weight = nn.Parameter(torch.empty(n_out, n_in, dtype=like.dtype, device=like.device), like.requires_grad)
    linear.register_parameter(
        "bias",
        None
        if bias is None
        else nn.Parameter(torch.empty_like(bias, memory_format=torch.contiguous_format), bias.requires_grad),
    )
    return linear


@torch.no_grad()
def factor(
    target: Target, rank: int, *, metric: Metric | None = None, mean: Tensor | None = None
) -> tuple[LowRankLinear, float]:
    """The low-rank layer that is nearest to a target in a metric, and its relative error there.

    Args:
        target: the layer.
        rank: the inner width.
        metric: as in `decompose`; None for the Frobenius norm of the weight.
        mean: E x (in,), for b' = b + (W - W') E x, which makes a metric of centred inputs exact in the mean.

    Returns:
        The layer, and ||W - W_r|| / ||W|| in the metric.

    Raises:
        WeightError: the weight is not finite, has no data, or is quantized; names the layer.
    """
    weight, bias = dense_matrix(target.module), target.module.bias
    try:
        decomposition: Decomposition = decompose(weight, max_rank=rank, metric=metric)
    except WeightError as error:
        raise WeightError(f"{target.name}: {error}") from None
    layer = low_rank_like(target.module, rank)
    factors = decomposition.truncate(rank)
    layer.up.weight.copy_(factors.up)
    layer.down.weight.copy_(factors.down)
    if isinstance(bias, nn.Parameter):
        layer.up.bias.copy_(bias)
        if mean is not None:
            shift = weight.double() @ mean - factors.up.double() @ (factors.down.double() @ mean)
            layer.up.bias.copy_(bias.double() + shift)
    return layer, decomposition.relative_error(rank)


def replace_modules(model: M, replacements: Mapping[nn.Module, nn.Module], *, inplace: bool) -> M:
    """Put new modules where old ones hang, at every path at which they hang.

    Args:
        model: the root.
        replacements: old module -> new module.
        inplace: change `model` itself; otherwise `model` stays as it is, and a copy is returned in which the replaced
            tensors were never copied.

    Raises:
        TargetError: inplace, and the model itself is to be replaced.
    """
    if not inplace:
        return copy.deepcopy(model, {id(old): new for old, new in replacements.items()})
    if model in replacements:
        raise TargetError("a model that is itself one dense layer cannot be replaced in place: use inplace=False")
    for module in list(model.modules()):
        for name, child in module._modules.items():
            if child is not None and child in replacements:
                module._modules[name] = replacements[child]
    return model
