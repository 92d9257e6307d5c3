"""Modules and their surgery: finds, replaces and restores dense layers of any `nn.Module`. Knows no transformers."""

from hf_reparam.nn.dense import DenseType, register_dense
from hf_reparam.nn.linear import LowRankLinear, PivotedLinear
from hf_reparam.nn.ranks import Rank
from hf_reparam.nn.targets import Skipped, Target, Targets, find_targets

__all__ = [
    "DenseType",
    "LowRankLinear",
    "PivotedLinear",
    "Rank",
    "Skipped",
    "Target",
    "Targets",
    "find_targets",
    "register_dense",
]
