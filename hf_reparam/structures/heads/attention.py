"""The registry of attention types whose heads can be made narrower, and the surgery: shapes and attributes.

A type is matched by its exact class. Queries are compared with keys as the projections give them: rotary embeddings
between would not commute with the maps of `hf_reparam.linalg.heads`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hf_reparam.layers.dense import dense_like, shape_of
from hf_reparam.structures.structure import Replacement

__all__ = [
    "Attention",
    "AttentionType",
    "FusedProjections",
    "attention_types",
    "find_attentions",
    "register_attention",
]

INNER = ("query", "key", "value")
"""Roles of the projections into heads."""
ROLES = (*INNER, "output")
"""Roles of all projections of an attention."""


@dataclass(frozen=True, slots=True)
class AttentionType:
    """Where a class of attention keeps its projections, and which attributes its `forward` cuts heads by.

    Args:
        query, key, value, output: paths of its dense layers, relative to the module; the first three may be one path,
            of a fused layer whose outputs are queries, keys and values, each of all heads.
        holder: path of the module that has the attributes below.
        width: attribute, the width of one head.
        size: attribute, heads times the width that the class was built with; it is not changed.
        split: attribute, outputs of one of three fused projections; empty where they are not fused.
    """

    query: str
    key: str
    value: str
    output: str
    holder: str = ""
    width: str = "head_dim"
    size: str = "embed_dim"
    split: str = ""

    @property
    def fused(self) -> bool:
        """Whether queries, keys and values come out of one layer."""
        return self.query == self.key


_registry: dict[str, AttentionType] = {}


def register_attention(module_type: type[nn.Module] | str, entry: AttentionType) -> None:
    """Make an attention class known, so that calibrated conversions may make its heads narrower.

    Its `forward` must view projections as (..., heads, width) with the attribute `width`, infer the number of heads,
    scale scores by a number that was computed when the module was built, and apply nothing between the projections and
    the attention: no rotary embeddings, no norms. Registering a class again replaces its entry.

    Args:
        module_type: the exact class, or its qualified name "package.module.Class", which imports nothing.
        entry: where its parts are.

    >>> register_attention("mypackage.MyAttention", AttentionType("q", "k", "v", "o", size="inner_dim"))
    """
    _registry[module_type if isinstance(module_type, str) else _qualified(module_type)] = entry


def attention_types() -> dict[str, AttentionType]:
    """Qualified name of a class -> its entry."""
    return dict(_registry)


def _qualified(module_type: type[nn.Module]) -> str:
    return f"{module_type.__module__}.{module_type.__qualname__}"


class FusedProjections(nn.Module):
    """Queries, keys and values from three layers, in the place of the one fused layer that gave all of them.

    Args:
        query, key, value: layers (in -> heads * width).

    >>> FusedProjections(nn.Linear(8, 4), nn.Linear(8, 4), nn.Linear(8, 4))(torch.zeros(5, 8)).shape
    torch.Size([5, 12])
    """

    of_one_layer = True  # patterns that mean the fused layer mean its parts

    def __init__(self, query: nn.Module, key: nn.Module, value: nn.Module) -> None:
        super().__init__()
        self.query, self.key, self.value = query, key, value

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., 3 heads * width)."""
        return torch.cat([self.query(x), self.key(x), self.value(x)], -1)


@dataclass(frozen=True, slots=True)
class Attention:
    """An attention of a registered type in a model.

    Args:
        names: every path at which it hangs, the first one is its name.
        module: the attention.
        kind: its entry in the registry.
        heads: how many it has.
        width, stock_width: of one head, now and as its class was built.
    """

    names: tuple[str, ...]
    module: nn.Module
    kind: AttentionType
    heads: int
    width: int
    stock_width: int

    @property
    def name(self) -> str:
        """The path under which it is stored in a plan."""
        return self.names[0]

    @property
    def split(self) -> bool:
        """Whether three layers are in the place of a fused one."""
        return isinstance(self.module.get_submodule(self.kind.query), FusedProjections)

    @property
    def narrowed(self) -> bool:
        """Whether it differs from the stock attention, in the width of its heads or by a fused layer that is split."""
        return self.width < self.stock_width or self.split

    def within(self, role: str, *, split: bool) -> str:
        """Where the layer of a role is in the attention; with `split`, of one of the three in a fused layer's place."""
        path: str = getattr(self.kind, role)
        return f"{path}.{role}" if split and self.kind.fused and role != "output" else path

    def layer(self, role: str) -> nn.Module:
        """The layer of a role, or the fused one that it is of."""
        module = self.module.get_submodule(getattr(self.kind, role))
        return module.get_submodule(role) if isinstance(module, FusedProjections) else module

    def shape(self, role: str, width: int) -> tuple[int, int]:
        """(in, out) of the layer of a role, for heads of this width."""
        n_in, n_out = shape_of(self.layer(role))
        return (self.heads * width, n_out) if role == "output" else (n_in, self.heads * width)

    def empty(self, width: int) -> dict[str, nn.Module]:
        """Role -> dense layer of `shape(role, width)`, without numbers."""
        return {role: dense_like(self.layer(role), self.shape(role, width)) for role in ROLES}

    def narrower(self, layers: Mapping[str, nn.Module], width: int) -> Replacement:
        """These layers of `shape(role, width)` in the place of its own, by their roles; the heads are as wide then."""
        old = {role: self.module.get_submodule(getattr(self.kind, role)) for role in ROLES}
        modules = {old[role]: layers[role] for role in ROLES}
        if self.kind.fused:
            fused = FusedProjections(*(layers[role] for role in INNER))
            modules = {old["query"]: fused, old["output"]: layers["output"]}
        return Replacement(modules, self._attributes(width))

    def stock(self, layers: Mapping[str, nn.Module]) -> Replacement:
        """Layers of stock width in the place of its own, by their roles; "query" is all three of a fused one."""
        old = {role: self.module.get_submodule(getattr(self.kind, role)) for role in layers}
        return Replacement({old[role]: layer for role, layer in layers.items()}, self._attributes(self.stock_width))

    def _attributes(self, width: int) -> list[tuple[nn.Module, str, Any]]:
        holder = self.module.get_submodule(self.kind.holder)
        split = [(holder, self.kind.split, self.heads * width)] if self.kind.split else []
        return [(holder, self.kind.width, width), *split]


def find_attentions(model: nn.Module) -> list[Attention]:
    """Every attention of a registered type whose parts are where its entry says, each once; reads shapes only."""
    names: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if _qualified(type(module)) in _registry:
            names.setdefault(module, []).append(name)
    found = (_attention(tuple(paths), module) for module, paths in names.items())
    return [attention for attention in found if attention is not None]


def _attention(names: tuple[str, ...], module: nn.Module) -> Attention | None:
    kind = _registry[_qualified(type(module))]
    try:
        holder: Any = module.get_submodule(kind.holder)
        width, size = getattr(holder, kind.width), getattr(holder, kind.size)
        inner = shape_of(module.get_submodule(kind.output))[0]
        heads = inner // width
        found = Attention(names, module, kind, heads, width, size // heads)
        outs = {shape_of(found.layer(role))[1] for role in INNER}
        fused = kind.fused and not found.split
    except (AttributeError, ZeroDivisionError):  # another version's class of that name
        return None
    return found if inner == heads * width and outs == {3 * inner if fused else inner} else None
