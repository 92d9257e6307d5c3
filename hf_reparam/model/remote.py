"""One Python file with which a folder loads where hf_reparam is not installed.

`save_pretrained(..., remote_code=True)` writes it beside the weights: the very modules that load and run a converted
model, one after the other. What only conversions need is left out.
"""

import ast
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import Any

from hf_reparam.compat.auto import auto_classes
from hf_reparam.errors import CheckpointError
from hf_reparam.model.config import PREFIX, PUBLIC_MODULE

FILE = "modeling_reparam.py"
_FIRST = "hf_reparam.model.auto"
_LEFT_OUT = (
    "linalg",
    "compat.accelerate",
    "layers.offload",
    "layers.processes",
    "structures.source",
    "structures.heads.narrow",
    "structures.experts.watch",
)
"""Modules of conversions: what they define is None in the file, where nothing calls it."""
_HEAD = '''"""Low-rank models without the package that made them, for `trust_remote_code=True`.

Where the package is installed, the classes are its own.

Put together by hf_reparam {version} (https://pypi.org/project/hf-reparam/), Apache-2.0.
"""

from __future__ import annotations

try:
    import hf_reparam as _installed
except ImportError:
    _installed = None

{imports}

{absent} = (None,) * {count}
'''
_TAIL = '''

def __getattr__(name):
    """`ReparamBertConfig`, `ReparamBertForMaskedLM` ...: the package's where it is installed, else made here."""
    return generated_class(name) if _installed is None else getattr(_installed, name)
'''


def write_module(folder: Path) -> None:
    """Write the file: made of the package, or the one that this is."""
    own = PUBLIC_MODULE != "hf_reparam"
    text = Path(__file__).read_text(encoding="utf-8") if own else _composed()
    (folder / FILE).write_text(text, encoding="utf-8")


@cache
def _composed() -> str:
    """The modules behind the front door, in the order in which they import each other."""
    trees: dict[str, ast.Module] = {}
    _gather(_FIRST, trees)
    imports, absent, bodies = set(), set(), []
    for name, tree in trees.items():
        body: list[ast.stmt] = []
        for node in tree.body:
            own = _own_imports(node)
            if isinstance(node, ast.ImportFrom) and any(map(_is_left_out, own)):
                absent |= {alias.asname or alias.name for alias in node.names}
            for_types = isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
            if own or for_types:
                continue
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                imports.add(ast.unparse(node))
            elif "__all__" not in _defined(node):
                body.append(node)
        _rename_private(body, name.removeprefix("hf_reparam.").replace(".", "_"))
        bodies.append(f"# {name}\n\n{ast.unparse(ast.Module(body, []))}")
    head = _HEAD.format(
        version=version("hf-reparam"),
        imports="\n".join(sorted(imports, key=lambda line: (line.startswith("from"), line))),
        absent=", ".join(sorted(absent)),
        count=len(absent),
    )
    return "\n\n\n".join([head.rstrip(), *bodies]) + _TAIL


def _gather(name: str, trees: dict[str, ast.Module]) -> None:
    """Add a module of the package and, before it, all that it imports."""
    if name in trees or _is_left_out(name):
        return
    place = files("hf_reparam").joinpath(*name.split(".")[1:])
    file = place / "__init__.py" if place.is_dir() else place.with_name(f"{place.name}.py")  # type: ignore[attr-defined]
    tree = ast.parse(file.read_text(encoding="utf-8"))
    for node in tree.body:
        for module in _own_imports(node):
            _gather(module, trees)
    trees[name] = tree


def _own_imports(node: ast.stmt) -> list[str]:
    names = [str(node.module)] if isinstance(node, ast.ImportFrom) else []
    names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
    return [name for name in names if name.startswith("hf_reparam.")]


def _is_left_out(name: str) -> bool:
    return f"{name}.".startswith(tuple(f"hf_reparam.{part}." for part in _LEFT_OUT))


def _rename_private(body: list[ast.stmt], start: str) -> None:
    """Let a module's private names, which others may have too, begin with the module's."""
    private = {name for node in body for name in _defined(node) if name.startswith("_") or len(name) == 1}
    for node in ast.walk(ast.Module(body, [])):
        for field in ("id", "name", "arg"):
            if (name := getattr(node, field, None)) in private:
                setattr(node, field, f"_{start}_{name.strip('_')}")


def _defined(node: ast.stmt) -> list[str]:
    if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
        return [node.name]
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    return [name.id for target in targets for name in ast.walk(target) if isinstance(name, ast.Name)]


@contextmanager
def named_in_config(model: Any, *, remote_code: bool) -> Iterator[None]:
    """While the block saves, `model.config.auto_map` names the file's classes; without `remote_code` it does not.

    Code for models that came with the source is left out: it knows no low-rank layers. Tokenizers keep theirs.

    Raises:
        CheckpointError: a layer stands for a dense type that the file does not know.
    """
    if remote_code:
        _check_types(model)
    config = model.config
    old = vars(config).pop("auto_map", None)  # of this file, or of code for the dense model alone
    kept = {auto: ref for auto, ref in _other_code(old).items() if not auto.startswith(("AutoConfig", "AutoModel"))}
    if remote_code:
        kept = {**kept, **_auto_map(config.base_class)}
    if kept:
        config.auto_map = kept
    try:
        yield
    finally:
        vars(config).pop("auto_map", None)
        if old is not None:
            config.auto_map = old


def forget_file(config: Any) -> None:
    """Take the file's classes out of the configuration of a model that is dense again."""
    kept = _other_code(vars(config).pop("auto_map", None))
    if kept:
        config.auto_map = kept


def _other_code(auto_map: Mapping[str, Any] | None) -> dict[str, Any]:
    """The entries of an `auto_map` that do not name classes of the file, whose models are low-rank."""
    return {auto: ref for auto, ref in (auto_map or {}).items() if f"{Path(FILE).stem}." not in str(ref)}


def _auto_map(base: Any) -> dict[str, str]:
    names = {
        auto: found[0].__name__
        for auto, _, found in auto_classes(base)
        if auto[0] != "_" and found[0].__module__.startswith("transformers.")
    }
    names["AutoConfig"] = base.__name__
    return {auto: f"{Path(FILE).stem}.{PREFIX}{name}" for auto, name in sorted(names.items())}


def _check_types(model: Any) -> None:
    if not model.base_class.__module__.startswith("transformers."):
        raise CheckpointError(
            f"{model.base_class.__name__} is no class of Transformers, and the file of remote_code=True knows no "
            "others: save without it, and load where hf_reparam is installed and that class is registered"
        )
    for name, module in model.named_modules():
        kind = getattr(module, "dense_type", type(module))
        if not kind.__module__.startswith(("torch.", "transformers.", "hf_reparam", "transformers_modules.")):
            raise CheckpointError(
                f"{name} is or stands for a {kind.__name__}, which is no class of torch or Transformers, and the file "
                "of remote_code=True knows no others: save without it, and load where hf_reparam and that type are "
                "installed"
            )
