"""The types of the public names are for users, too."""

import re
import warnings
from pathlib import Path

import pytest
from mypy import api

CONSUMER = Path(__file__).parent / "consumer.py"
ROOT = Path(__file__).parents[1]
STRICT = """
[[tool.mypy.overrides]]
module = ["right", "wrong0", "wrong1", "wrong2"]
warn_return_any = true
disallow_subclassing_any = true
disallow_untyped_calls = true
"""
WRONG = {
    "rank": ("rank=8)", 'rank="8")'),
    "assert-type": ("assert_type(report, Report)", "assert_type(report, int)"),
    "no_such_field": ("report.layers", "report.no_such_field"),
}


@pytest.fixture(scope="module")
def said(tmp_path_factory):
    """What mypy --strict says of the consumer, and of every wrong one, without this project's exceptions.

    For all other modules the configuration is the project's, and so what `mypy` has found out about them serves here.
    """
    folder, text = tmp_path_factory.mktemp("typing"), CONSUMER.read_text()
    (folder / "pyproject.toml").write_text((ROOT / "pyproject.toml").read_text() + STRICT)
    (folder / "right.py").write_text(text)
    for number, (right, wrong) in enumerate(WRONG.values()):
        assert text.count(right) >= 1
        (folder / f"wrong{number}.py").write_text(text.replace(right, wrong, 1))
    options = [f"--config-file={folder / 'pyproject.toml'}", f"--cache-dir={ROOT / '.mypy_cache'}"]
    out, error, _ = api.run([*options, *map(str, sorted(folder.glob("*.py")))])
    assert not error
    return out


def errors(said, name):
    return [line for line in said.splitlines() if re.search(rf"(^|/){name}\.py:\d+: error", line)]


@pytest.mark.slow
def test_a_consumer_type_checks(said):
    assert f"(checked {1 + len(WRONG)} source files)" in said
    assert errors(said, "right") == []


@pytest.mark.slow
@pytest.mark.parametrize("message", WRONG)
def test_a_wrong_consumer_does_not(said, message):
    found = errors(said, f"wrong{list(WRONG).index(message)}")
    assert found
    assert message in said


@pytest.mark.parametrize("kind", [DeprecationWarning, FutureWarning, PendingDeprecationWarning])
def test_what_our_code_is_warned_of_is_an_error_here(kind):
    """As set in pyproject.toml: a deprecated call in any module of the package fails the test that reaches it."""
    code = compile("import warnings; warnings.warn('old', kind)", "convert.py", "exec")
    with pytest.raises(kind, match="old"):
        exec(code, {"__name__": "hf_reparam.compress.convert", "kind": kind})
    with warnings.catch_warnings(record=True):
        exec(code, {"__name__": "transformers.modeling_utils", "kind": kind})
