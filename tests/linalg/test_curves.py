"""Loss curves by cross-validation: what held-out moments say of factors that were made without them."""

import pytest
import torch

from hf_reparam.linalg.curves import curve
from hf_reparam.linalg.factorize import decompose
from hf_reparam.linalg.moments import SHRINKAGES, LayerSums

N_IN, N_OUT = 24, 16


def moments(rows, seed, *, gradients=True):
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.randn(N_IN, N_IN, generator=torch.Generator().manual_seed(99), dtype=torch.float64)
    found = LayerSums(N_IN, N_OUT, gradients=gradients)
    found.add_inputs(torch.randn(rows, N_IN, generator=generator, dtype=torch.float64) @ mixed + 1)
    if gradients:
        found.add_gradients(torch.randn(rows, N_OUT, generator=generator, dtype=torch.float64))
    return found.take()


def split(rows, held, **options):
    part = moments(held, 1, **options)
    whole = moments(rows, 0, **options) + part
    whole.held = part
    return whole


@pytest.fixture
def weight():
    return torch.randn(N_OUT, N_IN, generator=torch.Generator().manual_seed(7), dtype=torch.float64)


@pytest.mark.parametrize("centred", [True, False])
@pytest.mark.parametrize("metric", ["activation", "fisher"])
def test_errors_are_those_on_the_held_out_part(weight, metric, centred):
    """tr G' (W - W_r) C' (W - W_r)^T with the held-out part's C' around the mean that the bias is fitted to."""
    seen = split(60, 40)
    found = curve(weight, seen, metric, centred=centred)
    fitting, held = seen.fitting(), seen.held
    factors = decompose(weight, metric=fitting.metric(metric, centred=centred, shrinkage=found.shrinkage))
    centre = fitting.mean() if centred else torch.zeros(N_IN, dtype=torch.float64)
    inputs = held.input_products / held.tokens
    mean = held.mean()
    inputs = inputs - torch.outer(mean, centre) - torch.outer(centre, mean) + torch.outer(centre, centre)
    outputs = held.gradient_products / held.tokens if metric == "fisher" else torch.eye(N_OUT, dtype=torch.float64)
    errors = []
    for rank in range(N_OUT):
        left = weight - torch.matmul(*factors.cut(rank)) if rank else weight
        errors.append(float((outputs * (left @ inputs @ left.T)).sum()))
    falling = [max(errors[rank:]) for rank in range(N_OUT)]
    torch.testing.assert_close(found.losses.flip(0).cumsum(0).flip(0), torch.tensor(falling, dtype=torch.float64))


def test_few_rows_promise_too_much_in_sample(weight):
    seen = split(30, 30)
    honest = curve(weight, seen, "fisher", centred=False).losses
    in_sample = curve(weight, moments(30, 0), "fisher", centred=False).losses
    assert honest[8:].sum() > 2 * in_sample[8:].sum()


def test_few_rows_are_shrunk_more_than_many(weight):
    chosen = {rows: curve(weight, split(rows, 2000), "fisher", centred=False).shrinkage for rows in (26, 100_000)}
    assert chosen[100_000] == SHRINKAGES[0] < chosen[26]


def test_the_chosen_shrinkage_is_the_best_of_those_tried(weight):
    seen = split(40, 4000)
    chosen = curve(weight, seen, "fisher", centred=False)

    def score(shrinkage):
        factors = decompose(weight, metric=seen.fitting().metric("fisher", centred=False, shrinkage=shrinkage))
        total = 1.0
        for rank in (N_OUT // 2, N_OUT // 4, N_OUT // 8):
            left = weight - torch.matmul(*factors.cut(rank))
            total *= float((seen.held.gradient_products * (left @ seen.held.input_products @ left.T)).sum())
        return total

    assert chosen.shrinkage == min(SHRINKAGES, key=score)


def test_without_a_held_out_part_it_is_the_spectrum(weight):
    seen = moments(50, 0)
    found = curve(weight, seen, "activation", centred=True)
    sigma = decompose(weight, metric=seen.metric("activation", centred=True)).singular_values
    torch.testing.assert_close(found.losses, sigma.square())
    assert found.shrinkage == SHRINKAGES[0]


def test_parts_add_up():
    seen = split(30, 20)
    twice = seen + seen
    assert (twice.tokens, twice.held.tokens, twice.fitting().tokens) == (100, 40, 60)
    torch.testing.assert_close(twice.fitting().input_products, 2 * seen.fitting().input_products)
    assert seen.map(lambda t: 3 * t).held.tokens == 60
