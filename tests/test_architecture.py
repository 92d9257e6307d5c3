"""Laws of the house: imports point down the layers, public names are sorted and documented, importing stays cheap."""

import ast
import doctest
import functools
import importlib
import pkgutil
import re
import sys
from pathlib import Path

import pytest
from transformers import PreTrainedModel

import hf_reparam
from hf_reparam.structures import STRUCTURES
from tests.launch import launch
from tests.test_compat import NAMES

ROOT = Path(hf_reparam.__file__).parent
LAYERS = [
    "errors",
    "compat",
    "tables",
    "config",
    "plan",
    "linalg",
    "layers",
    "report",
    "structures",
    "model",
    "calibrate",
    "compress",
    "plot",
    "recover",
    "files",
    "__main__",
]
GENERAL = {"__init__", "__pycache__", "hosts", "source", "structure"}
STDLIB_ONLY = {"errors", "config", "plan", "report", "tables"}
WITHOUT_TRANSFORMERS = {"layers": {"accelerate", "transformers.utils.logging"}}
"""Rooms below `model` that use a little of it: what of it."""
MODULES = sorted(m.name for m in pkgutil.walk_packages([str(ROOT)], "hf_reparam."))


def files():
    return sorted(path for path in ROOT.rglob("*.py") if path != ROOT / "__init__.py")


def layer(path):
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


@functools.cache
def nodes(path):
    return list(ast.walk(ast.parse(path.read_text())))


def imports(path):
    for node in nodes(path):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            yield node.module


def for_types(path):
    """What a file imports for type checkers alone."""
    blocks = nodes_of(path, ast.If)
    blocks = [node for node in blocks if ast.unparse(node.test) == "TYPE_CHECKING"]
    return {node.module for block in blocks for node in ast.walk(block) if isinstance(node, ast.ImportFrom)}


