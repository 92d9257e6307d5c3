"""Modules and their surgery: finds, replaces and restores dense layers of any `nn.Module`. Knows no transformers."""

from hf_reparam.layers.dense import DenseType, register_dense
from hf_reparam.layers.heads import AttentionType, register_attention
from hf_reparam.layers.linear import LowRankLinear, PivotedLinear
from hf_reparam.layers.ranks import Rank
from hf_reparam.layers.targets import Skipped, Target, Targets, find_targets

__all__ = [
    "AttentionType",
    "DenseType",
    "LowRankLinear",
    "PivotedLinear",
    "Rank",
    "Skipped",
    "Target",
    "Targets",
    "find_targets",
    "register_attention",
    "register_dense",
]
