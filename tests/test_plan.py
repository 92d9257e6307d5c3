"""The plan round-trips, and believes nothing that comes from disk."""

import copy
import dataclasses
import json
import pickle

import pytest

from hf_reparam import Entry, RankPlan
from hf_reparam.errors import PlanError
from hf_reparam.record import ConversionRecord

GOOD = {
    "format_version": 1,
    "base_model_type": "bert",
    "method": "svd",
    "modules": {"encoder.layer.0.output.dense": {"rank": 4, "form": "pair"}},
}


def changed(**fields):
    return {**copy.deepcopy(GOOD), **fields}


def with_layer(spec, name="a.b"):
    return changed(modules={name: spec})


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
        (changed(format_version=3), "format version 3, and this hf_reparam reads versions 1 to 2: install"),
        (changed(format_version=0), "format version 0"),
        (changed(format_version="1"), "must be an int"),
        (changed(format_version=True), "must be an int"),
        (changed(format_version=1.0), "must be an int"),
        (changed(base_model_type=3), "base_model_type"),
        (changed(method=None), "method"),
        (changed(extra=1), "unknown keys \\['extra'\\]"),
        (changed(modules=None), "modules"),
        (changed(modules=[["a", 1]]), "modules"),
        (changed(modules={f"m{i}": {"rank": 1} for i in range(100_001)}), "100001 layers"),
        (with_layer(4), "layer 'a.b': a layer must be an object"),
        (with_layer({}), "'rank' is missing"),
        (with_layer({"rank": 0}), "at least 1, got 0"),
        (with_layer({"rank": -3}), "got -3"),
        (with_layer({"rank": True}), "got True"),
        (with_layer({"rank": 4.0}), "got 4.0"),
        (with_layer({"rank": "4"}), "got '4'"),
        (with_layer({"rank": None}), "got None"),
        (with_layer({"rank": 4, "form": "spiral"}), "form must be one of"),
        (with_layer({"rank": 4, "form": None}), "form must be one of"),
        (with_layer({"rank": 4, "shape": 3}), "unknown keys"),
        (with_layer({"rank": 4}, ""), "not a module path"),
        (with_layer({"rank": 4}, "a..b"), "not a module path"),
        (with_layer({"rank": 4}, "../../etc"), "not a module path"),
        (with_layer({"rank": 4}, "a.b\n"), "not a module path"),
        (with_layer({"rank": 4}, "a" * 600), "not a module path"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_malformed_plans(data, message):
    with pytest.raises(PlanError, match=message):
        RankPlan.from_dict(data)


@pytest.mark.parametrize(
    "data", [changed(format_version="9" * 10**6), with_layer({"rank": "9" * 10**6})], ids=["v", "r"]
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
