"""How the error of a layer falls with its rank, judged on data that its factors were not made from.

With factors made from one part of the calibration data, the error on the held-out part is
tr G' (W - W_r) C' (W - W_r)^T, with that part's moments C' and G'. In-sample singular values promise less than that:
by a few percent where rows are many, many times where they are few.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_reparam.linalg.factorize import Decomposition, decompose, spectrum, working_device
from hf_reparam.linalg.moments import SHRINKAGES, LayerMoments, Shrinkage

_MANY = 50  # rows for each input, from which on the least shrinkage is taken without a trial
_TINY = 1e-300


@dataclass(frozen=True, slots=True)
class Curve:
    """What a layer loses at every rank."""

    losses: Tensor  # (min(out, in),) float64 on the CPU: what dropping each direction adds, per token
    shrinkage: Shrinkage  # of the moments, with which it was made; factors are to be made with it, too


@torch.no_grad()
def curve(weight: Tensor, moments: LayerMoments, metric: str, *, centred: bool) -> Curve:
    """The loss of a weight (out, in) at every rank, with the shrinkage that suits its data best.

    With held-out moments, factors from the other part are judged on them, for each shrinkage; the best one is that of
    the least geometric mean of the errors at a half, a quarter and an eighth of the full rank. Without, squared
    singular values and the least shrinkage.

    Cost: for each shrinkage a full decomposition and four products of its size.
    """
    device = working_device(weight)
    if moments.held is None or not moments.held.tokens:
        metric_of_all = moments.metric(metric, centred=centred, device=device)
        return Curve(spectrum(weight, metric_of_all).cpu(), SHRINKAGES[0])
    fitting = moments.fitting()
    many = fitting.tokens >= _MANY * weight.shape[1]
    second = moments.held.second_moments(metric, device=device, centre=fitting.mean() if centred else None)
    tried = {}
    for shrinkage in SHRINKAGES[:1] if many else SHRINKAGES:
        coordinates = fitting.metric(metric, centred=centred, device=device, shrinkage=shrinkage)
        tried[shrinkage] = _tails(decompose(weight, metric=coordinates), *second)
    best = min(tried, key=lambda shrinkage: _score(tried[shrinkage]))
    falling = tried[best].clamp_min(0).flip(0).cummax(0).values.flip(0)  # no higher rank counts for worse than a lower
    return Curve(falling - torch.cat([falling[1:], falling.new_zeros(1)]), best)


def _score(errors: Tensor) -> float:
    """Logarithm of the errors' product at three ranks."""
    return sum(math.log(max(float(errors[len(errors) // part]), _TINY)) for part in (2, 4, 8))


def _tails(found: Decomposition, inputs: Tensor, gradients: Tensor | None) -> Tensor:
    """(k,) the error of the cut at rank 0, 1, ... k - 1 in another metric: (in, in), and (out, out) or None."""
    left = found.left.T @ found.left if gradients is None else found.left.T @ gradients @ found.left
    right = found.right @ inputs @ found.right.T
    products = left * right * torch.outer(found.singular_values, found.singular_values)
    rows = 2 * products.triu(1).sum(1) + products.diagonal()
    return rows.flip(0).cumsum(0).flip(0).cpu()
