"""One Python file with which a folder loads where hf_reparam is not installed.

`save_pretrained(..., remote_code=True)` writes it beside the weights: the very modules that load and run a converted
model, one after the other. What only conversions need is left out.
"""

import ast
import io
import itertools
import re
import tokenize
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import Any

from hf_reparam.compat.auto import auto_classes
from hf_reparam.errors import CheckpointError
from hf_reparam.model.config import PREFIX, PUBLIC_MODULE

__all__ = ["FILE", "forget_file", "named_in_config", "write_module"]

FILE = "modeling_reparam.py"
_FOR_MODELS = ("AutoConfig", "AutoModel")
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


def _composed() -> str:
    """The modules behind the front door, in the order in which they import each other."""
    sources: dict[str, str] = {}
    _gather(_FIRST, sources)
    imports, absent, bodies = set(), set(), []
    for name, source in sources.items():
        body, outer, gone = _taken_apart(source)
        imports |= outer
        absent |= gone
        bodies.append(f"# {name}\n\n{_with_own_names(body, name)}")
    head = _HEAD.format(
        version=version("hf-reparam"),
        imports="\n".join(sorted(imports, key=lambda line: (line.startswith("from"), line))),
        absent=", ".join(sorted(absent)),
        count=len(absent),
    )
    return "\n\n\n".join([head.rstrip(), *bodies]) + _TAIL


def _gather(name: str, sources: dict[str, str]) -> None:
    """Add a module of the package and, before it, all that it imports."""
    if name in sources or _is_left_out(name):
        return
    place = files("hf_reparam").joinpath(*name.split(".")[1:])
    package = place.is_dir()
    file = place / "__init__.py" if package else place.with_name(f"{place.name}.py")  # type: ignore[attr-defined]
    source = file.read_text(encoding="utf-8")
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import) and node.names[0].name.startswith("hf_reparam"):
            _gather(node.names[0].name, sources)
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("hf_reparam"):
            _gather(str(node.module), sources)
            for alias in node.names:  # a module, imported as such
                if files("hf_reparam").joinpath(*str(node.module).split(".")[1:], f"{alias.name}.py").is_file():
                    _gather(f"{node.module}.{alias.name}", sources)
    sources[name] = source


def _is_left_out(name: str) -> bool:
    inner = name.removeprefix("hf_reparam.")
    return any(inner == part or inner.startswith(f"{part}.") for part in _LEFT_OUT)


def _taken_apart(source: str) -> tuple[str, set[str], set[str]]:
    """A module without its imports and `__all__`; the imports of other packages; names that are left out."""
    lines, imports, absent = source.splitlines(), set(), set()
    for node in ast.parse(source).body:
        span = range(node.lineno - 1, node.end_lineno or node.lineno)
        if isinstance(node, (ast.Import, ast.ImportFrom)) and "hf_reparam" in ast.unparse(node):
            if isinstance(node, ast.ImportFrom) and _is_left_out(str(node.module)):
                absent |= {alias.asname or alias.name for alias in node.names}
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            imports.add(ast.unparse(node))
        elif not (isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"):
            continue
        for i in span:
            lines[i] = ""
    return "\n".join(lines).strip(), imports, absent


def _with_own_names(source: str, module: str) -> str:
    """A module whose private names, which others may have too, begin with the module's."""
    tree = ast.parse(source)
    private = {name for node in tree.body for name in _defined(node) if name.startswith("_") or len(name) == 1}
    start = module.removeprefix("hf_reparam.").replace(".", "_")
    names = re.compile(rf"(?<![\w.])({'|'.join(map(re.escape, sorted(private)))})(?!\w)")
    changes, before = [], ""
    for token in tokenize.generate_tokens(io.StringIO(source).readline) if private else ():
        text = token.string
        if token.type == tokenize.NAME and text in private and before != ".":
            text = _renamed(text, start)
        elif token.type == tokenize.STRING and "f" in re.split("['\"]", text, maxsplit=1)[0].lower():
            # before Python 3.12 one token with all that is between its braces
            text = re.sub(r"\{[^{}]+", lambda part: names.sub(lambda name: _renamed(name[0], start), part[0]), text)
        if text != token.string:
            changes.append((token, text))
        before = token.string
    return _replaced(source, changes)


def _renamed(name: str, start: str) -> str:
    return f"_{start}_{name.strip('_')}"


def _replaced(source: str, changes: list[tuple[tokenize.TokenInfo, str]]) -> str:
    starts = [0, *itertools.accumulate(len(line) for line in source.splitlines(keepends=True))]
    for token, text in reversed(changes):
        begin, end = (starts[row - 1] + column for row, column in (token.start, token.end))
        source = source[:begin] + text + source[end:]
    return source


def _defined(node: ast.stmt) -> Iterator[str]:
    """Names that a statement of a module defines."""
    if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
        yield node.name
    elif isinstance(node, ast.Assign):
        yield from (name.id for target in node.targets for name in ast.walk(target) if isinstance(name, ast.Name))
    elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
        yield node.target.id


@contextmanager
def named_in_config(model: Any, *, remote_code: bool) -> Iterator[None]:
    """While the block saves, `model.config.auto_map` names the file's classes; without `remote_code` it does not.

    Code for models that came with the source is left out: it knows no low-rank layers. Tokenizers keep theirs.

    Raises:
        CheckpointError: a layer stands for a dense type that the file does not know.
    """
    config = model.config
    old = vars(config).pop("auto_map", None)  # of this file, or of code for the dense model alone
    kept = {auto: ref for auto, ref in _other_code(old).items() if not auto.startswith(_FOR_MODELS)}
    if remote_code:
        _check_types(model)
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
        for auto, found in auto_classes(base)
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
