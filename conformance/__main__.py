"""`python -m conformance`: run Transformers' common tests over every family and form, and write down what happened."""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from benchmarks.machine import RESULTS, describe
from conformance.families import DENSE, FAMILIES, FORMS

OUTCOMES = ("passed", "failed", "skipped")
EXPECTED = {
    "test_base_model_prefix_loads_base_weights",
    "test_model_weights_reload_no_missing_tied_weights",
    "test_reverse_loading_mapping",
}
"""Tests that end worse than dense; docs/trust.md says why."""
BY_CHANCE = {"test_training_overfit"}
"""Tests that may: of models drawn at random, by seed and number of threads."""


def outcome(counts: dict[str, int]) -> str:
    """Of a test and its parts together."""
    return next(o for o in ("failed", "passed", "skipped") if counts.get(o))


def compare(found: dict[str, dict[str, int]]) -> dict[str, dict[str, object]]:
    """Family -> form -> how many tests passed, failed and were skipped, and which ended worse than dense.

    A test ended worse if it passed dense and did not pass, if more of its parts were skipped than dense, or if it
    failed where dense all of it was skipped.
    """
    report = {}
    for family in FAMILIES:
        by_form = {form: _of(found, family.name.replace("-", "") + f"_{form}") for form in FORMS}
        dense = by_form[DENSE]
        for form, tests in by_form.items():
            counts = Counter(outcome(parts) for parts in tests.values())
            report.setdefault(family.name, {})[form] = {
                **{o: counts[o] for o in OUTCOMES},
                "failed_tests": sorted(name for name, parts in tests.items() if outcome(parts) == "failed"),
                "worse_than_dense": sorted(name for name in dense if _worse(tests.get(name, {}), dense[name])),
            }
    return report


def _of(found: dict[str, dict[str, int]], test_class: str) -> dict[str, dict[str, int]]:
    return {key.removeprefix(f"{test_class}::"): v for key, v in found.items() if key.startswith(f"{test_class}::")}


def _worse(parts: dict[str, int], dense: dict[str, int]) -> bool:
    if outcome(dense) != "passed":
        return outcome(dense) == "skipped" and bool(parts) and outcome(parts) == "failed"
    return not parts or outcome(parts) != "passed" or parts.get("skipped", 0) > dense.get("skipped", 0)


def unfit(status: int, report: dict[str, dict[str, dict[str, object]]], *, whole: bool) -> list[str]:
    """Why outcomes say nothing: pytest's status is not that of tests that passed or failed, or there is nothing to
    compare.

    Args:
        status: of pytest.
        report: what `compare` gave.
        whole: every form of every family was to be run; else of those that ran the dense one has to be among them.
    """
    reasons = [] if status in (0, 1) else [f"pytest ended with status {status}"]
    for name, forms in report.items():
        if whole or any(row[o] for row in forms.values() for o in OUTCOMES):
            needed = FORMS if whole else (DENSE,)
            reasons += [f"{name}, {form}: no test passed" for form in needed if not forms[form]["passed"]]
    return reasons


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m conformance", description=__doc__)
    parser.add_argument("--only", help="pytest expression, such as 'BERT' or 'Llama and test_training'; writes nothing")
    parser.add_argument("--processes", default="2", help="tests at a time (default: 2)")
    options = parser.parse_args()
    start = time.time()
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder) / "outcomes.json"
        command = [sys.executable, "-m", "pytest", "conformance", "-n", options.processes, "--dist", "worksteal"]
        command += ["--tb", "line", f"--outcomes={place}", *(["-k", options.only] if options.only else [])]
        settings = {**os.environ, "PYTHONWARNINGS": ""}
        status = subprocess.run(command, cwd=Path(__file__).parent.parent, env=settings, check=False).returncode
        found = json.loads(place.read_text()) if place.exists() else {}
    report = compare(found)
    for name, forms in report.items():
        for form, row in forms.items():
            print(f"{name:6} {form:8}", *(f"{row[o]:5} {o}" for o in OUTCOMES), *row["worse_than_dense"])
    reasons = unfit(status, report, whole=options.only is None)
    for reason in reasons:
        print(f"no result: {reason}")
    if options.only is None and not reasons:
        result = {"machine": {**describe(0), "command": "make conformance"}, "seconds": round(time.time() - start)}
        (RESULTS / "conformance.json").write_text(json.dumps({**result, "families": report}, indent=1) + "\n")
    worse = {name for forms in report.values() for row in forms.values() for name in row["worse_than_dense"]}
    for name in sorted(worse - EXPECTED - BY_CHANCE):
        print(f"worse than dense, and not as expected: {name}")
    return int(bool(reasons) or not worse <= EXPECTED | BY_CHANCE)


if __name__ == "__main__":
    sys.exit(main())
