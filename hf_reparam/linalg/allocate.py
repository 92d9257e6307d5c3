"""One budget for many layers: choose an option of each so that the summed error is least.

min sum_l error_l(j_l) subject to sum_l cost_l(j_l) <= budget is solved by its Lagrangian, min error + lambda cost, with
lambda bisected to the budget; what is left is spent greedily, so that no option that still fits would lower the error.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor

from hf_reparam.errors import RankError

_HIGHEST = 100.0  # natural logarithm of lambda

C = TypeVar("C")


@dataclass(frozen=True, slots=True)
class Options:
    """What one part of a model can become, from the cheapest option to the dearest.

    Args:
        entries: what each option is.
        errors: (options,) float64, not increasing.
        costs: (options,) float64, strictly increasing.
    """

    entries: Sequence[Any]
    errors: Tensor
    costs: Tensor

    def of(self, kept: list[int]) -> "Options":
        """Some of them, by their places."""
        return Options([self.entries[i] for i in kept], self.errors[kept], self.costs[kept])


@dataclass(frozen=True, slots=True)
class Way:
    """One way to build some parts together.

    Args:
        error: predicted loss of this way with all of them at full rank.
        sites: name in a plan -> what it can become.
        entries: name in a plan -> entry, of what this way decides beside.
    """

    error: float
    sites: Mapping[str, Options]
    entries: Mapping[str, Any] = field(default_factory=dict)


def allocate(groups: Mapping[str, Sequence[Way]], budget: float) -> dict[str, Any]:
    """The entries of the chosen options, and of what the chosen ways decide beside, by their names.

    The total cost never exceeds the budget. Optimal whenever the Lagrangian's own choice uses up the budget, and
    otherwise short of optimal by no more than what one step of one part would gain; ways are chosen first.

    Args:
        groups: name -> ways to build the group. No name of a site is in two groups.
        budget: of all together.

    Raises:
        RankError: even the cheapest options exceed the budget.

    Cost: about 60 passes over all options, and as many more where there are several ways.

    >>> steps = Options([1, 2, 3], torch.tensor([4.0, 1.0, 0.0]), torch.tensor([1.0, 2.0, 3.0]))
    >>> flat = Options([1, 2, 3], torch.tensor([1.0, 0.9, 0.8]), torch.tensor([1.0, 2.0, 3.0]))
    >>> allocate({"a": [Way(0.0, {"a": steps})], "b": [Way(0.0, {"b": flat})]}, budget=4)
    {'a': 3, 'b': 1}
    >>> small = Way(1.0, {"a": Options([1, 2], torch.tensor([2.0, 0.0]), torch.tensor([1.0, 2.0]))}, {"heads": 8})
    >>> large = Way(0.0, {"a": Options([3, 4], torch.tensor([2.0, 0.0]), torch.tensor([3.0, 4.0]))})
    >>> allocate({"a": [small, large]}, budget=2), allocate({"a": [small, large]}, budget=4)
    ({'heads': 8, 'a': 2}, {'a': 4})
    """
    ways = _ways(groups, budget).values()
    sites = {name: options for way in ways for name, options in way.sites.items()}
    least = sum(float(o.costs[0]) for o in sites.values())
    if least > budget:
        total = sum(float(o.costs[-1]) for o in sites.values())
        raise RankError(
            f"the budget of {budget:,.0f} parameters is below the smallest size, {least:,.0f}: "
            f"keep at least {least / total:.3f}"
        )
    chosen = _bisect(lambda price: _cheapest(sites, price), dict.fromkeys(sites, 0), budget)
    left = budget - _cost(sites, chosen)
    while (step := _best_step(sites, chosen, left)) is not None:
        name, option = step
        left -= float(sites[name].costs[option] - sites[name].costs[chosen[name]])
        chosen[name] = option
    entries: dict[str, Any] = {}
    for way in ways:
        entries |= way.entries
        entries |= {name: options.entries[chosen[name]] for name, options in way.sites.items()}
    return entries


def _ways(groups: Mapping[str, Sequence[Way]], budget: float) -> dict[str, Way]:
    """The way of each group at the price that meets the budget; the cheapest ones where none does."""
    if all(len(ways) == 1 for ways in groups.values()):
        return {name: ways[0] for name, ways in groups.items()}

    def at(price: Tensor) -> tuple[dict[str, Way], float]:
        chosen, cost = {}, 0.0
        for name, ways in groups.items():
            priced = []
            for way in ways:
                picks, spent = _cheapest(way.sites, price)
                lost = sum(float(way.sites[site].errors[i]) for site, i in picks.items())
                priced.append((way.error + lost + float(price) * spent, spent, way))
            _, spent, chosen[name] = min(priced, key=lambda known: known[0])
            cost += spent
        return chosen, cost

    return _bisect(at, at(torch.tensor(_HIGHEST, dtype=torch.float64).exp())[0], budget)


def _bisect(at: Callable[[Tensor], tuple[C, float]], first: C, budget: float) -> C:
    """What is chosen at the lowest price that meets the budget; `first` if none does."""
    low, high, chosen = -_HIGHEST, _HIGHEST, first  # natural logarithm of lambda; the high end always fits, up to ties
    while low < (middle := (low + high) / 2) < high:  # neighbours have none between them
        found, cost = at(torch.tensor(middle, dtype=torch.float64).exp())
        if cost <= budget:
            high, chosen = middle, found
        else:
            low = middle
    return chosen


def _cheapest(sites: Mapping[str, Options], price: Tensor) -> tuple[dict[str, int], float]:
    """The options of least error and price, and what they cost."""
    chosen = {name: int(torch.argmin(o.errors + price * o.costs)) for name, o in sites.items()}
    return chosen, _cost(sites, chosen)


def _cost(sites: Mapping[str, Options], chosen: Mapping[str, int]) -> float:
    return sum(float(sites[name].costs[option]) for name, option in chosen.items())


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
