"""Attentions with narrower heads: what they lose, what layers they have, and a model in which they stand."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hf_reparam.calibrate.collect import layer_name
from hf_reparam.compress.decomposition import Decompositions
from hf_reparam.errors import PlanError, WeightError
from hf_reparam.layers.dense import dense_like, dense_matrix, dense_type
from hf_reparam.layers.heads import INNER, ROLES, Attention, find_attentions
from hf_reparam.linalg import (
    HeadMaps,
    HeadMoments,
    LayerMoments,
    Moments,
    fingerprint,
    map_both,
    map_rows,
    output_moment,
    spectrum,
    working_device,
)
from hf_reparam.model.offload import aligned, build_layers, execution_device

__all__ = ["NarrowHeads", "attentions_by_name", "narrowed"]

_Lazy = Callable[[], LayerMoments]


def attentions_by_name(model: nn.Module) -> dict[str, Attention]:
    """Name in a plan -> attention, of those whose heads can be made narrower and that are as their class built them."""
    found = {layer_name(model, a.name): a for a in find_attentions(model) if not a.narrowed}
    return {name: a for name, a in found.items() if all(dense_type(a.layer(role)) for role in ROLES)}


@dataclass(frozen=True)
class NarrowHeads:
    """One attention, and the maps that make its heads narrower.

    Args:
        model: where it is.
        attention: the attention, as its class built it.
        source: moments of its layers, and the metric.
    """

    model: nn.Module
    attention: Attention
    source: Decompositions

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
            raise WeightError(f"{self.attention.name}: its weights or moments are not finite")
        moments = HeadMoments(self.attention.heads, *parts)
        return moments, moments.maps()

    def made_of(self, width: int) -> str:
        """A fingerprint of all that layers of this width come from: weights, moments and metric."""
        parts: list[object] = [width, self.source.metric]
        for role in ROLES:
            layer = self.attention.layer(role)
            with aligned(layer):
                parts += [type(layer).__qualname__, fingerprint(layer.state_dict())]
            parts.append(self.source.moments_of(layer_name(self.model, self.attention.path(role, split=False))))
        return fingerprint(*parts, version("hf-reparam"))

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
        name = layer_name(self.model, self.attention.path(role, split=False))
        layer = self.source.layer_moments(name)
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

        In the unit of `Decompositions.losses`; for the fisher metric.
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
            raise WeightError(f"{self.attention.name}: there are no moments of its {role} projection")
        if role == "output":
            mean = map_rows(layer.input_sum[:, None], maps.value)[:, 0]
            return replace(layer, input_sum=mean, input_products=map_both(layer.input_products, maps.value))
        if layer.gradient_products is None:
            return layer
        back = {"query": maps.key, "key": maps.query, "value": maps.output}[role]
        return replace(layer, gradient_products=map_both(layer.gradient_products, back))


class _Changed(Mapping[str, LayerMoments]):
    """Moments of which some are computed when they are asked for, in the place of others."""

    def __init__(self, known: Mapping[str, LayerMoments], gone: set[str], new: Mapping[str, _Lazy]) -> None:
        self._known, self._new = known, new
        self._names = [*(name for name in known if name not in gone), *new]

    def __getitem__(self, name: str) -> LayerMoments:
        if name not in self._names:
            raise KeyError(name)
        return self._new[name]() if name in self._new else self._known[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def _with_moments(
    source: Decompositions, new: Mapping[str, _Lazy], gone: set[str], origins: Mapping[str, str]
) -> Decompositions:
    layers = {name: found for name, found in source.layers.items() if name not in gone}
    if source.moments is None:
        return replace(source, layers=layers, origins=origins)
    moments = Moments(source.moments.metric, _Changed(source.moments.layers, gone, new))
    return replace(source, layers=layers, moments=moments, origins=origins)


@contextmanager
def narrowed(
    model: nn.Module, widths: Mapping[str, int], source: Decompositions, folder: Path | None = None, *, keep: bool
) -> Iterator[tuple[Decompositions, dict[str, float]]]:
    """A model with narrower heads, dense still, while the block lasts.

    Args:
        model: dense; it is changed, and changed back.
        widths: name of an attention -> width of its heads.
        source: the metric, and moments of the model as it is.
        folder: where the new layers go instead of into memory, as in `build_layers`.
        keep: leave the narrower heads in place if the block ends well.

    Yields:
        The same metric with the moments of the narrower layers, and name of an attention -> its relative error.

    Raises:
        PlanError: no such attention that can be narrowed, or a width above its own.
        WeightError: weights or moments are not finite.
        CheckpointError: as `build_layers`.
    """
    if not widths:
        yield source, {}
        return
    known = attentions_by_name(model)
    for name, width in widths.items():
        if name not in known:
            raise PlanError(f"{name}: the plan makes its heads narrower, and it is no attention of which this is known")
        if width > known[name].width:
            raise PlanError(f"{name}: the plan makes its heads {width} wide, above the {known[name].width} they have")
    chosen = {name: known[name] for name in widths}
    heads = {name: NarrowHeads(model, attention, source) for name, attention in chosen.items()}
    maps, errors = {}, {}
    for name, part in heads.items():
        moments, full = part.prepare()
        maps[name] = full.cut(widths[name])
        errors[name] = moments.relative_error(maps[name])
    places = {layer_name(model, a.path(role, split=True)): (name, role) for name, a in chosen.items() for role in ROLES}
    old = {name: {role: a.layer(role) for role in ROLES} for name, a in chosen.items()}

    def make(place: str) -> tuple[nn.Module, float]:
        name, role = places[place]
        return heads[name].layer(role, maps[name]), 0.0

    def empty(place: str) -> nn.Module:
        name, role = places[place]
        return dense_like(old[name][role], chosen[name].shape(role, widths[name]))

    devices = {place: execution_device(old[name][role]) for place, (name, role) in places.items()}
    costs, origins = dict.fromkeys(places, 1.0), {}
    if folder is not None:
        folder = folder / "narrow"
        made_of = {name: part.made_of(widths[name]) for name, part in heads.items()}
        origins = {place: made_of[name] for place, (name, _) in places.items()}
    built = build_layers(costs, make, empty, devices, folder, made_of=origins.__getitem__, desc="Narrowing heads")
    seen = {
        place: partial(heads[name].narrow_moments, role, maps[name])
        for place, (name, role) in places.items()
        if heads[name].moments(role) is not None
    }
    done = False
    try:
        for name, attention in chosen.items():
            mine = {role: built[layer_name(model, attention.path(role, split=True))][0] for role in ROLES}
            attention.narrow(mine, widths[name])
        gone = {layer_name(model, a.path(role, split=False)) for a in chosen.values() for role in ROLES}
        yield _with_moments(source, seen, gone, origins), errors
        done = keep
    finally:
        if not done:
            for name, attention in chosen.items():
                attention.restore(old[name], attention.width)
