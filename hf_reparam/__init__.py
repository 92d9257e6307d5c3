"""Low-rank reparameterization of pretrained Transformers models: W ~ up @ down, from an SVD.

Importing this package makes `AutoConfig`, `AutoModel...`, `pipeline` and friends load converted models.
"""

from typing import Any

from hf_reparam import errors, plot
from hf_reparam.calibrate.collect import calibrate
from hf_reparam.compress.compare import Comparison, compare
from hf_reparam.compress.convert import convert
from hf_reparam.compress.merge import merge
from hf_reparam.compress.pairs import to_pairs
from hf_reparam.compress.planning import make_plan
from hf_reparam.compress.search import search_plan
from hf_reparam.config import LowRankConfig
from hf_reparam.errors import ReparamError
from hf_reparam.files.compare import compare_folders
from hf_reparam.files.convert import convert_folder, merge_folder
from hf_reparam.files.storage import load, save
from hf_reparam.layers.dense import register_dense
from hf_reparam.linalg.calibration import Calibration
from hf_reparam.model.auto import generated_class
from hf_reparam.model.card import model_card
from hf_reparam.model.summary import report
from hf_reparam.plan import Entry, RankPlan
from hf_reparam.recover.adapters import lora_targets
from hf_reparam.recover.distil import distillation_loss
from hf_reparam.recover.refine import refine
from hf_reparam.recover.refit import refit
from hf_reparam.report import Report

__version__ = "0.1.0"

__all__ = [
    "Calibration",
    "Comparison",
    "Entry",
    "LowRankConfig",
    "RankPlan",
    "ReparamError",
    "Report",
    "calibrate",
    "compare",
    "compare_folders",
    "convert",
    "convert_folder",
    "distillation_loss",
    "errors",
    "load",
    "lora_targets",
    "make_plan",
    "merge",
    "merge_folder",
    "model_card",
    "plot",
    "refine",
    "refit",
    "register_dense",
    "report",
    "save",
    "search_plan",
    "to_pairs",
]


def __getattr__(name: str) -> Any:
    """Generated classes, such as `hf_reparam.ReparamBertForMaskedLM`, are made when they are asked for."""
    return generated_class(name)
