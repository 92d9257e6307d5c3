"""Embedding tables: the best cut in their metric, and moments that are sums."""

import pytest
import torch

from hf_reparam.errors import RankError, WeightError
from hf_reparam.linalg.tables import TableMoments, decompose_table

TOKENS, WIDTH = 40, 6


def moments(*, head=True):
    found = TableMoments.zeros(TOKENS, WIDTH)
    found.add_ids(torch.randint(0, 10, (200,)))
    found.add_gradients(torch.randn(200, WIDTH) * torch.logspace(0, -2, WIDTH))
    if head:
        found.add_head(torch.randn(200, WIDTH), None)
        found.add_head(None, torch.randn(200, TOKENS) * 0.1)
    return found


@pytest.mark.parametrize("seen", [None, moments(head=False), moments()])
@pytest.mark.parametrize("rank", [1, 3, 5])
def test_no_other_table_of_this_rank_loses_less(seen, rank):
    """Against the error by its definition, of 200 factors near the best ones."""
    weight = torch.randn(TOKENS, WIDTH, dtype=torch.float64)
    rows, root = seen.metric() if seen else (torch.full((TOKENS,), 1 / TOKENS, dtype=torch.float64), torch.eye(WIDTH))
    found = decompose_table(weight, seen)
    table, up = found.cut(weight, rank)

    def lost(a, b):
        change = weight - a @ b.T
        return float((rows[:, None] * (change @ root.double()) ** 2).sum())

    best = lost(table, up)
    assert best == pytest.approx(float(found.squares[rank:].sum()), rel=1e-9)
    for scale in (1e-3, 1e-2, 0.1, 1.0):
        for _ in range(50):
            assert best <= lost(table + torch.randn_like(table) * scale, up + torch.randn_like(up) * scale)
    assert torch.allclose(up.T @ up, torch.eye(rank, dtype=torch.float64))
    assert found.relative_error(rank) == pytest.approx((best / float(found.squares.sum())) ** 0.5)


def test_frequent_tokens_are_kept_better():
    weight, seen = torch.randn(TOKENS, WIDTH).double(), moments(head=False)
    table, up = decompose_table(weight, seen).cut(weight, 3)
    errors = (weight - table @ up.T).norm(dim=1)
    plain, other = decompose_table(weight, None).cut(weight, 3)
    plain_errors = (weight - plain @ other.T).norm(dim=1)
    assert (errors[:10] / plain_errors[:10]).mean() < (errors[10:] / plain_errors[10:]).mean()


def test_moments_are_sums():
    whole, first, second = (TableMoments.zeros(TOKENS, WIDTH) for _ in range(3))
    ids, gradients, states = torch.randint(0, TOKENS, (50,)), torch.randn(50, WIDTH), torch.randn(50, WIDTH)
    logits = torch.randn(50, TOKENS)
    for target, part in ((whole, slice(None)), (first, slice(20)), (second, slice(20, None))):
        target.add_ids(ids[part])
        target.add_gradients(gradients[part])
        target.add_head(states[part], logits[part])
    summed = first + second
    for a, b in zip(vars(summed).values(), vars(whole).values(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-5)
    assert whole.tokens == 50
    assert torch.equal(whole.counts, torch.bincount(ids, minlength=TOKENS).double())
    torch.testing.assert_close(
        whole.head_gradients, logits.double().square().sum(0), rtol=1e-5, atol=1e-5
    )  # in float32


def test_without_an_embedding_tokens_are_those_of_the_head():
    head = TableMoments.zeros(TOKENS, WIDTH)
    head.add_head(torch.randn(7, WIDTH), torch.randn(7, TOKENS))
    assert head.tokens == 7


def test_errors():
    weight = torch.randn(TOKENS, WIDTH)
    for rank in (0, WIDTH):
        with pytest.raises(RankError, match="must be in 1..5"):
            decompose_table(weight, None).cut(weight, rank)
    bad = moments()
    bad.gradients[0, 0] = float("nan")
    with pytest.raises(WeightError, match="not finite"):
        decompose_table(weight, bad)
    weight[0, 0] = float("inf")
    with pytest.raises(WeightError, match="NaN or infinite"):
        decompose_table(weight, None)


def test_a_tied_head_makes_its_tokens_count():
    seen = TableMoments.zeros(4, 2)
    seen.add_ids(torch.zeros(10, dtype=torch.long))
    seen.add_gradients(torch.ones(10, 2))
    seen.add_head(torch.ones(10, 2), None)
    seen.add_head(None, torch.tensor([[0.0, 0.0, 2.0, 0.0]]).expand(10, 4))
    rows, _ = seen.metric()
    torch.testing.assert_close(rows, 0.9 * torch.tensor([2.0, 0.0, 8.0, 0.0], dtype=torch.float64) / 10 + 0.1 / 4)
