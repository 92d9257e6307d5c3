"""One budget for many layers: choose an option of each so that the summed error is least.

min sum_l error_l(j_l) subject to sum_l cost_l(j_l) <= budget is solved by its Lagrangian, min error + lambda cost, with
lambda bisected to the budget; what is left is spent greedily, so that no option that still fits would lower the error.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from hf_reparam.errors import RankError

__all__ = ["Alternative", "Options", "allocate"]

_HIGHEST = 100.0  # natural logarithm of lambda

K = TypeVar("K")


@dataclass(frozen=True, slots=True)
class Options:
    """What a layer can become, from the cheapest option to the dearest.

    Args:
        errors: (options,) float64, not increasing.
        costs: (options,) float64, strictly increasing, parameters.
    """

    errors: Tensor
    costs: Tensor


@dataclass(frozen=True, slots=True)
class Alternative:
    """One way to build a group of layers.

    Args:
        error: what this way costs at any option of its layers.
        layers: what each of its layers can become.
    """

    error: float
    layers: Sequence[Options]


def allocate(groups: Mapping[str, Sequence[Alternative]], budget: float) -> dict[str, tuple[int, list[int]]]:
    """For each group the index of the chosen alternative, and of the option of each of its layers.

    The total cost never exceeds the budget. Optimal whenever the Lagrangian's own choice uses up the budget, and
    otherwise short of optimal by no more than what one step of one layer would gain; alternatives are chosen first.

    Raises:
        RankError: even the cheapest options exceed the budget.

    Cost: about 60 passes over all options, and as many more where there are alternatives.

    >>> steps = Options(torch.tensor([4.0, 1.0, 0.0]), torch.tensor([1.0, 2.0, 3.0]))
    >>> flat = Options(torch.tensor([1.0, 0.9, 0.8]), torch.tensor([1.0, 2.0, 3.0]))
    >>> allocate({"a": [Alternative(0.0, [steps])], "b": [Alternative(0.0, [flat])]}, budget=4)
    {'a': (0, [2]), 'b': (0, [0])}
    >>> small = Alternative(1.0, [Options(torch.tensor([2.0, 0.0]), torch.tensor([1.0, 2.0]))])
    >>> large = Alternative(0.0, [Options(torch.tensor([2.0, 0.0]), torch.tensor([3.0, 4.0]))])
    >>> allocate({"a": [small, large]}, budget=2), allocate({"a": [small, large]}, budget=4)
    ({'a': (0, [1])}, {'a': (1, [1])})
    """
    ways = _ways(groups, budget)
    layers = {(name, i): o for name, way in ways.items() for i, o in enumerate(groups[name][way].layers)}
    least = sum(float(o.costs[0]) for o in layers.values())
    if least > budget:
        total = sum(float(o.costs[-1]) for o in layers.values())
        raise RankError(
            f"the budget of {budget:,.0f} parameters is below the smallest size, {least:,.0f}: "
            f"keep at least {least / total:.3f}"
        )
    chosen = _bisect(lambda price: _options(layers, price), dict.fromkeys(layers, 0), budget)
    left = budget - _cost(layers, chosen)
    while (step := _best_step(layers, chosen, left)) is not None:
        key, option = step
        left -= float(layers[key].costs[option] - layers[key].costs[chosen[key]])
        chosen[key] = option
    return {name: (way, [chosen[name, i] for i in range(len(groups[name][way].layers))]) for name, way in ways.items()}


def _ways(groups: Mapping[str, Sequence[Alternative]], budget: float) -> dict[str, int]:
    """The alternative of each group at the price that meets the budget; the cheapest ones where none does."""
    if all(len(alternatives) == 1 for alternatives in groups.values()):
        return dict.fromkeys(groups, 0)

    def at(price: Tensor) -> tuple[dict[str, int], float]:
        chosen, cost = {}, 0.0
        for name, alternatives in groups.items():
            totals = []
            for way in alternatives:
                picks = [(o, int(torch.argmin(o.errors + price * o.costs))) for o in way.layers]
                spent = sum(float(o.costs[i]) for o, i in picks)
                totals.append((way.error + sum(float(o.errors[i]) for o, i in picks) + float(price) * spent, spent))
            chosen[name] = min(range(len(totals)), key=lambda i: totals[i][0])
            cost += totals[chosen[name]][1]
        return chosen, cost

    cheapest = at(torch.tensor(_HIGHEST, dtype=torch.float64).exp())[0]
    return _bisect(at, cheapest, budget)


def _bisect(at: Callable[[Tensor], tuple[dict[K, int], float]], first: dict[K, int], budget: float) -> dict[K, int]:
    """What is chosen at the lowest price that meets the budget; `first` if none does."""
    low, high, chosen = -_HIGHEST, _HIGHEST, first  # natural logarithm of lambda; the high end always fits, up to ties
    while low < (middle := (low + high) / 2) < high:  # neighbours have none between them
        found, cost = at(torch.tensor(middle, dtype=torch.float64).exp())
        if cost <= budget:
            high, chosen = middle, found
        else:
            low = middle
    return chosen


def _options(layers: Mapping[K, Options], price: Tensor) -> tuple[dict[K, int], float]:
    chosen = {key: int(torch.argmin(o.errors + price * o.costs)) for key, o in layers.items()}
    return chosen, _cost(layers, chosen)


def _cost(layers: Mapping[K, Options], chosen: Mapping[K, int]) -> float:
    return sum(float(layers[key].costs[option]) for key, option in chosen.items())


def _best_step(layers: Mapping[K, Options], chosen: Mapping[K, int], left: float) -> tuple[K, int] | None:
    """The step up with the most error saved for its cost among those that fit in what is left; None if none does."""
    best: tuple[float, tuple[K, int] | None] = (0.0, None)
    for key, o in layers.items():
        now = chosen[key]
        extra = o.costs[now + 1 :] - o.costs[now]
        fits = int((extra <= left).sum())
        if fits:
            rate = (o.errors[now] - o.errors[now + 1 : now + 1 + fits]) / extra[:fits]
            top = int(rate.argmax())
            if float(rate[top]) > best[0]:
                best = (float(rate[top]), (key, now + 1 + top))
    return best[1]
