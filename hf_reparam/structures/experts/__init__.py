"""Fused experts of MoE layers: 3-D parameters, one matrix for each expert, held as low-rank products."""

from hf_reparam.structures.experts.modules import ExpertWeight, LowRankExperts
from hf_reparam.structures.experts.structure import (
    EXPERTS,
    ExpertSite,
    build,
    dense_deviation,
    draw,
    expert_moments,
    losses,
    pooled,
    put,
    sites,
    skeleton,
    stock,
    unserved,
)
from hf_reparam.structures.experts.watch import Pass, watching

__all__ = [
    "EXPERTS",
    "ExpertSite",
    "ExpertWeight",
    "LowRankExperts",
    "Pass",
    "build",
    "dense_deviation",
    "draw",
    "expert_moments",
    "losses",
    "pooled",
    "put",
    "sites",
    "skeleton",
    "stock",
    "unserved",
    "watching",
]
