"""What counts as a small error: square roots of the input covariance and of the output-gradient second moment.

In the coordinates M = L_G^T W L_C the Frobenius norm is tr G (W - W') C (W - W')^T, C = L_C L_C^T and G = L_G L_G^T:
the expected squared change of the output for G = I, and the K-FAC model of the increase of the loss for the gradient's
G.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Metric:
    """Coordinates in which a weight is decomposed; None stands for the identity."""

    input_root: Tensor | None = None  # L_C (in, in), float64, lower triangular
    output_root: Tensor | None = None  # L_G (out, out), float64, lower triangular

    def apply(self, weight: Tensor) -> Tensor:
        """M = L_G^T W L_C, a new tensor, for W (out, in) float64."""
        weight = weight.clone() if self.input_root is None else weight @ self.input_root
        return weight if self.output_root is None else self.output_root.T @ weight

    def unapply_left(self, left: Tensor) -> Tensor:
        """L_G^-T U, for U (out, k)."""
        if self.output_root is None:
            return left
        return torch.linalg.solve_triangular(self.output_root.T, left, upper=True)

    def unapply_right(self, right: Tensor) -> Tensor:
        """V L_C^-1, for V (k, in)."""
        if self.input_root is None:
            return right
        return torch.linalg.solve_triangular(self.input_root, right, upper=False, left=False)


def root(second_moment: Tensor, shrinkage: float) -> Tensor:
    """Lower-triangular L with L L^T = (1 - a) C + a mean(diag C) I: C (d, d), symmetric and positive semidefinite.

    Relative shrinkage makes C positive definite for any amount of data and any scale, and keeps what calibration did
    not span. Where rounding of the data is larger than that (all tokens nearly the same), its negative eigenvalues are
    raised to the shrinkage. A zero moment gives the identity.

    Cost: d^3 / 3 multiply-adds.
    """
    size = second_moment.shape[0]
    mean = float(second_moment.diagonal().mean())
    if mean <= 0:
        return torch.eye(size, dtype=torch.float64, device=second_moment.device)
    shrunk = (1 - shrinkage) * second_moment
    shrunk.diagonal().add_(shrinkage * mean)
    factor, failed = torch.linalg.cholesky_ex(shrunk)
    if not failed:
        return factor
    values, vectors = torch.linalg.eigh(shrunk)
    upright = vectors * values.clamp_min(shrinkage * mean).sqrt()
    upper = torch.linalg.qr(upright.T)[1]
    return upper.T * upper.diagonal().sign()
