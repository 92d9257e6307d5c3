"""Texts that are on every machine: docstrings of the Python standard library."""

import inspect
import pkgutil
import sys
import types

__all__ = ["stdlib_docstrings"]

MODULES = (
    "argparse",
    "collections",
    "datetime",
    "decimal",
    "email",
    "functools",
    "inspect",
    "json",
    "logging",
    "random",
)


def stdlib_docstrings(count: int) -> list[str]:
    """The first `count` distinct docstrings of 40 or more characters, in a fixed order.

    >>> texts = stdlib_docstrings(50)
    >>> len(texts), min(map(len, texts)) >= 40
    (50, True)
    """
    texts: dict[str, None] = {}
    for name in MODULES:
        for _, member in sorted(vars(pkgutil.resolve_name(name)).items()):
            if isinstance(member, (type, types.FunctionType)) and member.__module__ in sys.stdlib_module_names:
                for item in (member, *vars(member).values()):
                    doc = inspect.getdoc(item) if isinstance(item, (type, types.FunctionType)) else None
                    if doc and len(doc) >= 40:
                        texts.setdefault(" ".join(doc.split()))
    if len(texts) < count:
        raise ValueError(f"{count} texts asked for, {len(texts)} found")
    return list(texts)[:count]
