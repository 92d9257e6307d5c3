"""The budget is never exceeded, never left where a step fits, and small cases equal brute force at the same cost."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_reparam.errors import RankError
from hf_reparam.linalg.allocate import Options, Way
from hf_reparam.linalg.allocate import allocate as allocate_groups


def options(drops, costs):
    errors = torch.tensor(drops, dtype=torch.float64).flip(0).cumsum(0).flip(0)
    return Options(range(len(costs)), errors - errors[-1], torch.tensor(costs, dtype=torch.float64).cumsum(0))


def allocate(layers, budget):
    """The option of each layer, where there is one way to build each."""
    return allocate_groups({name: [Way(0.0, {name: o})] for name, o in layers.items()}, budget)


@st.composite
def problems(draw):
    layers = {}
    for i in range(draw(st.integers(1, 3))):
        size = draw(st.integers(1, 6))
        # a gain of 5e-324, the least above zero, for three parameters is a gain of nothing for each
        drops = [draw(st.floats(0, 10, allow_subnormal=False)) for _ in range(size)]
        layers[f"l{i}"] = options(drops, [draw(st.integers(1, 9)) for _ in range(size)])
    return layers


def test_an_error_without_bound_is_an_option_to_avoid():
    known = Options([1, 2, 3], torch.tensor([torch.inf, 1.0, 0.0]).double(), torch.tensor([1.0, 2.0, 3.0]).double())
    assert allocate({"a": known}, 2) == {"a": 2}
    assert allocate({"a": known}, 1) == {"a": 1}


def total(layers, chosen, field):
    return sum(float(getattr(layers[n], field)[j]) for n, j in chosen.items())


def brute(layers, budget):
    choices = [
        dict(zip(layers, c, strict=True)) for c in itertools.product(*(range(len(o.costs)) for o in layers.values()))
    ]
    return min(total(layers, c, "errors") for c in choices if total(layers, c, "costs") <= budget)


@pytest.mark.slow
@settings(max_examples=150, deadline=None)
@given(problems(), st.floats(0, 1))
def test_budget_is_kept_and_used(layers, share):
    least = sum(float(o.costs[0]) for o in layers.values())
    most = sum(float(o.costs[-1]) for o in layers.values())
    budget = least + share * (most - least)
    chosen = allocate(layers, budget)
    left = budget - total(layers, chosen, "costs")
    assert left >= 0
    for name, o in layers.items():
        for better in range(chosen[name] + 1, len(o.costs)):
            gains = float(o.errors[chosen[name]] - o.errors[better]) > 0
            assert not (gains and float(o.costs[better] - o.costs[chosen[name]]) <= left)
    largest_step = max(float(o.errors[0]) for o in layers.values())
    assert total(layers, chosen, "errors") <= brute(layers, budget) + largest_step
    # Where the cost is what the Lagrangian itself chose, there is nothing better at that cost.
    spent = total(layers, chosen, "costs")
    assert total(layers, allocate(layers, spent), "errors") <= total(layers, chosen, "errors") + 1e-9


@pytest.mark.parametrize("budget", [3, 4, 6, 9, 12, 15])
def test_equals_brute_force_where_gains_fall(budget):
    layers = {
        "a": options([9.0, 5.0, 3.0, 1.0, 0.0], [1, 1, 1, 1, 1]),
        "b": options([8.0, 4.0, 2.0, 0.5, 0.0], [1, 1, 1, 1, 1]),
        "c": options([7.0, 0.3, 0.2, 0.1, 0.0], [1, 1, 1, 1, 1]),
    }
    assert total(layers, allocate(layers, budget), "errors") == pytest.approx(brute(layers, budget))


@pytest.mark.slow
def test_more_budget_never_hurts():
    generator = torch.Generator().manual_seed(0)
    drops = [torch.rand(9, generator=generator).sort(descending=True).values.tolist() for _ in range(4)]
    layers = {str(i): options(d, [2 + i] * 9) for i, d in enumerate(drops)}
    errors = [total(layers, allocate(layers, budget), "errors") for budget in range(14, 127)]
    assert errors == sorted(errors, reverse=True)


def test_budget_below_the_smallest_size():
    with pytest.raises(RankError, match="smallest size, 2: keep at least 0.500"):
        allocate({"a": options([1.0, 0.0], [2, 2])}, 1)
