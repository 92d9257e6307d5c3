"""Oracle: torch.linalg.svd in float64. Eckart and Young say no approximation of rank r has a smaller error."""

import pytest
import torch

from hf_reparam.errors import RankError, TargetError, WeightError
from hf_reparam.linalg import factorize
from hf_reparam.linalg.factorize import decompose, working_device

SHAPES = [(1, 1), (1, 9), (9, 1), (8, 8), (24, 40), (40, 24), (300, 300), (320, 500)]
EXCESS = 1e-6  # relative to the optimal squared error, as decompose promises


def spectrum_matrix(rows, cols, sigma, seed=0):
    generator = torch.Generator().manual_seed(seed)
    k = min(rows, cols)
    left = torch.linalg.qr(torch.randn(rows, k, generator=generator, dtype=torch.float64))[0]
    right = torch.linalg.qr(torch.randn(cols, k, generator=generator, dtype=torch.float64))[0]
    return left * sigma @ right.T


def optimum(weight, rank):
    return float(torch.linalg.svdvals(weight.double())[rank:].square().sum())


def squared_error(weight, factors):
    up, down = factors
    return float((weight.double() - up @ down).square().sum())


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_error_of_every_cut_is_the_optimum(shape):
    weight = torch.randn(shape, dtype=torch.float64)
    decomposition = decompose(weight)
    for rank in {1, (min(shape) + 1) // 2, max(1, min(shape) - 1), min(shape)}:
        error, best = squared_error(weight, decomposition.cut(rank)), optimum(weight, rank)
        rounding = 1e-24 * float(weight.square().sum())
        assert error <= best * (1 + EXCESS) + rounding
        assert decomposition.relative_error(rank) == pytest.approx(
            (best / float(weight.square().sum())) ** 0.5, abs=1e-7
        )


@pytest.mark.parametrize("rank", [1, 16, 64, 100, 128, 160])
@pytest.mark.parametrize("shape", [(320, 320), (320, 700), (700, 320)], ids=str)
def test_partial_decomposition_is_as_good_as_the_full_one(shape, rank):
    weight = torch.randn(shape, dtype=torch.float64)
    assert squared_error(weight, decompose(weight, max_rank=rank).cut(rank)) <= optimum(weight, rank) * (1 + EXCESS)


@pytest.mark.parametrize(
    "sigma",
    [
        torch.logspace(0, -14, 300, dtype=torch.float64),
        torch.logspace(0, -5, 300, dtype=torch.float64),
        torch.cat([torch.full((40,), 100.0), torch.ones(260)]).double(),
        torch.ones(300, dtype=torch.float64),
        torch.cat([torch.ones(20), torch.full((280,), 1e-9)]).double(),
        1 / torch.arange(1, 301, dtype=torch.float64),
    ],
    ids=["steep", "log", "outliers", "flat", "cliff", "power"],
)
@pytest.mark.parametrize("rank", [5, 20, 60, 100, 200])
def test_hard_spectra(sigma, rank):
    weight = spectrum_matrix(300, 400, sigma)
    error = squared_error(weight, decompose(weight, max_rank=rank).cut(rank))
    assert error <= optimum(weight, rank) * (1 + EXCESS) + 1e-28 * float(weight.square().sum())


def test_search_is_used_where_it_helps_and_refused_where_it_may_be_off(monkeypatch):
    found = []
    search = factorize._search
    monkeypatch.setattr(factorize, "_search", lambda a, rank: found.append(search(a, rank)) or found[-1])
    decompose(torch.randn(320, 640, dtype=torch.float64), max_rank=64)
    decompose(spectrum_matrix(320, 400, torch.logspace(0, -14, 320, dtype=torch.float64)), max_rank=100)
    assert [result is None for result in found] == [False, True]


def test_left_and_right_are_orthonormal_and_descending():
    d = decompose(torch.randn(30, 20))
    eye = torch.eye(20, dtype=torch.float64)
    torch.testing.assert_close(d.left.T @ d.left, eye, atol=1e-10, rtol=0)
    torch.testing.assert_close(d.right @ d.right.T, eye, atol=1e-10, rtol=0)
    assert bool((d.singular_values.diff() <= 0).all())


@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
def test_scale_does_not_matter(scale):
    weight = torch.randn(300, 300, dtype=torch.float64)
    one, scaled = decompose(weight, max_rank=64), decompose(weight * scale, max_rank=64)
    torch.testing.assert_close(scaled.singular_values, one.singular_values * scale, rtol=1e-10, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_is_factored_in_double(dtype):
    weight = torch.randn(48, 64).to(dtype)
    factors, double = decompose(weight).cut(48), decompose(weight.double()).cut(48)
    assert all(factor.dtype == torch.float64 for factor in factors)
    assert all(map(torch.equal, factors, double))


def test_zero_and_rank_deficient_weights():
    assert squared_error(torch.zeros(8, 5), decompose(torch.zeros(8, 5)).cut(3)) == 0
    assert decompose(torch.zeros(8, 5)).relative_error(3) == 0
    weight = torch.randn(40, 3, dtype=torch.float64) @ torch.randn(3, 50, dtype=torch.float64)
    factors = decompose(weight).cut(10)
    assert all(bool(torch.isfinite(factor).all()) for factor in factors)
    assert squared_error(weight, factors) <= 1e-24 * float(weight.square().sum())


def test_input_is_not_modified_and_result_repeats():
    weight = torch.randn(300, 310)
    before = weight.clone()
    first, second = decompose(weight, max_rank=50), decompose(weight, max_rank=50)
    assert torch.equal(weight, before)
    assert torch.equal(first.left, second.left)
    assert torch.equal(first.right, second.right)


def test_factors_share_the_singular_values_evenly():
    up, down = decompose(torch.randn(20, 30, dtype=torch.float64)).cut(5)
    torch.testing.assert_close(up.norm(dim=0), down.norm(dim=1))


@pytest.mark.parametrize("rank", [0, -1, 6, True])
def test_rank_out_of_range(rank):
    with pytest.raises(RankError, match=r"1\.\.5"):
        decompose(torch.randn(5, 7), max_rank=rank)


def test_cut_above_what_was_computed():
    with pytest.raises(RankError, match=r"1\.\.3, got 4"):
        decompose(torch.randn(5, 7), max_rank=3).cut(4)


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        (torch.tensor([[1.0, float("nan")]]), "1 of 2 values are NaN or infinite"),
        (torch.tensor([[float("inf"), 1.0]]), "NaN or infinite"),
        (torch.empty(2, 2, device="meta"), "meta device"),
        (torch.ones(2, 2, dtype=torch.int8), r"torch\.int8"),
        (torch.ones(2, 2).to(torch.float8_e4m3fn), "float8"),
        (torch.ones(2, 2).to_sparse(), "sparse|not implemented|layout"),
        (torch.ones(2), "matrix"),
    ],
    ids=["nan", "inf", "meta", "int8", "float8", "sparse", "vector"],
)
def test_weights_that_cannot_be_factored(weight, message):
    with pytest.raises(WeightError, match=message):
        decompose(weight)


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(400, 900), (900, 400)], ids=str)
@pytest.mark.parametrize("rank", [1, 20, 80])
@pytest.mark.parametrize(
    ("sigma", "excess"),
    [
        (torch.ones(400, dtype=torch.float64), 1e-9),
        (1 / torch.arange(1, 401, dtype=torch.float64).sqrt(), 0.1),
        (1 / torch.arange(1, 401, dtype=torch.float64), 0.01),
        (torch.logspace(0, -5, 400, dtype=torch.float64), 1e-3),
    ],
    ids=["flat", "slow", "power", "steep"],
)
def test_randomized_is_near_the_optimum_and_says_how_near(shape, rank, sigma, excess):
    weight = spectrum_matrix(*shape, sigma) if shape[0] < shape[1] else spectrum_matrix(*shape[::-1], sigma).T
    decomposition = decompose(weight, max_rank=rank, solver="randomized")
    error = squared_error(weight, decomposition.cut(rank))
    least = optimum(weight, rank)
    assert least * (1 - 1e-9) <= error <= least * (1 + excess)
    assert decomposition.relative_error(rank) ** 2 * decomposition.energy == pytest.approx(error, rel=1e-6)


