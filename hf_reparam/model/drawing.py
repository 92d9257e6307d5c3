"""Numbers for low-rank layers that have none, as large as those that the base class would draw for dense ones."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from hf_reparam.compat.loading import draw_as_class, fill
from hf_reparam.layers.dense import dense_type, shape_of
from hf_reparam.layers.factored import Factored


@torch.no_grad()
def draw(layer: Factored, config: Any, deviation: float | None = None) -> None:
    """Give numbers to factors, so that their product has this deviation; if None, the family's or a new nn.Linear's."""
    for tensor, value in layer.fresh(_deviation(config, layer.in_features) if deviation is None else deviation):
        fill(tensor, value)


@torch.no_grad()
def draw_new(module: nn.Module, config: Any) -> None:
    """Give numbers to the factors and dense layers in a module, where they are not on the meta device."""
    inside = {factor for part in module.modules() if isinstance(part, Factored) for factor in part.children()}
    for part in module.modules():
        tensors = (*part.parameters(recurse=False), *part.buffers(recurse=False))
        if part in inside or any(tensor.is_meta for tensor in tensors):
            continue
        if isinstance(part, Factored):
            draw(part, config)
        elif dense_type(type(part)) is not None:  # the base class may not draw it again
            layer: Any = part
            fill(layer.weight, _deviation(config, layer.weight.numel() // shape_of(layer)[1]))
            if layer.bias is not None:
                fill(layer.bias, 0.0)


def _deviation(config: Any, n_in: int) -> float:
    """The family's, or that of a fresh nn.Linear."""
    std = getattr(config, "initializer_range", None)
    return float((3 * n_in) ** -0.5 if std is None else std)


@torch.no_grad()
def deviations(model: PreTrainedModel, layers: list[Any]) -> dict[nn.Module, float]:
    """Layer -> deviation of the numbers that the base class draws for the dense layer or table in its place.

    Families scale them by more than one entry of their configuration ("initializer_factor"), by the depth and by where
    a layer is, so that one has to be drawn and looked at. What stands beside the layers is drawn with them: call it
    where all is drawn anew afterwards.
    """
    found: dict[nn.Module, float] = {}
    model_of = {"": model}
    for name, owner in model.named_modules():
        holder = owner if isinstance(owner, PreTrainedModel) else model_of[name.rpartition(".")[0]]
        model_of[name] = holder
        mine: dict[str, Any] = {key: child for key, child in owner._modules.items() if child in layers}
        if not mine:
            continue
        held, stand_ins = dict(owner._modules), {key: low.stand_in() for key, low in mine.items()}
        for key, stand_in in stand_ins.items():  # a module, or a parameter
            setattr(owner, key, stand_in)
        try:
            for part in [*stand_ins.values(), owner]:
                if isinstance(part, nn.Module):
                    draw_as_class(holder, part)
            for key, low in mine.items():
                found[low] = float(getattr(stand_ins[key], "weight", stand_ins[key]).float().std())
        finally:
            for key in mine:
                delattr(owner, key)
            owner._modules.clear()
            owner._modules.update(held)
    return found


@contextmanager
def out_of_sight(layers: Iterable[nn.Module]) -> Iterator[None]:
    """Hide factors from base classes that initialise every Linear inside of a module, and take its bias for granted."""
    held = [(layer, dict(layer._modules)) for layer in layers]
    for layer, factors in held:
        layer._modules.clear()
        vars(layer).update(factors)
    try:
        yield
    finally:
        for layer, factors in held:
            for name in factors:
                del vars(layer)[name]
            layer._modules.update(factors)
