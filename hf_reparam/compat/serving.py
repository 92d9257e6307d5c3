"""Where servers look for model classes: among the names of `transformers`."""

from collections.abc import Callable
from typing import Any

import transformers


def offer_names(prefix: str, made: Callable[[str], Any]) -> None:
    """Have names of `transformers` that begin with a prefix made when they are asked for. May be called again.

    It is said of the type of that module, which Transformers makes a second time while its processors are imported:
    who imported it before has another one than who does afterwards.
    """
    lazy: Any = type(transformers)
    usual = lazy.__getattr__
    if getattr(usual, "made", None) is made:
        return

    def __getattr__(module: Any, name: str) -> Any:  # noqa: N807  # the type's
        return made(name) if name.startswith(prefix) and module.__name__ == "transformers" else usual(module, name)

    __getattr__.made = made  # type: ignore[attr-defined]
    lazy.__getattr__ = __getattr__
