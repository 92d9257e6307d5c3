"""A short part of `make conformance`, and the arithmetic of its report."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from conformance import __main__ as conformance
from conformance.__main__ import compare, unfit
from conformance.families import FAMILIES, FORMS
from tests.launch import launch

SHORT = "test_config or test_save_load or test_resize or test_tied or test_gradient_checkpointing or test_init_weights"


PARTS = ["BERT_pair", "GPT2_pivoted", "T5_joint"]


@pytest.fixture(scope="module")
def part(tmp_path_factory):
    place = tmp_path_factory.mktemp("conformance") / "outcomes.json"
    wanted = [f"conformance/test_families.py::{part}" for part in PARTS]  # no more than these are collected
    launch("-m", "pytest", *wanted, "-p", "no:cacheprovider", "-k", SHORT, f"--outcomes={place}", processes=1)
    return json.loads(place.read_text())


@pytest.mark.slow
@pytest.mark.parametrize("name", PARTS)
def test_a_part_of_transformers_own_tests(part, name):
    outcomes = [parts for test, parts in part.items() if test.startswith(f"{name}::")]
    assert len(outcomes) > 15
    assert sum(parts.get("passed", 0) > 0 for parts in outcomes) > 10


def test_what_ended_worse_than_dense():
    def run(**outcomes):
        return {f"BERT_{form}::test_{name}": parts for (form, name), parts in outcomes["found"].items()}

    dense = {
        ("dense", "a"): {"passed": 1},
        ("dense", "b"): {"passed": 1, "skipped": 1},
        ("dense", "c"): {"failed": 1},
        ("dense", "d"): {"passed": 1},
        ("dense", "e"): {"skipped": 1},
        ("dense", "f"): {"skipped": 1},
    }
    pair = {
        ("pair", "a"): {"passed": 1, "failed": 1},
        ("pair", "b"): {"passed": 1, "skipped": 2},
        ("pair", "c"): {"failed": 1},
        ("pair", "e"): {"skipped": 1},
        ("pair", "f"): {"failed": 1, "skipped": 1},
    }
    report = compare(run(found=dense | pair))["BERT"]
    assert report["dense"] == {
        "passed": 3,
        "failed": 1,
        "skipped": 2,
        "failed_tests": ["test_c"],
        "worse_than_dense": [],
    }
    assert report["pair"]["worse_than_dense"] == ["test_a", "test_b", "test_d", "test_f"]
    assert report["pair"]["failed_tests"] == ["test_a", "test_c", "test_f"]


def outcomes(**change):
    """Every form of every family passed one test, but for those that are given."""
    names = [f"{family.name.replace('-', '')}_{form}" for family in FAMILIES for form in FORMS]
    return {f"{name}::test_x": change.get(name, {"passed": 1}) for name in names if change.get(name, "") is not None}


@pytest.mark.parametrize(
    ("status", "found", "whole", "reasons"),
    [
        (0, outcomes(), True, []),
        (1, outcomes(T5_pair={"failed": 1}), False, []),
        (5, {}, False, ["pytest ended with status 5"]),  # no test of that name
        (2, outcomes(), True, ["pytest ended with status 2"]),  # broken off
        (0, outcomes(T5_pair=None), True, ["T5, pair: no test passed"]),
        (1, outcomes(BERT_dense={"failed": 1}), True, ["BERT, dense: no test passed"]),
        (0, {"BERT_pair::test_x": {"passed": 1}}, False, ["BERT, dense: no test passed"]),
    ],
)
def test_outcomes_that_say_nothing_are_no_success(monkeypatch, tmp_path, status, found, whole, reasons):
    assert unfit(status, compare(found), whole=whole) == reasons

    def run(command, **_):
        place = next(word.partition("=")[2] for word in command if word.startswith("--outcomes="))
        Path(place).write_text(json.dumps(found))
        return subprocess.CompletedProcess(command, status)

    monkeypatch.setattr(conformance, "RESULTS", tmp_path)
    monkeypatch.setattr(conformance.subprocess, "run", run)
    monkeypatch.setattr(sys, "argv", ["conformance", *([] if whole else ["--only", "x"])])
    expected = {"T5_pair::test_x"} & {name for name, parts in found.items() if "failed" in parts}
    assert conformance.main() == bool(reasons or expected)
    assert (tmp_path / "conformance.json").exists() == (whole and not reasons)


def test_every_family_of_the_issue_is_there():
    assert [family.name for family in FAMILIES] == ["BERT", "GPT-2", "Llama", "T5", "BART", "ViT"]
