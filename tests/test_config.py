"""A configuration is valid in itself: senseless ones are refused by name, the rest goes through JSON."""

import copy
import dataclasses
import json
import math
import pickle

import pytest
from torch import nn

from hf_reparam import LowRankConfig, convert, make_plan, report
from hf_reparam.errors import RankError, TargetError

GOOD = [
    LowRankConfig(),
    LowRankConfig(rank=4),
    LowRankConfig(rank=0.25, form="pivoted", allow_larger=True, solver="randomized"),
    LowRankConfig(rank={"query": 4, "re:.*key": 0.5}),
    LowRankConfig(keep=0.6, metric="fisher", allocation="global", heads=True, embeddings=True),
    LowRankConfig(target_params=0.5, multiple_of=8, min_rank=16, allocation="uniform"),
    LowRankConfig(target_params=10_000, target_modules=["query", "*.layer.0.*"], exclude_modules="key"),
]


@pytest.mark.parametrize("config", GOOD, ids=lambda config: str(config.to_dict()))
def test_json_round_trip(config):
    assert LowRankConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert pickle.loads(pickle.dumps(config)) == copy.deepcopy(config) == config


def test_json_says_what_was_asked_and_nothing_else():
    assert LowRankConfig().to_dict() == {}
    asked = LowRankConfig(keep=0.6, target_modules="query", exclude_modules=("key", "value"), min_rank=8)
    assert asked.to_dict() == {"keep": 0.6, "target_modules": ["query"], "exclude_modules": ["key", "value"]}
    with pytest.raises(TargetError, match=r"unknown options \['include'\]; known are \['rank', 'keep'"):
        LowRankConfig.from_dict({"include": "query"})


def test_it_is_frozen_and_its_own():
    ranks, names = {"query": 4}, ["query"]
    config = LowRankConfig(rank=ranks, target_modules=names)
    ranks["key"] = 5
    names.append("key")
    assert config.rank == {"query": 4}
    assert config.target_modules == ("query",)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.rank = 3
    with pytest.raises(TypeError, match="positional"):
        LowRankConfig(4)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        *(({"rank": bad}, RankError, "rank must be an int of at least 1") for bad in (0, -1, True, "8", 1.5, math.nan)),
        ({"rank": {"query": 0}}, RankError, r"rank\['query'\] must be an int of at least 1"),
        ({"rank": {}}, RankError, "empty mapping"),
        ({"rank": {3: 4}}, TargetError, "rank: a pattern is a string"),
        *(({"keep": bad}, RankError, r"keep must be in \(0, 1\]") for bad in (0, -0.5, 1.1, True, "0.5", math.nan)),
        *(
            ({"target_params": bad}, RankError, "target_params must be an int, .* or a float in")
            for bad in (0.0, 1e4, True, "9", math.nan)
        ),
        ({"rank": 4, "keep": 0.5}, TargetError, "one of rank, keep, target_params and speedup"),
        ({"keep": 0.5, "target_params": 1000}, TargetError, "one of rank, keep, target_params and speedup"),
        ({"metric": "magic"}, TargetError, r"metric must be one of \['svd', 'activation', 'fisher'\], got 'magic'"),
        ({"allocation": "magic"}, TargetError, "allocation must be one of"),
        ({"form": "table"}, TargetError, r"form must be one of \['pair', 'pivoted'\], got 'table'"),
        ({"solver": "magic"}, TargetError, "solver must be one of"),
        ({"solver": None}, TargetError, "solver must be one of"),
        *(({"keep": 0.5, "multiple_of": bad}, RankError, "multiple_of must be an int") for bad in (0, -1, True, 1.0)),
        *(({"keep": 0.5, "min_rank": bad}, RankError, "min_rank must be an int") for bad in (0, None, 2.5)),
        *(
            ({option: 1}, TargetError, f"{option} must be True or")
            for option in ("embeddings", "heads", "allow_larger", "compiled")
        ),
        ({"target_modules": "re:("}, TargetError, "target_modules: 're:.' is not a regular expression"),
        ({"exclude_modules": [3]}, TargetError, "exclude_modules: a pattern is a string"),
        *(
            ({"rank": 4, **idle}, TargetError, f"{next(iter(idle))} goes with a budget .*, and rank is none")
            for idle in (
                {"allocation": "uniform"},
                {"multiple_of": 8},
                {"min_rank": 4},
                {"embeddings": True},
                {"heads": True},
                {"verify": False},
            )
        ),
        *(
            ({"least_saving": 0.2, **given}, TargetError, "least_saving goes with global allocation of parameters")
            for given in ({"speedup": 1.5}, {"keep": 0.5, "allocation": "uniform"}, {"keep": 0.5, "metric": "svd"})
        ),
        ({"keep": 0.5, "allow_larger": True}, TargetError, "allow_larger goes with rank"),
        ({"keep": 0.5, "heads": True, "metric": "svd"}, TargetError, "needs the fisher metric and global allocation"),
        ({"keep": 0.5, "heads": True, "metric": "activation"}, TargetError, "needs the fisher metric and global"),
        ({"keep": 0.5, "heads": True, "allocation": "uniform"}, TargetError, "needs the fisher metric and global"),
    ],
    ids=lambda value: str(value)[:50] if isinstance(value, dict) else "",
)
def test_refusals(options, error, message):
    with pytest.raises(error, match=message):
        LowRankConfig(**options)
    with pytest.raises(error, match=message):
        LowRankConfig.from_dict(options)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.query, self.query_norm, self.key = nn.Linear(32, 32), nn.Linear(32, 32), nn.Linear(32, 32)


def test_a_bare_name_means_the_end_of_a_path():
    net = nn.ModuleDict({"first": Block(), "second": Block()})

    def targeted(patterns, **options):
        config = LowRankConfig(rank=4, target_modules=patterns, **options)
        return sorted(row.name for row in report(convert(net, config)).layers)

    assert targeted("query") == ["first.query", "second.query"]
    assert targeted(["first.query", "key"]) == ["first.key", "first.query", "second.key"]
    assert targeted("query", exclude_modules="first.query") == ["second.query"]
    assert targeted("first.*") == ["first.key", "first.query", "first.query_norm"]
    with pytest.raises(TargetError, match="target_modules: 'uery' matches none"):
        targeted("uery")


@pytest.mark.parametrize("share", [0.6, 0.75, 1.0])
def test_target_params_as_a_share_of_the_whole_model(share):
    net = nn.Sequential(nn.Embedding(40, 32), nn.Linear(32, 64), nn.Linear(64, 32))
    whole = sum(p.numel() for p in net.parameters())
    plan = make_plan(net, target_params=share)
    assert plan == make_plan(net, target_params=int(share * whole))
    assert share * whole - 2 * (32 + 64) < plan.report.parameters_after <= share * whole
    assert bool(plan.modules) == (share < 1)
