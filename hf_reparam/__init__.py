"""Low-rank reparameterization of pretrained Transformers models: W ~ up @ down, from an SVD.

Importing this package makes `AutoConfig`, `AutoModel...`, `pipeline` and friends load converted models.
"""

from typing import Any

from hf_reparam import plot
from hf_reparam.calibrate.collect import collect_moments
from hf_reparam.compress.convert import convert
from hf_reparam.compress.decomposition import Decompositions, decompose
from hf_reparam.compress.merge import merge
from hf_reparam.compress.planning import make_plan
from hf_reparam.errors import CheckpointError, PlanError, RankError, ReparamError, TargetError, WeightError
from hf_reparam.files.checkpoint import convert_checkpoint, merge_checkpoint
from hf_reparam.files.storage import load, save
from hf_reparam.layers import (
    AttentionType,
    LowRankLinear,
    PivotedLinear,
    register_attention,
    register_dense,
)
from hf_reparam.linalg import Moments
from hf_reparam.model.auto import ReparamConfig, generated_class
from hf_reparam.model.card import model_card
from hf_reparam.model.summary import summarize
from hf_reparam.plan import LayerSpec, RankPlan
from hf_reparam.record import ConversionRecord
from hf_reparam.recover.distil import distillation_loss
from hf_reparam.recover.refit import refit
from hf_reparam.report import ConversionReport, HeadsReport, LayerReport, RefitReport, SkippedReport

__version__ = "0.1.0"

__all__ = [
    "AttentionType",
    "CheckpointError",
    "ConversionRecord",
    "ConversionReport",
    "Decompositions",
    "HeadsReport",
    "LayerReport",
    "LayerSpec",
    "LowRankLinear",
    "Moments",
    "PivotedLinear",
    "PlanError",
    "RankError",
    "RankPlan",
    "RefitReport",
    "ReparamConfig",
    "ReparamError",
    "SkippedReport",
    "TargetError",
    "WeightError",
    "collect_moments",
    "convert",
    "convert_checkpoint",
    "decompose",
    "distillation_loss",
    "load",
    "make_plan",
    "merge",
    "merge_checkpoint",
    "model_card",
    "plot",
    "refit",
    "register_attention",
    "register_dense",
    "save",
    "summarize",
]


def __getattr__(name: str) -> Any:
    """Generated classes, such as `hf_reparam.ReparamBertForMaskedLM`, are made when they are asked for."""
    return generated_class(name)
