"""`to_pairs`: the same function without pivots, for programs that know nothing but Linears."""

from typing import TypeVar

import torch
from torch import nn

from hf_reparam.errors import TargetError
from hf_reparam.layers.linear import LowRankLinear, PivotedLinear
from hf_reparam.layers.surgery import check_copyable, independent_copy, low_rank_like, replace_modules, undone_on_error
from hf_reparam.model.checks import check_convertible, check_no_adapters, check_unquantized, outside_inference_mode
from hf_reparam.model.config import plan_of
from hf_reparam.model.host import check_model, hosts, metric_of
from hf_reparam.model.retype import retype
from hf_reparam.plan import ConversionRecord, Entry

M = TypeVar("M", bound=nn.Module)


@outside_inference_mode()
def to_pairs(model: M, *, inplace: bool = False) -> M:
    """Hold every pivoted layer as a pair, y = up(down(x)) of the same rank: the same function with r^2 more parameters.

    A pair is two plain Linears, without a buffer and without a gather: what serves, exports or shards Linears takes it
    as it is, and where a call has few tokens it is faster. Trained factors stay as they are.

    Args:
        model: a converted model, trained or not.
        inplace: change `model` itself; otherwise the result is a copy that shares no tensor with it.

    Returns:
        The model, of the same dtype, device, `requires_grad` and training mode; its plan says "pair".

    Raises:
        TargetError: nothing in the model is pivoted, it has adapters, is sharded, or cannot be copied.
        WeightError: it is quantized.

    Cost: a copy of the model, and r * in numbers for each layer.

    >>> from hf_reparam.compress.convert import convert
    >>> small = to_pairs(convert(nn.Sequential(nn.Linear(64, 64)), keep=0.5))
    >>> small[0].form, small[0].rank, tuple(small[0].down.weight.shape)
    ('pair', 18, (18, 64))
    """
    check_model(model)
    check_no_adapters(model)
    check_convertible(model, inplace=inplace)
    check_unquantized(model)
    if isinstance(model, PivotedLinear):
        if inplace:
            raise TargetError("a model that is itself one low-rank layer cannot be changed in place: use inplace=False")
        return _pair(model)  # type: ignore[return-value]  # a layer for a layer
    layers = [module for module in model.modules() if isinstance(module, PivotedLinear)]
    if not layers:
        raise TargetError(f"{type(model).__name__} has no pivoted layer: there is nothing to change")
    if not inplace:
        check_copyable(model, layers)
    result = model if inplace else independent_copy(model, ())
    with undone_on_error(result):
        new: dict[nn.Module, nn.Module] = {
            module: _pair(module) for module in result.modules() if isinstance(module, PivotedLinear)
        }
        replace_modules(result, new)
        for host in hosts(result).values():
            record = plan_of(host.config).record or ConversionRecord()
            retype(host, list(new.values()), metric_of(host), record)
    return result


@torch.no_grad()
def _pair(layer: PivotedLinear) -> LowRankLinear:
    """Factors of their own; both must be plain Linears, or WeightError says what they are."""
    pair = low_rank_like(layer, Entry(layer.rank, "pair"))
    pair.down.weight.copy_(layer.factors()[1]).requires_grad_(layer.down.weight.requires_grad)
    pair.up.load_state_dict(layer.up.state_dict())
    pair.error, pair.metric, pair.from_rank = layer.error, layer.metric, layer.from_rank
    return pair
