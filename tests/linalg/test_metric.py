"""In the metric's coordinates the truncation is optimal; oracle: symmetric square roots and a full SVD."""

import pytest
import torch

from hf_reparam.linalg.factorize import decompose, spectrum
from hf_reparam.linalg.metric import Metric, root


def moment(size, seed, rank=None):
    x = torch.randn(size, rank or 3 * size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return x @ x.T / x.shape[1]


def symmetric_root(matrix):
    values, vectors = torch.linalg.eigh(matrix)
    return vectors * values.clamp_min(0).sqrt() @ vectors.T


def loss(weight, other, c, g):
    delta = weight - other
    return float(torch.trace(g @ delta @ c @ delta.T))


@pytest.mark.parametrize("shape", [(12, 20), (20, 12), (300, 280)], ids=str)
@pytest.mark.parametrize("which", ["input", "output", "both"])
def test_no_rank_r_matrix_has_a_smaller_loss(shape, which):
    rows, cols = shape
    weight = torch.randn(shape, dtype=torch.float64)
    c = moment(cols, 1) if which != "output" else torch.eye(cols, dtype=torch.float64)
    g = moment(rows, 2) if which != "input" else torch.eye(rows, dtype=torch.float64)
    metric = Metric(
        torch.linalg.cholesky(c) if which != "output" else None, torch.linalg.cholesky(g) if which != "input" else None
    )
    sigma = torch.linalg.svdvals(symmetric_root(g) @ weight @ symmetric_root(c))
    torch.testing.assert_close(spectrum(weight, metric), sigma.square(), rtol=1e-8, atol=1e-10)
    for rank in (1, 5, 11):
        decomposition = decompose(weight, max_rank=rank, metric=metric)
        up, down = decomposition.cut(rank)
        optimum = float(sigma[rank:].square().sum())
        assert loss(weight, up @ down, c, g) == pytest.approx(optimum, rel=1e-6)
        assert decomposition.relative_error(rank) == pytest.approx(
            (optimum / float(sigma.square().sum())) ** 0.5, rel=1e-6
        )


def test_root_shrinks_towards_a_multiple_of_the_identity():
    c = moment(8, 1)
    lower = root(c, 0.25)
    expected = 0.75 * c + 0.25 * c.diagonal().mean() * torch.eye(8, dtype=torch.float64)
    torch.testing.assert_close(lower @ lower.T, expected)
    assert torch.equal(lower, lower.tril())


@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
def test_root_of_a_singular_moment_at_any_scale(scale):
    lower = root(moment(50, 1, rank=3) * scale, 1e-6)
    assert bool(torch.isfinite(lower).all())


def test_root_of_nothing_is_the_identity():
    assert torch.equal(root(torch.zeros(4, 4, dtype=torch.float64), 0.1), torch.eye(4, dtype=torch.float64))


@pytest.mark.parametrize("noise", [0.1, 10.0])
def test_rounding_below_zero_is_raised_to_the_shrinkage(noise):
    """A moment of rank 2 whose other eigenvalues are negative, as float32 sums of nearly equal tokens leave them."""
    torch.manual_seed(0)
    q = torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64))[0]
    values = torch.tensor([60.0, 40.0, *[-noise] * 4], dtype=torch.float64)
    moment = (q * values) @ q.T
    lower = root(moment, 1e-3)
    assert torch.equal(lower, lower.tril())
    assert bool((lower.diagonal() > 0).all())
    mean = float(values.mean())
    expected = ((1 - 1e-3) * values + 1e-3 * mean).clamp_min(1e-3 * mean)
    torch.testing.assert_close(lower @ lower.T, (q * expected) @ q.T, atol=1e-9, rtol=1e-9)
