"""From a user's `rank` to one rank for each layer."""

import math

import pytest
from torch import nn

from hf_reparam import LowRankConfig, make_plan
from hf_reparam.compress.ranks import given_ranks
from hf_reparam.errors import RankError, TargetError
from hf_reparam.layers.surgery import low_rank_like
from hf_reparam.model.sites import select
from hf_reparam.plan import Entry


def targets(**layers):
    return select(nn.ModuleDict(layers), LowRankConfig()).selected


def entries(layers, rank, **options):
    return given_ranks(layers, LowRankConfig(rank=rank, **options))


def choose_ranks(layers, rank, **options):
    """Plain numbers where every layer is a pair."""
    chosen, skipped = entries(layers, rank, **options)
    assert {entry.form for entry in chosen.values()} == {"pair"}
    return {name: entry.rank for name, entry in chosen.items()}, skipped


NET = {"big": nn.Linear(64, 64), "wide": nn.Linear(64, 16), "head": nn.Linear(64, 3)}


def test_int():
    chosen, skipped = choose_ranks(targets(**NET), 8)
    assert chosen == {"big": 8, "wide": 8}
    assert {s.name: s.reason for s in skipped} == {"head": "rank 8, above min(in, out) = 3"}


def test_fraction_of_the_smaller_side():
    assert choose_ranks(targets(**NET), 0.25)[0] == {"big": 16, "wide": 4, "head": 1}


def test_mapping_first_match_decides_and_the_rest_stays():
    chosen, skipped = choose_ranks(targets(**NET), {"big": 20, "*i*": 5})
    assert chosen == {"big": 20, "wide": 5}
    assert {s.name: s.reason for s in skipped} == {"head": "no pattern of `rank` matches"}


def test_pairs_that_would_not_be_smaller():
    chosen, skipped = choose_ranks(targets(**NET), {"big": 32, "wide": 12, "head": 2})
    assert chosen == {"wide": 12, "head": 2}
    assert skipped[0].reason == "a pair of rank 32 would not be smaller: 64 x 64 pays below 32"


def test_pays_below_is_exact():
    for rows in range(2, 20):
        for cols in range(2, 20):
            layer = targets(a=nn.Linear(cols, rows))
            pays = [r for r in range(1, min(rows, cols) + 1) if r * (rows + cols) < rows * cols]
            for rank in pays:
                assert choose_ranks(layer, rank)[0] == {"a": rank}
            if rank_too_high := [r for r in range(1, min(rows, cols) + 1) if r not in pays]:
                with pytest.raises(TargetError, match=f"pays below {len(pays) + 1}"):
                    choose_ranks(layer, rank_too_high[0])


def test_allow_larger():
    assert choose_ranks(targets(**NET), 1.0, allow_larger=True)[0] == {"big": 64, "wide": 16, "head": 3}


@pytest.mark.parametrize(
    "bad", [0, -1, True, False, None, "8", math.nan, math.inf, -0.5, 0.0, 1.5, 2.0, [8], 1 + 0j], ids=repr
)
def test_bad_ranks(bad):
    for rank in (bad, {"*": bad}) if bad is not None else ({"*": bad},):
        with pytest.raises(RankError, match="must be an int of at least 1"):
            make_plan(nn.ModuleDict(NET), rank=rank)


def test_rank_above_every_layer():
    with pytest.raises(RankError, match="rank 65 is above min.in, out. of every layer; the largest of them is 64"):
        choose_ranks(targets(**NET), 65)


def test_rank_above_a_layer_that_is_named():
    with pytest.raises(RankError, match="wide: rank 17, above min.in, out. = 16 .64 x 16."):
        choose_ranks(targets(**NET), {"wide": 17})


def test_unused_and_empty_mappings():
    with pytest.raises(TargetError, match="rank: 'nope' matches none"):
        choose_ranks(targets(**NET), {"big": 8, "nope": 3})
    with pytest.raises(RankError, match="empty mapping"):
        choose_ranks(targets(**NET), {})


def test_nothing_to_do():
    with pytest.raises(TargetError, match="highest rank that makes any layer smaller is 31"):
        choose_ranks(targets(big=NET["big"]), 40)
    with pytest.raises(TargetError, match="no dense layer"):
        make_plan(nn.ModuleDict({"table": nn.Embedding(9, 8)}), rank=4)


def test_low_rank_layers_go_down_only():
    low = targets(a=low_rank_like(nn.Linear(64, 64), Entry(16)), b=nn.Linear(64, 64))
    assert choose_ranks(low, 8)[0] == {"a": 8, "b": 8}
    chosen, skipped = choose_ranks(low, 16)
    assert chosen == {"b": 16}
    assert skipped[0].reason == "already has rank 16"
    with pytest.raises(RankError, match="a: it already has rank 16, and rank 17 cannot be won back"):
        choose_ranks(low, 17)


def test_pivoted_form_pays_up_to_full_rank():
    specs, skipped = entries(targets(**NET), {"big": 63, "wide": 16, "head": 2}, form="pivoted")
    assert specs == {"big": Entry(63, "pivoted"), "head": Entry(2, "pivoted")}
    assert skipped[0].reason == "a pivoted form of rank 16 would not be smaller: 64 x 16 pays below 16"


def test_pivots_need_inputs_beside_them():
    layers = targets(tall=nn.Linear(8, 64), wide=nn.Linear(64, 8))
    specs, skipped = entries(layers, 8, form="pivoted", allow_larger=True)
    assert specs == {"wide": Entry(8, "pivoted")}
    assert skipped[0].reason == "rank 8, above min(in - 1, out) = 7"


def test_a_pair_can_become_pivoted_at_its_own_rank():
    low = targets(a=low_rank_like(nn.Linear(64, 64), Entry(16)))
    assert entries(low, 16, form="pivoted")[0] == {"a": Entry(16, "pivoted")}
