"""Embeddings of low rank: a table of r numbers for each token and one matrix up, shared with a tied output head."""

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from hf_reparam.layers.factored import Factored


class Factor(nn.Module):
    """One matrix W (out, in), y = x W^T, or the other way, y = x W.

    No `nn.Linear`: adapters and quantizers would change one side of a tie only. It is called, not read: hooks that
    bring offloaded or partitioned parameters in wait for the call.
    """

    def __init__(self, weight: nn.Parameter, *, transposed: bool = False) -> None:
        super().__init__()
        self.weight, self.transposed = weight, transposed

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        return F.linear(x, self.weight.T if self.transposed else self.weight, bias)


class Rows(Factor):
    """The same matrix as a table, W[ids]."""

    def __init__(self, weight: nn.Parameter, padding_idx: int | None) -> None:
        super().__init__(weight)
        self.padding_idx = padding_idx

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        return F.embedding(x, self.weight, self.padding_idx)


class LowRankTable(Factored):
    """E (tokens, d) = table (tokens, r) @ up (d, r)^T; `weight` answers as the dense table's would."""

    form = "table"

    def __init__(self, table: Factor, up: Factor) -> None:
        super().__init__()
        self.table, self.up = table, up
        (self.out_features, self.rank), self.in_features = table.weight.shape, len(up.weight)

    def stand_in(self) -> nn.Module:
        """An Embedding (tokens, width) or a Linear (width -> tokens); its values are not set."""
        like = self.up.weight
        return stock_table(self, nn.Parameter(like.new_empty(self.out_features, self.in_features), like.requires_grad))

    def fresh(self, deviation: float) -> Iterator[tuple[Tensor, float | Tensor]]:
        yield self.table.weight, deviation
        yield self.up.weight, self.rank**-0.5

    def stored_shape(self, stored: Mapping[str, tuple[int, ...]], path: str) -> tuple[int, int] | None:
        """(width, tokens) of the table that a file has under a path; its own where it is there under a tied name."""
        table, up = stored.get(f"{path}.table.weight", ()), stored.get(f"{path}.up.weight", ())
        return (up[0], table[0]) if len(table) == len(up) == 2 else (self.in_features, self.out_features)

    def factors(self) -> tuple[Tensor, Tensor]:
        """(tokens, r) and (r, d), whose product is the table."""
        return self.table.weight, self.up.weight.T

    def extra_repr(self) -> str:
        return f"{self.out_features}, {self.in_features}, rank={self.rank}"


class LowRankEmbedding(LowRankTable):
    """ids -> up (table[ids]): an embedding of r numbers for each token, from a table (tokens, r) and an up (d, r).

    Cost: r d multiply-adds for each token.

    >>> import torch
    >>> small = LowRankEmbedding(nn.Parameter(torch.ones(50, 2)), nn.Parameter(torch.ones(8, 2)))
    >>> small(torch.tensor([[3, 7, 1]])).shape, small.weight.shape, sum(p.numel() for p in small.parameters())
    (torch.Size([1, 3, 8]), torch.Size([50, 8]), 116)
    """

    def __init__(self, table: nn.Parameter, up: nn.Parameter, *, padding_idx: int | None = None) -> None:
        super().__init__(Rows(table, padding_idx), Factor(up))
        self.padding_idx = padding_idx

    @property
    def num_embeddings(self) -> int:
        return self.out_features

    @property
    def embedding_dim(self) -> int:
        return self.in_features

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002  # the name that the dense layer gives it
        return self.up(self.table(input))


class LowRankHead(LowRankTable):
    """h -> table (up^T h) + bias (tokens,): the output layer that shares an embedding's factors.

    Cost: r (d + tokens) multiply-adds for each row.
    """

    def __init__(self, table: nn.Parameter, up: nn.Parameter, bias: nn.Parameter | None) -> None:
        super().__init__(Factor(table), Factor(up, transposed=True))
        self.bias = bias

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002  # the name that the dense layer gives it
        return self.table(self.up(input), self.bias)


def low_rank_table(dense: Any, table: nn.Parameter, up: nn.Parameter) -> LowRankTable:
    """The low-rank module for an Embedding or Linear; it shares the factors."""
    if isinstance(dense, nn.Embedding):
        return LowRankEmbedding(table, up, padding_idx=dense.padding_idx).train(dense.training)
    return LowRankHead(table, up, _copied(dense.bias)).train(dense.training)


def stock_table(low: Any, weight: nn.Parameter) -> nn.Module:
    """The Embedding or Linear for a low-rank module; it shares the table (tokens, d)."""
    tokens, width = weight.shape
    dense: Any
    if isinstance(low, LowRankEmbedding):
        dense = nn.Embedding(tokens, width, low.padding_idx, device="meta")
    else:
        dense = nn.Linear(width, tokens, bias=False, device="meta")
        dense.bias = _copied(low.bias)
    dense.weight = weight
    return dense.train(low.training)


def _copied(bias: Tensor | None) -> nn.Parameter | None:
    return None if bias is None else nn.Parameter(bias.detach().clone(), bias.requires_grad)
