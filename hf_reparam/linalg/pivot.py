"""Pivots: a matrix of rank r written by r of its columns and the combinations of them that give the others.

W = up @ down of rank r has r columns W[:, p] of which every other column is a combination: W x = C (x[p] + S x[rest])
with C = W[:, p] (out, r) and S (r, in - r). That is r^2 fewer parameters than the pair, and always fewer than the
dense weight. Which columns: those of nearly the largest volume, for which no entry of S is much above 1.
"""

import torch
from torch import Tensor

BOUND = 1.05
"""No entry of S is larger than this."""

_MAX_SWAPS = 10_000  # every swap multiplies the volume by BOUND or more; LU with partial pivoting leaves tens of them


@torch.no_grad()
def pivot(up: Tensor, down: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Write up @ down by its pivots; the product is the same but for rounding, whatever its true rank.

    Args:
        up: (out, r) float64.
        down: (r, in) float64, r < in.

    Returns:
        C (out, r) float64, columns of the product; S (r, in - r) float64, entries at most BOUND; and the order (in,)
        int64 in which the product's columns are C (I S): the r pivots, ascending, then the others, ascending.

    Cost: one LU factorization of down^T, in r^2 multiply-adds, and r (in - r) for each swap (tens of them).

    Source: the pivoted form of rank-r matrices, PIFA, arXiv 2501.19090 (there with rows, see docs/decisions); maximal
    volume by swaps, S. Goreinov et al., How to find a good submatrix, 2010.

    >>> columns, combinations, order = pivot(torch.ones(3, 1).double(), torch.tensor([[1.0, 4.0, 2.0]]).double())
    >>> columns.T, combinations, order
    (tensor([[4., 4., 4.]], dtype=torch.float64), tensor([[0.2500, 0.5000]], dtype=torch.float64), tensor([1, 0, 2]))
    """
    rank, width = down.shape
    lu, swaps, _ = torch.linalg.lu_factor_ex(down.T)  # a zero on the diagonal of U does no harm here
    order = torch.arange(width)
    for row, other in enumerate((swaps - 1).tolist()):
        order[[row, other]] = order[[other, row]]
    # down^T = L U by rows: down[:, rest] = down[:, p] S with S^T = L_rest L_p^-1, for a singular U, too
    below = torch.linalg.solve_triangular(lu[:rank], lu[rank:], upper=False, left=False, unitriangular=True)
    combinations = _maximise_volume(below.T.contiguous(), order)
    kept, rest = order[:rank].argsort(), order[rank:].argsort()
    order = torch.cat([order[:rank][kept], order[rank:][rest]]).to(down.device)
    return up @ down[:, order[:rank]], combinations[kept][:, rest].contiguous(), order


def _maximise_volume(s: Tensor, order: Tensor) -> Tensor:
    """Swap pivots until no |S_ij| is above BOUND. Changes `order` (in,) and s (r, in - r)."""
    rank, others = s.shape
    for _ in range(_MAX_SWAPS):
        i, j = divmod(int(s.abs().argmax()), others)
        value = s[i, j].clone()
        if abs(float(value)) <= BOUND:
            break
        column, row = s[:, j].clone(), s[i].clone()
        column[i] -= 1
        row[j] += 1
        s -= torch.outer(column, row) / value
        order[[i, rank + j]] = order[[rank + j, i]]
    return s
