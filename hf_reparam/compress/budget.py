"""One budget for many parts of a model: equal shares, or ranks where they lower the loss most."""

import math
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from hf_reparam.compress.units import Unit
from hf_reparam.errors import RankError
from hf_reparam.linalg.allocate import Options, Way, allocate
from hf_reparam.model.sites import Found
from hf_reparam.plan import Entry
from hf_reparam.structures import STRUCTURES
from hf_reparam.structures.source import Source
from hf_reparam.structures.structure import Steps

_TRIES = 4
_CLOSE = 0.02  # of the cost that was asked for
_NEARLY_DENSE = 0.99

Ways = Mapping[str, list[Way]]
"""Name of a group of sites -> ways to build it."""


@dataclass(frozen=True)
class Budget:
    """What parts of a model may cost together.

    Raises:
        RankError: even the least ranks exceed it.
    """

    found: Sequence[Found]  # the targeted sites
    share: float  # of what they cost dense
    steps: Steps  # the ranks that may be chosen
    unit: Unit  # in which costs are counted

    def __post_init__(self) -> None:
        total, least = self._dense(self.found), sum(map(self._least, self.found))
        if least > self.share * total:
            raise RankError(self.unit.too_small(self.share, least / total, self.steps))

    def ways(self, source: Source) -> dict[str, list[Way]]:
        """Ways to build every site. A group of several sites takes the place of their own groups."""
        ways: dict[str, list[Way]] = {}
        taken: dict[str, Options] = {}
        for structure in reversed(STRUCTURES):  # dense layers first: narrower heads offer other choices for them
            sites = {item.name: item.site for item in self.found if item.structure is structure}
            offered = structure.ways(sites, source, self.steps, taken) if sites else {}
            claimed = {name for group in offered.values() for name in group[0].sites}
            ways = {name: group for name, group in ways.items() if claimed.isdisjoint(group[0].sites)} | offered
            taken |= {name: options for group in offered.values() for name, options in group[0].sites.items()}
        named = {item.name: item for item in self.found}
        priced = lambda way: replace(way, sites={n: self.unit.priced(named.get(n), o) for n, o in way.sites.items()})  # noqa: E731
        return {name: [priced(way) for way in group] for name, group in ways.items()}

    def as_measured(self, spend: "Callable[[Budget], Mapping[str, Entry]]") -> "Budget":
        """The budget with a share at which sites cost what was asked for when the very entries that it gives are
        measured: times between a dozen ranks are off by a tenth, most where a budget likes them best."""
        best, least, tried = self, math.inf, self
        for _ in range(_TRIES):
            try:
                entries = spend(tried)
                cost = self.unit.measured([(item, entries.get(item.name)) for item in self.found])
                if cost is None:
                    return self
                off = abs(cost / self.share - 1)
                if off < least:
                    best, least = tried, off
                if off < _CLOSE:
                    break
                tried = replace(tried, share=min(tried.share * self.share / cost, _NEARLY_DENSE))
            except RankError:  # less than the least ranks cost, by what was known of them
                break
        return best

    def spent(self, ways: Ways) -> dict[str, Entry]:
        """Ranks by one Lagrangian. What has no common unit of error gets the same share as the others have together."""
        inside = {name for group in ways.values() for name in group[0].sites}
        apart = [item for item in self.found if item.name not in inside and item.site.weights]
        entries = self._uniform(apart) if apart else {}
        budget = self.share * self._dense([item for item in self.found if item.name in inside])
        budget += min(0.0, self.share * self._dense(apart) - self._cost(apart, entries))  # the least may cost more
        chosen = allocate(ways, budget) if ways else {}
        return entries | {name: entry for name, entry in chosen.items() if entry is not None}

    def uniform(self) -> dict[str, Entry]:
        """The same share for every site; those that are left out stay dense.

        What the least rank or staying dense costs a narrow layer is taken from the widest ones.
        """
        return self._uniform([item for item in self.found if item.site.weights])

    def _uniform(self, found: Sequence[Found]) -> dict[str, Entry]:
        budget = self.share * self._dense(found)
        if self.share >= 1:
            return {}
        cost, entries = self.unit.cost, {}
        for item in found:
            entry = self._highest(item, self.share * cost(item, None))
            if cost(item, entry) < cost(item, None):
                entries[item.name] = entry
        named = {item.name: item for item in found}
        lowest = {item.name: self.steps.least(item.site) for item in found}
        while self._cost(found, entries) > budget:
            lower = [(cost(named[n], e), n) for n, e in entries.items() if e.rank > lowest[n]]
            if not lower:
                break
            _, name = max(lower)
            rank = entries[name].rank - self.steps.step(named[name].site)
            entries[name] = self.unit.entry(named[name], rank)
        return entries

    def _highest(self, item: Found, most: float) -> Entry:
        """At the highest rank at which a site costs no more than that; at the least one if it does at none."""
        ranks = self.steps.up_to(item.site, item.site.full_rank)
        count = bisect_right(ranks, most, key=lambda rank: self.unit.cost(item, self.unit.entry(item, rank)))
        return self.unit.entry(item, ranks[count - 1] if count else self.steps.least(item.site))

    def _least(self, item: Found) -> float:
        """What a site costs at the least."""
        entry = self.unit.entry(item, self.steps.least(item.site))
        return min(self.unit.cost(item, entry), self.unit.cost(item, None))

    def _cost(self, found: Sequence[Found], entries: Mapping[str, Entry]) -> float:
        return sum(self.unit.cost(item, entries.get(item.name)) for item in found)

    def _dense(self, found: Sequence[Found]) -> float:
        return self._cost(found, {})
