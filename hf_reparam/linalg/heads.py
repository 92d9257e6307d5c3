"""Narrower heads: queries with keys, and values with outputs, of each head approximated as wholes.

A head scores tokens by s_ij = q_i . k_j and returns W_O sum_j a_ij v_j. Put a matrix P of rank w between the two sides
of each product, q_i . P k_j and W_O P v_j: written as P = F E with E (w, d) and F (d, w) it makes the head w wide, E
applied to one side and F^T to the other. Every approximation of rank w of W_Q^T W_K and of W_O W_V has this form,
biases included, for q and k are what the projections give.

The best P is one singular value decomposition of the identity (d, d) in a metric. For keys the change is (P - I) k, so
that K-FAC's model of the loss increase is tr G (P - I) C (P - I)^T, with C the covariance of keys (their mean adds the
same to all scores of a query, which softmax ignores) and G the second moment of the gradient at the keys,
sum_i (dl/ds_ij) q_i: the queries, weighted by what scores matter. For values the same with what the output projection
gets, and its gradient W_O^T G W_O. Both are in the unit of every other layer. What P does to means the bias of the
output projection takes back.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from hf_reparam.linalg.factorize import decompose
from hf_reparam.linalg.metric import Metric, root
from hf_reparam.linalg.moments import SHRINKAGES


@dataclass(frozen=True, slots=True)
class HeadMaps:
    """Into heads of width w, for all heads of one attention.

    Args:
        query, key: (heads, w, d) float64: narrower queries are `query` times queries, and query^T key = P.
        value: (heads, w, d) float64, E.
        output: (heads, w, d) float64, F^T: the columns of W_O are multiplied by it.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    output: Tensor

    def cut(self, width: int) -> "HeadMaps":
        """The maps into a smaller width, for the same P as the first rows, balanced between its two sides.

        In the metric's own coordinates queries may come out a thousand times larger than keys, which training does not
        survive. Of P = U S V^T, U S^1/2 and S^1/2 V^T are balanced, and rotations at full width.
        """
        query, key = _balanced(self.query[:, :width], self.key[:, :width])
        output, value = _balanced(self.output[:, :width], self.value[:, :width])
        return HeadMaps(query, key, value, output)


def _balanced(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """Maps (heads, w, d) with the same left^T right."""
    u, s, v = torch.linalg.svd(left.mT @ right)
    width = left.shape[1]
    u, v = u[:, :, :width].mT, v[:, :width]
    signs = v.gather(2, v.abs().argmax(2, keepdim=True)).sign()  # the largest entry positive, for the same bytes
    scale = signs * s[:, :width, None].sqrt()
    return u * scale, v * scale


@dataclass(frozen=True, slots=True)
class HeadMoments:
    """What decides how narrow heads of one attention can be: second moments of a token, (heads d, heads d) float64.

    >>> eye = torch.eye(4, dtype=torch.float64)
    >>> moments = HeadMoments(2, eye, eye, eye, eye)
    >>> maps = moments.maps()
    >>> maps.query.shape, maps.cut(1).query.shape
    (torch.Size([2, 2, 2]), torch.Size([2, 1, 2]))
    >>> [round(error, 6) for error in moments.errors(maps.cut(1))]
    [2.0, 2.0]
    """

    heads: int  # how many
    keys: Tensor  # covariance of the keys
    queries: Tensor  # second moment of the gradient at the keys; without gradients that of the queries
    values: Tensor  # covariance of what the output projection gets
    outputs: Tensor  # W_O^T G W_O, with G the second moment of the gradient at the output; without gradients W_O^T W_O

    def maps(self) -> HeadMaps:
        """The maps of full width, the best directions first.

        Cost: two decompositions of order d for each head.

        Source: the two products of a head as wholes: MoDeGPT, arXiv 2408.09632, there in the metric of inputs alone.
        """
        query, key = self._split(self.keys, self.queries)
        output, value = self._split(self.values, self.outputs)
        return HeadMaps(query, key, value, output)

    def _split(self, inner: Tensor, outer: Tensor) -> tuple[Tensor, Tensor]:
        """F^T and E of every head, (heads, d, d)."""
        size = inner.shape[0] // self.heads
        identity, parts = torch.eye(size, dtype=torch.float64), []
        for head in range(self.heads):
            block = slice(head * size, (head + 1) * size)
            roots = root(inner[block, block], SHRINKAGES[0][0]), root(outer[block, block], SHRINKAGES[0][1])
            parts.append(decompose(identity, metric=Metric(*roots)).cut(size))
        return torch.stack([up.T for up, _ in parts]), torch.stack([down for _, down in parts])

    def errors(self, maps: HeadMaps) -> tuple[float, float]:
        """tr G (P - I) C (P - I)^T of queries and keys, and of values and outputs; terms between heads are counted."""
        return (
            _dropped(self.keys, self.queries, maps.query, maps.key),
            _dropped(self.values, self.outputs, maps.output, maps.value),
        )

    def relative_error(self, maps: HeadMaps) -> float:
        """Root of the errors' share of what no head at all would lose."""
        nothing = (float((self.keys * self.queries).sum()), float((self.values * self.outputs).sum()))
        lost = sum(max(error, 0.0) for error in self.errors(maps))
        return float((lost / sum(nothing)) ** 0.5) if sum(nothing) > 0 else 0.0


def _dropped(inner: Tensor, outer: Tensor, left: Tensor, right: Tensor) -> float:
    change = left.mT @ right - torch.eye(left.shape[2], dtype=torch.float64)
    return float((map_both(inner, change) * outer).sum())


def map_rows(matrix: Tensor, maps: Tensor) -> Tensor:
    """(heads d, n) -> (heads w, n): the rows of each head multiplied by its map (w, d)."""
    heads, _, size = maps.shape
    return (maps @ matrix.reshape(heads, size, -1)).flatten(0, 1)


def map_both(square: Tensor, maps: Tensor) -> Tensor:
    """(heads d, heads d) -> (heads w, heads w): a second moment of what is mapped."""
    return map_rows(map_rows(square, maps).T, maps).T


def output_moment(weight: Tensor, bias: Tensor | None, products: Tensor, mean: Tensor) -> Tensor:
    """E y y^T (out, out) of y = W x + b, from E x x^T and E x; all float64."""
    moment = weight @ products @ weight.T
    if bias is not None:
        shift = torch.outer(weight @ mean, bias)
        moment += shift + shift.T + torch.outer(bias, bias)
    return moment
