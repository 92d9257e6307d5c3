"""Fused experts of MoE layers: 3-D parameters, one matrix for each expert, held as low-rank products."""

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from torch import nn

from hf_reparam.compat.accelerate import aligned
from hf_reparam.errors import RankError
from hf_reparam.linalg import LayerMoments
from hf_reparam.plan import Entry
from hf_reparam.structures.experts.structure import (
    EXPERTS,
    ExpertSite,
    build,
    every_parameter,
    losses,
    skeleton,
    stock,
    why_not,
)
from hf_reparam.structures.experts.watch import watching
from hf_reparam.structures.source import Source
from hf_reparam.structures.structure import Built, Choices, Replacement, Site, Steps, Way, choices_of, named

__all__ = ["Experts"]


@dataclass(frozen=True, kw_only=True)
class _Site(Site):
    """A parameter of experts; `parts` is how many."""

    held: ExpertSite


@dataclass(frozen=True)
class Experts:
    """Parameters with a matrix for each expert, all of one rank."""

    forms: tuple[str, ...] = (EXPERTS,)
    option: str | None = None
    changes_moments: bool = False
    stays_in_memory: bool = True  # a parameter, and no module that could wait in a file

    def sites(self, model: nn.Module) -> list[Site]:
        """Every 3-D parameter of modules that Transformers marks as experts, or that are known to be."""
        return [
            _Site(
                names=held.names,
                module=held.owner,
                kind=type(held.module).__name__,
                in_features=held.in_features,
                out_features=held.out_features,
                weights=held.dense_parameters,
                entry=None if held.rank is None else Entry(held.rank, EXPERTS),
                reason=why_not(held, model),
                parts=held.experts,
                held=held,
            )
            for held in every_parameter(model)
        ]

    def cost(self, site: Site, entry: Entry | None) -> int:
        """Numbers of the factors of all experts; raises RankError for a rank above min(in, out)."""
        if entry is not None and entry.rank > site.full_rank:
            raise RankError(f"rank {entry.rank}, above min(in, out) = {site.full_rank}")
        return _held(site).cost(None if entry is None else entry.rank)

    def ways(
        self, sites: Mapping[str, Site], source: Source, steps: Steps, taken: Mapping[str, Choices]
    ) -> dict[str, list[Way]]:
        """Every rank at which the experts are smaller than dense."""
        ways = {}
        for name, site in sites.items():
            with named(site.name), aligned(_held(site).module):
                lost = losses(name, _held(site), source)
            if lost is None:
                continue
            entries = [steps.entry(rank, self.forms) for rank in steps.up_to(site.full_rank)]
            entries = [entry for entry in entries if self.cost(site, entry) < site.weights]
            costs = [*(self.cost(site, entry) for entry in entries), site.weights]
            ways[name] = [Way(0.0, {name: choices_of(entries, lost, costs)})]
        return ways

    def sums(self, name: str, site: Site, *, gradients: bool) -> dict[str, Any]:
        """Moments of what goes into each expert, and of the gradient that comes back."""
        shape = (site.in_features, site.out_features)
        dense = site.parts if site.entry is None else 0
        return {f"{name}.{i}": LayerMoments.zeros(*shape, gradients=gradients) for i in range(dense)}

    def watch(self, name: str, site: Site, sums: Mapping[str, Any], watcher: Any) -> list[Any]:
        """A stand-in that tells what each expert multiplies."""
        if not sums:
            return []
        stack = ExitStack()
        stack.enter_context(watching(_held(site), list(sums.values()), watcher))
        return [_Handle(stack)]

    def skeleton(self, site: Site, entry: Entry | None) -> Replacement:
        """Empty factors; the empty parameter for None."""
        held = _held(site)
        if entry is not None:
            return Replacement({}, parts=[(held.module, held.parameter, skeleton(held, entry.rank))])
        low: Any = held.held
        dense = nn.Parameter(low.up.new_empty(low.shape), low.up.requires_grad)
        return Replacement({}, parts=[(held.module, held.parameter, dense)])

    def build(self, name: str, site: Site, entry: Entry | None, source: Source) -> Built:
        """The factors of the smallest error in the metric; the products for None."""
        held, error = _held(site), None
        with named(site.name), aligned(held.module), aligned(held.owner):
            if entry is None:
                low: Any = held.held
                made: Any = stock(low)
            else:
                made, error = build(name, held, entry.rank, source)
        return Built(Replacement({}, parts=[(held.module, held.parameter, made)]), error)


class _Handle:
    """What takes a stand-in away again."""

    def __init__(self, stack: ExitStack) -> None:
        self.remove = stack.close


def _held(site: Site) -> ExpertSite:
    held: ExpertSite = site.held  # type: ignore[attr-defined]
    return held
