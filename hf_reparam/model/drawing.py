"""Numbers for low-rank layers that have none, as large as those that the base class would draw for dense ones."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, initialization

from hf_reparam.layers.dense import dense_like, dense_matrix, shape_of
from hf_reparam.layers.embedding import Tables
from hf_reparam.layers.linear import LowRankLinear, PivotedLinear

__all__ = ["deviations", "draw", "draw_dense", "draw_tables", "out_of_sight"]


@torch.no_grad()
def draw(layer: LowRankLinear, config: Any, deviation: float | None = None) -> None:
    """Give numbers to a layer, so that its product has this deviation; if None, the family's, or a fresh nn.Linear's.

    One factor has it, and the other mixes its r rows or columns with variance 1 / r.
    """
    outer, mixing = (layer.up, layer.down) if layer.form == "pivoted" else (layer.down, layer.up)
    std = _deviation(config, layer.in_features) if deviation is None else deviation
    for part, size in ((outer, std), (mixing, layer.rank**-0.5)):
        initialization.normal_(part.weight, std=size)
    if layer.up.bias is not None:
        initialization.zeros_(layer.up.bias)
    if isinstance(layer, PivotedLinear):
        initialization.copy_(layer.order, torch.arange(layer.in_features))


@torch.no_grad()
def draw_tables(module: Any, config: Any, deviation: float | None = None) -> None:
    """Give numbers to an embedding, as `draw`."""
    std = _deviation(config, module.in_features) if deviation is None else deviation
    initialization.normal_(module.table.weight, std=std)
    initialization.normal_(module.up.weight, std=module.rank**-0.5)


@torch.no_grad()
def draw_dense(layer: Any, config: Any) -> None:
    """Give numbers to a dense layer, as the base class may not do it again."""
    initialization.normal_(layer.weight, std=_deviation(config, layer.weight.numel() // shape_of(layer)[1]))
    if layer.bias is not None:
        initialization.zeros_(layer.bias)


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
        mine = {key: child for key, child in owner._modules.items() if any(child is layer for layer in layers)}
        if not mine:
            continue
        for key, low in mine.items():
            owner._modules[key] = _stand_in(low)
        try:
            for key in mine:
                holder._init_weights(owner._modules[key])
            holder._init_weights(owner)
            found |= {low: _spread(owner._modules[key]) for key, low in mine.items() if isinstance(low, nn.Module)}
        finally:
            owner._modules.update(mine)
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


def _stand_in(low: Any) -> nn.Module:
    if isinstance(low, Tables):
        return nn.Embedding(low.out_features, low.in_features, dtype=low.up.weight.dtype)
    return dense_like(low)


def _spread(dense: Any) -> float:
    matrix = dense.weight if isinstance(dense, nn.Embedding) else dense_matrix(dense)
    return float(matrix.float().std())
