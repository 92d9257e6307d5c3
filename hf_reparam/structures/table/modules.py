"""Embeddings of low rank: a table of r numbers for each token and one matrix up, shared with a tied output head."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from hf_reparam.layers.factored import Factored

__all__ = ["Factor", "LowRankEmbedding", "LowRankHead", "LowRankTable", "low_rank_tables", "stock_tables"]


class Factor(nn.Module):
    """One matrix W (out, in), y = x W^T. No `nn.Linear`: adapters and quantizers would change one side of a tie only.

    It is called, not read: hooks that bring offloaded or partitioned parameters in wait for the call.

    Args:
        weight: its numbers.
    """

    def __init__(self, weight: nn.Parameter) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """(..., in) -> (..., out)."""
        return F.linear(x, self.weight, bias)


class Transposed(Factor):
    """The same matrix the other way, y = x W."""

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """(..., out) -> (..., in)."""
        return F.linear(x, self.weight.T, bias)


class Rows(Factor):
    """The same matrix as a table, W[ids].

    Args:
        weight: its numbers.
        padding_idx: row that gets no gradient.
    """

    def __init__(self, weight: nn.Parameter, padding_idx: int | None) -> None:
        super().__init__(weight)
        self.padding_idx = padding_idx

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """(...) int -> (..., in)."""
        return F.embedding(x, self.weight, self.padding_idx)


class LowRankTable(Factored):
    """E (tokens, d) = table (tokens, r) @ up (d, r)^T; `weight` answers as the dense table's would."""

    form = "table"

    def __init__(self, table: Factor, up: Factor) -> None:
        super().__init__()
        self.table, self.up = table, up

    @property
    def rank(self) -> int:  # type: ignore[override]
        """Numbers for each token."""
        return int(self.table.weight.shape[1])

    @property
    def out_features(self) -> int:  # type: ignore[override]
        """Tokens."""
        return int(self.table.weight.shape[0])

    @property
    def in_features(self) -> int:  # type: ignore[override]
        """Width d."""
        return int(self.up.weight.shape[0])

    def stand_in(self, shape: tuple[int, int] | None = None) -> nn.Module:
        """An embedding of its or another shape (width, tokens); its numbers are not set."""
        width, tokens = shape or (self.in_features, self.out_features)
        like = self.up.weight
        return nn.utils.skip_init(nn.Embedding, tokens, width, dtype=like.dtype, device=like.device)

    def fresh(self, deviation: float) -> Iterator[tuple[Tensor, float | Tensor]]:
        """Its tensors, with the deviation to draw each with."""
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
    """ids -> up (table[ids]): an embedding of r numbers for each token.

    Args:
        table: (tokens, r).
        up: (d, r).
        padding_idx: token whose row gets no gradient.

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
        """Tokens."""
        return self.out_features

    @property
    def embedding_dim(self) -> int:
        """Width d."""
        return self.in_features

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002  # the name that the dense layer gives it
        """(...) int -> (..., d)."""
        out: Tensor = self.up(self.table(input))
        return out


class LowRankHead(LowRankTable):
    """h -> table (up^T h) + bias: the output layer that shares an embedding's factors.

    Args:
        table: (tokens, r).
        up: (d, r).
        bias: (tokens,), or none.

    Cost: r (d + tokens) multiply-adds for each row.
    """

    def __init__(self, table: nn.Parameter, up: nn.Parameter, bias: nn.Parameter | None) -> None:
        super().__init__(Factor(table), Transposed(up))
        self.bias = bias

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002  # the name that the dense layer gives it
        """(..., d) -> (..., tokens)."""
        out: Tensor = self.table(self.up(input), self.bias)
        return out


def low_rank_tables(members: Iterable[nn.Module], table: nn.Parameter, up: nn.Parameter) -> dict[nn.Module, nn.Module]:
    """Dense module -> low-rank one, for all modules that hold one table; they share the factors."""
    made: dict[nn.Module, nn.Module] = {}
    for module in members:
        if isinstance(module, nn.Embedding):
            made[module] = LowRankEmbedding(table, up, padding_idx=module.padding_idx)
        else:
            made[module] = LowRankHead(table, up, _copied(module.bias))
        made[module].train(module.training)
    return made


def stock_tables(members: Iterable[nn.Module], weight: nn.Parameter) -> dict[nn.Module, nn.Module]:
    """Low-rank module -> dense one, for all modules that share one pair of factors; they share the table."""
    made: dict[nn.Module, nn.Module] = {}
    for module in members:
        dense: Any
        if isinstance(module, LowRankEmbedding):
            dense = nn.Embedding(1, 1, device="meta")
            dense.num_embeddings, dense.embedding_dim = weight.shape
            dense.padding_idx = module.padding_idx
        else:
            dense = nn.Linear(1, 1, bias=module.bias is not None, device="meta")
            dense.out_features, dense.in_features = weight.shape
            dense.bias = _copied(module.bias)
        dense.weight = weight
        made[module] = dense.train(module.training)
    return made


def _copied(bias: Any) -> nn.Parameter | None:
    return None if bias is None else nn.Parameter(bias.detach().clone(), bias.requires_grad)
