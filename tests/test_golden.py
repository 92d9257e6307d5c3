"""Checkpoints of released formats load, compute and merge as on the day they were made."""

import json
import subprocess
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file

from hf_reparam import merge
from hf_reparam.errors import PlanError
from hf_reparam.plan import FORMAT_VERSION
from tests import zoo
from tests.golden.make import BASES, FORMS, commit, make

GOLDEN = Path(__file__).parent / "golden"
FOLDERS = sorted(path.parent for path in GOLDEN.glob("format-*/*/config.json"))


def test_every_format_has_its_models():
    for version in range(1, FORMAT_VERSION + 1):
        names = {path.name for path in FOLDERS if path.parent.name == f"format-{version}"}
        assert names == {f"{base}-{form}" for base in BASES for form in FORMS}
        assert len(json.loads((GOLDEN / f"format-{version}" / "made.json").read_text())["commit"]) == 40


@pytest.mark.slow
@pytest.mark.parametrize("folder", FOLDERS, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_golden(folder):
    base, form = folder.name.split("-")
    expected = load_file(folder / "expected.safetensors")
    logits = expected.pop("logits")
    model, info = getattr(transformers, zoo.BY_BASE[base].auto).from_pretrained(folder, output_loading_info=True)
    assert type(model).__name__ == f"Reparam{base}"
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert {entry["form"] for entry in model.config.reparam["modules"].values()} == {form, "heads", "table"}
    for each in (model, merge(model)):
        with torch.no_grad():
            got = each(**expected).logits
        torch.testing.assert_close(got, logits, atol=1e-5, rtol=1e-4)  # other processors, other orders of summation
    stored = load_file(folder / "model.safetensors")
    assert all(
        torch.equal(model.state_dict()[k], v) for k, v in stored.items() if v.numel() and k in model.state_dict()
    )


def test_a_newer_format_says_what_it_needs(tmp_path):
    config = json.loads((FOLDERS[0] / "config.json").read_text())
    config["reparam"]["format_version"] = FORMAT_VERSION + 1
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(PlanError, match=f"version {FORMAT_VERSION + 1}"):
        transformers.AutoConfig.from_pretrained(tmp_path)


def git(folder, *command):
    identity = ["-c", "user.name=x", "-c", "user.email=x@example.org"]
    subprocess.run(["git", *identity, *command], cwd=folder, check=True, capture_output=True)


@pytest.mark.slow
def test_golden_models_are_made_from_a_clean_tree_and_once(tmp_path):
    git(tmp_path, "init")
    (tmp_path / "file").write_text("a")
    with pytest.raises(SystemExit, match=r"clean tree only:\n\?\? file"):
        commit(tmp_path)
    git(tmp_path, "add", "file")
    git(tmp_path, "commit", "-m", "x")
    assert len(commit(tmp_path)) == 40
    make(tmp_path / "golden", "0" * 40)
    assert sorted(p.name for p in (tmp_path / "golden").iterdir()) == sorted(
        [*(f"{base}-{form}" for base in BASES for form in FORMS), "made.json"]
    )
    with pytest.raises(FileExistsError):
        make(tmp_path / "golden", "0" * 40)
