"""The registry of dense layer types: how each is read as a matrix (out, in) and built again.

A type is matched exactly. A subclass may override anything, so it is left alone until somebody vouches for it. Types
can be named, so that their modules are not imported before a model has them.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hf_reparam.errors import TargetError, WeightError
from hf_reparam.layers.factored import Factored


@dataclass(frozen=True, slots=True)
class DenseType:
    """How to read and rebuild one class of dense layer: see `register_dense`."""

    module_type: type[nn.Module] | str
    matrix: Callable[[Any], Tensor]
    build: Callable[[int, int, bool, torch.device, torch.dtype], nn.Module]


_registry: dict[type[nn.Module] | str, DenseType] = {}


def register_dense(
    module_type: type[nn.Module] | str,
    *,
    matrix: Callable[[Any], Tensor],
    build: Callable[[int, int, bool, torch.device, torch.dtype], nn.Module],
) -> DenseType:
    """Make a dense layer type known, for `convert` and `merge` alike. Registering a type again replaces its entry.

    Args:
        module_type: the exact class, or its qualified name "package.module.Class", which imports nothing; its
            parameters must be `weight` and optionally `bias` (out,).
        matrix: module -> a *view* of its weight of shape (out, in), so that copying into it fills the module.
        build: (in_features, out_features, bias, device, dtype) -> a new module.

    Raises:
        TargetError: module_type is not a class of modules.

    >>> class MyLinear(nn.Linear): ...
    >>> entry = register_dense(
    ...     MyLinear,
    ...     matrix=lambda module: module.weight,
    ...     build=lambda i, o, bias, device, dtype: MyLinear(i, o, bias, device=device, dtype=dtype),
    ... )
    >>> entry.module_type.__name__
    'MyLinear'
    """
    if not isinstance(module_type, str) and not (isinstance(module_type, type) and issubclass(module_type, nn.Module)):
        raise TargetError(f"register_dense takes a class of nn.Module or the name of one, got {module_type!r}")
    _registry[module_type] = DenseType(module_type, matrix, build)
    return _registry[module_type]


def dense_type(kind: type[nn.Module]) -> DenseType | None:
    """The entry for exactly this class, or None."""
    return _registry.get(kind) or _registry.get(f"{kind.__module__}.{kind.__qualname__}")


def _known(kind: type[nn.Module]) -> DenseType:
    entry = dense_type(kind)
    if entry is None:
        raise TargetError(f"{kind.__name__} is no registered dense type: register_dense makes it known")
    return entry


def not_whole(module: nn.Module) -> str | None:
    """Why a dense or low-rank layer cannot be read in this process, its weights being in parts; None if it can."""
    layers = module.children() if isinstance(module, Factored) else (module,)
    for layer, weight in ((layer, layer._parameters.get("weight")) for layer in layers):
        if weight is None:
            continue
        whole = getattr(weight, "ds_shape", None)
        if whole is not None and tuple(weight.shape) != tuple(whole):
            return (
                f"its weight is partitioned by DeepSpeed ZeRO-3, {tuple(weight.shape)} of {tuple(whole)} here: do this "
                "before the model is partitioned, or inside deepspeed.zero.GatheredParameters(model.parameters())"
            )
        if hasattr(weight, "placements"):
            return f"its weight is a DTensor, {weight.placements}: do this before the model is sharded"
        if weight.dim() < 2 or (weight.dim() > 2 and dense_type(type(layer)) is not None):
            return (
                f"its weight has the shape {tuple(weight.shape)}, and a matrix is needed: FSDP flattens and shards "
                "weights; do this before the model is wrapped"
            )
    return None


def dense_matrix(module: nn.Module) -> Tensor:
    """The weight (out, in) of a registered dense layer, or of a low-rank one, whose product is formed in float64.

    Raises WeightError if its weights are in parts, as `not_whole` says, or its factors are no plain Linears.
    """
    if isinstance(module, Factored):
        return module.matrix()
    if (reason := not_whole(module)) is not None:
        raise WeightError(reason)
    return _known(type(module)).matrix(module)


@torch.no_grad()
def build_dense(layer: Factored) -> nn.Module:
    """The dense layer that a low-rank one stands for: W = up @ down, multiplied in float64, cast back.

    Raises WeightError if its factors are wrapped, quantized or without data.
    """
    weight = dense_matrix(layer)
    if weight.is_meta:
        raise WeightError("the factors are on the meta device and have no data: load the model onto a real device")
    dense = layer.stand_in()
    dense_matrix(dense).copy_(weight)
    bias: Any = layer.bias
    if bias is not None:
        dense.get_parameter("bias").copy_(bias)
    return dense


def dense_like(layer: nn.Module, shape: tuple[int, int]) -> nn.Module:
    """A dense layer like this one, of a shape (in, out), without numbers.

    For a low-rank layer, one of the type that it stands for. dtype, device, mode and `requires_grad` are this layer's.
    """
    like: Any = layer
    part, kind = (like.up, like.dense_type) if isinstance(layer, Factored) else (like, type(layer))
    weight, bias = part.weight, part.bias
    built = _known(kind).build(*shape, bias is not None, weight.device, weight.dtype)
    built.get_parameter("weight").requires_grad_(weight.requires_grad)
    if bias is not None:
        built.get_parameter("bias").requires_grad_(bias.requires_grad)
    return built.train(layer.training)


def shape_of(module: nn.Module) -> tuple[int, int]:
    """(in, out) of a dense or low-rank layer; (0, 0) of any other module."""
    if isinstance(module, Factored):
        return module.in_features, module.out_features
    entry = dense_type(type(module))
    n_out, n_in = entry.matrix(module).shape if entry is not None else (0, 0)
    return n_in, n_out


def has_hooks(module: nn.Module) -> bool:
    """Whether somebody has put hooks on a module, which a module in its place would not have."""
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return any(hooks)


def _linear(n_in: int, n_out: int, bias: bool, device: torch.device, dtype: torch.dtype) -> nn.Module:
    return nn.utils.skip_init(nn.Linear, n_in, n_out, bias=bias, device=device, dtype=dtype)


register_dense(nn.Linear, matrix=lambda module: module.weight, build=_linear)
