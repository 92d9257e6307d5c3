"""Dense layers as products of two smaller ones, as a pair or with pivots."""

from collections import Counter
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from hf_reparam.compat.marks import hook_of
from hf_reparam.config import FORMS
from hf_reparam.errors import WeightError
from hf_reparam.layers.dense import build_dense, dense_matrix, dense_type, has_hooks, not_whole, shape_of
from hf_reparam.layers.factored import Factored
from hf_reparam.layers.linear import LowRankLinear
from hf_reparam.layers.surgery import factor, low_rank_like
from hf_reparam.linalg.moments import LayerSums
from hf_reparam.plan import Entry
from hf_reparam.structures.multihead import unsplittable
from hf_reparam.structures.source import Source
from hf_reparam.structures.structure import Built, Replacement, Site, Structure, paths_of, reading


class Linears(Structure):
    """Every layer of a registered dense type (see `hf_reparam.register_dense`): as a pair, or with pivots."""

    forms = FORMS
    of_rows = True

    def sites(self, model: nn.Module) -> list[Site]:
        factors = {part for m in model.modules() if isinstance(m, Factored) for part in m.modules() if part is not m}
        owners = Counter(id(p) for m in model.modules() for p in m._parameters.values() if p is not None)
        paths = {m: names for m, names in paths_of(model).items() if m not in factors and _looks_dense(m)}
        return [_site(model, module, names, owners) for module, names in paths.items()]

    def losses(self, name: str, site: Site, source: Source) -> Tensor | None:
        moments = source.moments(name)
        if source.metric == "fisher" and not (moments is not None and moments.has_gradient()):
            return None
        curve = source.curve(name, dense_matrix(site.module), centred=site.others > 0)
        return curve.losses * (1 if moments is None else moments.tokens)

    def sums(self, name: str, site: Site, *, gradients: bool) -> dict[str, Any]:
        return {name: LayerSums(site.in_features, site.out_features, gradients=gradients)}

    def watch(self, name: str, site: Site, sums: Mapping[str, Any], watcher: Any) -> None:
        layer: LayerSums = sums[name]
        back = None if layer.gradient_products is None else lambda g: layer.add_gradients(watcher.real(name, g))
        watcher.watch(site.module, lambda x: layer.add_inputs(watcher.rows(name, x)), back)

    def skeleton(self, site: Site, entry: Entry | None) -> Replacement:
        layer: Any = site.module
        return Replacement({layer: layer.stand_in() if entry is None else low_rank_like(layer, entry)})

    def build(self, name: str, site: Site, entry: Entry | None, source: Source) -> Built:
        layer: Any = site.module
        with reading(site.name, layer):
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
        return Built(Replacement({layer: made}), error)


def _looks_dense(module: nn.Module) -> bool:
    if isinstance(module, nn.MultiheadAttention):
        return module.in_proj_weight is not None
    return isinstance(module, LowRankLinear) or any(map(dense_type, type(module).__mro__))


def _site(model: nn.Module, module: Any, names: list[str], owners: Counter[int]) -> Site:
    parents = [name.rpartition(".")[0] for name in names]
    parent, low = model.get_submodule(parents[0]), isinstance(module, LowRankLinear)
    reason = _unfit(module, parent, owners)
    n_in, n_out = shape_of(module) if reason is None and not_whole(module) is None else (0, 0)
    if isinstance(module, nn.MultiheadAttention):  # its projections stay dense
        names, others = [f"{names[0]}.in_proj_weight".lstrip(".")], module.in_proj_weight.numel()
    elif n_in:
        others = 0 if module.bias is None else n_out
    else:
        others = sum(p.numel() for p in module.parameters() if not is_lazy(p))
    return Site(
        names=tuple(names),
        module=module,
        kind=(module.dense_type if low else type(module)).__name__,
        in_features=n_in,
        out_features=n_out,
        weights=n_in * n_out,
        others=others,
        entry=module.entry if low else None,
        reason=reason,
        aliases=tuple(parents) if getattr(parent, "of_one_layer", False) else (),
    )


def _unfit(module: nn.Module, parent: nn.Module, owners: Counter[int]) -> str | None:
    """Why this dense-looking layer cannot be replaced by a module with the same call, or None."""
    for attention in (module, parent):
        if isinstance(attention, nn.MultiheadAttention):
            why = unsplittable(attention, owners)
            return f"inside nn.MultiheadAttention{', which reads the weight itself' if why is None else f': {why}'}"
    if not isinstance(module, LowRankLinear):
        if dense_type(type(module)) is None:
            return f"{type(module).__name__} is a subclass of a dense type; register_dense makes it known"
        weight = module._parameters.get("weight")
        if weight is None:
            return "its weight is not a parameter of its own: FSDP flattens weights, parametrizations compute them"
        if set(module._parameters) - {"weight", "bias"} or module._modules:
            return "has parameters other than weight and bias"
        if any(owners[id(p)] > 1 for p in module._parameters.values() if p is not None):
            return "tied: another module holds the same parameter"
        if not weight.is_floating_point():
            return f"quantized: its weight is {weight.dtype}"
        if weight.dim() == 2 and weight.numel() == 0:
            return "its weight holds no numbers"
    wrapped = "forward" in vars(module) and hook_of(module) is None  # accelerate's may be replaced
    return "has hooks, which would be lost" if has_hooks(module) or wrapped else None
