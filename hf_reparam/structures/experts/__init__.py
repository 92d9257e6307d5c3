"""Fused experts of MoE layers: 3-D parameters, one matrix for each expert, held as low-rank products."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from operator import add
from typing import Any

import torch
from torch import Tensor, nn

from hf_reparam.linalg.factorize import decompose, spectrum, working_device
from hf_reparam.linalg.metric import Metric
from hf_reparam.linalg.moments import LayerMoments, LayerSums
from hf_reparam.plan import Entry
from hf_reparam.structures.experts.modules import LowRankExperts
from hf_reparam.structures.experts.watch import ExpertWatch
from hf_reparam.structures.source import Source
from hf_reparam.structures.structure import Built, Replacement, Site, Structure, paths_of, reading

_UNMARKED = {
    "llama4.modeling_llama4.Llama4TextExperts": True,
    "longcat_flash.modeling_longcat_flash.LongcatFlashExperts": False,
    "step3p7.modeling_step3p7.Step3p7Experts": False,
    "jetmoe.modeling_jetmoe.JetMoeParallelExperts": False,
    "inkling.modeling_inkling.InklingSharedExperts": False,
}
"""Classes of Transformers that do not say of themselves that they are experts: whether they hold (experts, in, out)."""

_DTYPES = frozenset({torch.float16, torch.bfloat16, torch.float32, torch.float64})


@dataclass(frozen=True, kw_only=True)
class ExpertSite(Site):
    """A parameter with one matrix for each expert, dense or low-rank."""

    owner: nn.Module  # the experts that have it
    parameter: str  # its name there
    transposed: bool  # whether it is (experts, in, out) and not (experts, out, in)

    def moments(self, name: str) -> list[str]:
        """Those of one expert each."""
        return [f"{name}.{i}" for i in range(self.held.shape[0])]

    @property
    def held(self) -> Any:
        """The parameter, or the LowRankExperts in its place."""
        return getattr(self.owner, self.parameter)

    def matrix(self, expert: int) -> Tensor:
        """(out, in) of one expert; of a low-rank one the product, in float64."""
        if isinstance(self.held, LowRankExperts):
            return self.held.product(expert)
        weight: Tensor = self.held.detach()[expert]
        return weight.mT if self.transposed else weight

    def replaced(self, new: nn.Module | nn.Parameter) -> Replacement:
        """What puts something else in the parameter's place."""
        module = nn.ParameterList([new]) if isinstance(new, nn.Parameter) else new
        return Replacement({}, [(self.owner, self.parameter, module)])


class Experts(Structure):
    """3-D parameters of modules that Transformers marks as experts, or that are known; all experts of one rank."""

    forms = ("experts",)
    stays_in_memory = True  # a parameter, and no module that could wait in a file

    def sites(self, model: nn.Module) -> list[ExpertSite]:
        experts = {module: paths for module, paths in paths_of(model).items() if _is_transposed(module) is not None}
        return [
            _site(model, module, name, held, paths)
            for module, paths in experts.items()
            for name, held in (*module._parameters.items(), *module._modules.items())
            if isinstance(held, LowRankExperts) or (isinstance(held, nn.Parameter) and held.dim() == 3)
        ]

    def cost(self, site: ExpertSite, entry: Entry | None) -> int:
        return super().cost(site, entry) * (1 if entry is None else site.held.shape[0])

    def losses(self, name: str, site: ExpertSite, source: Source) -> Tensor | None:
        """The sum over experts; None without gradients in the fisher metric: there is no unit of other layers then."""
        moments = self._moments(name, site, source)
        if source.metric == "fisher" and not _has_gradient(moments):
            return None
        total = torch.zeros(site.full_rank, dtype=torch.float64)
        for i, (weight, metric, tokens) in enumerate(_coordinates(site, moments, source.metric)):
            with reading(f"expert {i}"):
                total += spectrum(weight, metric).cpu() * tokens
        return total

    def sums(self, name: str, site: ExpertSite, *, gradients: bool) -> dict[str, Any]:
        shape = (site.in_features, site.out_features)
        dense = site.moments(name) if site.entry is None else []
        return {known: LayerSums(*shape, gradients=gradients) for known in dense}

    def _moments(self, name: str, site: ExpertSite, source: Source) -> list[LayerMoments | None]:
        return [source.moments(known) for known in site.moments(name)]

    def watch(self, name: str, site: ExpertSite, sums: Mapping[str, Any], watcher: Any) -> None:
        if sums:
            watcher.hooks.callback(ExpertWatch(site.owner, site.parameter, list(sums.values()), watcher).remove)

    def skeleton(self, site: ExpertSite, entry: Entry | None) -> Replacement:
        held = site.held
        like = held.up if isinstance(held, LowRankExperts) else held

        def empty(*shape: int) -> nn.Parameter:
            return nn.Parameter(like.new_empty(shape), like.requires_grad)

        if entry is None:
            return site.replaced(empty(*held.shape))
        down = empty(held.shape[0], entry.rank, site.in_features)
        up = empty(held.shape[0], site.out_features, entry.rank)
        return site.replaced(LowRankExperts(down, up, transposed=site.transposed).train(site.owner.training))

    @torch.no_grad()
    def build(self, name: str, site: ExpertSite, entry: Entry | None, source: Source) -> Built:
        """Each expert's matrix is decomposed by itself, in float64; the error is that of all."""
        with reading(site.name, site.owner):
            if entry is None:
                return Built(site.replaced(dense_experts(site.held)))
            made, tail, energy = self.skeleton(site, entry), 0.0, 0.0
            low: Any = made.new()[0]
            moments = self._moments(name, site, source)
            for i, (weight, metric, tokens) in enumerate(_coordinates(site, moments, source.metric)):
                with reading(f"expert {i}"):
                    found = decompose(weight, max_rank=entry.rank, metric=metric, solver=source.solver)
                up, down = found.cut(entry.rank)
                low.up[i].copy_(up)
                low.down[i].copy_(down)
                energy += tokens * found.energy
                tail += tokens * found.energy * found.relative_error(entry.rank) ** 2
        error = (tail / energy) ** 0.5 if energy else 0.0
        return Built(made, error if site.entry is None else None)


