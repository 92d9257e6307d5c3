"""Replacing modules: factor one layer, swap by shape, install, restore. Shared modules stay shared."""

import copy
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from hf_reparam.errors import TargetError
from hf_reparam.layers.dense import dense_matrix, shape_of
from hf_reparam.layers.linear import LowRankLinear, PivotedLinear
from hf_reparam.linalg.factorize import Decomposition
from hf_reparam.linalg.pivot import pivot
from hf_reparam.plan import Entry

M = TypeVar("M", bound=nn.Module)


def low_rank_like(dense: nn.Module, entry: Entry) -> LowRankLinear:
    """A low-rank layer of a layer's shape, dtype, device, training mode and `requires_grad`; its values are not set.

    The layer is dense, or low-rank of another rank or form. A pivoted layer needs more inputs than its rank.
    """
    part: Any = dense.up if isinstance(dense, LowRankLinear) else dense
    kind = dense.dense_type if isinstance(dense, LowRankLinear) else type(dense)
    (n_in, n_out), like = shape_of(dense), part.weight
    bias = part.bias if isinstance(part.bias, nn.Parameter) else None
    up = _empty_linear(entry.rank, n_out, like, bias)
    low: LowRankLinear
    if entry.form == "pair":
        low = LowRankLinear(_empty_linear(n_in, entry.rank, like, None), up, dense_type=kind)
    else:
        down, order = _empty_linear(n_in - entry.rank, entry.rank, like, None), torch.arange(n_in, device=like.device)
        low = PivotedLinear(down, up, order=order, dense_type=kind)
    return low.train(dense.training)


def _empty_linear(n_in: int, n_out: int, like: Tensor, bias: nn.Parameter | None) -> nn.Linear:
    """An nn.Linear whose values are not set: drawing them is most of what building a skeleton costs."""
    linear = nn.Linear.__new__(nn.Linear)
    nn.Module.__init__(linear)
    linear.in_features, linear.out_features = n_in, n_out
    linear.weight = nn.Parameter(torch.empty(n_out, n_in, dtype=like.dtype, device=like.device), like.requires_grad)
    linear.register_parameter("bias", None)
    if bias is not None:
        linear.bias = nn.Parameter(torch.empty(n_out, dtype=bias.dtype, device=bias.device), bias.requires_grad)
    return linear


@torch.no_grad()
def factor(
    dense: nn.Module, entry: Entry, decomposition: Decomposition, *, mean: Tensor | None = None
) -> LowRankLinear:
    """The low-rank layer that a decomposition of its weight, in any metric, gives in place of a dense or low-rank one.

    With a mean E x (in,) the bias is b' = b + (W - W') E x, which makes a metric of centred inputs exact in the mean.
    """
    layer = low_rank_like(dense, entry)
    set_factors(layer, *decomposition.cut(entry.rank))
    if isinstance(dense.bias, nn.Parameter):
        layer.up.bias.copy_(dense.bias)
        if mean is not None:
            set_bias(layer, dense, mean, mean)
    return layer


@torch.no_grad()
def set_bias(layer: LowRankLinear, dense: nn.Module, mean: Tensor, low_mean: Tensor) -> None:
    """b' = b + W E x - W' E x', with x (in,) what the dense layer gets on average and x' what the low-rank one gets."""
    bias: Any = dense.bias
    mean, low_mean = mean.to(bias.device), low_mean.to(bias.device)
    up, down = layer.factors()
    shift = dense_matrix(dense).double() @ mean - up.double() @ (down.double() @ low_mean)
    layer.up.bias.copy_(bias.double() + shift)


@torch.no_grad()
def set_factors(layer: LowRankLinear, up: Tensor, down: Tensor) -> None:
    """Make a layer's product that of factors (float64) of its rank."""
    if isinstance(layer, PivotedLinear):
        up, down, order = pivot(up, down)
        layer.order.copy_(order)
    layer.up.weight.copy_(up)
    layer.down.weight.copy_(down)


def replace_modules(model: nn.Module, replacements: Mapping[nn.Module, nn.Module]) -> None:
    """Put new modules where old ones hang, at every path at which they hang. Changes the model."""
    if not replacements:
        return
    for module in list(model.modules()):
        for name, child in module._modules.items():
            if child is not None and child in replacements:
                module._modules[name] = replacements[child]
        for value in vars(module).values():  # some families call layers by a list of their own beside the children
            for i, item in enumerate(value if isinstance(value, list) else ()):
                if isinstance(item, nn.Module) and item in replacements:
                    value[i] = replacements[item]


def set_attribute(module: nn.Module, name: str, value: object) -> None:
    """Set an attribute; a module may take the place of a parameter, and a parameter, in a list, that of a module."""
    if isinstance(value, nn.Module):
        delattr(module, name)
    setattr(module, name, value[0] if isinstance(value, nn.ParameterList) else value)


def independent_copy(model: M, shared: Iterable[nn.Module | Tensor]) -> M:
    """A deep copy, in which some tensors, and some modules with all that they have, are those of the model itself.

    Raises TargetError for a model that cannot be copied without them.
    """
    kept = [part for item in shared for part in (item.modules() if isinstance(item, nn.Module) else [item])]
    try:
        return copy.deepcopy(model, {id(part): part for part in kept})
    except Exception as error:  # whatever the model's own attributes raise
        raise TargetError(
            f"{type(model).__name__} cannot be copied: use inplace=True. The copy failed with: {error}"
        ) from error


def check_copyable(model: nn.Module, replaced: Iterable[nn.Module]) -> None:
    """Raise TargetError for a model that cannot be copied without what is to be replaced; no parameter is copied."""
    independent_copy(model, [*model.parameters(), *model.buffers(), *replaced])


@contextmanager
def undone_on_error(model: nn.Module) -> Iterator[None]:
    """Give every module of a model its class, attributes, children and tensors back if the block fails.

    Until the block ends, what was replaced in it is kept in memory.
    """
    before = []
    for module in model.modules():
        contents: list[Any] = [vars(module), module._modules, module._parameters, module._buffers]
        before.append((module, type(module), [(held, dict(held)) for held in contents]))
    try:
        yield
    except BaseException:
        for module, kind, states in before:
            module.__class__ = kind
            for held, then in states:
                held.clear()
                held.update(then)
        raise
