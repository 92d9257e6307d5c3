"""Warnings of the code that called the package."""

import sys
import warnings


def warn(text: str) -> None:
    """A UserWarning, attributed to the first caller outside of the package, however deep this is."""
    level = 1
    while sys._getframe(level).f_globals.get("__name__", "").startswith(("hf_reparam.", "hf_reparam_cli")):
        level += 1
    warnings.warn(text, stacklevel=level + 1)