def test_randomized_is_used_where_the_rank_is_small(monkeypatch):
    used = []
    sketch = factorize._sketch
    monkeypatch.setattr(factorize, "_sketch", lambda a, rank: used.append(rank) or sketch(a, rank))
    weight = torch.randn(320, 640)
    for rank in (8, 64, 65, 320):
        decompose(weight, max_rank=rank, solver="randomized")
    assert used == [8, 64]
    decompose(weight, max_rank=8)
    assert used == [8, 64]
    a, b = (decompose(weight, max_rank=8, solver="randomized").cut(8) for _ in range(2))
    assert all(map(torch.equal, a, b))


def test_no_such_solver():
    with pytest.raises(TargetError, match=r"solver must be one of \['exact', 'randomized'\], got 'quick'"):
        decompose(torch.eye(3), solver="quick")


@pytest.mark.parametrize("shape", [(30, 50), (50, 30)], ids=str)
def test_the_largest_entry_of_a_vector_is_positive(shape):
    """A sign that rounding cannot turn."""
    weight = torch.randn(shape)
    d = decompose(weight)
    near = d.left if shape[0] < shape[1] else d.right.T
    assert bool((near.gather(0, near.abs().argmax(0, keepdim=True)) > 0).all())
    noisy = decompose(weight.double() * (1 + 1e-15 * torch.randn(shape, dtype=torch.float64)))
    torch.testing.assert_close(noisy.left, d.left, atol=1e-8, rtol=0)


def test_where_a_weight_is_decomposed():
    assert working_device(torch.zeros(1)) == torch.device("cpu")
    on_mps = type("Weight", (), {"device": torch.device("mps")})()  # no float64 there
    on_cuda = type("Weight", (), {"device": torch.device("cuda", 1)})()
    assert working_device(on_mps) == torch.device("cpu")
    assert working_device(on_cuda) == torch.device("cuda", 1)


def test_the_weight_is_not_changed():
    for dtype in (torch.float32, torch.float64):
        weight = torch.randn(20, 30, dtype=dtype) * 7
        before = weight.clone()
        decompose(weight)
        assert torch.equal(weight, before)
