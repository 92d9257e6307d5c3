"""Tensor mathematics: tensors in, tensors out, float64 inside. Knows no module and no model."""

from hf_reparam.linalg.factorize import Decomposition, Factors, decompose

__all__ = ["Decomposition", "Factors", "decompose"]
