"""Tensor mathematics: tensors in, tensors out, float64 inside. Knows no module and no model."""
