"""One budget for many layers: choose an option of each so that the summed error is least.

min sum_l error_l(j_l) subject to sum_l cost_l(j_l) <= budget is solved by its Lagrangian, min error + lambda cost, with
lambda bisected to the budget; what is left is spent greedily, so that no option that still fits would lower the error.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_reparam.errors import RankError

__all__ = ["Alternative", "Options", "allocate", "choose"]

_BISECTIONS = 200


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


def choose(groups: Mapping[str, Sequence[Alternative]], budget: float) -> dict[str, int]:
    """Index of the best alternative of each group under a budget, by the Lagrangian that `allocate` solves.

    Where even the cheapest options exceed the budget, the alternatives that are cheapest.

    Cost: 200 passes over all options.

    >>> small = Alternative(1.0, [Options(torch.tensor([2.0, 0.0]), torch.tensor([1.0, 2.0]))])
    >>> large = Alternative(0.0, [Options(torch.tensor([2.0, 0.0]), torch.tensor([3.0, 4.0]))])
    >>> choose({"a": [small, large]}, budget=2), choose({"a": [small, large]}, budget=4)
    ({'a': 0}, {'a': 1})
    """

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

    low, high = -100.0, 100.0
    best = at(torch.tensor(high, dtype=torch.float64).exp())[0]
    for _ in range(_BISECTIONS // 4):  # to a factor of 1 + 1e-13 in lambda
        middle = (low + high) / 2
        found, cost = at(torch.tensor(middle, dtype=torch.float64).exp())
        if cost <= budget:
            high, best = middle, found
        else:
            low = middle
    return best


def allocate(layers: Mapping[str, Options], budget: float) -> dict[str, int]:
    """Index of the chosen option of each layer; the total cost never exceeds the budget.

    Optimal whenever the Lagrangian's own choice uses up the budget, and otherwise short of optimal by no more than what
    one step of one layer would gain.

    Raises:
        RankError: even the cheapest options exceed the budget.

    Cost: 200 passes over all options.

    >>> steps = Options(torch.tensor([4.0, 1.0, 0.0]), torch.tensor([1.0, 2.0, 3.0]))
    >>> flat = Options(torch.tensor([1.0, 0.9, 0.8]), torch.tensor([1.0, 2.0, 3.0]))
    >>> allocate({"a": steps, "b": flat}, budget=4)
    {'a': 2, 'b': 0}
    """
    least = sum(float(o.costs[0]) for o in layers.values())
    if least > budget:
        total = sum(float(o.costs[-1]) for o in layers.values())
        raise RankError(
            f"the budget of {budget:,.0f} parameters is below the smallest size, {least:,.0f}: "
            f"keep at least {least / total:.3f}"
        )
    chosen = _bisect(layers, budget)
    left = budget - _cost(layers, chosen)
    while True:
        name, option = _best_step(layers, chosen, left)
        if name is None:
            return chosen
        left -= float(layers[name].costs[option] - layers[name].costs[chosen[name]])
        chosen[name] = option


def _bisect(layers: Mapping[str, Options], budget: float) -> dict[str, int]:
    low, high = -100.0, 100.0  # natural logarithm of lambda; the high end always fits, up to ties
    chosen = dict.fromkeys(layers, 0)
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        price = torch.tensor(middle, dtype=torch.float64).exp()
        choice = {name: int(torch.argmin(o.errors + price * o.costs)) for name, o in layers.items()}
        if _cost(layers, choice) <= budget:
            high, chosen = middle, choice
        else:
            low = middle
    return chosen


def _cost(layers: Mapping[str, Options], chosen: Mapping[str, int]) -> float:
    return sum(float(layers[name].costs[option]) for name, option in chosen.items())


def _best_step(layers: Mapping[str, Options], chosen: Mapping[str, int], left: float) -> tuple[str | None, int]:
    """The step up with the most error saved for its cost among those that fit in what is left."""
    best: tuple[float, str | None, int] = (0.0, None, 0)
    for name, o in layers.items():
        now = chosen[name]
        extra = o.costs[now + 1 :] - o.costs[now]
        fits = int((extra <= left).sum())
        if fits:
            rate = (o.errors[now] - o.errors[now + 1 : now + 1 + fits]) / extra[:fits]
            top = int(rate.argmax())
            if float(rate[top]) > best[0]:
                best = (float(rate[top]), name, now + 1 + top)
    return best[1], best[2]
