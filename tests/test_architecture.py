"""Laws of the house: imports point down the layers, public names are sorted and documented, importing stays cheap."""

import ast
import doctest
import importlib
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import pytest

import hf_reparam

ROOT = Path(hf_reparam.__file__).parent
LAYERS = [
    "errors",
    "record",
    "plan",
    "report",
    "linalg",
    "layers",
    "model",
    "calibrate",
    "compress",
    "plot",
    "recover",
    "files",
    "cli",
    "__main__",
]
STDLIB_ONLY = {"errors", "plan", "record", "report"}
MODULES = sorted(m.name for m in pkgutil.walk_packages([str(ROOT)], "hf_reparam.") if not m.name.endswith("__main__"))


def files():
    return sorted(path for path in ROOT.rglob("*.py") if path != ROOT / "__init__.py")


def layer(path):
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            yield node.module


@pytest.mark.parametrize("path", files(), ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_down_the_layers(path):
    own = layer(path)
    for name in imports(path):
        if name.startswith("hf_reparam."):
            assert LAYERS.index(name.split(".")[1]) <= LAYERS.index(own), f"{path.name} imports {name}"
        elif name.partition(".")[0] in {"transformers", "huggingface_hub", "accelerate"}:
            assert LAYERS.index(own) >= LAYERS.index("model"), f"{path.name} imports {name}"
        elif own in STDLIB_ONLY:
            assert name.partition(".")[0] in sys.stdlib_module_names, f"{path.name} imports {name}"
        assert name != "hf_reparam", f"{path.name} imports the package itself"


@pytest.mark.parametrize("name", ["hf_reparam", *MODULES])
def test_every_module_is_documented_and_its_public_names_too(name):
    module = importlib.import_module(name)
    assert module.__doc__
    public = getattr(module, "__all__", [])
    assert list(public) == sorted(public)
    for item in public:
        value = getattr(module, item)
        if callable(value) and getattr(value, "__module__", "").startswith("hf_reparam"):
            assert value.__doc__, item


@pytest.mark.parametrize("name", ["hf_reparam", *MODULES])
def test_docstring_examples_run(name):
    failed, _ = doctest.testmod(importlib.import_module(name))
    assert failed == 0


def test_docstring_examples_exist():
    examples = sum(len(t.examples) for m in MODULES for t in doctest.DocTestFinder().find(importlib.import_module(m)))
    assert examples >= 10


def test_public_names_are_on_the_reference_page():
    page = (ROOT.parent / "docs" / "reference.md").read_text()
    modules = {"errors": hf_reparam.errors, "plot": hf_reparam.plot}
    inside = [f"{module}.{name}" for module, found in modules.items() for name in found.__all__]
    public = [name for name in [*hf_reparam.__all__, *inside] if name not in {*modules, "errors.ReparamError"}]
    listed = re.findall(r"^::: hf_reparam\.([\w.]+)$", page, re.M)
    assert sorted(listed) == sorted(public)


@pytest.mark.slow
def test_importing_loads_no_modelling_file():
    code = (
        "import sys, hf_reparam; "
        "print([m for m in sys.modules if m.startswith('transformers.models.') and '.modeling_' in m "
        "and not m.startswith('transformers.models.auto')])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_version_is_the_distributions():
    from importlib.metadata import version

    assert version("hf-reparam") == hf_reparam.__version__
