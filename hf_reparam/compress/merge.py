"""`merge`: multiply the factors out and give the plain dense model back."""

import os
from contextlib import ExitStack
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hf_reparam.errors import TargetError, WeightError
from hf_reparam.layers.attention import join_dense
from hf_reparam.layers.dense import build_dense, dense_like, dense_matrix, shape_of
from hf_reparam.layers.embedding import Tables, stock_tables
from hf_reparam.layers.heads import INNER, ROLES, Attention, FusedProjections, find_attentions
from hf_reparam.layers.linear import LowRankLinear
from hf_reparam.layers.surgery import check_copyable, replace_modules, undone_on_error
from hf_reparam.linalg import fingerprint
from hf_reparam.model.classes import ReparamMixin
from hf_reparam.model.host import check_model, hosts, unwrapped
from hf_reparam.model.inspection import check_convertible
from hf_reparam.model.offload import aligned, build_layers, execution_device, mark_offloaded
from hf_reparam.model.retype import to_stock
from hf_reparam.model.tables import table_groups

__all__ = ["merge"]

M = TypeVar("M", bound=nn.Module)


def merge(model: M, *, inplace: bool = False, offload_folder: str | os.PathLike[str] | None = None) -> M:
    """Multiply every pair out, W = up @ down in float64, and return the dense model.

    Heads that are narrower are filled up with zeros, which is exact, and a fused layer that was split is fused.

    A `PreTrainedModel`, and every one inside another object, comes back as its stock class with its stock
    configuration; saved, it loads where hf_reparam was never installed. Tied weights stay tied, and
    `tie_word_embeddings` says what the tensors are.

    Args:
        model: a converted model, trained or not.
        inplace: change `model` itself; otherwise the result is a copy that shares no tensor with it.
        offload_folder: where dense layers stay until they compute, as in `convert`; not the folder of its layers.

    Returns:
        The dense model, of the same dtype, device, `requires_grad` and training mode.

    Raises:
        TargetError: the model has no low-rank layer, is sharded, or cannot be copied.
        WeightError: factors are wrapped by an adapter, quantized, or without data.
        CheckpointError: `offload_folder` holds layers of another model, or another process is filling it.

    Cost: r * in * out multiply-adds for each layer. The relative error of each weight is rounding alone.

    >>> from hf_reparam.compress.convert import convert
    >>> merge(convert(nn.Sequential(nn.Linear(64, 64)), rank=16))
    Sequential(
      (0): Linear(in_features=64, out_features=64, bias=True)
    )
    """
    check_model(model)
    check_convertible(model, inplace=inplace)
    narrow = [attention for attention in find_attentions(model) if attention.narrowed]
    parts = _parts(model, narrow)
    tables = [module for module in model.modules() if isinstance(module, Tables)]
    if not parts and not tables and not any(isinstance(module, ReparamMixin) for module in model.modules()):
        raise TargetError(f"{type(model).__name__} has no low-rank layer: there is nothing to merge")

    if not inplace:
        check_copyable(unwrapped(model), [*tables, *(part.module for part in parts.values())])
    elif any(part.module is model for part in parts.values()):
        raise TargetError("a model that is itself one low-rank layer cannot be changed in place: use inplace=False")

    def make(name: str) -> tuple[nn.Module, float]:
        try:
            return parts[name].build(), 0.0
        except WeightError as error:
            raise WeightError(f"{name}: {error}") from None

    costs = {name: float(part.shape[0] * part.shape[1]) for name, part in parts.items()}
    devices = {name: execution_device(part.layers[0]) for name, part in parts.items()}
    folder = None if offload_folder is None else Path(offload_folder)
    built = build_layers(
        costs,
        make,
        lambda name: parts[name].empty(),
        devices,
        folder,
        made_of=lambda name: parts[name].made_of(),
        desc="Merging layers",
    )
    stock = _stock(model, tables)
    biases = {dense: dense.bias for dense in stock.values() if isinstance(dense, nn.Linear)}
    replaced = {parts[name].module: dense for name, (dense, _) in built.items()} | stock
    result = model if inplace else replace_modules(model, replaced, inplace=False)
    with undone_on_error(result):
        if inplace:
            replace_modules(model, replaced, inplace=True)
        for attention in narrow:
            replace(attention, module=result.get_submodule(attention.name)).set_width(attention.stock_width)
        if folder is not None:
            mark_offloaded(result, parts)
        for path, host in hosts(result).items():
            if not path or any(isinstance(module, ReparamMixin) for module in host.modules()):
                to_stock(host)
        for head, bias in biases.items():
            if head.bias is not None and head.bias.is_meta:  # tied to one in a file, which nobody would bring in here
                head.bias = bias
        return result if "" in hosts(result) else join_dense(result)


