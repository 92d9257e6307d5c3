"""A stack of matrices, one for each expert, held as a stack of low-rank products in the place of a 3-D parameter.

The experts' own forward stays as it is. It asks for `self.gate_up_proj[i]` and multiplies, or hands the whole stack to
a batched or grouped product: what it gets answers these with two thinner products, and forms numbers for the rest.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hf_reparam.compat.marks import set_initialized
from hf_reparam.errors import WeightError
from hf_reparam.layers.factored import Factored, Product

__all__ = ["ExpertWeight", "LowRankExperts"]

_ALIGNMENT = 16  # bytes: what grouped products ask of the length of a row


class _Weights:
    """What tensor functions and experts ask alike of the whole parameter and of one expert's matrix."""

    shape: torch.Size

    def size(self, dim: int | None = None) -> Any:
        return self.shape if dim is None else self.shape[dim]

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        return _call(func, args, kwargs or {})


class LowRankExperts(_Weights, Factored):
    """W_i = up_i @ down_i for every expert i, in the place of a parameter (experts, out, in) or (experts, in, out).

    Answers what experts ask of that parameter: `[i]`, `transpose`, `shape`, `dtype`, `device`, and being multiplied.
    In the eager implementation, and in "batched_mm", "grouped_mm" and `torch.bmm`, no dense weight is formed. Grouped
    products want rows of a multiple of 16 bytes: other ranks are padded in every pass, which copies the factors. It is
    compiled and exported as dense experts are, but for "grouped_mm" in bfloat16, at which a compiled graph breaks.

    Args:
        down: (experts, r, in).
        up: (experts, out, r).
        transposed: whether it stands for (experts, in, out).

    Cost: r (in + out) multiply-adds for each row that reaches an expert, against in * out.

    >>> weight = LowRankExperts(nn.Parameter(torch.ones(4, 2, 16)), nn.Parameter(torch.ones(4, 8, 2)))
    >>> weight.shape, F.linear(torch.ones(3, 16), weight[1]).shape, sum(p.numel() for p in weight.parameters())
    (torch.Size([4, 8, 16]), torch.Size([3, 8]), 192)
    """

    form = "experts"
    stands_for = ""
    bias = None

    def __init__(self, down: nn.Parameter, up: nn.Parameter, *, transposed: bool = False) -> None:
        super().__init__()
        self.transposed = transposed
        self.down, self.up = down, up

    def forward(
        self, x: Any, use: Callable[[Any, Tensor, Tensor], Any], index: Any = None, swapped: bool = False
    ) -> Any:
        """use(x, first, second) of two factors, whose product is the weight. A call: hooks bring in offloaded ones.

        Args:
            x: an input, which hooks may move to the factors; or None.
            use: what to do with them.
            index: an int or int64 tensor, which experts; None for all.
            swapped: whether first @ second is to be (in, out).
        """
        up, down = (self.up, self.down) if index is None else (self.up[index], self.down[index])
        return use(x, down.mT, up.mT) if swapped else use(x, up, down)

    @property
    def rank(self) -> int:  # type: ignore[override]
        return int(self.up.shape[2])

    @property
    def in_features(self) -> int:  # type: ignore[override]
        return int(self.down.shape[2])

    @property
    def out_features(self) -> int:  # type: ignore[override]
        return int(self.up.shape[1])

    def factors(self) -> tuple[Tensor, Tensor]:
        """(experts, out, r) and (experts, r, in)."""
        return self.up, self.down

    def stand_in(self, shape: tuple[int, int] | None = None) -> Any:
        """A parameter of the shape that it stands for, of one expert; its numbers are zeros."""
        return torch.zeros(1, *self.shape[1:])

    def fresh(self, deviation: float) -> Iterator[tuple[Tensor, float | Tensor]]:
        yield self.down, deviation
        yield self.up, self.rank**-0.5

    def stored_shape(self, stored: Mapping[str, tuple[int, ...]], path: str) -> tuple[int, int] | None:
        """Its own: experts are in no head."""
        return self.in_features, self.out_features

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        """As of any module: the marker of `Factored` has the name of a weight."""
        nn.Module._save_to_state_dict(self, destination, prefix, keep_vars)

    @property
    def weight(self) -> "ExpertWeight":  # type: ignore[override]
        """What experts take for the parameter."""
        return ExpertWeight(self, None, self.transposed)

    @property
    def shape(self) -> torch.Size:  # type: ignore[override]
        return self.weight.shape

    @property
    def dtype(self) -> torch.dtype:
        return self.up.dtype

    @property
    def device(self) -> torch.device:
        return self.up.device

    @property
    def mT(self) -> "ExpertWeight":  # noqa: N802  # torch's name
        return self.weight.mT

    def transpose(self, dim0: int, dim1: int) -> Any:
        return self.weight.transpose(dim0, dim1)

    def __len__(self) -> int:
        return int(self.up.shape[0])

    def __getitem__(self, index: Any) -> Any:
        return self.weight[index]

    def __setitem__(self, index: Any, value: Any) -> None:
        self.weight[index] = value

    def extra_repr(self) -> str:
        return f"{len(self)}, in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}"


