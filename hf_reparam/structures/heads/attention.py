"""The registry of attention types whose heads can be made narrower, and the surgery: shapes and attributes.

A type is matched by its exact class. Queries are compared with keys as the projections give them: rotary embeddings
between would not commute with the maps of `hf_reparam.linalg.heads`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from hf_reparam.layers.dense import dense_type, shape_of
from hf_reparam.plan import Entry
from hf_reparam.structures.structure import Replacement, Site, paths_of

INNER = ("query", "key", "value")  # roles of the projections into heads
ROLES = (*INNER, "output")  # and of all projections of an attention


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


def _qualified(module_type: type[nn.Module]) -> str:
    return f"{module_type.__module__}.{module_type.__qualname__}"


class FusedProjections(nn.Module):
    """Queries, keys and values from three layers (in -> heads * width), in the place of one that gave all of them.

    >>> FusedProjections(nn.Linear(8, 4), nn.Linear(8, 4), nn.Linear(8, 4))(torch.zeros(5, 8)).shape
    torch.Size([5, 12])
    """

    of_one_layer = True  # patterns that mean the fused layer mean its parts

    def __init__(self, query: nn.Module, key: nn.Module, value: nn.Module) -> None:
        super().__init__()
        self.query, self.key, self.value = query, key, value

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.query(x), self.key(x), self.value(x)], -1)


@dataclass(frozen=True, kw_only=True)
class Attention(Site):
    """An attention of a registered type in a model; the rank of its entry is the width of each head."""

    known: AttentionType  # its entry in the registry
    heads: int  # how many it has
    width: int  # of one head, now; `out_features` is the width that its class was built with

    def within(self, role: str, *, split: bool) -> str:
        """Where the layer of a role is in the attention; with `split`, of one of the three in a fused layer's place."""
        path: str = getattr(self.known, role)
        return f"{path}.{role}" if split and self.known.fused and role != "output" else path

    def layer(self, role: str) -> Any:
        """The layer of a role, or the fused one that it is of."""
        module = self.module.get_submodule(getattr(self.known, role))
        return module.get_submodule(role) if isinstance(module, FusedProjections) else module

    def shape(self, role: str, width: int) -> tuple[int, int]:
        """(in, out) of the layer of a role, for heads of this width."""
        n_in, n_out = shape_of(self.layer(role))
        return (self.heads * width, n_out) if role == "output" else (n_in, self.heads * width)

    def dense_numbers(self, entry: Entry | None) -> int:
        """Numbers that narrower heads leave out of its dense layers."""
        return 0 if entry is None else self._numbers(self.out_features) - self._numbers(entry.rank)

    def _numbers(self, width: int) -> int:
        shapes = {role: self.shape(role, width) for role in ROLES}
        return sum(n_out * (n_in + (self.layer(role).bias is not None)) for role, (n_in, n_out) in shapes.items())

    def replaced(self, layers: Mapping[str, nn.Module], width: int) -> Replacement:
        """Layers of `shape(role, width)` in the place of its own, by their roles; the heads are as wide then.

        In the place of a fused layer "query" is all three, or with "key" and "value" one of three.
        """
        if self.known.fused and "key" in layers:
            fused = FusedProjections(*(layers[role] for role in INNER))
            layers = {"query": fused, "output": layers["output"]}
        modules = {self.module.get_submodule(getattr(self.known, role)): layer for role, layer in layers.items()}
        holder = self.module.get_submodule(self.known.holder)
        split = [(holder, self.known.split, self.heads * width)] if self.known.split else []
        return Replacement(modules, [(holder, self.known.width, width), *split])


def find_attentions(model: nn.Module) -> list[Attention]:
    """Every attention of a registered type whose parts are where its entry says, each once; reads shapes only."""
    paths = paths_of(model)
    found = (_attention(m, names, paths) for m, names in paths.items() if _qualified(type(m)) in _registry)
    return [attention for attention in found if attention is not None]


def _attention(module: nn.Module, names: list[str], paths: Mapping[nn.Module, list[str]]) -> Attention | None:
    known = _registry[_qualified(type(module))]
    try:
        holder: Any = module.get_submodule(known.holder)
        width, size = getattr(holder, known.width), getattr(holder, known.size)
        inner = shape_of(module.get_submodule(known.output))[0]
        heads = inner // width
        found = Attention(
            names=tuple(names),
            module=module,
            kind=type(module).__name__,
            in_features=size // heads,
            out_features=size // heads,
            weights=0,
            known=known,
            heads=heads,
            width=width,
        )
        outs = {shape_of(found.layer(role))[1] for role in INNER}
        split = isinstance(module.get_submodule(known.query), FusedProjections)
    except (AttributeError, ZeroDivisionError):  # another version's class of that name
        return None
    if inner != heads * width or outs != {3 * inner if known.fused and not split else inner}:
        return None
    if width < found.out_features or split:
        return replace(found, entry=Entry(width, "heads"))
    layers = [found.layer(role) for role in ROLES]
    if not all(dense_type(type(layer)) for layer in layers):
        return replace(found, reason="a projection is not a dense layer")
    if any(len(paths[layer]) != len(names) for layer in layers):
        return replace(found, reason="a projection hangs elsewhere, too, and cannot change its shape")
    return found
