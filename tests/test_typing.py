"""The types of the public names are for users, too."""

import warnings
from pathlib import Path

import pytest
from mypy import api

CONSUMER = Path(__file__).parent / "consumer.py"


def check(path):
    """mypy --strict, with no configuration of this project."""
    out, error, code = api.run(["--strict", "--config-file=", "--ignore-missing-imports", str(path)])
    assert not error
    return code, out


def test_a_consumer_type_checks():
    code, out = check(CONSUMER)
    assert code == 0, out


@pytest.mark.parametrize(
    ("right", "wrong", "message"),
    [
        ("rank=8)", 'rank="8")', "rank"),
        ("assert_type(report, ConversionReport)", "assert_type(report, int)", "assert-type"),
        ("report.layers", "report.no_such_field", "no_such_field"),
    ],
)
def test_a_wrong_consumer_does_not(tmp_path, right, wrong, message):
    text = CONSUMER.read_text()
    assert text.count(right) >= 1
    (tmp_path / "consumer.py").write_text(text.replace(right, wrong, 1))
    code, out = check(tmp_path / "consumer.py")
    assert code == 1
    assert message in out


@pytest.mark.parametrize("kind", [DeprecationWarning, FutureWarning, PendingDeprecationWarning])
def test_what_our_code_is_warned_of_is_an_error_here(kind):
    """As set in pyproject.toml: a deprecated call in any module of the package fails the test that reaches it."""
    code = compile("import warnings; warnings.warn('old', kind)", "convert.py", "exec")
    with pytest.raises(kind, match="old"):
        exec(code, {"__name__": "hf_reparam.compress.convert", "kind": kind})
    with warnings.catch_warnings(record=True):
        exec(code, {"__name__": "transformers.modeling_utils", "kind": kind})
