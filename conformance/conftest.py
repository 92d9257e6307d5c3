"""Every test runs offline, and `--outcomes FILE` writes down how it ended."""

import json
import os
from collections import Counter
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import pytest

from conformance.sources import install

_counts = {}


def pytest_addoption(parser):
    parser.addoption("--outcomes", type=Path, help="JSON file to write: test -> how it and its parts ended")


def pytest_configure(config):
    if not hasattr(config, "workerinput"):  # once, before processes start
        install()


def pytest_runtest_logreport(report):
    if report.when == "call" or report.outcome != "passed":
        _counts.setdefault(report.nodeid.partition("::")[2], Counter())[report.outcome] += 1


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session):
    place = session.config.getoption("--outcomes")
    if place is not None and not hasattr(session.config, "workerinput"):
        place.write_text(json.dumps(_counts))