@torch.no_grad()
def _stock(model: nn.Module, tables: list[Tables]) -> dict[nn.Module, nn.Module]:
    """Modules that hold factors of tables -> dense ones; those that share factors share the table."""
    groups: dict[object, list[Tables]] = {}
    tied = {module: group.path for group in table_groups(model) for module in group.members.values()}
    for module in tables:  # offloaded ones have a meta tensor each: what is tied is known by name alone
        shared = module.table.weight
        groups.setdefault(tied.get(module, module) if shared.is_meta else shared, []).append(module)
    made: dict[nn.Module, nn.Module] = {}
    for members in groups.values():
        with ExitStack() as stack:
            for module in members:
                stack.enter_context(aligned(module))
            table, up = members[0].factors()
            if table.is_meta:
                raise WeightError("the embeddings are on the meta device and have no data")
            weight = nn.Parameter((table.double() @ up.double()).to(table.dtype), table.requires_grad)
            made |= stock_tables(members, weight)
    return made


@dataclass(frozen=True)
class _Part:
    """What becomes one dense layer.

    Args:
        module: what is in its place.
        layers: low-rank or dense; three for a fused layer that is split.
        shape: (in, out) of the dense layer.
        attention, role: where heads are narrower, the attention and the role of the layers, "query" for all three.
    """

    module: nn.Module
    layers: tuple[nn.Module, ...]
    shape: tuple[int, int]
    attention: Attention | None = None
    role: str = ""

    def empty(self) -> nn.Module:
        """The dense layer without its numbers."""
        return dense_like(self.layers[0], self.shape)

    def made_of(self) -> str:
        """A fingerprint of all that the dense layer comes from."""
        heads = None if self.attention is None else (self.attention.heads, self.attention.width)
        parts: list[object] = ["merge", self.shape, self.role, heads]
        for layer in self.layers:
            with aligned(layer):
                parts += [repr(layer), getattr(layer, "dense_type", None), fingerprint(layer.state_dict())]
        return fingerprint(*parts, version("hf-reparam"))

    @torch.no_grad()
    def build(self) -> nn.Module:
        """The dense layer: products multiplied out, heads filled up with zeros, and fused."""
        if self.attention is None and isinstance(self.layers[0], LowRankLinear):
            with aligned(self.layers[0]):
                return build_dense(self.layers[0])
        with aligned(self.layers[0]):  # in files it would be on the meta device
            made = self.empty()
        matrix, bias = dense_matrix(made).zero_(), made.bias
        step = self.shape[1] // len(self.layers)
        for i, layer in enumerate(self.layers):
            with aligned(layer):
                dense: Any = build_dense(layer) if isinstance(layer, LowRankLinear) else layer
                rows = slice(i * step, (i + 1) * step)
                matrix[rows] = self._widen(dense_matrix(dense))
                if isinstance(bias, nn.Parameter):
                    wide = dense.bias if self.role == "output" else self._widen(dense.bias[:, None])[:, 0]
                    bias[rows] = wide
        return made

    def _widen(self, matrix: Tensor) -> Tensor:
        """Zeros after the entries of every head: of columns for the output projection, else of rows."""
        if self.attention is None:
            return matrix
        if self.role == "output":
            return self._fill(matrix.T).T
        return self._fill(matrix)

    def _fill(self, matrix: Tensor) -> Tensor:
        heads, width, wide = self.attention.heads, self.attention.width, self.attention.stock_width  # type: ignore[union-attr]
        return F.pad(matrix.reshape(heads, width, -1), (0, 0, 0, wide - width)).flatten(0, 1)


def _parts(model: nn.Module, narrow: list[Attention]) -> dict[str, _Part]:
    """Path -> what becomes one dense layer there."""
    parts: dict[str, _Part] = {}
    inside: set[nn.Module] = set()
    for a in narrow:
        inside |= {a.layer(role) for role in ROLES}
        for role in ("query", "output") if a.kind.fused else ROLES:
            module = a.module.get_submodule(getattr(a.kind, role))
            layers = tuple(a.layer(r) for r in INNER) if isinstance(module, FusedProjections) else (a.layer(role),)
            n_in, n_out = a.shape(role, a.stock_width)
            parts[a.path(role, split=False)] = _Part(module, layers, (n_in, n_out * len(layers)), a, role)
    for name, module in model.named_modules():
        if isinstance(module, LowRankLinear) and module not in inside:
            parts[name] = _Part(module, (module,), shape_of(module))
    return parts
