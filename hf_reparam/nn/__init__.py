"""Modules and their surgery: finds, replaces and restores dense layers of any `nn.Module`. Knows no transformers."""

from hf_reparam.nn.dense import DenseType, register_dense
from hf_reparam.nn.heads import AttentionType, register_attention
from hf_reparam.nn.linear import LowRankLinear, PivotedLinear
from hf_reparam.nn.ranks import Rank
from hf_reparam.nn.targets import Skipped, Target, Targets, find_targets

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
