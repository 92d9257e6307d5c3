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
from hf_reparam.linalg.factorize import spectrum, working_device
from hf_reparam.linalg.heads import HeadMaps, HeadMoments, map_both, map_rows, output_moment
from hf_reparam.linalg.moments import LayerMoments
from hf_reparam.structures.heads.attention import INNER, ROLES, Attention
from hf_reparam.structures.source import Source
from hf_reparam.structures.structure import Built


@dataclass(frozen=True)
class NarrowHeads:
    """One attention, as its class built it, its name in a plan, and what is known of its layers."""

    name: str
    attention: Attention
    source: Source

    def prepare(self) -> tuple[HeadMoments, HeadMaps]:
        """Moments of the heads, and maps of full width; raises WeightError where weights or moments are not finite."""
        key, output = self.moments("key"), self.moments("output")
        keys, mean = self._outputs("key")
        if key is not None:
            keys = keys - torch.outer(mean, mean)
        if key is None or key.gradient_products is None:
            queries = self._outputs("query")[0]
        else:
            queries = key.gradient_products / key.tokens
        weight, bias = self.weight("output")
        if output is None:
            values = self._outputs("value")[0]
        else:
            mean = output.mean() * (bias is not None)
            values = output.input_products / output.tokens - torch.outer(mean, mean)
        if output is None or output.gradient_products is None:
            outputs = weight.T @ weight
        else:
            outputs = weight.T @ (output.gradient_products / output.tokens) @ weight
        parts = (keys, queries, values, outputs)
        if not all(bool(torch.isfinite(part).all()) for part in parts):
            raise WeightError(f"{self.name}: its weights or moments are not finite")
        moments = HeadMoments(self.attention.heads, *parts)
        return moments, moments.maps()

    def build(self, width: int) -> Built:
        """Its layers with heads of this width, and the moments that they have."""
        moments, full = self.prepare()
        maps = full.cut(width)
        seen = {
            f"{self.name}.{self.attention.within(role, split=True)}": partial(self.narrow_moments, role, maps)
            for role in ROLES
            if self.moments(role) is not None
        }
        gone = frozenset(f"{self.name}.{self.attention.within(role, split=False)}" for role in ROLES)
        made = self.attention.replaced({role: self.layer(role, maps) for role in ROLES}, width)
        return Built(made, moments.relative_error(maps), seen, gone)

    def _outputs(self, role: str) -> tuple[Tensor, Tensor]:
        """Second moment and mean of what a projection gives; for inputs of no mean and unit covariance without data."""
        weight, bias = self.weight(role)
        seen = self.moments(role)
        if seen is None:
            products, mean = torch.eye(weight.shape[1], dtype=torch.float64), weight.new_zeros(weight.shape[1])
        else:
            products, mean = seen.input_products / seen.tokens, seen.mean()
        return output_moment(weight, bias, products, mean), weight @ mean + (0 if bias is None else bias)

    def weight(self, role: str) -> tuple[Tensor, Tensor | None]:
        """Weight (out, in) and bias (out,) of a role, dense, float64 on the CPU."""
        layer, rows = self.attention.layer(role), self._rows(role)
        with aligned(layer):
            weight = dense_matrix(layer).detach().to("cpu", torch.float64)[rows]
            bias = None if layer.bias is None else layer.bias.detach().to("cpu", torch.float64)[rows]
        return weight, bias

    def moments(self, role: str) -> LayerMoments | None:
        """Moments of the layer of a role as the metric uses them; None if there are none."""
        layer, rows = self.source.moments(f"{self.name}.{self.attention.within(role, split=False)}"), self._rows(role)
        if layer is None or layer.gradient_products is None:
            return None if layer is None else replace(layer, held=None)
        used = self.source.metric == "fisher" and layer.has_gradient()
        return replace(layer, gradient_products=layer.gradient_products[rows, rows] if used else None, held=None)

    def _rows(self, role: str) -> slice:
        if not self.attention.known.fused or role == "output":
            return slice(None)
        size, place = self.attention.heads * self.attention.width, INNER.index(role)
        return slice(place * size, (place + 1) * size)

    def losses(self, widths: Iterable[int]) -> list[tuple[int, float, dict[str, Tensor]]]:
        """For every width, what it loses, and what dropping directions of its layers loses: role -> (min(in, out),).

        In the unit of `Structure.losses`; for the fisher metric, with moments of every layer.
        """
        moments, full = self.prepare()
        seen: dict[str, Any] = {role: self.moments(role) for role in ROLES}
        weights = {role: self.weight(role) for role in ROLES}
        device = execution_device(self.attention.layer("output"))
        found = []
        for width in widths:
            maps = full.cut(width)
            by_keys, by_values = moments.errors(maps)
            losses = {}
            for role, (weight, bias) in weights.items():
                narrow = _narrow(role, weight, maps).to(device)
                layer = self.narrow_moments(role, maps)
                metric = layer.metric(self.source.metric, centred=bias is not None, device=working_device(narrow))
                losses[role] = spectrum(narrow, metric).cpu() * layer.tokens
            found.append((width, seen["key"].tokens * by_keys + seen["output"].tokens * by_values, losses))
        return found

    def layer(self, role: str, maps: HeadMaps) -> nn.Module:
        """The dense layer of a role with narrower heads, of the type, dtype and device of its original."""
        weight, bias = self.weight(role)
        narrow = _narrow(role, weight, maps)
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
        """The moments that the narrower layer of a role has, from those that there are of the layer."""
        layer: Any = self.moments(role)
        if role == "output":
            mean = map_rows(layer.input_sum[:, None], maps.value)[:, 0]
            return replace(layer, input_sum=mean, input_products=map_both(layer.input_products, maps.value))
        if layer.gradient_products is None:
            return layer
        back = {"query": maps.key, "key": maps.query, "value": maps.output}[role]
        return replace(layer, gradient_products=map_both(layer.gradient_products, back))


def _narrow(role: str, weight: Tensor, maps: HeadMaps) -> Tensor:
    return map_rows(weight.T, maps.output).T if role == "output" else map_rows(weight, getattr(maps, role))


def stock_layers(attention: Attention) -> dict[str, nn.Module]:
    """Role -> dense layer of stock width, without numbers; "query" is all three of a fused one."""
    made = {}
    for role in ("query", "output") if attention.known.fused else ROLES:
        n_in, n_out = attention.shape(role, attention.out_features)
        made[role] = dense_like(attention.layer(role), (n_in, n_out * len(_parts(attention, role))))
    return made


def _parts(attention: Attention, role: str) -> tuple[str, ...]:
    return INNER if attention.known.fused and role == "query" else (role,)


@torch.no_grad()
def widened(attention: Attention) -> dict[str, nn.Module]:
    """`stock_layers` with the numbers of narrower heads, filled up with zeros, which is exact."""
    made: dict[str, Any] = stock_layers(attention)
    heads, extra = attention.heads, attention.out_features - attention.width

    def filled(matrix: Tensor) -> Tensor:  # after the rows of every head
        return F.pad(matrix.reshape(heads, attention.width, -1), (0, 0, 0, extra)).flatten(0, 1)

    for role, dense in made.items():
        parts = [attention.layer(part) for part in _parts(attention, role)]
        for rows, layer in zip(dense_matrix(dense).chunk(len(parts)), parts, strict=True):
            weight = dense_matrix(layer)
            rows.copy_(filled(weight.T).T if role == "output" else filled(weight))
        if dense.bias is not None:
            biases = [layer.bias if role == "output" else filled(layer.bias[:, None])[:, 0] for layer in parts]
            dense.bias.copy_(torch.cat(biases))
    return made
