"""A short part of `make conformance`, and the arithmetic of its report."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from conformance.__main__ import compare
from conformance.families import FAMILIES

ROOT = Path(__file__).parent.parent
SHORT = "test_config or test_save_load or test_resize or test_tied or test_gradient_checkpointing or test_init_weights"


@pytest.mark.parametrize("name", ["BERT_pair", "GPT2_pivoted", "T5_joint"])
def test_a_part_of_transformers_own_tests(tmp_path, name):
    place = tmp_path / "outcomes.json"
    command = [sys.executable, "-m", "pytest", "conformance", "-k", f"{name} and ({SHORT})", f"--outcomes={place}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:]
    outcomes = json.loads(place.read_text())
    assert len(outcomes) > 15
    assert sum(parts.get("passed", 0) > 0 for parts in outcomes.values()) > 10


def test_what_ended_worse_than_dense():
    def run(**outcomes):
        return {f"BERT_{form}::test_{name}": parts for (form, name), parts in outcomes["found"].items()}

    dense = {
        ("dense", "a"): {"passed": 1},
        ("dense", "b"): {"passed": 1, "skipped": 1},
        ("dense", "c"): {"failed": 1},
        ("dense", "d"): {"passed": 1},
        ("dense", "e"): {"skipped": 1},
    }
    pair = {
        ("pair", "a"): {"passed": 1, "failed": 1},
        ("pair", "b"): {"passed": 1, "skipped": 2},
        ("pair", "c"): {"failed": 1},
        ("pair", "e"): {"skipped": 1},
    }
    report = compare(run(found=dense | pair))["BERT"]
    assert report["dense"] == {
        "passed": 3,
        "failed": 1,
        "skipped": 1,
        "failed_tests": ["test_c"],
        "worse_than_dense": [],
    }
    assert report["pair"]["worse_than_dense"] == ["test_a", "test_b", "test_d"]
    assert report["pair"]["failed_tests"] == ["test_a", "test_c"]


def test_every_family_of_the_issue_is_there():
    assert [family.name for family in FAMILIES] == ["BERT", "GPT-2", "Llama", "T5", "BART", "ViT"]
