"""Least squares between a dense layer on its own inputs and a low-rank layer on the inputs that it really gets.

Once the layers before it are low-rank, a layer sees x' where the dense one saw x. The W' that is best for
E ||W x - W' x'||^2 is W E[x x'^T] E[x' x'^T]^-1, cut in the coordinates of E[x' x'^T].
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from hf_reparam.linalg.metric import Metric, root
from hf_reparam.linalg.moments import Shrinkage
from hf_reparam.linalg.sums import add, add_rows, product, widened


@dataclass
class PairedMoments:
    """Sums over tokens of x, the input in the dense model, and x', in the low-rank one; float64, where the rows are.

    Args:
        tokens: rows that were seen.
        dense_sum, low_sum: (in,) sums of x and x'.
        cross: (in, in) sum of x x'^T.
        products: (in, in) sum of x' x'^T.
    """

    tokens: int
    dense_sum: Tensor
    low_sum: Tensor
    cross: Tensor
    products: Tensor

    @classmethod
    def zeros(cls, n_in: int) -> "PairedMoments":
        """No tokens yet."""
        vectors = [torch.zeros(n_in, dtype=torch.float64) for _ in range(2)]
        matrices = [torch.zeros(n_in, n_in, dtype=torch.float64) for _ in range(2)]
        return cls(0, *vectors, *matrices)

    def add(self, dense: Tensor, low: Tensor) -> None:
        """Add rows x and x' (tokens, in), of the same tokens. Products in float32 or better, sums in float64."""
        dense, low = widened(dense), widened(low)
        self.tokens += dense.shape[0]
        self.dense_sum = add_rows(self.dense_sum, dense)
        self.low_sum = add_rows(self.low_sum, low)
        self.cross = add(self.cross, product(dense, low))
        self.products = add(self.products, product(low, low))

    def means(self) -> tuple[Tensor, Tensor]:
        """E x and E x', (in,)."""
        return self.dense_sum / self.tokens, self.low_sum / self.tokens

    def refit(
        self, weight: Tensor, gradient_products: Tensor | None, shrinkage: Shrinkage, *, centred: bool
    ) -> tuple[Tensor, Metric]:
        """The least-squares problem of a layer with dense weight W (out, in).

        Relative shrinkage adds the same noise to x and x', which draws the solution to W where data are few.

        Args:
            weight: W, float64.
            gradient_products: (out, out) sum of g g^T, of any scale, to weigh errors of the output; None for equal
                weights.
            shrinkage: shares of the mean variance, and of the mean squared gradient.
            centred: means are left to the bias.

        Returns:
            What to decompose, the unconstrained solution (out, in) float64, and the coordinates in which: of the inputs
            x', and of the outputs where a gradient moment is known.

        Source: AA-SVD, arXiv 2604.02119; with shrinkage, centring and output weights added here.
        """
        cross, second = self.cross / self.tokens, self.products / self.tokens
        if centred:
            mean, low_mean = self.means()
            cross = cross - torch.outer(mean, low_mean)
            second = second - torch.outer(low_mean, low_mean)
        part, variance = shrinkage[0], second.diagonal().mean()
        inputs = root(second, part)
        if variance > 0:
            cross = (1 - part) * cross
            cross.diagonal().add_(part * variance)
            weight = torch.cholesky_solve((weight @ cross).T, inputs).T
        return weight, Metric(inputs, None if gradient_products is None else root(gradient_products, shrinkage[1]))