def _site(model: nn.Module, module: nn.Module, parameter: str, held: Any, paths: Sequence[str]) -> ExpertSite:
    low, transposed = isinstance(held, LowRankExperts), bool(_is_transposed(module))
    _, n_out, n_in = held.shape
    if transposed:
        n_out, n_in = n_in, n_out
    return ExpertSite(
        names=tuple(f"{path}.{parameter}".lstrip(".") for path in paths),
        module=held if low else module,
        kind=type(module).__name__,
        in_features=n_in,
        out_features=n_out,
        weights=held.shape.numel(),
        entry=held.entry if low else None,
        reason=None if low else _why_not(held, module, model),
        owner=module,
        parameter=parameter,
        transposed=transposed,
    )


def _is_transposed(module: nn.Module) -> bool | None:
    """Whether experts hold (experts, in, out); None for a module that is none."""
    if hasattr(module, "is_transposed") and hasattr(module, "has_gate"):  # by `use_experts_implementation`
        return bool(module.is_transposed)
    kind = type(module)
    return _UNMARKED.get(f"{kind.__module__}.{kind.__qualname__}".removeprefix("transformers.models."))


def _why_not(held: nn.Parameter, module: nn.Module, model: nn.Module) -> str | None:
    if type(held) is not nn.Parameter or held.dtype not in _DTYPES:
        return f"experts in {type(held).__name__} of {held.dtype}: convert first, quantize or distribute afterwards"
    if min(held.shape[1:]) < 2:
        return "experts of one row or column"
    owners = {m for m in model.modules() for p in m._parameters.values() if p is held}
    return "experts that are tied to others" if len(owners) > 1 else None


def expert_moments(moments: Sequence[LayerMoments | None], n_in: int) -> list[LayerMoments | None]:
    """What each expert is decomposed with: its own moments, or those of all experts together.

    An expert that saw fewer rows than it has inputs has a covariance without full rank, of mostly noise: it takes the
    pooled moments. How much it counts beside other experts is still the number of rows that it saw.
    """
    known = [own for own in moments if own is not None]
    together = reduce(add, known) if known else None
    return [own if own is not None and own.tokens >= n_in else together for own in moments]


def _has_gradient(moments: Sequence[LayerMoments | None]) -> bool:
    return any(own is not None and own.has_gradient() for own in moments)


def _coordinates(
    site: ExpertSite, moments: Sequence[LayerMoments | None], kind: str
) -> Iterator[tuple[Tensor, Metric, float]]:
    """Weight (out, in), metric and how much it counts, of each expert. Not centred: biases of experts stay."""
    kind = "activation" if kind == "fisher" and not _has_gradient(moments) else kind
    for i, used in enumerate(expert_moments(moments, site.in_features)):
        matrix, own = site.matrix(i), moments[i]
        if used is None:
            yield matrix, Metric(), 1.0
        else:
            metric = used.metric(kind, centred=False, device=working_device(matrix))
            yield matrix, metric, float(0 if own is None else own.tokens)


@torch.no_grad()
def dense_experts(low: LowRankExperts) -> nn.Parameter:
    """The dense parameter: products in float64, cast back; memory of the parameter and one matrix in float64."""
    dense = torch.empty(low.shape, dtype=low.dtype, device=low.device)
    for i, made in enumerate(dense):
        product = low.product(i)
        made.copy_(product.mT if low.transposed else product)
    return nn.Parameter(dense, low.up.requires_grad)
