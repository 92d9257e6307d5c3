"""Where fused experts are in a model, what each rank costs and loses, and how they become low-rank and dense again."""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import reduce
from operator import add
from typing import Any

import torch
from torch import Tensor, nn

from hf_reparam.compat.marks import is_spread
from hf_reparam.errors import PlanError
from hf_reparam.linalg import LayerMoments, Metric, decompose, spectrum, working_device
from hf_reparam.structures.experts.modules import LowRankExperts
from hf_reparam.structures.source import Source
from hf_reparam.structures.structure import named

__all__ = [
    "EXPERTS",
    "ExpertSite",
    "build",
    "every_parameter",
    "expert_moments",
    "losses",
    "pooled",
    "skeleton",
    "stock",
    "why_not",
]

EXPERTS = "experts"
"""The form of their entries in a plan."""

_UNMARKED = {
    "llama4.modeling_llama4.Llama4TextExperts": True,
    "longcat_flash.modeling_longcat_flash.LongcatFlashExperts": False,
    "step3p7.modeling_step3p7.Step3p7Experts": False,
    "jetmoe.modeling_jetmoe.JetMoeParallelExperts": False,
    "inkling.modeling_inkling.InklingSharedExperts": False,
}
"""Classes of Transformers that do not say of themselves that they are experts: whether they hold (experts, in, out)."""

_DTYPES = frozenset({torch.float16, torch.bfloat16, torch.float32, torch.float64})


@dataclass(frozen=True, slots=True)
class ExpertSite:
    """A parameter with one matrix for each expert, dense or low-rank.

    Args:
        names: every path at which the parameter hangs in the model, the first one is its name.
        module: the experts that have it.
        parameter: its name there.
        transposed: whether it is (experts, in, out) and not (experts, out, in).
    """

    names: tuple[str, ...]
    module: nn.Module
    parameter: str
    transposed: bool

    @property
    def name(self) -> str:
        """The path under which it is reported and stored."""
        return self.names[0]

    @property
    def held(self) -> nn.Parameter | LowRankExperts:
        """The parameter, or what stands in its place."""
        found: Any = getattr(self.module, self.parameter)
        return found

    @property
    def owner(self) -> nn.Module:
        """What holds the numbers: the module, or the factors in the parameter's place."""
        return self.held if isinstance(self.held, LowRankExperts) else self.module

    @property
    def shape(self) -> torch.Size:
        """Of the dense parameter."""
        return self.held.shape

    @property
    def experts(self) -> int:
        """How many matrices."""
        return self.shape[0]

    @property
    def in_features(self) -> int:
        """Inputs of each."""
        return self.shape[1 if self.transposed else 2]

    @property
    def out_features(self) -> int:
        """Outputs of each."""
        return self.shape[2 if self.transposed else 1]

    @property
    def full_rank(self) -> int:
        """min(in, out)."""
        return min(self.in_features, self.out_features)

    @property
    def rank(self) -> int | None:
        """The present rank of each matrix; None for dense ones."""
        return self.held.rank if isinstance(self.held, LowRankExperts) else None

    @property
    def dense_parameters(self) -> int:
        """Numbers in the dense parameter."""
        return self.shape.numel()

    def cost(self, rank: int | None) -> int:
        """Numbers at this rank; None for dense."""
        if rank is None:
            return self.dense_parameters
        return self.experts * rank * (self.in_features + self.out_features)

    def matrix(self, expert: int) -> Tensor:
        """(out, in) of one expert, a view of the dense parameter."""
        weight = self.module.get_parameter(self.parameter).detach()[expert]
        return weight.mT if self.transposed else weight


def every_parameter(model: nn.Module) -> Iterator[ExpertSite]:
    """All parameters with a matrix for each expert, of modules that Transformers marks as experts or that are known."""
    paths: dict[nn.Module, list[str]] = defaultdict(list)
    for path, module in model.named_modules(remove_duplicate=False):
        paths[module].append(f"{path}." if path else "")
    for module, starts in paths.items():
        transposed = _is_transposed(module)
        if transposed is not None:
            for parameter, held in [*module._parameters.items(), *module._modules.items()]:
                if isinstance(held, LowRankExperts) or (isinstance(held, nn.Parameter) and held.dim() == 3):
                    yield ExpertSite(tuple(start + parameter for start in starts), module, parameter, transposed)


def _is_transposed(module: nn.Module) -> bool | None:
    """Whether experts hold (experts, in, out); None for a module that is none.

    What `use_experts_implementation` decorates says so itself.
    """
    if hasattr(module, "is_transposed") and hasattr(module, "has_gate"):
        return bool(module.is_transposed)
    kind = type(module)
    return _UNMARKED.get(f"{kind.__module__}.{kind.__qualname__}".removeprefix("transformers.models."))


def why_not(site: ExpertSite, model: nn.Module) -> str | None:
    """Why a parameter cannot be of low rank, in the words of a report; None if it can."""
    held = site.held
    if isinstance(held, LowRankExperts):
        return None
    if type(held) is not nn.Parameter or held.dtype not in _DTYPES:
        return f"experts in {type(held).__name__} of {held.dtype}: convert first, quantize or shard afterwards"
    if is_spread(site.module):
        return "experts that are spread over processes: convert first, distribute afterwards"
    if site.full_rank < 2:
        return "experts of one row or column"
    owners = {id(m) for m in model.modules() for p in m._parameters.values() if p is held}
    return "experts that are tied to others" if len(owners) > 1 else None