@pytest.mark.parametrize("path", files(), ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_down_the_layers(path):
    own = layer(path)
    for name in {*imports(path)} - for_types(path):
        if name.startswith("hf_reparam."):
            assert LAYERS.index(name.split(".")[1]) <= LAYERS.index(own), f"{path.name} imports {name}"
        elif name.partition(".")[0] in {"transformers", "huggingface_hub", "accelerate"}:
            allowed = own == "compat" or LAYERS.index(own) >= LAYERS.index("structures")
            assert allowed or name in WITHOUT_TRANSFORMERS.get(own, ()), f"{path.name} imports {name}"
        elif own in STDLIB_ONLY:
            assert name.partition(".")[0] in sys.stdlib_module_names, f"{path.name} imports {name}"
        assert name != "hf_reparam", f"{path.name} imports the package itself"


def test_rooms_stand_on_at_most_ten_floors():
    rooms = {}
    for path in [*files(), ROOT / "__init__.py"]:
        below = {name.split(".")[1] for name in {*imports(path)} - for_types(path) if name.startswith("hf_reparam.")}
        rooms.setdefault(layer(path), set()).update(below - {layer(path)})

    def floor(room):
        return 1 + max(map(floor, rooms[room]), default=0)

    assert max(map(floor, rooms)) <= 10


@pytest.mark.parametrize("name", ["hf_reparam", *MODULES])
def test_every_module_is_documented_and_its_public_names_too(name):
    module = importlib.import_module(name)
    assert module.__doc__
    defined = [n for n, v in vars(module).items() if n[0] != "_" and getattr(v, "__module__", "") == name]
    public = getattr(module, "__all__", defined)
    assert len(set(public)) == len(public)  # sorted they are by ruff (RUF022)
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
    of_reports = ["LayerReport", "RefineReport", "RefitReport", "SkippedReport", "TriedSize"]
    inside_others = ["plan.Judgement", "plan.Speed", *(f"report.{name}" for name in of_reports)]  # which these return
    inside = [f"{module}.{name}" for module, found in modules.items() for name in found.__all__]
    public = [name for name in [*hf_reparam.__all__, *inside] if name not in {*modules, "errors.ReparamError"}]
    where = {"calibrate": "calibrate.collect.calibrate", "report": "model.summary.report"}  # beside modules
    public = [where.get(name, name) for name in public]
    listed = re.findall(r"^::: hf_reparam\.([\w.]+)$", page, re.M)
    assert sorted(listed) == sorted([*public, *inside_others])


@pytest.mark.slow
def test_importing_loads_no_modelling_file():
    code = (
        "import sys, hf_reparam; "
        "print([m for m in sys.modules if m.startswith('transformers.models.') and '.modeling_' in m "
        "and not m.startswith('transformers.models.auto')])"
    )
    assert launch("-c", code, processes=1).strip() == "[]"


def test_version_is_the_distributions():
    from importlib.metadata import version

    assert version("hf-reparam") == hf_reparam.__version__


# private and undocumented names of other libraries

PUBLIC = {
    *("transformers", "transformers.pytorch_utils", "transformers.utils", "transformers.utils.logging"),
    *("accelerate", "accelerate.utils", "huggingface_hub", "huggingface_hub.errors", "huggingface_hub.utils"),
}
INSIDE = r"(transformers|accelerate|huggingface_hub|peft)\.\w[\w.]*"
FAMILY = r"transformers\.models\.(?!auto\b).*"
ALLOWED = {  # of torch and Python
    *("_modules", "_parameters", "_buffers", "_base", "_getframe", "_make_wrapper_subclass", "_orig_mod", "_schema"),
    *("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"),
    *("_checkpoint_wrapped_module", "_load_from_state_dict", "_save_to_state_dict"),
}
BY_NAME = r"(^getattr|^hasattr|^setattr|^delattr|\.get|\.pop|\.setdefault)$"
HOUSE = [path for path in files() if layer(path) != "compat"]
COMPAT = [path for path in files() if layer(path) == "compat"]


def nodes_of(path, kind):
    return [node for node in nodes(path) if isinstance(node, kind)]


def names_in(path):
    """Every name that a file's code has, and every string."""
    yield from (node.id for node in nodes_of(path, ast.Name))
    yield from (node.attr for node in nodes_of(path, ast.Attribute))
    yield from (node.name for node in nodes_of(path, (ast.FunctionDef, ast.ClassDef, ast.alias)))
    yield from (node.value for node in nodes_of(path, ast.Constant) if isinstance(node.value, str))


def inner_modules(path):
    """Modules inside of other libraries that are not documented, imported or named; those of model families may be."""
    named = {*imports(path), *names_in(path)}
    return {name for name in named - PUBLIC if re.fullmatch(INSIDE, name) and not re.fullmatch(FAMILY, name)}


def private_names(path):
    """Names with one underscore in front that a file takes from, or puts on, what it has not defined itself."""
    attributes, kinds = nodes_of(path, ast.Attribute), nodes_of(path, ast.ClassDef)
    own = {node.name for node in nodes_of(path, (ast.FunctionDef, ast.ClassDef))}
    own |= {node.id for node in nodes_of(path, ast.Name)}
    own |= {a.attr for a in attributes if isinstance(a.ctx, ast.Store) and ast.unparse(a.value) == "self"}
    overridden = {part.name for kind in kinds for part in kind.body if hasattr(part, "name")} & {*dir(PreTrainedModel)}
    calls = [node for node in nodes_of(path, ast.Call) if re.search(BY_NAME, ast.unparse(node.func))]
    quoted = {str(arg.value) for call in calls for arg in call.args if isinstance(arg, ast.Constant)}
    taken = {a.attr for a in attributes} - own | overridden | quoted
    return {name for name in taken - ALLOWED if re.fullmatch(r"_[A-Za-z]\w*", name)}


@pytest.mark.parametrize("path", HOUSE, ids=lambda p: str(p.relative_to(ROOT)))
def test_names_of_other_libraries_that_may_change_stand_in_compat_alone(path):
    taken = NAMES.keys() & {*names_in(path)} | inner_modules(path) | private_names(path)
    assert not taken, f"{path.name} uses {sorted(taken)} of others: call a function of hf_reparam.compat instead"


@pytest.mark.parametrize("path", COMPAT, ids=lambda p: str(p.relative_to(ROOT)))
def test_compat_uses_no_name_without_a_contract(path):
    inside = [node for node in nodes_of(path, ast.ImportFrom) if node.module in inner_modules(path)]
    taken = private_names(path) | {alias.name for node in inside for alias in node.names}
    missing = taken - NAMES.keys()
    assert not missing, f"{path.name} uses {sorted(missing)}: add them to NAMES in tests/test_compat.py, with a test"


def test_no_structure_is_named_outside_of_structures():
    """Convert, load, merge, save, report and the remote file are loops over `STRUCTURES`."""
    rooms = sorted(path.stem for path in (ROOT / "structures").iterdir() if path.stem not in GENERAL)
    assert {"experts", "heads", "linear", "multihead", "table"} == set(rooms)
    names = re.compile(rf"^from hf_reparam\.structures\.({'|'.join(rooms)})\b|^from hf_reparam\.structures import .*")
    classes = {type(structure).__name__ for structure in STRUCTURES}
    for path in files():
        if layer(path) != "structures":
            for line in path.read_text().splitlines():
                found = names.match(line)
                assert not (found and found[1]), f"{path.name}: {line}"
                assert not classes & set(re.findall(r"\w+", line if found else "")), f"{path.name}: {line}"


@pytest.mark.slow
def test_what_loads_a_model_imports_nothing_of_calibration_or_compression():
    code = (
        "import sys; import hf_reparam.model.auto; "
        "unneeded = ['calibrate', 'compress', 'recover', 'files', 'model.build']; "
        "print([m for m in sys.modules for n in unneeded if f'{m}.'.startswith(f'hf_reparam.{n}.')])"
    )
    stub = (  # the package without its own __init__, which imports all
        "import sys, types; p = types.ModuleType('hf_reparam'); p.__path__ = [sys.argv[1]]; "
        "sys.modules['hf_reparam'] = p; "
    )
    loaded = launch("-c", stub + code, ROOT, processes=1)
    assert [m for m in loaded.strip().strip("[]").split(", ") if "hf_reparam" in m] == []
