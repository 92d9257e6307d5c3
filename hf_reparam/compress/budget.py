"""One budget for many parts of a model: equal shares, or ranks where they lower the loss most."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from hf_reparam.errors import RankError
from hf_reparam.linalg import Alternative, allocate
from hf_reparam.model.sites import Found
from hf_reparam.plan import Entry
from hf_reparam.structures import STRUCTURES
from hf_reparam.structures.source import Source
from hf_reparam.structures.structure import Choices, Steps, Way

__all__ = ["Budget", "Ways"]

Ways = Mapping[str, list[Way]]
"""Name of a group of sites -> ways to build it."""


@dataclass(frozen=True)
class Budget:
    """What parts of a model may hold together.

    Args:
        found: the targeted sites.
        share: of their weights.
        steps: the ranks that may be chosen.

    Raises:
        RankError: even the least ranks exceed it.
    """

    found: Sequence[Found]
    share: float
    steps: Steps

    def __post_init__(self) -> None:
        steps, total = self.steps, self._weights(self.found)
        budget = self.share * total
        least = sum(min(_cost(f, steps.entry(steps.least, f.structure.forms)), f.site.weights) for f in self.found)
        if least > budget:
            raise RankError(
                f"the budget of {budget:,.0f} weights is below the smallest size, {least:,} of {total:,} at rank "
                f"{steps.least}: keep at least {math.ceil(1000 * least / total) / 1000:.3f}, or allow lower ranks with "
                f"min_rank= (now {steps.min_rank}; multiple_of is {steps.multiple_of})"
            )

    def ways(self, source: Source) -> dict[str, list[Way]]:
        """Ways to build every site. A group of several sites takes the place of their own groups."""
        ways: dict[str, list[Way]] = {}
        taken: dict[str, Choices] = {}
        for structure in reversed(STRUCTURES):  # dense layers first: narrower heads offer other choices for them
            sites = {item.name: item.site for item in self.found if item.structure is structure}
            offered = structure.ways(sites, source, self.steps, taken) if sites else {}
            claimed = {name for group in offered.values() for name in group[0].sites}
            ways = {name: group for name, group in ways.items() if claimed.isdisjoint(group[0].sites)} | offered
            taken |= {name: choices for group in offered.values() for name, choices in group[0].sites.items()}
        return ways

    def spent(self, ways: Ways) -> dict[str, Entry]:
        """Ranks by one Lagrangian. What has no common unit of error gets the same share as the others have together."""
        sizes = {item.name: item.site.weights for item in self.found}
        inside = {name for group in ways.values() for name in group[0].sites}
        apart = [item for item in self.found if item.name not in inside and item.site.weights]
        entries = self._uniform(apart) if apart else {}
        groups = {n: [Alternative(w.error, [o for _, o in w.sites.values()]) for w in way] for n, way in ways.items()}
        chosen = allocate(groups, self.share * sum(sizes[name] for name in inside)) if groups else {}
        for group, (way, options) in chosen.items():
            best = ways[group][way]
            entries |= best.entries
            picked = zip(best.sites.items(), options, strict=True)
            entries |= {name: entry for (name, (known, _)), i in picked if (entry := known[i]) is not None}
        return entries

    def uniform(self) -> dict[str, Entry]:
        """The same share for every site; those that are left out stay dense.

        What the least rank or staying dense costs a narrow layer is taken from the widest ones.
        """
        return self._uniform([item for item in self.found if item.site.weights])

    def _uniform(self, found: Sequence[Found]) -> dict[str, Entry]:
        steps, total = self.steps, self._weights(found)
        budget = self.share * total
        if budget >= total:
            return {}
        entries: dict[str, Entry] = {}
        for item in found:
            most = _highest(item, budget / total * item.site.weights, steps)
            entry = steps.entry(most, item.structure.forms)
            if _cost(item, entry) < item.site.weights:
                entries[item.name] = entry
        named = {item.name: item for item in found}
        while sum(_cost(item, entries.get(item.name)) for item in found) > budget:
            _, name = max((_cost(named[n], e), n) for n, e in entries.items() if e.rank > steps.least)
            entries[name] = steps.entry(entries[name].rank - steps.multiple_of, named[name].structure.forms)
        return entries

    @staticmethod
    def _weights(found: Sequence[Found]) -> int:
        return sum(item.site.weights for item in found)


def _cost(item: Found, entry: Entry | None) -> float:
    """As the structure says; infinite where it cannot be."""
    try:
        return item.structure.cost(item.site, entry)
    except RankError:
        return math.inf


def _highest(item: Found, share: float, steps: Steps) -> int:
    """The highest rank at which a site holds no more numbers than its share; the least one if none does."""
    ranks = steps.up_to(item.site.full_rank)
    low, high = 0, len(ranks)  # costs rise with the rank
    while low < high:
        middle = (low + high) // 2
        if _cost(item, steps.entry(ranks[middle], item.structure.forms)) <= share:
            low = middle + 1
        else:
            high = middle
    return ranks[low - 1] if low else steps.least
