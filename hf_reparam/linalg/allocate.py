"""One budget for many layers: choose an option of each so that the summed error is least.

min sum_l error_l(j_l) subject to sum_l cost_l(j_l) <= budget is solved by its Lagrangian, min error + lambda cost, with
lambda bisected to the budget; what is left is spent greedily, so that no option that still fits would lower the error.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor

from hf_reparam.errors import RankError

_HIGHEST = 100.0  # natural logarithm of lambda


@dataclass(frozen=True, slots=True)
class Options:
    """What one part of a model can become, from the cheapest option to the dearest."""

    entries: Sequence[Any]  # what each option is
    errors: Tensor  # (options,) float64, not increasing
    costs: Tensor  # (options,) float64, strictly increasing

    def of(self, kept: list[int]) -> "Options":
        """Some of them, by their places."""
        return Options([self.entries[i] for i in kept], self.errors[kept], self.costs[kept])


@dataclass(frozen=True, slots=True)
class Way:
    """One way to build some parts together."""

    error: float  # predicted loss of this way with all of them at full rank
    sites: Mapping[str, Options]  # name in a plan -> what it can become
    entries: Mapping[str, Any] = field(default_factory=dict)  # name in a plan -> entry, of what this way decides beside


def allocate(groups: Mapping[str, Sequence[Way]], budget: float) -> dict[str, Any]:
    """The entries of the chosen options, and of what the chosen ways decide beside, by their names.

    The total cost never exceeds the budget. Optimal whenever the Lagrangian's own choice uses up the budget, and
    otherwise, where every group has one way, short of optimal by no more than what one step of one part would gain.

    Args:
        groups: name -> ways to build the group. No name of a site is in two groups.
        budget: of all together.

    Raises:
        RankError: even the cheapest options exceed the budget.

    Cost: about 60 passes over all options.

    >>> steps = Options([1, 2, 3], torch.tensor([4.0, 1.0, 0.0]), torch.tensor([1.0, 2.0, 3.0]))
    >>> flat = Options([1, 2, 3], torch.tensor([1.0, 0.9, 0.8]), torch.tensor([1.0, 2.0, 3.0]))
    >>> allocate({"a": [Way(0.0, {"a": steps})], "b": [Way(0.0, {"b": flat})]}, budget=4)
    {'a': 3, 'b': 1}
    >>> small = Way(1.0, {"a": Options([1, 2], torch.tensor([2.0, 0.0]), torch.tensor([1.0, 2.0]))}, {"heads": 8})
    >>> large = Way(0.0, {"a": Options([3, 4], torch.tensor([2.0, 0.0]), torch.tensor([3.0, 4.0]))})
    >>> allocate({"a": [small, large]}, budget=2), allocate({"a": [small, large]}, budget=4)
    ({'heads': 8, 'a': 2}, {'a': 4})
    """

    def at(logarithm: float) -> tuple[dict[str, tuple[Way, dict[str, int]]], float]:
        """Each group's way of least error and price, with the options of its sites, and what all of them cost."""
        price, found, total = torch.tensor(logarithm, dtype=torch.float64).exp(), {}, 0.0
        for name, ways in groups.items():
            priced = []
            for way in ways:
                picks = {site: int(torch.argmin(o.errors + price * o.costs)) for site, o in way.sites.items()}
                lost = way.error + sum(float(o.errors[picks[site]]) for site, o in way.sites.items())
                cost = sum(float(o.costs[picks[site]]) for site, o in way.sites.items())
                priced.append((lost + float(price) * cost, cost, way, picks))
            _, cost, way, picks = min(priced, key=itemgetter(0))
            found[name] = way, picks
            total += cost
        return found, total

    low, high = -_HIGHEST, _HIGHEST  # natural logarithm of lambda
    best = {name: (way, dict.fromkeys(way.sites, 0)) for name, (way, _) in at(high)[0].items()}
    cost = sum(float(o.costs[0]) for way, _ in best.values() for o in way.sites.values())
    if cost > budget:
        total = sum(float(o.costs[-1]) for way, _ in best.values() for o in way.sites.values())
        raise RankError(
            f"the budget of {budget:,.0f} parameters is below the smallest size, {cost:,.0f}: "
            f"keep at least {cost / total:.3f}"
        )
    while low < (middle := (low + high) / 2) < high:  # neighbours have none between them
        found, spent = at(middle)
        if spent <= budget:
            high, best, cost = middle, found, spent
        else:
            low = middle
    sites = {site: options for way, _ in best.values() for site, options in way.sites.items()}
    chosen = {site: option for _, picks in best.values() for site, option in picks.items()}
    while (step := _best_step(sites, chosen, budget - cost)) is not None:
        name, option = step
        cost += float(sites[name].costs[option] - sites[name].costs[chosen[name]])
        chosen[name] = option
    entries: dict[str, Any] = {}
    for way, _ in best.values():
        entries |= way.entries
        entries |= {name: options.entries[chosen[name]] for name, options in way.sites.items()}
    return entries


def _best_step(sites: Mapping[str, Options], chosen: Mapping[str, int], left: float) -> tuple[str, int] | None:
    """The step up with the most error saved for its cost among those that fit in what is left; None if none does."""
    best: tuple[float, tuple[str, int] | None] = (0.0, None)
    for name, o in sites.items():
        now = chosen[name]
        extra = o.costs[now + 1 :] - o.costs[now]
        fits = int((extra <= left).sum())
        if fits:
            rate = (o.errors[now] - o.errors[now + 1 : now + 1 + fits]) / extra[:fits]
            top = int(rate.argmax())
            if float(rate[top]) > best[0]:
                best = (float(rate[top]), (name, now + 1 + top))
    return best[1]
