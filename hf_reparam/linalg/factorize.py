"""Singular value decomposition of a weight through the Gram matrix of its smaller side.

For W (m, n) with m <= n the left singular vectors U are the eigenvectors of W W^T, and the best approximation of rank
r is the projection U_r U_r^T W (Eckart and Young, 1936). One symmetric eigenproblem of order min(m, n) costs a
fraction of a full SVD. The price, squared singular values, is paid back where it would show: see `_leading`.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_reparam.config import SOLVERS
from hf_reparam.errors import RankError, TargetError, WeightError
from hf_reparam.linalg.metric import Metric

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_OVERSAMPLING = 32  # eigenvectors beyond the rank that the single-precision search hands to the refinement
_SMALL = 256  # below this order the double-precision eigenproblem is cheap, and the search gains nothing
_SEARCH_EXCESS = 1e-7  # energy above the optimum, relative to the tail, that the search is trusted with
_GRAM_TAIL = 1e-8  # relative tail energy below which the Gram matrix, at ~1e-16, cannot rank directions to 1e-7
_COLUMNS = 2048  # that are cast to float32 at a time
_POWER_STEPS = 2  # of the random sketch
_NO_FLOAT64 = ("mps",)  # devices whose weights are decomposed on the CPU


@dataclass(frozen=True, slots=True)
class Decomposition:
    """W = left @ diag(singular_values) @ right + what was not computed."""

    left: Tensor  # (out, k) float64, L_G^-T U with orthonormal U
    singular_values: Tensor  # (k,) float64, descending
    right: Tensor  # (k, in) float64, V L_C^-1 with orthonormal V (zero where the singular value is zero)
    energy: float  # ||W||_F^2, the sum of *all* squared singular values

    def cut(self, rank: int) -> tuple[Tensor, Tensor]:
        """Factors up (out, r) and down (r, in) float64 of the best approximation of this rank.

        Singular values are split evenly between the two, which gives both the same norm: that keeps half precision in
        range and gradients balanced.

        Raises:
            RankError: rank is below 1 or above the number of computed singular values.
        """
        self._check(rank)
        root = self.singular_values[:rank].sqrt()
        return self.left[:, :rank] * root, root[:, None] * self.right[:rank]

    def relative_error(self, rank: int) -> float:
        """||W - W_r|| / ||W|| of this rank in the metric's norm, before it is rounded to the weight's dtype.

        The root of what the squares leave of the energy: below about 1e-8 it says no more than that.
        """
        self._check(rank)
        if self.energy == 0.0:
            return 0.0
        tail = self.energy - float(self.singular_values[:rank].square().sum())
        return (max(tail, 0.0) / self.energy) ** 0.5

    def _check(self, rank: int) -> None:
        if not 1 <= rank <= len(self.singular_values):
            raise RankError(f"rank must be in 1..{len(self.singular_values)}, got {rank}")


@torch.no_grad()
def decompose(
    weight: Tensor, *, max_rank: int | None = None, metric: Metric | None = None, solver: str = "exact"
) -> Decomposition:
    """Decompose a weight so that it can be cut at any rank up to `max_rank`.

    The squared error of every cut is within 1e-6, relative, of the optimum sum_{i>r} sigma_i^2; with the randomized
    solver see there.

    Args:
        weight: (out, in), float16, bfloat16, float32 or float64, on any device; not modified.
        max_rank: singular values to compute, 1..min(out, in); None for all.
        metric: what is decomposed is M = L_G^T W L_C instead of W, and the factors are L_G^-T [M]_r L_C^-1; the error
            and the energy are those of M, on `working_device(weight)`. None for W itself.
        solver: "exact", or "randomized": the leading vectors of a random sketch of 2 r + 32 columns for r = max_rank,
            after two power iterations. Its squared error at rank r is expected to be below 3 times the optimum (before
            the iterations: 2 + r / (r + 31) times; of a Gaussian 4096 x 11008 at rank 128 it is 1.009 times). The error
            that is reported is that of the factors. Where the sketch is wider than half of min(out, in), the exact
            solver is used.

    Returns:
        A Decomposition on `working_device(weight)`.

    Raises:
        WeightError: the weight has no data (meta device), is not of a plain floating-point type, or is not finite.
        RankError: max_rank is out of range.

    Cost: one Gram matrix, m^2 n multiply-adds for m = min(out, in), and one eigenproblem of order m; for
    max_rank below about m / 2 that eigenproblem is solved in float32 and its leading vectors are refined in float64.
    Randomized: six products of the weight with the sketch, 12 m n r multiply-adds. Memory: two to four times the
    weight in float64, by rank.

    Source: C. Eckart and G. Young, Psychometrika 1, 1936; Rayleigh-Ritz refinement and its a-posteriori bound as in
    B. Parlett, The Symmetric Eigenvalue Problem, 1998, chapter 11. Sketch: N. Halko, P.-G. Martinsson and J. Tropp,
    arXiv 0909.4061, theorem 10.5 for the range, to which cutting it to rank r adds at most the optimum.

    >>> w = torch.diag(torch.tensor([3.0, 2.0, 1.0]))
    >>> up, down = decompose(w).cut(2)
    >>> torch.round(up @ down, decimals=4).abs()
    tensor([[3., 0., 0.],
            [0., 2., 0.],
            [0., 0., 0.]], dtype=torch.float64)
    """
    _check_weight(weight)
    rows, cols = weight.shape
    rank = min(rows, cols) if max_rank is None else max_rank
    if isinstance(rank, bool) or not 1 <= rank <= min(rows, cols):
        raise RankError(f"rank must be in 1..{min(rows, cols)} for a {rows} x {cols} weight, got {rank}")
    if solver not in SOLVERS:
        raise TargetError(f"solver must be one of {list(SOLVERS)}, got {solver!r}")
    wide = rows <= cols
    full = _double(weight, metric)
    low, high = full.aminmax()
    scale = max(-float(low), float(high)) or 1.0  # squares of 1e-200 would vanish
    if not math.isfinite(scale):
        bad = int((~torch.isfinite(full)).sum())
        raise WeightError(f"{bad} of {full.numel()} values are NaN or infinite")
    a = full.div_(scale) if wide else full.div_(scale).T
    near, across = _sketch(a, rank) if solver == "randomized" and 2 * _width(rank) <= a.shape[0] else _leading(a, rank)
    sigma = across.norm(dim=1)
    order = sigma.argsort(descending=True, stable=True)
    sigma = sigma[order]
    near, far = near[:, order], across[order].div_(sigma.clamp_min(torch.finfo(torch.float64).tiny)[:, None])
    signs = near.gather(0, near.abs().argmax(0, keepdim=True)).sign()  # the largest entry positive, for the same bytes
    near, far = near.mul_(signs), far.mul_(signs.T)
    left, right = (near, far) if wide else (far.T, near.T)
    if metric is not None:
        left, right = metric.unapply_left(left), metric.unapply_right(right)
    return Decomposition(left, sigma * scale, right, _energy(a) * scale**2)


@torch.no_grad()
def spectrum(weight: Tensor, metric: Metric | None = None) -> Tensor:
    """All squared singular values of L_G^T W L_C, (min(out, in),) float64, descending, without the vectors.

    Args, Raises: as `decompose`.
    """
    _check_weight(weight)
    full = _double(weight, metric)
    if not bool(torch.isfinite(full).all()):
        raise WeightError("the weight has values that are NaN or infinite")
    values = torch.linalg.eigvalsh(_gram(full if full.shape[0] <= full.shape[1] else full.T))
    return values.clamp_min(0).flip(0)


def working_device(weight: Tensor) -> torch.device:
    """Where a weight is decomposed: on its own device, or on the CPU if that device has no float64."""
    return torch.device("cpu") if weight.device.type in _NO_FLOAT64 else weight.device


def _double(weight: Tensor, metric: Metric | None) -> Tensor:
    """L_G^T W L_C in float64, a new tensor."""
    device = working_device(weight)
    if metric is None:
        return weight.detach().to(device, torch.float64, copy=True)
    return metric.apply(weight.detach().to(device, torch.float64))


def _check_weight(weight: Tensor) -> None:
    """Raise WeightError unless the weight is a matrix with data of a plain floating-point type."""
    if weight.dim() != 2:
        raise WeightError(f"a weight must be a matrix, got shape {tuple(weight.shape)}")
    if weight.device.type == "meta":
        raise WeightError("the weight is on the meta device and has no data: load the model onto a real device first")
    plain = type(weight) in (Tensor, torch.nn.Parameter) and weight.layout is torch.strided
    if not plain or weight.dtype not in _DTYPES:
        raise WeightError(
            f"the weight is a {type(weight).__name__} of {weight.layout}, {weight.dtype}; plain float16, bfloat16, "
            "float32 and float64 tensors can be factored: convert the model first and quantize or shard it afterwards"
        )


def _leading(a: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """U and U^T a, U the leading left singular vectors of a (m, n), m <= n, float64, largest number 1, in any order.

    Three solvers, each used only where its error is known to be far below the tail it leaves: single-precision search
    with double-precision refinement; the double-precision Gram matrix; a full SVD for a tail near rounding.
    """
    order = a.shape[0]
    partial = order >= _SMALL and 2 * (rank + _OVERSAMPLING) <= order
    if partial and (found := _search(a, rank)) is not None:
        return found
    vectors = torch.linalg.eigh(_gram(a))[1][:, -rank:]
    across = vectors.T @ a
    energy = _energy(a)
    if rank < order and energy - float(across.square().sum()) < _GRAM_TAIL * energy:
        left, sigma, right = torch.linalg.svd(a, full_matrices=False)
        return left[:, :rank], sigma[:rank, None] * right[:rank]
    return vectors, across


def _search(a: Tensor, rank: int) -> tuple[Tensor, Tensor] | None:
    """U and U^T a from a float32 eigenproblem and one float64 Rayleigh-Ritz step, or None if they may be off.

    With Ritz vectors X of theta_1..theta_r in the searched space Q, and R = (I - Q Q^T) a a^T X, the energy missed is
    at most ||R||_F^2 / (theta_r - lambda), lambda the largest eigenvalue outside of Q. R is formed in float32: its
    rounding adds about 1e-7 of the energy's square root, which makes the test stricter where it matters.
    """
    values, vectors = torch.linalg.eigh(_gram(a, torch.float32))
    width = rank + _OVERSAMPLING
    q = torch.linalg.qr(vectors[:, -width:].to(torch.float64))[0]
    projected = q.T @ a
    theta, rotation = torch.linalg.eigh(_gram(projected))
    rotation = rotation[:, -rank:]
    across = rotation.T @ projected
    image = torch.zeros(a.shape[0], rank, device=a.device)
    for start in range(0, a.shape[1], _COLUMNS):
        columns = slice(start, start + _COLUMNS)
        image.addmm_(a[:, columns].float(), across[:, columns].T.float())
    basis = q.float()
    residual = image - basis @ (basis.T @ image)
    gap = float(theta[-rank]) - float(values[-width - 1])
    tail = _energy(a) - float(theta[-rank:].sum())
    if gap <= 0 or float(residual.square().sum()) / gap > _SEARCH_EXCESS * tail:
        return None
    return q @ rotation, across


def _sketch(a: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """As `_leading`, from the range of a random sketch: float32 products, float64 from the range on."""
    generator = torch.Generator().manual_seed(0)
    single = a.float()
    sample = single @ torch.randn(a.shape[1], _width(rank), generator=generator).to(a.device)
    for _ in range(_POWER_STEPS):
        sample = single @ (single.T @ torch.linalg.qr(sample)[0])
    del single
    q = torch.linalg.qr(sample.to(torch.float64))[0]
    projected = q.T @ a
    rotation = torch.linalg.eigh(_gram(projected))[1][:, -rank:]
    return q @ rotation, rotation.T @ projected


def _width(rank: int) -> int:
    return 2 * rank + _OVERSAMPLING


def _energy(a: Tensor) -> float:
    """||a||_F^2, without a second matrix of squares."""
    return float(torch.linalg.vector_norm(a)) ** 2


def _gram(a: Tensor, dtype: torch.dtype = torch.float64, block: int = 256) -> Tensor:
    """The lower triangle of a a^T, which is all that eigh reads; above it only blocks on the diagonal are set.

    Columns are cast block by block: a whole matrix in another dtype would be half of the memory that `decompose` takes.
    """
    order = a.shape[0]
    gram = a.new_zeros(order, order, dtype=dtype)
    for start in range(0, a.shape[1], _COLUMNS):
        part = a[:, start : start + _COLUMNS].to(dtype)
        for i in range(0, order, block):
            gram[i:, i : i + block].addmm_(part[i:], part[i : i + block].T)
    return gram
