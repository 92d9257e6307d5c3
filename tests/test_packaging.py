"""Wheel and source distribution: built, checked, and used from where nothing else of the project is."""

import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from tests.launch import launch

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.slow
IGNORED = shutil.ignore_patterns(".git", ".venv*", "__pycache__", "*_cache", ".conformance", ".census")
USE = """
import sys
place, out, project = sys.argv[1:]
sys.path[:] = [place, *(path for path in sys.path if path not in ("", project))]
import hf_reparam
from transformers import BertConfig, BertModel
assert hf_reparam.__file__.startswith(place), hf_reparam.__file__
shape = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64, vocab_size=99)
small = hf_reparam.convert(BertModel(BertConfig(**shape)), rank=4)
small.save_pretrained(out, remote_code=True)
print(type(BertModel).__name__, type(small).__name__)
"""


def call(*command, **options):
    done = subprocess.run([sys.executable, *map(str, command)], capture_output=True, text=True, **options)
    assert done.returncode == 0, done.stdout[-1500:] + done.stderr[-1500:]
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A folder with wheel and source distribution of a copy of the project."""
    source, out = tmp_path_factory.mktemp("source") / "project", tmp_path_factory.mktemp("dist")
    shutil.copytree(ROOT, source, ignore=IGNORED)
    call("-m", "build", "--no-isolation", "--outdir", out, source)
    return out


def test_both_are_well_formed(built):
    assert sorted(path.suffix for path in built.iterdir()) == [".gz", ".whl"]
    assert call("-m", "twine", "check", "--strict", *built.iterdir()).count("PASSED") == 2
    (wheel,) = built.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {"hf_reparam/py.typed", "hf_reparam/model/remote.py", "hf_reparam/layers/linear.py"} <= names
    assert {name.partition("/")[0].partition("-")[0] for name in names} == {"hf_reparam", "hf_reparam_cli.py"}
    (sdist,) = built.glob("*.gz")
    with tarfile.open(sdist) as archive:
        kept = {name.partition("/")[2] for name in archive.getnames()}
    assert {"pyproject.toml", "README.md", "LICENSE", "tests/zoo.py", "docs/quickstart.md", "mkdocs.yml"} <= kept


def test_the_wheel_works_by_itself(built, tmp_path):
    (wheel,) = built.glob("*.whl")
    place, out = tmp_path / "site", tmp_path / "out"
    call("-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", place, wheel)
    assert "ReparamBertModel" in launch("-c", USE, place, out, ROOT, processes=1)
    assert (out / "modeling_reparam.py").exists()


def test_extras_that_are_named_exist(built):
    (wheel,) = built.glob("*.whl")
    archive = zipfile.ZipFile(wheel)
    (name,) = [name for name in archive.namelist() if name.endswith("METADATA")]
    extras = {line.partition(": ")[2] for line in archive.read(name).decode().splitlines() if "Provides-Extra" in line}
    pages = [ROOT / "README.md", *(ROOT / "docs").rglob("*.md"), *(ROOT / "benchmarks").glob("*.py")]
    named = {found for page in pages for found in re.findall(r"(?:hf-reparam|\.)\[(\w+)\]'", page.read_text())}
    assert {"plot", "benchmark", "peers"} <= named
    assert named <= extras
