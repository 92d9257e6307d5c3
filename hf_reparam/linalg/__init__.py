"""Tensor mathematics: tensors in, tensors out, float64 inside. Knows no module and no model."""

from hf_reparam.linalg.allocate import Options, allocate
from hf_reparam.linalg.factorize import Decomposition, Factors, decompose, spectrum, working_device
from hf_reparam.linalg.metric import Metric
from hf_reparam.linalg.moments import LayerMoments, Moments
from hf_reparam.linalg.paired import PairedMoments, Refit
from hf_reparam.linalg.pivot import Pivots, pivot

__all__ = [
    "Decomposition",
    "Factors",
    "LayerMoments",
    "Metric",
    "Moments",
    "Options",
    "PairedMoments",
    "Pivots",
    "Refit",
    "allocate",
    "decompose",
    "pivot",
    "spectrum",
    "working_device",
]
