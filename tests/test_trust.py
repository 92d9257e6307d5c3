"""The page on trust says what the stored results say, and explains every test that ended worse than dense."""

import re
from pathlib import Path

from benchmarks.figures import stored
from conformance.__main__ import EXPECTED

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "trust.md").read_text()
PARTS = ("configurations", "whole_loads", "skeletons", "weight_files")


def test_memory_is_the_result():
    assert f"Memory grew by {stored('hostile')['peak_memory_growth_mb']} MB" in PAGE


def test_a_million_layers_are_the_result():
    found, page = stored("hostile")["a_million_layers"], " ".join(PAGE.split())
    assert f"is a file of {found['megabytes']:.0f} MB" in page
    assert f"{found['auto_model_seconds']:.1f} s until it is refused" in page
    assert f"by stock Transformers in {found['stock_configuration_seconds']:.0f} s" in page
    assert found["load_seconds"] < 0.1
    assert {found["load_error"], found["auto_model_error"]} == {"CheckpointError", "PlanError"}


def test_every_exception_has_its_reason():
    """The page names the tests that ended worse than dense, each with its families, and no other."""
    told = {}
    for names, families in re.findall(r"^\| (`test_\w+`(?:, `test_\w+`)*) \| ([^|]+) \| [A-Z]", PAGE, re.M):
        told |= dict.fromkeys(re.findall(r"`(\w+)`", names), families)
    found = {}
    for family, forms in stored("conformance")["families"].items():
        assert forms["pair"]["worse_than_dense"] == forms["pivoted"]["worse_than_dense"]
        assert forms["dense"]["passed"] > 100
        for name in forms["pair"]["worse_than_dense"]:
            found.setdefault(name, []).append(family)
        assert set(forms["joint"]["worse_than_dense"]) >= set(forms["pair"]["worse_than_dense"])
        for name in set(forms["joint"]["worse_than_dense"]) - set(forms["pair"]["worse_than_dense"]):
            found.setdefault(name, []).append(f"{family}, joint")
    every = list(stored("conformance")["families"])
    shown = {" ".join(every): "all", " ".join(f for f in every if f != "T5"): "all but T5"}
    assert set(found) == EXPECTED
    assert told == {name: shown.get(" ".join(families), ", ".join(families)) for name, families in found.items()}


def test_what_fails_dense_is_told():
    for forms in stored("conformance")["families"].values():
        assert all(f"`{name}`" in PAGE for name in forms["dense"]["failed_tests"])


def test_hostile_and_faults_ran_in_full():
    hostile, faults = stored("hostile"), stored("faults")
    assert hostile["configurations"]["cases"] >= 100_000
    assert all(ends["kills"] >= 50 and ends["broken"] == 0 for ends in faults["killed"].values())
    assert all(hostile[part]["bad"] == 0 for part in PARTS)
