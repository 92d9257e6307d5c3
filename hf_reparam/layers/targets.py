"""Which layers of a model can be factored, and why the others are left alone. All targeting is decided here."""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from torch import nn
from torch.nn.parameter import is_lazy

from hf_reparam.errors import TargetError, WeightError
from hf_reparam.layers.attention import unsplittable
from hf_reparam.layers.dense import dense_matrix, dense_type, not_whole, registered_types
from hf_reparam.layers.embedding import Tables
from hf_reparam.layers.heads import FusedProjections, stock_shapes
from hf_reparam.layers.linear import LowRankLinear
from hf_reparam.layers.patterns import as_patterns, check_used, first_match
from hf_reparam.layers.surgery import has_hooks
from hf_reparam.plan import LayerSpec
from hf_reparam.report import BARE

__all__ = ["Skipped", "Target", "Targets", "find_targets", "no_layer"]

Modules = Mapping[str, tuple[tuple[str, ...], nn.Module]]
"""First name of a module -> all its names, and the module."""


@dataclass(frozen=True, slots=True)
class Target:
    """A dense or low-rank layer that can be factored.

    Args:
        names: every path at which the module hangs in the model, the first one is its name.
        module: the layer itself.
        kind: class name of the dense layer.
        in_features, out_features: the dense shape.
        stock_shape: (in, out) in the stock model, if heads are narrower here.
    """

    names: tuple[str, ...]
    module: nn.Module
    kind: str
    in_features: int
    out_features: int
    stock_shape: tuple[int, int] | None = None

    @property
    def name(self) -> str:
        """The path under which the layer is reported and stored."""
        return self.names[0]

    @property
    def spec(self) -> LayerSpec | None:
        """The present rank and form of a low-rank layer, None for a dense one."""
        return self.module.spec if isinstance(self.module, LowRankLinear) else None

    @property
    def full_rank(self) -> int:
        """min(in, out)."""
        return min(self.in_features, self.out_features)

    @property
    def bias_parameters(self) -> int:
        """Numbers in the bias."""
        return self.out_features if self.module.bias is not None else 0

    def weights(self, spec: LayerSpec | None = None) -> int:
        """Numbers without the bias: of the dense layer, or in this rank and form."""
        n_in, n_out = self.in_features, self.out_features
        return n_in * n_out if spec is None else spec.weights(n_in, n_out)

    @property
    def dense_parameters(self) -> int:
        """Numbers in the dense layer, bias included."""
        return self.weights() + self.bias_parameters

    @property
    def stock_parameters(self) -> int:
        """Numbers that it has in the stock model, bias included."""
        if self.stock_shape is None:
            return self.dense_parameters
        n_in, n_out = self.stock_shape
        return n_in * n_out + (n_out if self.bias_parameters else 0)

    @property
    def parameters(self) -> int:
        """Numbers that the layer holds now."""
        return self.dense_parameters if self.spec is None else self.parameters_as(self.spec)

    def parameters_as(self, spec: LayerSpec) -> int:
        """Numbers that the layer would hold in this rank and form, bias included."""
        return self.weights(spec) + self.bias_parameters


@dataclass(frozen=True, slots=True)
class Skipped:
    """A weight that is left alone, and why."""

    name: str
    kind: str
    parameters: int
    reason: str


@dataclass(frozen=True, slots=True)
class Targets:
    """The layers to factor, and every other weight of two or more dimensions."""

    selected: tuple[Target, ...]
    skipped: tuple[Skipped, ...]


def find_targets(
    model: nn.Module,
    *,
    include: str | Iterable[str] | None = None,
    exclude: str | Iterable[str] = (),
    protected: Mapping[str, str] | None = None,
    optional: Mapping[str, str] | None = None,
) -> Targets:
    """Find the layers that can be factored; reads shapes only, so it works on the meta device.

    Args:
        model: any module.
        include: glob or `re:` patterns over whole module names; None for all.
        exclude: patterns of layers to leave alone; wins over include.
        protected: module name -> reason, for layers that must stay dense whatever the patterns say.
        optional: module name -> reason, for layers that stay dense unless `include` is given and matches them. Those
            that are low-rank already are not left out.

    Returns:
        Targets in the model's order, each shared module once, under its first name.

    Raises:
        TargetError: a pattern is malformed or matches no dense layer.
        WeightError: a layer's weights are in parts, partitioned or sharded among processes.

    >>> net = nn.Sequential(nn.Linear(8, 8), nn.Embedding(10, 8))
    >>> found = find_targets(net)
    >>> [t.name for t in found.selected], [(s.name, s.reason) for s in found.skipped]
    (['0'], [('1', 'Embedding is no dense layer')])
    """
    wanted, unwanted = as_patterns(include, "include"), as_patterns(exclude, "exclude") or ()
    modules = _group(model)
    dense = {name: _with_fused(names, modules) for name, (names, module) in modules.items() if _looks_dense(module)}
    every_name = [name for names in dense.values() for name in names]
    check_used(wanted or (), every_name, "include")
    check_used(unwanted, every_name, "exclude")
    owners = Counter(id(p) for _, module in modules.values() for p in module._parameters.values() if p is not None)
    kept, by_default, literal = protected or {}, optional or {}, frozenset(wanted or ())
    shapes = stock_shapes(model)
    selected, skipped = [], []
    for name, (names, module) in modules.items():
        if name not in dense:
            skipped += _other_weights(name, module, owners)
            continue
        reason = next((kept[n] for n in names if n in kept), None) or _unfit(name, module, modules, owners)
        if reason is None and (pattern := first_match(unwanted, dense[name])):
            reason = f"excluded by {pattern!r}"
        listed = wanted is None or not literal.isdisjoint(dense[name])  # long lists of names are common, and slow
        if reason is None and not listed and first_match(wanted or (), dense[name]) is None:
            reason = "not included"
        if reason is None and wanted is None and all(n in by_default for n in names):
            reason = None if isinstance(module, LowRankLinear) else by_default[name]
        if reason is None:
            selected.append(replace(_target(names, module), stock_shape=shapes.get(module)))
        else:
            skipped.append(Skipped(name, _kind(module), _count(module), reason))
    return Targets(tuple(selected), tuple(skipped))


