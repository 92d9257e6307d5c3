"""`merge`: multiply the factors out and give the plain dense model back."""

import os
from pathlib import Path
from typing import TypeVar

from torch import nn
from transformers import PreTrainedModel

from hf_reparam.errors import TargetError, WeightError
from hf_reparam.hf.offload import aligned, build_layers, execution_device, mark_offloaded
from hf_reparam.hf.retype import to_stock
from hf_reparam.nn.attention import join_dense
from hf_reparam.nn.dense import build_dense, dense_like
from hf_reparam.nn.linear import LowRankLinear
from hf_reparam.nn.surgery import replace_modules

__all__ = ["merge"]

M = TypeVar("M", bound=nn.Module)


def merge(model: M, *, inplace: bool = False, offload_folder: str | os.PathLike[str] | None = None) -> M:
    """Multiply every pair out, W = up @ down in float64, and return the dense model.

    A `PreTrainedModel` comes back as its stock class with its stock configuration; saved, it loads where hf_reparam was
    never installed. Tied weights stay tied, and `tie_word_embeddings` says what the tensors are.

    Args:
        model: a converted model, trained or not.
        inplace: change `model` itself; otherwise the result is a copy that shares no tensor with it.
        offload_folder: where dense layers stay until they compute, as in `convert`.

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
    layers = {name: module for name, module in model.named_modules() if isinstance(module, LowRankLinear)}
    if not layers:
        raise TargetError(f"{type(model).__name__} has no low-rank layer: there is nothing to merge")

    def make(name: str) -> tuple[nn.Module, float]:
        try:
            with aligned(layers[name]):
                return build_dense(layers[name]), 0.0
        except WeightError as error:
            raise WeightError(f"{name}: {error}") from None

    costs = {name: float(x.rank * x.in_features * x.out_features) for name, x in layers.items()}
    devices = {name: execution_device(layer) for name, layer in layers.items()}
    folder = None if offload_folder is None else Path(offload_folder)
    built = build_layers(costs, make, lambda name: dense_like(layers[name]), devices, folder, desc="Merging layers")
    result = replace_modules(model, {layers[name]: dense for name, (dense, _) in built.items()}, inplace=inplace)
    if folder is not None:
        mark_offloaded(result, layers)
    return to_stock(result) if isinstance(result, PreTrainedModel) else join_dense(result)