class ExpertWeight(_Weights):
    """The weight of one expert, of some or of all, not yet multiplied out.

    Writing into it raises WeightError: it would be lost. What is no product with it sees numbers formed for the call.

    Args:
        owner: has the factors.
        index: an int or int64 tensor, which experts; None for all.
        swapped: whether it is (in, out).
    """

    def __init__(self, owner: LowRankExperts, index: Any, swapped: bool) -> None:
        self.owner, self.index, self.swapped = owner, index, swapped

    def use(self, x: Any, how: Callable[[Any, Tensor, Tensor], Any]) -> Any:
        """how(x, first, second) of the factors, whose product it is."""
        return self.owner(x, how, self.index, self.swapped)

    def formed(self) -> Any:
        """Its numbers, with gradients into both factors."""
        return self.use(None, lambda _, first, second: first @ second)

    @property
    def shape(self) -> torch.Size:  # type: ignore[override]
        """(experts, rows, columns), or (rows, columns) of one."""
        sizes = (self.owner.out_features, self.owner.in_features)
        if self.index is None:
            start: tuple[int, ...] = (len(self.owner),)
        else:
            start = tuple(self.index.shape) if isinstance(self.index, Tensor) else ()
        return torch.Size((*start, *(sizes[::-1] if self.swapped else sizes)))

    @property
    def dtype(self) -> torch.dtype:
        return self.owner.dtype

    @property
    def device(self) -> torch.device:
        return self.owner.device

    @property
    def mT(self) -> "ExpertWeight":  # noqa: N802  # torch's name
        return ExpertWeight(self.owner, self.index, not self.swapped)

    def transpose(self, dim0: int, dim1: int) -> Any:
        dims = len(self.shape)
        if {dim0 % dims, dim1 % dims} == {dims - 2, dims - 1}:
            return self.mT
        return _numbers(self).transpose(dim0, dim1)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, Tensor) and index.dim() == 0 and not index.is_floating_point():
            index = int(index)  # once, where each factor would wait for the device
        whole = isinstance(index, int) or (isinstance(index, Tensor) and index.dtype == torch.int64)
        if self.index is None and whole:
            return ExpertWeight(self.owner, index, self.swapped)
        return _numbers(self)[index]

    def __setitem__(self, index: Any, value: Any) -> None:
        raise WeightError(
            "setting numbers would be lost: weights of low-rank experts are up @ down, formed whenever they are read. "
            "Change the factors, up and down, or merge the model first"
        )

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(_numbers(self), name)


def _call(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """A function of torch that was given low-rank experts: by their factors if it multiplies by them."""
    name = getattr(func, "__name__", "")
    left, right = (_lazy(args[0]), _lazy(args[1])) if len(args) > 1 else (None, None)
    if name == "linear" and right is not None and left is None:
        bias = args[2] if len(args) > 2 else kwargs.get("bias")
        return right.use(args[0], lambda x, first, second: F.linear(F.linear(x, second), first, bias))
    if name in ("_grouped_mm", "grouped_mm", "grouped_mm_fallback") and right is not None and left is None:
        return right.use(args[0], lambda x, first, second: _grouped(func, x, first, second, *args[2:], **kwargs))
    if name in ("matmul", "bmm", "mm", "__matmul__") and len(args) == 2 and not kwargs:
        if right is not None and left is None:
            return right.use(args[0], lambda x, first, second: func(func(x, first), second))
        if left is not None and right is None:
            return left.use(args[1], lambda x, first, second: func(first, func(second, x)))
    return func(*map(_numbers, args), **{key: _numbers(value) for key, value in kwargs.items()})


def _grouped(func: Any, x: Tensor, first: Tensor, second: Tensor, *rest: Any, **kwargs: Any) -> Any:
    """x @ first @ second, each row with the matrices of its group."""
    spare = -first.shape[-1] % (_ALIGNMENT // first.element_size())
    if spare:
        first, second = F.pad(first, (0, spare)), F.pad(second, (0, 0, 0, spare))
    return func(func(x, first, *rest, **kwargs), second, *rest, **kwargs)


def _lazy(value: Any) -> ExpertWeight | None:
    """A value that stands for weights of experts; None for any other."""
    return value.weight if isinstance(value, LowRankExperts) else value if isinstance(value, ExpertWeight) else None


def _numbers(value: Any) -> Any:
    """A value with every weight of experts in it as a tensor, which refuses to be written into."""
    if isinstance(value, (list, tuple)):
        return type(value)(map(_numbers, value))
    weight = _lazy(value)
    if weight is None:
        return value
    if torch.compiler.is_compiling():  # knows no such tensor
        return weight.formed()
    return Product(weight.formed, weight.owner.up, tuple(weight.shape))


set_initialized(LowRankExperts)  # the numbers that classes draw for their parameters are not for it