def no_layer(found: Targets) -> TargetError:
    """The error for a model in which nothing can be factored, with the two commonest reasons."""
    reasons = Counter(item.reason for item in found.skipped).most_common(2)
    why = "; ".join(f"{reason} ({count} weights)" for reason, count in reasons)
    return TargetError(f"the model has no dense layer that can be factored{': ' if why else ''}{why}")


def _group(model: nn.Module) -> Modules:
    """First name -> (all names, module), without the factors inside low-rank layers."""
    names: dict[int, list[str]] = {}
    modules: dict[int, nn.Module] = {}
    low = [m for m in model.modules() if isinstance(m, (LowRankLinear, Tables))]
    factors = {id(child) for m in low for child in m.modules()} - {id(m) for m in low}
    for name, module in model.named_modules(remove_duplicate=False):
        if id(module) not in factors:
            names.setdefault(id(module), []).append(name)
            modules[id(module)] = module
    return {paths[0]: (tuple(paths), modules[key]) for key, paths in names.items()}


def _with_fused(names: tuple[str, ...], modules: Modules) -> tuple[str, ...]:
    """Names that patterns may mean: those of a part of a fused layer, and that of the fused layer."""
    parents = [name.rpartition(".")[0] for name in names]
    return names + tuple(p for p in parents if p in modules and isinstance(modules[p][1], FusedProjections))


def _looks_dense(module: nn.Module) -> bool:
    return isinstance(module, (LowRankLinear, *registered_types())) or dense_type(module) is not None


def _kind(module: nn.Module) -> str:
    return module.dense_type.__name__ if isinstance(module, LowRankLinear) else type(module).__name__


def _count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters() if not is_lazy(p))


def _target(names: tuple[str, ...], module: nn.Module) -> Target:
    if (reason := not_whole(module)) is not None:
        raise WeightError(f"{names[0]}: {reason}")
    if isinstance(module, LowRankLinear):
        return Target(names, module, _kind(module), module.in_features, module.out_features)
    n_out, n_in = dense_matrix(module).shape
    return Target(names, module, _kind(module), n_in, n_out)


def _unfit(name: str, module: nn.Module, modules: Modules, owners: Counter[int]) -> str | None:
    """Why this dense-looking layer cannot be replaced by a module with the same call, or None."""
    parent = modules.get(name.rpartition(".")[0])
    if parent is not None and isinstance(parent[1], nn.MultiheadAttention):
        return _inside(parent[1], owners)
    if not isinstance(module, LowRankLinear):
        if dense_type(module) is None:
            return f"{type(module).__name__} is a subclass of a dense type; register_dense makes it known"
        if module._parameters.get("weight") is None:
            return "its weight is no parameter of its own: FSDP flattens weights, parametrizations compute them"
        if set(module._parameters) - {"weight", "bias"} or module._modules:
            return "has parameters other than weight and bias"
        if any(owners[id(p)] > 1 for p in module._parameters.values() if p is not None):
            return "tied: another module holds the same parameter"
        if not module._parameters["weight"].is_floating_point():  # type: ignore[union-attr]
            return f"quantized: its weight is {module._parameters['weight'].dtype}"  # type: ignore[union-attr]
        if module._parameters["weight"].dim() == 2 and module._parameters["weight"].numel() == 0:  # type: ignore[union-attr]
            return "its weight holds no numbers"
    wrapped = "forward" in vars(module) and not hasattr(module, "_hf_hook")  # accelerate's may be replaced
    if has_hooks(module) or wrapped:
        return "has hooks, which would be lost"
    return None


def _inside(attention: nn.MultiheadAttention, owners: Counter[int]) -> str:
    why = unsplittable(attention, owners)
    return f"inside nn.MultiheadAttention{', which reads the weight itself' if why is None else f': {why}'}"


def _other_weights(name: str, module: nn.Module, owners: Counter[int]) -> list[Skipped]:
    """Weights of two or more dimensions held by a module that is no dense layer."""
    found = []
    for key, parameter in module._parameters.items():
        if parameter is not None and parameter.dim() >= 2:
            kind = type(module).__name__
            if isinstance(module, nn.MultiheadAttention):
                reason = _inside(module, owners)
            elif key == "weight":
                reason = f"{kind} is no dense layer"
            else:
                reason = f"{BARE} of {kind}, no module of its own"
            full = name if key == "weight" else f"{name}.{key}".lstrip(".")
            found.append(Skipped(full, kind, parameter.numel(), reason))
    return found
