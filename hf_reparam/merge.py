"""`merge`: multiply the factors out and give the plain dense model back."""

from typing import TypeVar

from torch import nn
from transformers import PreTrainedModel

from hf_reparam.errors import TargetError, WeightError
from hf_reparam.hf.retype import to_stock
from hf_reparam.nn.dense import build_dense
from hf_reparam.nn.linear import LowRankLinear
from hf_reparam.nn.surgery import replace_modules

__all__ = ["merge"]

M = TypeVar("M", bound=nn.Module)


def merge(model: M, *, inplace: bool = False) -> M:
    """Multiply every pair out, W = up @ down in float64, and return the dense model.

    A `PreTrainedModel` comes back as its stock class with its stock configuration; saved, it loads where hf_reparam was
    never installed. Tied weights stay tied, and `tie_word_embeddings` says what the tensors are.

    Args:
        model: a converted model, trained or not.
        inplace: change `model` itself; otherwise the result is a copy that shares no tensor with it.

    Returns:
        The dense model, of the same dtype, device, `requires_grad` and training mode.

    Raises:
        TargetError: the model has no low-rank layer.
        WeightError: factors are wrapped by an adapter, quantized, or without data.

    Cost: r * in * out multiply-adds for each layer. The relative error of each weight is rounding alone.

    >>> from hf_reparam.convert import convert
    >>> merge(convert(nn.Sequential(nn.Linear(64, 64)), rank=16))
    Sequential(
      (0): Linear(in_features=64, out_features=64, bias=True)
    )
    """
    dense: dict[nn.Module, nn.Module] = {}
    for name, module in model.named_modules():
        if isinstance(module, LowRankLinear):
            try:
                dense[module] = build_dense(module)
            except WeightError as error:
                raise WeightError(f"{name}: {error}") from None
    if not dense:
        raise TargetError(f"{type(model).__name__} has no low-rank layer: there is nothing to merge")
    result = replace_modules(model, dense, inplace=inplace)
    return to_stock(result) if isinstance(result, PreTrainedModel) else result
