"""The plan round-trips, and believes nothing that comes from disk."""

import copy
import dataclasses
import json
import pickle
from types import MappingProxyType

import pytest
from torch import nn

from hf_reparam import Entry, RankPlan, convert
from hf_reparam.errors import PlanError, TargetError
from hf_reparam.plan import ConversionRecord

GOOD = {
    "format_version": 1,
    "base_model_type": "bert",
    "metric": "svd",
    "modules": {"encoder.layer.0.output.dense": {"rank": 4, "form": "pair"}},
}


def changed(**fields):
    return {**copy.deepcopy(GOOD), **fields}


def with_entry(entry, name="a.b"):
    return changed(modules={name: entry})


def test_round_trip_through_json():
    plan = RankPlan.from_dict(GOOD)
    assert plan.to_dict() == GOOD
    assert RankPlan.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan
    assert pickle.loads(pickle.dumps(plan)) == plan
    assert copy.deepcopy(plan) == plan


def test_frozen():
    plan = RankPlan.from_dict(GOOD)
    with pytest.raises(TypeError, match="does not support item assignment"):
        plan.modules["x"] = Entry(1)
    with pytest.raises(dataclasses.FrozenInstanceError):
        plan.metric = "x"


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (None, "must be an object"),
        ([], "must be an object"),
        ({}, "format_version"),
        (changed(format_version=2), "format version 2, and this hf_reparam reads version 1: install"),
        (changed(format_version=0), "format version 0"),
        (changed(format_version="1"), "must be an int"),
        (changed(format_version=True), "must be an int"),
        (changed(format_version=1.0), "must be an int"),
        (changed(base_model_type=3), "base_model_type"),
        (changed(metric=None), "metric"),
        (changed(method="svd"), "unknown keys \\['method'\\]"),
        (changed(extra=1), "unknown keys \\['extra'\\]"),
        (changed(metric="spectral"), "reparam.metric"),
        (changed(metric=3), "reparam.metric"),
        (changed(modules=None), "modules"),
        (changed(modules=[["a", 1]]), "modules"),
        (changed(modules={f"m{i}": {"rank": 1} for i in range(100_001)}), "100001 modules"),
        (with_entry(4), "'a.b': an entry must be an object"),
        (with_entry({}), "'form' and 'rank' alone"),
        (with_entry({"rank": 4}), "'form' and 'rank' alone"),
        (with_entry({"form": "pair"}), "'form' and 'rank' alone"),
        (with_entry({"rank": 0, "form": "pair"}), "at least 1, got 0"),
        (with_entry({"rank": -3, "form": "pair"}), "got -3"),
        (with_entry({"rank": True, "form": "pair"}), "got True"),
        (with_entry({"rank": 4.0, "form": "pair"}), "got 4.0"),
        (with_entry({"rank": "4", "form": "pair"}), "got '4'"),
        (with_entry({"rank": None, "form": "pair"}), "got None"),
        (with_entry({"rank": 4, "form": "spi ral"}), "form must be a word"),
        (with_entry({"rank": 4, "form": None}), "form must be a word"),
        (with_entry({"rank": 4, "form": "pair", "shape": 3}), "alone, got .*shape"),
        (with_entry({"rank": 4, "form": "pair"}, ""), "not a module path"),
        (with_entry({"rank": 4, "form": "pair"}, "a..b"), "not a module path"),
        (with_entry({"rank": 4, "form": "pair"}, "../../etc"), "not a module path"),
        (with_entry({"rank": 4, "form": "pair"}, "a.b\n"), "not a module path"),
        (with_entry({"rank": 4, "form": "pair"}, "a" * 600), "not a module path"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_malformed_plans(data, message):
    with pytest.raises(PlanError, match=message):
        RankPlan.from_dict(data)


@pytest.mark.parametrize(
    "data", [changed(format_version="9" * 10**6), with_entry({"rank": "9" * 10**6, "form": "pair"})], ids=["v", "r"]
)
def test_messages_stay_short(data):
    with pytest.raises(PlanError) as caught:
        RankPlan.from_dict(data)
    assert len(str(caught.value)) < 200


@pytest.mark.parametrize(
    "record",
    [
        [],
        {"unknown": 1},
        {"base_model": "/home/me/bert"},
        {"base_model": "me/../bert"},
        {"base_model": "me/.."},
        {"base_model": "me/bert](javascript:alert(1))"},
        {"calibration_tokens": -1},
        {"calibration_tokens": True},
        {"refitted_layers": None},
        {"errors": ["fc"]},
        {"errors": {"fc": float("nan")}},
        {"errors": {"fc": "0.1"}},
        {"errors": {"fc": 10**400}},
        {"speed": {"device": "cpu", "tokens": 1, "asked": 10**400, "layers": 1.0}},
    ],
)
def test_records_from_disk_are_not_believed(record):
    data = RankPlan({"fc": Entry(3)}, base_model_type="bert").to_dict()
    with pytest.raises(PlanError, match=r"reparam\.record"):
        RankPlan.from_dict({**data, "record": record})


def test_a_record_is_no_part_of_the_decision():
    plan = RankPlan({"fc": Entry(3)}, record=ConversionRecord("me/bert", 10, 1, {"fc": 0.5}))
    assert plan == RankPlan({"fc": Entry(3)})
    assert RankPlan.from_dict(plan.to_dict()).record == plan.record
    assert pickle.loads(pickle.dumps(plan)).record == plan.record
    frozen = dataclasses.replace(plan, record=ConversionRecord(errors=MappingProxyType({"fc": 0.5})))
    assert RankPlan.from_dict(frozen.to_dict()).record.errors == {"fc": 0.5}


def test_a_form_of_another_version_is_refused_where_it_is_applied():
    plan = RankPlan.from_dict(with_entry({"rank": 2, "form": "spiral"}, "0"))
    with pytest.raises(PlanError, match=r"0: the plan holds it as 'spiral', and this hf_reparam knows \['heads'"):
        convert(nn.Sequential(nn.Linear(8, 8)), plan)


EDITED = RankPlan({"a.query": Entry(4), "a.key": Entry(5, "pivoted"), "b": Entry(6, "table")}, "bert", "fisher")


def test_ranks_are_edited_by_patterns_and_forms_stay():
    edited = EDITED.with_ranks({"a.key": 2, "a.*": 3})
    assert edited == RankPlan(
        {"a.query": Entry(3), "a.key": Entry(2, "pivoted"), "b": Entry(6, "table")}, "bert", "fisher"
    )
    assert EDITED.modules["a.query"] == Entry(4)
    for wrong, error, message in (
        ({"nope": 3}, TargetError, "with_ranks: 'nope' matches none of the 3"),
        ({"query": 0}, PlanError, "rank must be an int of at least 1, got 0"),
    ):
        with pytest.raises(error, match=message):
            EDITED.with_ranks(wrong)


def test_parts_are_left_out_by_patterns():
    assert EDITED.without("key", "b") == RankPlan({"a.query": Entry(4)}, "bert", "fisher")
    with pytest.raises(TargetError, match="without: 'nope' matches none of the 3"):
        EDITED.without("nope")


def test_entries_by_form_and_printed():
    assert EDITED.of(("pair", "table")) == {"a.query": Entry(4), "b": Entry(6, "table")}
    assert str(EDITED).splitlines() == [
        "name     form     rank",
        "----------------------",
        "a.query  pair     4",
        "a.key    pivoted  5",
        "b        table    6",
    ]


@pytest.mark.parametrize("options", [{"modules": {"fc": 8}}, {"modules": {}, "metric": "spectral"}])
def test_a_plan_is_checked_when_it_is_made(options):
    with pytest.raises(PlanError):
        RankPlan(**options)
