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
from hf_reparam.linalg.factorize import working_device

Use = Callable[[Any, Tensor, Tensor], Any]  # of an input, and the two factors of a weight in the order of their product

_ALIGNMENT = 16  # bytes: what grouped products ask of the length of a row


class _Weights:
    """What experts ask of their parameter, and of one expert's matrix in it: `weight` says which it is."""

    weight: Any

    @property
    def shape(self) -> torch.Size:
        """(experts, rows, columns), or (rows, columns) of one."""
        owner, index = self.weight.owner, self.weight.index
        sizes = (owner.out_features, owner.in_features)
        if index is None:
            start: tuple[int, ...] = (len(owner),)
        else:
            start = tuple(index.shape) if isinstance(index, Tensor) else ()
        return torch.Size((*start, *(sizes[::-1] if self.weight.swapped else sizes)))

    @property
    def dtype(self) -> torch.dtype:
        return self.weight.owner.up.dtype

    @property
    def device(self) -> torch.device:
        return self.weight.owner.up.device

    @property
    def mT(self) -> "ExpertWeight":  # noqa: N802  # torch's name
        return ExpertWeight(self.weight.owner, self.weight.index, not self.weight.swapped)

    def transpose(self, dim0: int, dim1: int) -> Any:
        dims = len(self.shape)
        if {dim0 % dims, dim1 % dims} == {dims - 2, dims - 1}:
            return self.mT
        return _numbers(self).transpose(dim0, dim1)

    def size(self, dim: int | None = None) -> Any:
        return self.shape if dim is None else self.shape[dim]

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, Tensor) and index.dim() == 0 and not index.is_floating_point():
            index = int(index)  # once, where each factor would wait for the device
        whole = isinstance(index, int) or (isinstance(index, Tensor) and index.dtype == torch.int64)
        if self.weight.index is None and whole:
            return ExpertWeight(self.weight.owner, index, self.weight.swapped)
        return _numbers(self)[index]

    def __setitem__(self, index: Any, value: Any) -> None:
        raise WeightError(
            "setting numbers would be lost: weights of low-rank experts are up @ down, formed whenever they are read. "
            "Change the factors, up and down, or merge the model first"
        )

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
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
        _, self.rank, self.in_features = down.shape
        self.out_features = up.shape[1]

    def forward(self, x: Any, use: Use, index: Any = None, swapped: bool = False) -> Any:
        """use(x, first, second) of the factors of an `ExpertWeight`. A call: hooks bring in offloaded ones."""
        up, down = (self.up, self.down) if index is None else (self.up[index], self.down[index])
        return use(x, down.mT, up.mT) if swapped else use(x, up, down)

    def factors(self) -> tuple[Tensor, Tensor]:
        return self.up, self.down

    def product(self, expert: int) -> Tensor:
        """(out, in) of one expert, formed in float64 on its working device, detached."""
        up, down = (part.detach()[expert].to(working_device(part), torch.float64) for part in self.factors())
        return up @ down

    def stand_in(self) -> Any:
        """A parameter of the shape that it stands for, for one expert."""
        return nn.Parameter(torch.zeros(1, *self.shape[1:]))

    def fresh(self, deviation: float) -> Iterator[tuple[Tensor, float | Tensor]]:
        yield self.down, deviation
        yield self.up, self.rank**-0.5

    @property
    def weight(self) -> "ExpertWeight":  # type: ignore[override]
        return ExpertWeight(self, None, self.transposed)

    def __len__(self) -> int:
        return int(self.up.shape[0])

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

    @property
    def weight(self) -> "ExpertWeight":
        return self

    def use(self, x: Any, how: Use) -> Any:
        """how(x, first, second) of the factors, whose product it is."""
        return self.owner(x, how, self.index, self.swapped)

    def formed(self) -> Any:
        """Its numbers, with gradients into both factors."""
        return self.use(None, lambda _, first, second: first @ second)

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
    return value.weight if isinstance(value, _Weights) else None


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