def skeleton(site: ExpertSite, rank: int) -> LowRankExperts:
    """What stands in the place of the parameter at this rank: its dtype, device and `requires_grad`, no numbers.

    Raises:
        PlanError: the rank is not in 1..min(in, out).
    """
    if not 1 <= rank <= site.full_rank:
        raise PlanError(f"{site.name}: the rank must be in 1..{site.full_rank}, got {rank}")
    held = site.held
    like = held.up if isinstance(held, LowRankExperts) else held
    down, up = (
        nn.Parameter(torch.empty(site.experts, *shape, dtype=like.dtype, device=like.device), like.requires_grad)
        for shape in ((rank, site.in_features), (site.out_features, rank))
    )
    return LowRankExperts(down, up, transposed=site.transposed).train(site.module.training)


@torch.no_grad()
def build(name: str, site: ExpertSite, rank: int, source: Source) -> tuple[LowRankExperts, float]:
    """The low-rank experts of a dense parameter, and their relative error in the metric over all experts.

    Each expert's matrix is decomposed in the coordinates of `expert_moments`; the metric is not centred, so that
    biases of experts stay as they are.

    Args:
        name: of the parameter in the source, which knows its experts as "name.0", "name.1" and so on.
        site: dense.
        rank: of every expert.
        source: metric, solver and moments.

    Raises:
        WeightError: weights or moments are not finite, or have no data.
        PlanError: as `skeleton`.

    Cost: one `decompose` for each expert; memory of one.
    """
    made, tail, energy = skeleton(site, rank), 0.0, 0.0
    for i, (weight, metric, tokens) in enumerate(_coordinates(name, site, source)):
        with named(f"expert {i}"):
            found = decompose(weight, max_rank=rank, metric=metric, solver=source.solver)
        factors = found.truncate(rank)
        made.up[i].copy_(factors.up)
        made.down[i].copy_(factors.down)
        energy += tokens * found.energy
        tail += tokens * found.energy * found.relative_error(rank) ** 2
    return made, (tail / energy) ** 0.5 if energy else 0.0


def losses(name: str, site: ExpertSite, source: Source) -> Tensor | None:
    """What dropping each direction costs, (min(in, out),) float64 on the CPU, descending: the sum over experts.

    Squared singular values times the tokens that the expert saw, the unit of dense layers. None without gradients in
    the fisher metric: there is no such unit.

    Args:
        name, site, source: as in `build`.

    Raises:
        WeightError: as `build`.
    """
    everything = pooled(_moments(name, site, source))
    if source.metric == "fisher" and not (everything is not None and everything.has_gradient()):
        return None
    total = torch.zeros(site.full_rank, dtype=torch.float64)
    for i, (weight, metric, tokens) in enumerate(_coordinates(name, site, source)):
        with named(f"expert {i}"):
            total += spectrum(weight, metric).cpu() * tokens
    return total


def expert_moments(moments: Sequence[LayerMoments | None], n_in: int) -> list[LayerMoments | None]:
    """What each expert is decomposed with: its own moments, or those of all experts together.

    An expert that saw fewer rows than it has inputs has a covariance without full rank, of mostly noise: it takes the
    pooled moments. How much it counts beside other experts is still the number of rows that it saw.

    Args:
        moments: of each expert; None where there are none.
        n_in: inputs of each expert.
    """
    together = pooled(moments)
    return [own if own is not None and own.tokens >= n_in else together for own in moments]


def pooled(moments: Sequence[LayerMoments | None]) -> LayerMoments | None:
    """The sum of moments over experts; None if there are none."""
    known = [own for own in moments if own is not None]
    return reduce(add, known) if known else None


def _moments(name: str, site: ExpertSite, source: Source) -> list[LayerMoments | None]:
    return [source.moments(f"{name}.{i}") for i in range(site.experts)]


def _coordinates(name: str, site: ExpertSite, source: Source) -> Iterator[tuple[Tensor, Metric, float]]:
    """Weight (out, in), metric and how much it counts, of each expert."""
    moments = _moments(name, site, source)
    together = pooled(moments)
    for i, own in enumerate(expert_moments(moments, site.in_features)):
        weight = site.matrix(i)
        if own is None or together is None:
            yield weight, Metric(), 1.0
            continue
        kind = "activation" if source.metric == "fisher" and not together.has_gradient() else source.metric
        seen = moments[i]
        metric = own.metric(kind, centred=False, device=working_device(weight))
        yield weight, metric, float(seen.tokens if seen is not None else 0)


@torch.no_grad()
def stock(low: LowRankExperts) -> nn.Parameter:
    """The dense parameter: products in float64, cast back.

    Cost: E r in out multiply-adds; the parameter and one matrix in float64.
    """
    dense = torch.empty(low.shape, dtype=low.dtype, device=low.device)
    for i in range(low.experts):
        device = working_device(low.up)
        product = low.up[i].to(device, torch.float64) @ low.down[i].to(device, torch.float64)
        dense[i].copy_(product.mT if low.transposed else product)
    return nn.Parameter(dense, low.up.requires_grad)
