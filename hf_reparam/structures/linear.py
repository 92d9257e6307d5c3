"""Dense layers as products of two smaller ones, as a pair or with pivots."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from hf_reparam.compat.accelerate import aligned
from hf_reparam.compat.marks import hook_of
from hf_reparam.config import FORMS
from hf_reparam.errors import RankError, WeightError
from hf_reparam.layers.dense import (
    build_dense,
    dense_matrix,
    dense_type,
    not_whole,
    registered_types,
    shape_of,
)
from hf_reparam.layers.factored import Factored
from hf_reparam.layers.linear import LowRankLinear
from hf_reparam.layers.processes import spread
from hf_reparam.layers.surgery import factor, has_hooks, low_rank_like
from hf_reparam.linalg import LayerMoments
from hf_reparam.plan import Entry
from hf_reparam.structures.multihead import unsplittable
from hf_reparam.structures.source import Source
from hf_reparam.structures.structure import Built, Choices, Replacement, Site, Steps, Way, choices_of, named

__all__ = ["Linears", "numbers"]


@dataclass(frozen=True)
class Linears:
    """Every layer of a registered dense type: see `hf_reparam.register_dense`."""

    forms: tuple[str, ...] = FORMS
    option: str | None = None
    changes_moments: bool = False
    stays_in_memory: bool = False

    def sites(self, model: nn.Module) -> list[Site]:
        """All layers that are dense or low-rank; why a dense one cannot be replaced by a module with the same call."""
        names: dict[nn.Module, list[str]] = {}
        modules = dict(model.named_modules(remove_duplicate=False))
        factors = {part for m in model.modules() if isinstance(m, Factored) for part in m.modules() if part is not m}
        for path, module in modules.items():
            if module not in factors and (_looks_dense(module) or isinstance(module, nn.MultiheadAttention)):
                names.setdefault(module, []).append(path)
        owners = Counter(id(p) for m in set(modules.values()) for p in m._parameters.values() if p is not None)
        found = (_site(tuple(paths), module, modules, owners) for module, paths in names.items())
        return [site for site in found if site is not None]

    def cost(self, site: Site, entry: Entry | None) -> int:
        """Numbers of the factors; raises RankError for a rank above min(in, out), or min(in - 1, out) with pivots."""
        if entry is None:
            return site.weights
        pivoted = entry.form == "pivoted"
        most = min(site.in_features - pivoted, site.out_features)
        if entry.rank > most:
            raise RankError(f"rank {entry.rank}, above {'min(in - 1, out)' if pivoted else 'min(in, out)'} = {most}")
        return numbers(site.in_features, site.out_features, entry)

    def ways(
        self, sites: Mapping[str, Site], source: Source, steps: Steps, taken: Mapping[str, Choices]
    ) -> dict[str, list[Way]]:
        """Every rank at which a layer is smaller than dense."""

        def work(name: str) -> Tensor | None:
            site = sites[name]
            with named(site.name), aligned(site.module):
                return source.losses(name, lambda: dense_matrix(site.module), centred=site.others > 0)

        found = spread({name: source.effort(site) for name, site in sites.items()}, work, desc="Spectra")
        shapes = {name: (site.in_features, site.out_features) for name, site in sites.items()}
        return {
            name: [Way(0.0, {name: self.choices(*shapes[name], losses, steps)})]
            for name, losses in found.items()
            if losses is not None
        }

    def choices(self, n_in: int, n_out: int, losses: Any, steps: Steps) -> Choices:
        """Every rank at which a layer of this shape is smaller than dense, and None for the dense layer itself."""
        entries = [steps.entry(rank, self.forms) for rank in steps.up_to(min(n_in, n_out))]
        costs = [numbers(n_in, n_out, entry) for entry in entries]
        smaller = [(e, c) for e, c in zip(entries, costs, strict=True) if c < n_in * n_out]
        return choices_of([e for e, _ in smaller], losses, [*(c for _, c in smaller), n_in * n_out])

    def sums(self, name: str, site: Site, *, gradients: bool) -> dict[str, Any]:
        """Moments of what goes in and of the gradient that comes back."""
        return {name: LayerMoments.zeros(site.in_features, site.out_features, gradients=gradients)}

    def watch(self, name: str, site: Site, sums: Mapping[str, Any], watcher: Any) -> list[Any]:
        """Hooks on the layer."""
        layer: LayerMoments = sums[name]
        back = None if layer.gradient_products is None else lambda g: layer.add_gradients(watcher.real(name, g))
        return list(watcher.watch(site.module, lambda x: layer.add_inputs(watcher.rows(name, x)), back))

    def skeleton(self, site: Site, entry: Entry | None) -> Replacement:
        """An empty low-rank layer; an empty dense one for None."""
        layer: Any = site.module
        return Replacement({layer: layer.stand_in() if entry is None else low_rank_like(layer, entry)})

    def build(self, name: str, site: Site, entry: Entry | None, source: Source) -> Built:
        """The low-rank layer of the smallest error in the metric; the product for None."""
        layer: Any = site.module
        with named(site.name), aligned(layer):
            if entry is None:
                return Built(Replacement({layer: build_dense(layer)}))
            bias = layer.bias
            if isinstance(bias, nn.Parameter) and not bias.is_meta and not bias.isfinite().all():
                raise WeightError("its bias has NaN or infinite numbers, which would be copied")
            weight, moments = dense_matrix(layer), source.moments(name)
            found = source.decomposition(name, weight, centred=bias is not None, max_rank=entry.rank)
            mean = None if moments is None or bias is None else moments.mean()
            made = factor(layer, entry, found, mean=mean)
        error = None if isinstance(layer, LowRankLinear) else found.relative_error(entry.rank)
        return Built(Replacement({layer: made}), error, source.metric_of(name))


def numbers(n_in: int, n_out: int, entry: Entry) -> int:
    """Numbers in the factors of a layer (in, out), its bias not counted.

    >>> [numbers(16, 8, entry) for entry in (Entry(2), Entry(2, "pivoted"))]
    [48, 44]
    """
    return entry.rank * (n_in + n_out - (entry.rank if entry.form == "pivoted" else 0))


def _looks_dense(module: nn.Module) -> bool:
    return isinstance(module, (LowRankLinear, *registered_types())) or dense_type(module) is not None


def _site(names: tuple[str, ...], module: Any, modules: Mapping[str, nn.Module], owners: Counter[int]) -> Site | None:
    parent = modules.get(names[0].rpartition(".")[0])
    if isinstance(module, nn.MultiheadAttention):
        return _whole(names[0], module, owners) if module.in_proj_weight is not None else None
    reason = _unfit(module, parent, owners)
    n_in, n_out = shape_of(module) if reason is None and not_whole(module) is None else (0, 0)
    low = isinstance(module, LowRankLinear)
    bias = n_out if reason is None and module.bias is not None else 0
    parents = [name.rpartition(".")[0] for name in names]
    return Site(
        names=names,
        module=module,
        kind=(module.dense_type if low else type(module)).__name__,
        in_features=n_in,
        out_features=n_out,
        weights=n_in * n_out,
        others=bias if n_in else sum(p.numel() for p in module.parameters() if not is_lazy(p)),
        entry=module.entry if low else None,
        reason=reason,
        aliases=tuple(parents) if getattr(parent, "of_one_layer", False) else (),
    )


def _whole(name: str, attention: nn.MultiheadAttention, owners: Counter[int]) -> Site:
    """The projections of an attention that is not split: they stay dense."""
    weight: Any = attention.in_proj_weight
    return Site(
        names=(f"{name}.in_proj_weight".lstrip("."),),
        module=attention,
        kind=type(attention).__name__,
        in_features=0,
        out_features=0,
        weights=0,
        others=weight.numel(),
        reason=_inside(attention, owners),
    )


def _inside(attention: nn.MultiheadAttention, owners: Counter[int]) -> str:
    why = unsplittable(attention, owners)
    return f"inside nn.MultiheadAttention{', which reads the weight itself' if why is None else f': {why}'}"


def _unfit(module: nn.Module, parent: nn.Module | None, owners: Counter[int]) -> str | None:
    """Why this dense-looking layer cannot be replaced by a module with the same call, or None."""
    if isinstance(parent, nn.MultiheadAttention):
        return _inside(parent, owners)
    if not isinstance(module, LowRankLinear):
        if dense_type(module) is None:
            return f"{type(module).__name__} is a subclass of a dense type; register_dense makes it known"
        weight = module._parameters.get("weight")
        if weight is None:
            return "its weight is no parameter of its own: FSDP flattens weights, parametrizations compute them"
        if set(module._parameters) - {"weight", "bias"} or module._modules:
            return "has parameters other than weight and bias"
        if any(owners[id(p)] > 1 for p in module._parameters.values() if p is not None):
            return "tied: another module holds the same parameter"
        if not weight.is_floating_point():
            return f"quantized: its weight is {weight.dtype}"
        if weight.dim() == 2 and weight.numel() == 0:
            return "its weight holds no numbers"
    wrapped = "forward" in vars(module) and hook_of(module) is None  # accelerate's may be replaced
    if has_hooks(module) or wrapped:
        return "has hooks, which would be lost"
    return None
