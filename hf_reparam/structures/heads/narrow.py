"""Narrower heads of one attention: what they lose, and the layers that they have; and back."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hf_reparam.compat.accelerate import aligned, execution_device
from hf_reparam.errors import WeightError
from hf_reparam.layers.dense import dense_like, dense_matrix
from hf_reparam.linalg import (
    HeadMaps,
    HeadMoments,
    LayerMoments,
    map_both,
    map_rows,
    output_moment,
    spectrum,
    working_device,
)
from hf_reparam.structures.heads.attention import INNER, ROLES, Attention
from hf_reparam.structures.source import Source
from hf_reparam.structures.structure import Built

__all__ = ["NarrowHeads", "stock_layers", "widened"]


@dataclass(frozen=True)
class NarrowHeads:
    """One attention, and the maps that make its heads narrower.

    Args:
        name: of the attention in a plan.
        attention: the attention, as its class built it.
        source: moments of its layers, and the metric.
    """

    name: str
    attention: Attention
    source: Source

    def prepare(self) -> tuple[HeadMoments, HeadMaps]:
        """Moments of the heads, and maps of full width.

        Raises:
            WeightError: weights or moments are not finite.
        """
        keys, key_mean = self._outputs("key")
        seen, (weight, bias) = self.moments("output"), self.weight("output")
        if seen is None:
            values, gradient = self._outputs("value")[0], None
        else:
            mean = seen.mean() * (bias is not None)
            values = seen.input_products / seen.tokens - torch.outer(mean, mean)
            gradient = seen.gradient_products
        outputs = (
            weight.T @ weight if gradient is None or seen is None else weight.T @ (gradient / seen.tokens) @ weight
        )
        seen = self.moments("key")
        if seen is not None:
            keys = keys - torch.outer(key_mean, key_mean)
        scores = None if seen is None else seen.gradient_products
        queries = self._outputs("query")[0] if scores is None or seen is None else scores / seen.tokens
        parts = (keys, queries, values, outputs)
        if not all(bool(torch.isfinite(part).all()) for part in parts):
            raise WeightError(f"{self.name}: its weights or moments are not finite")
        moments = HeadMoments(self.attention.heads, *parts)
        return moments, moments.maps()

    def build(self, width: int) -> Built:
        """Its layers with heads of this width, and the moments that they have.

        Raises:
            WeightError: weights or moments are not finite.
        """
        moments, full = self.prepare()
        maps = full.cut(width)
        layers = {role: self.layer(role, maps) for role in ROLES}
        seen = {
            f"{self.name}.{self.attention.within(role, split=True)}": partial(self.narrow_moments, role, maps)
            for role in ROLES
            if self.moments(role) is not None
        }
        gone = frozenset(f"{self.name}.{self.attention.within(role, split=False)}" for role in ROLES)
        made = self.attention.narrower(layers, width)
        return Built(made, moments.relative_error(maps), self.source.metric, seen, gone)

    def _outputs(self, role: str) -> tuple[Tensor, Tensor]:
        """Second moment and mean of what a projection gives; for inputs of no mean and unit covariance without data."""
        weight, bias = self.weight(role)
        seen = self.moments(role)
        identity, zero = torch.eye(weight.shape[1], dtype=torch.float64), weight.new_zeros(weight.shape[1])
        products, mean = (identity, zero) if seen is None else (seen.input_products / seen.tokens, seen.mean())
        return output_moment(weight, bias, products, mean), weight @ mean + (0 if bias is None else bias)

    def weight(self, role: str) -> tuple[Tensor, Tensor | None]:
        """Weight (out, in) and bias (out,) of a role, dense, float64 on the CPU."""
        layer: Any = self.attention.layer(role)
        with aligned(layer):
            weight = dense_matrix(layer).detach().to("cpu", torch.float64)[self._rows(role)]
            bias = None if layer.bias is None else layer.bias.detach().to("cpu", torch.float64)[self._rows(role)]
        return weight, bias

    def moments(self, role: str) -> LayerMoments | None:
        """Moments of the layer of a role as the metric uses them; None if there are none."""
        layer = self.source.moments(f"{self.name}.{self.attention.within(role, split=False)}")
        if layer is None or self.source.metric != "fisher" or not layer.has_gradient():
            return None if layer is None else replace(layer, gradient_products=None)
        return replace(layer, gradient_products=layer.gradient_products[self._rows(role), self._rows(role)])  # type: ignore[index]

    def _rows(self, role: str) -> slice:
        """The outputs that belong to a role."""
        if not self.attention.kind.fused or role == "output":
            return slice(None)
        size, place = self.attention.heads * self.attention.width, INNER.index(role)
        return slice(place * size, (place + 1) * size)

    def losses(self, widths: Iterable[int]) -> list[tuple[int, float, dict[str, Tensor]]]:
        """For every width, what it loses, and what dropping directions of its layers loses: role -> (min(in, out),).

        In the unit of `Source.losses`; for the fisher metric.
        """
        moments, full = self.prepare()
        seen = {role: self.moments(role) for role in ROLES}
        tokens = [0 if (part := seen[role]) is None else part.tokens for role in ("key", "output")]
        weights = {role: self.weight(role) for role in ROLES}
        device = execution_device(self.attention.layer("output"))
        found = []
        for width in widths:
            maps = full.cut(width)
            error = sum(t * e for t, e in zip(tokens, moments.errors(maps), strict=True))
            losses = {}
            for role, (weight, bias) in weights.items():
                narrow = self._narrow(role, weight, maps).to(device)
                layer = self.narrow_moments(role, maps)
                metric = layer.metric(self.source.metric, centred=bias is not None, device=working_device(narrow))
                losses[role] = spectrum(narrow, metric).cpu() * layer.tokens
            found.append((width, error, losses))
        return found

    @staticmethod
    def _narrow(role: str, weight: Tensor, maps: HeadMaps) -> Tensor:
        return map_rows(weight.T, maps.output).T if role == "output" else map_rows(weight, getattr(maps, role))

    def layer(self, role: str, maps: HeadMaps) -> nn.Module:
        """The dense layer of a role with narrower heads, of the type, dtype and device of its original."""
        weight, bias = self.weight(role)
        narrow = self._narrow(role, weight, maps)
        if bias is not None and role != "output":
            bias = map_rows(bias[:, None], getattr(maps, role))[:, 0]
        elif bias is not None and (seen := self.moments(role)) is not None:
            bias = bias + weight @ seen.mean() - narrow @ map_rows(seen.mean()[:, None], maps.value)[:, 0]
        old = self.attention.layer(role)
        with aligned(old), torch.no_grad():
            made = dense_like(old, (narrow.shape[1], narrow.shape[0]))
            dense_matrix(made).copy_(narrow)
            if bias is not None:
                made.get_parameter("bias").copy_(bias)
        return made

    def narrow_moments(self, role: str, maps: HeadMaps) -> LayerMoments:
        """The moments that the narrower layer of a role has.

        Raises:
            WeightError: there are none of the layer.
        """
        layer = self.moments(role)
        if layer is None:
            raise WeightError(f"{self.name}: there are no moments of its {role} projection")
        if role == "output":
            mean = map_rows(layer.input_sum[:, None], maps.value)[:, 0]
            return replace(layer, input_sum=mean, input_products=map_both(layer.input_products, maps.value))
        if layer.gradient_products is None:
            return layer
        back = {"query": maps.key, "key": maps.query, "value": maps.output}[role]
        return replace(layer, gradient_products=map_both(layer.gradient_products, back))


@torch.no_grad()
def widened(attention: Attention) -> dict[str, nn.Module]:
    """Role -> dense layer of stock width: heads filled up with zeros, which is exact, three layers fused again."""
    made = {}
    for role in ("query", "output") if attention.kind.fused else ROLES:
        parts = INNER if attention.kind.fused and role == "query" else (role,)
        layers: list[Any] = [attention.layer(part) for part in parts]
        with aligned(layers[0]):
            dense = _empty(attention, role, layers)
        matrix, bias = dense_matrix(dense).zero_(), dense.bias
        step = matrix.shape[0] // len(layers)
        for i, layer in enumerate(layers):
            with aligned(layer):
                rows = slice(i * step, (i + 1) * step)
                weight = dense_matrix(layer)
                matrix[rows] = _fill(attention, weight.T).T if role == "output" else _fill(attention, weight)
                if isinstance(bias, nn.Parameter):
                    bias[rows] = layer.bias if role == "output" else _fill(attention, layer.bias[:, None])[:, 0]
        made[role] = dense
    return made


def stock_layers(attention: Attention) -> dict[str, nn.Module]:
    """As `widened`, by shape alone."""
    roles = ("query", "output") if attention.kind.fused else ROLES
    parts = {r: INNER if attention.kind.fused and r == "query" else (r,) for r in roles}
    return {role: _empty(attention, role, [attention.layer(part) for part in parts[role]]) for role in roles}


def _empty(attention: Attention, role: str, layers: list[Any]) -> Any:
    n_in, n_out = attention.shape(role, attention.stock_width)
    return dense_like(layers[0], (n_in, n_out * len(layers)))


def _fill(attention: Attention, matrix: Tensor) -> Tensor:
    """Zeros after the rows of every head."""
    heads, width, wide = attention.heads, attention.width, attention.stock_width
    return F.pad(matrix.reshape(heads, width, -1), (0, 0, 0, wide - width)).flatten(0, 1)
