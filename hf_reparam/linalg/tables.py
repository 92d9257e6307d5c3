"""Embedding tables: rows weighted by how often tokens come, columns by the gradient that comes back.

An embedding is a layer on one-hot inputs, whose second moment is the diagonal of token frequencies f. K-FAC's model of
the loss increase is then sum_v f_v (e_v - e'_v)^T G (e_v - e'_v), with G the second moment of the gradient at the
embedding. An output head has, and a tied one adds, sum_v w_v (e_v - e'_v)^T C (e_v - e'_v), with w_v the mean square of
the gradient at a logit and C the second moment of what the head gets. Their sum is taken as a product, weights of rows
times one matrix of columns, each the sum of both with the other traced out.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from hf_reparam.errors import RankError, WeightError
from hf_reparam.linalg.metric import root
from hf_reparam.linalg.sums import add, add_rows, product, widened

ROW_SHRINKAGE = 0.1
"""Share of the mean weight that is mixed into the weights of rows: most tokens do not come in calibration data."""
_COLUMN_SHRINKAGE = 1e-2


@dataclass
class TableMoments:
    """Sums over tokens for one embedding table, float64; on the CPU, but for the time in which rows are added."""

    counts: Tensor  # (tokens,) how often each came
    gradients: Tensor  # (d, d) sum of g g^T at the embedding
    head_gradients: Tensor  # (tokens,) sum of squared gradients at the logits of a tied head; zero without one
    head_inputs: Tensor  # (d, d) sum of h h^T of what the head got
    head_tokens: Tensor  # () how many h

    @classmethod
    def zeros(cls, tokens: int, width: int) -> "TableMoments":
        """Nothing seen yet."""
        rows, square = (torch.zeros(*shape, dtype=torch.float64) for shape in ((tokens,), (width, width)))
        return cls(rows, square, rows.clone(), square.clone(), torch.zeros((), dtype=torch.float64))

    @property
    def tokens(self) -> float:
        """How many were seen: by the embedding, or by an untied head."""
        return float(self.counts.sum()) or float(self.head_tokens)

    def add_ids(self, ids: Tensor) -> None:
        """Count tokens (n,)."""
        every = torch.zeros(len(self.counts) + 1, dtype=torch.int64, device=ids.device)
        every.scatter_add_(0, ids.clamp(max=len(self.counts)), torch.ones_like(ids))
        self.counts = add(self.counts, every[:-1])  # an id beyond them fails in the embedding itself

    def add_gradients(self, g: Tensor) -> None:
        """Add rows (n, d) of the gradient at the embedding."""
        g = widened(g)
        self.gradients = add(self.gradients, product(g, g))

    def add_head(self, inputs: Tensor | None, gradients: Tensor | None) -> None:
        """Add rows (n, d) of what the head got, or (n, tokens) of the gradient at its logits."""
        if inputs is not None:
            inputs = widened(inputs)
            self.head_inputs = add(self.head_inputs, product(inputs, inputs))
            self.head_tokens += len(inputs)
        if gradients is not None:
            self.head_gradients = add_rows(self.head_gradients, widened(gradients).square())

    def __add__(self, other: "TableMoments") -> "TableMoments":
        return TableMoments(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    def map(self, function: Callable[[Tensor], Tensor]) -> "TableMoments":
        """The same function of every sum."""
        return TableMoments(*(function(getattr(self, f.name)) for f in fields(self)))

    def metric(self) -> tuple[Tensor, Tensor]:
        """Weights of rows (tokens,) and root L (d, d) of the columns' matrix, for one token; equal ones if none came.

        Raises:
            WeightError: they are not finite.
        """
        seen = self.tokens or 1.0
        frequency, gradients = self.counts / seen, self.gradients / seen
        logits, inputs = self.head_gradients / seen, self.head_inputs / seen
        rows = frequency * gradients.trace() + logits * inputs.trace()
        columns = gradients + logits.sum() * inputs
        if not (bool(torch.isfinite(rows).all()) and bool(torch.isfinite(columns).all())):
            raise WeightError("the calibration data of the embedding are not finite")
        total = float(rows.sum())
        if total <= 0:
            return torch.full_like(rows, 1 / len(rows)), torch.eye(len(columns), dtype=torch.float64)
        rows = (1 - ROW_SHRINKAGE) * rows / total + ROW_SHRINKAGE / len(rows)
        return rows, root(columns, _COLUMN_SHRINKAGE)


@dataclass(frozen=True, slots=True)
class Table:
    """A table E (tokens, d) in coordinates of its metric."""

    squares: Tensor  # (d,) what dropping each direction loses, for one token, descending
    vectors: Tensor  # (d, d) their directions, as columns
    column_root: Tensor  # L (d, d)

    def cut(self, weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
        """Factors (tokens, r) and up (d, r) float64 of E, the best of this rank; the columns of `up` are orthonormal.

        Raises:
            RankError: rank is not in 1..d - 1.
        """
        if not 1 <= rank < len(self.squares):
            raise RankError(f"the rank of an embedding must be in 1..{len(self.squares) - 1}, got {rank}")
        leading = self.vectors[:, :rank]
        up, mixing = torch.linalg.qr(torch.linalg.solve_triangular(self.column_root.T, leading, upper=True))
        table = weight.to(torch.float64) @ (self.column_root @ leading @ mixing.T)
        return table, up

    def relative_error(self, rank: int) -> float:
        """Root of the share of the squares that this rank drops."""
        total = float(self.squares.sum())
        return float((self.squares[rank:].sum() / total) ** 0.5) if total > 0 else 0.0


@torch.no_grad()
def decompose_table(weight: Tensor, moments: TableMoments | None) -> Table:
    """Decompose an embedding table; without moments all rows and columns weigh the same.

    Args:
        weight: (tokens, d), of any floating-point type.
        moments: what calibration saw of it.

    Raises:
        WeightError: weight or moments are not finite.

    Cost: tokens d^2 multiply-adds and one symmetric eigenproblem of order d.

    Source: K-FAC, arXiv 1503.05671, on one-hot inputs.

    >>> table = decompose_table(torch.ones(5, 1) @ torch.tensor([[3.0, 4.0]]), None)
    >>> rows, up = table.cut(torch.ones(5, 1) @ torch.tensor([[3.0, 4.0]]), 1)
    >>> torch.round(rows @ up.T, decimals=4)[0]
    tensor([3., 4.], dtype=torch.float64)
    """
    full = weight.detach().to("cpu", torch.float64)
    if not bool(torch.isfinite(full).all()):
        raise WeightError("the embedding has values that are NaN or infinite")
    rows, columns = (moments or TableMoments.zeros(*full.shape)).metric()
    scaled = rows.sqrt()[:, None] * full @ columns
    values, vectors = torch.linalg.eigh(scaled.T @ scaled)
    signs = vectors.gather(0, vectors.abs().argmax(0, keepdim=True)).sign()
    return Table(values.clamp_min(0).flip(0), (vectors * signs).flip(1), columns)
