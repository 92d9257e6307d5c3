"""Globs and regular expressions cover whole names; one that covers nothing says what is near."""

import pytest

from hf_reparam.config import as_patterns, check_used, first_match, matches
from hf_reparam.errors import TargetError

NAMES = ["encoder.layer.0.attention.self.query", "encoder.layer.0.output.dense", "pooler.dense"]


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("*", NAMES),
        ("*.query", NAMES[:1]),
        ("encoder.*", NAMES[:2]),
        ("encoder.layer.?.output.dense", NAMES[1:2]),
        ("*.[qk]*", NAMES[:1]),
        ("query", NAMES[:1]),
        ("self.query", NAMES[:1]),
        ("pooler.dense", NAMES[2:]),
        ("dense", NAMES[1:]),
        ("elf.query", []),
        ("attention", []),
        ("Query", []),
        ("", []),
        ("*QUERY", []),
        (r"re:.*\.(query|dense)", NAMES),
        (r"re:encoder\.layer\.\d+\.output\.dense", NAMES[1:2]),
        ("re:encoder", []),
    ],
)
def test_matches(pattern, expected):
    assert [name for name in NAMES if matches(pattern, name)] == expected


def test_first_match_wins_over_any_alias():
    assert first_match(["*.key", "*.query", "*"], ["a.query"]) == "*.query"
    assert first_match(["b.*"], ["a.query", "b.query"]) == "b.*"
    assert first_match([], ["a"]) is None


def test_as_patterns():
    assert as_patterns("a", "target_modules") == ("a",)
    assert as_patterns(["a", "b"], "target_modules") == ("a", "b")
    assert as_patterns(None, "target_modules") is None
    assert as_patterns((), "exclude_modules") == ()


@pytest.mark.parametrize("value", ["", [3], [None], ["a", ""], "re:(", ["re:*"]])
def test_malformed_patterns(value):
    with pytest.raises(TargetError, match="target_modules: "):
        as_patterns(value, "target_modules")


@pytest.mark.parametrize(
    ("pattern", "hint"),
    [
        ("other.query", "'\\*\\.query' or 'encoder.layer.0.attention.self.query'"),
        ("*.querry", "'\\*\\.query'"),
        ("encoder.layer.0.output.dens", "'\\*\\.dense' or 'encoder.layer.0.output.dense'"),
        ("zzzz", "names end in dense, query$"),
    ],
)
def test_unused_pattern_lists_near_names(pattern, hint):
    with pytest.raises(
        TargetError, match=f"target_modules: '{pattern.replace('*', '[*]')}' matches none of the 3 .*{hint}"
    ):
        check_used([pattern], NAMES, "target_modules")
