"""Patterns that name layers: the end of a name, a glob over the whole name, or `re:` and a regular expression."""

import difflib
import fnmatch
import re
from collections.abc import Iterable, Sequence

from hf_reparam.errors import TargetError

__all__ = ["as_patterns", "check_used", "first_match", "layer_kind", "matches"]


def as_patterns(value: str | Iterable[str] | None, option: str) -> tuple[str, ...] | None:
    """One pattern or several as a tuple; None stays None. TargetError for anything that is no pattern."""
    if value is None:
        return None
    patterns = (value,) if isinstance(value, str) else tuple(value)
    for pattern in patterns:
        if not isinstance(pattern, str) or not pattern:
            raise TargetError(f"{option}: a pattern is a string such as '*.query' or 're:.*query', got {pattern!r}")
        if pattern.startswith("re:"):
            try:
                re.compile(pattern[3:])
            except re.error as error:
                raise TargetError(f"{option}: {pattern!r} is not a regular expression: {error}") from None
    return patterns


def matches(pattern: str, name: str) -> bool:
    """Whether the pattern covers the name: a glob, whose `*` crosses dots, the whole name; other text its end, too.

    >>> [matches(p, "encoder.layer.0.attention.self.query") for p in ("query", "self.query", "*.query", "elf.query")]
    [True, True, True, False]
    """
    if pattern.startswith("re:"):
        return re.fullmatch(pattern[3:], name) is not None
    return fnmatch.fnmatchcase(name, pattern) or name.endswith(f".{pattern}")


def first_match(patterns: Iterable[str], names: Sequence[str]) -> str | None:
    """The first pattern that covers one of a layer's names, or None."""
    return next((pattern for pattern in patterns if any(matches(pattern, name) for name in names)), None)


def check_used(patterns: Iterable[str], names: Sequence[str], option: str) -> None:
    """Raise TargetError for a pattern that covers no name, listing names near to it."""
    known = set(names)
    for pattern in patterns:
        if pattern not in known and not any(matches(pattern, name) for name in names):
            near = _near(pattern, names)
            hint = f"; did you mean {' or '.join(map(repr, near))}?" if near else ""
            raise TargetError(
                f"{option}: {pattern!r} matches none of the {len(names)} layers (a pattern covers the end of a "
                f"name, a glob the whole name){hint}"
            )


def _near(pattern: str, names: Sequence[str]) -> list[str]:
    bare = pattern.removeprefix("re:").strip("*.^$\\")
    last = bare.rpartition(".")[2]
    endings = {name.rpartition(".")[2] for name in names}
    if last in endings:
        return [f"*.{last}", *[name for name in names if name.endswith(last)][:2]]
    found = difflib.get_close_matches(bare, names, n=2, cutoff=0.5)
    return [f"*.{end}" for end in difflib.get_close_matches(last, sorted(endings), n=2, cutoff=0.6)] + found


def layer_kind(name: str) -> str:
    """A layer's name with `*` for its numbers, the same for the layers that repeat in a model.

    >>> layer_kind("encoder.layer.11.output.dense")
    'encoder.layer.*.output.dense'
    """
    return re.sub(r"(^|\.)\d+(?=\.|$)", r"\1*", name)
