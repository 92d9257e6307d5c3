"""The page on trust says what the stored results say, and explains every test that ended worse than dense."""

import json
import re
from pathlib import Path

import pytest

from conformance.__main__ import EXPECTED

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "trust.md").read_text()
WHAT = {
    "configurations": "`config.json`, read by `AutoConfig`",
    "whole_loads": "`config.json`, whole model loaded",
    "skeletons": "`config.json`, skeleton built",
    "weight_files": "`model.safetensors`, whole model loaded",
}


def results(name):
    return json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text())


def conformance_rows(data):
    for family, forms in data["families"].items():
        for form, row in forms.items():
            worse = len(row["worse_than_dense"]) if form != "dense" else "-"
            yield f"| {family} | {form} | {row['passed']} | {row['failed']} | {row['skipped']} | {worse} |"


def hostile_rows(data):
    for part, what in WHAT.items():
        ends, cases = data[part]["ends"], data[part]["cases"]
        good = sum(ends.get(end, 0) for end in ("read", "loaded", "built"))
        early = sum(n for end, n in ends.items() if end.endswith("before the plan is read"))
        slowest = data[part]["slowest_seconds"]
        yield (
            f"| {what} | {cases:,} | {good:,} | {cases - good - early:,} | {early:,} "
            f"| {slowest:.2f} s | {data[part]['bad']} |"
        )


def fault_rows(data):
    for work, ends in data["killed"].items():
        yield f"| {work} | {ends['kills']} | {ends['absent']} | {ends['whole']} | {ends['broken']} |"


@pytest.mark.parametrize(
    ("name", "rows"), [("conformance", conformance_rows), ("hostile", hostile_rows), ("faults", fault_rows)]
)
def test_the_tables_are_the_results(name, rows):
    expected = list(rows(results(name)))
    assert len(expected) > 2
    assert [row for row in expected if row not in PAGE] == []


def test_memory_is_the_result():
    assert f"Memory grew by {results('hostile')['peak_memory_growth_mb']} MB" in PAGE


def test_a_million_layers_are_the_result():
    found, page = results("hostile")["a_million_layers"], " ".join(PAGE.split())
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
    for family, forms in results("conformance")["families"].items():
        assert forms["pair"]["worse_than_dense"] == forms["pivoted"]["worse_than_dense"]
        assert forms["dense"]["passed"] > 100
        for name in forms["pair"]["worse_than_dense"]:
            found.setdefault(name, []).append(family)
        assert set(forms["joint"]["worse_than_dense"]) >= set(forms["pair"]["worse_than_dense"])
        for name in set(forms["joint"]["worse_than_dense"]) - set(forms["pair"]["worse_than_dense"]):
            found.setdefault(name, []).append(f"{family}, joint")
    every = list(results("conformance")["families"])
    shown = {" ".join(every): "all", " ".join(f for f in every if f != "T5"): "all but T5"}
    assert set(found) == EXPECTED
    assert told == {name: shown.get(" ".join(families), ", ".join(families)) for name, families in found.items()}


def test_what_fails_dense_is_told():
    for forms in results("conformance")["families"].values():
        assert all(f"`{name}`" in PAGE for name in forms["dense"]["failed_tests"])


def test_hostile_and_faults_ran_in_full():
    hostile, faults = results("hostile"), results("faults")
    assert hostile["configurations"]["cases"] >= 100_000
    assert all(ends["kills"] >= 50 and ends["broken"] == 0 for ends in faults["killed"].values())
    assert all(hostile[part]["bad"] == 0 for part in WHAT)
