"""Maps into narrower heads: exact at full width, optimal below, and errors that are what they say."""

import pytest
import torch

from hf_reparam.linalg.heads import HeadMoments, map_both, map_rows, output_moment

HEADS, WIDTH = 3, 5


def moments(seed=0):
    generator = torch.Generator().manual_seed(seed)

    def second():
        rows = torch.randn(400, HEADS * WIDTH, generator=generator, dtype=torch.float64)
        return (rows * torch.logspace(0, -2, HEADS * WIDTH, dtype=torch.float64)).T @ rows / 400 / 2 + torch.eye(
            HEADS * WIDTH, dtype=torch.float64
        ) * 1e-3

    parts = [second() for _ in range(4)]
    return HeadMoments(HEADS, *(part @ part.T for part in parts))


def blocks(maps):
    return torch.block_diag(*maps)


def test_at_full_width_the_maps_are_each_others_inverse():
    maps = moments().maps()
    eye = torch.eye(WIDTH, dtype=torch.float64)
    for left, right in ((maps.query, maps.key), (maps.output, maps.value)):
        assert torch.allclose(left.mT @ right, eye.expand(HEADS, -1, -1), atol=1e-9)
    assert max(moments().errors(maps)) < 1e-12


@pytest.mark.parametrize("width", [1, 2, 4])
def test_the_error_is_the_expected_loss_increase(width):
    """tr G (P - I) C (P - I)^T with whole matrices, terms between heads included."""
    found = moments()
    maps = found.maps().cut(width)
    pairs = ((maps.query, maps.key, found.keys, found.queries), (maps.output, maps.value, found.values, found.outputs))
    for got, (left, right, inner, outer) in zip(found.errors(maps), pairs, strict=True):
        change = blocks(left.mT @ right) - torch.eye(HEADS * WIDTH, dtype=torch.float64)
        assert got == pytest.approx(float(torch.trace(outer @ change @ inner @ change.T)), rel=1e-9)


@pytest.mark.parametrize("width", [1, 2, 4])
def test_no_other_map_of_this_rank_loses_less_in_a_head(width):
    """Against 200 matrices of the same rank near the best one; one head, so that blocks are all there is."""
    found = moments()
    one = HeadMoments(1, *(part[:WIDTH, :WIDTH] for part in (found.keys, found.queries, found.values, found.outputs)))
    maps = one.maps().cut(width)
    best = one.errors(maps)[0]
    generator = torch.Generator().manual_seed(1)
    for scale in (1e-3, 1e-2, 0.1, 1.0):
        for _ in range(50):
            noise = torch.randn(2, 1, width, WIDTH, generator=generator, dtype=torch.float64) * scale
            change = (maps.query + noise[0]).mT @ (maps.key + noise[1]) - torch.eye(WIDTH, dtype=torch.float64)
            assert best <= 1.01 * float((map_both(one.keys, change) * one.queries).sum())  # 1 %: shrinkage


def test_wider_heads_lose_less():
    found = moments()
    errors = [sum(found.errors(found.maps().cut(width))) for width in range(1, WIDTH + 1)]
    assert errors == sorted(errors, reverse=True)


def test_rows_and_second_moments_are_mapped_by_blocks():
    maps, matrix = torch.randn(HEADS, 2, WIDTH), torch.randn(HEADS * WIDTH, HEADS * WIDTH)
    assert torch.allclose(map_rows(matrix, maps), blocks(maps) @ matrix, atol=1e-5)
    assert torch.allclose(map_both(matrix, maps), blocks(maps) @ matrix @ blocks(maps).T, atol=1e-5)


@pytest.mark.parametrize("with_bias", [True, False])
def test_the_moment_of_outputs_is_that_of_the_outputs(with_bias):
    x = torch.randn(50, 4, dtype=torch.float64) + 1
    weight, bias = torch.randn(3, 4, dtype=torch.float64), torch.randn(3, dtype=torch.float64) if with_bias else None
    y = x @ weight.T + (0 if bias is None else bias)
    found = output_moment(weight, bias, x.T @ x / 50, x.mean(0))
    assert torch.allclose(found, y.T @ y / 50)
