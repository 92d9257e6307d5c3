"""Sums over tokens, kept in float64 on the device that computes what is added to them, while there is room."""

import torch
from torch import Tensor

from hf_reparam.linalg.factorize import working_device

_BLOCK = 192  # columns
_FREE = 0.25  # of a device's memory, which sums leave to everything else


def widened(x: Tensor) -> Tensor:
    """In float32 or better, in which products are computed."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def add(total: Tensor, part: Tensor) -> Tensor:
    """The sum, which is `total` itself where that is on the device where it should be."""
    total = _beside(total, part)
    total += part.to(total.device, torch.float64)
    return total


def add_rows(total: Tensor, x: Tensor) -> Tensor:
    """As `add`, of the rows of x, summed in their own precision."""
    return add(total, x.sum(0))


class Gram:
    """A running sum of x^T x, (n, n), in float64. On a CPU no blocks below the diagonal are computed until the end.

    >>> gram = Gram(2)
    >>> gram.add(torch.tensor([[1.0, 2.0]]))
    >>> gram.add(torch.tensor([[0.0, 1.0]]))
    >>> gram.take()
    tensor([[1., 2.],
            [2., 5.]], dtype=torch.float64)
    """

    def __init__(self, n: int) -> None:
        self.n = n
        self.sum: Tensor | None = None

    def add(self, x: Tensor) -> None:
        """Add rows x (rows, n), in float32 or better."""
        if self.sum is None:
            self.sum = torch.zeros(self.n, self.n, dtype=torch.float64)
        if x.device.type != "cpu" or self.sum.device != x.device:
            self.sum = add(self.sum, product(x, x))
            return
        for start in range(0, self.n, _BLOCK):
            end = start + _BLOCK
            self.sum[start:end, start:] += product(x[:, start:end], x[:, start:])

    def take(self) -> Tensor:
        """The sum, on the CPU; it begins anew, and takes no memory until then."""
        if self.sum is None:
            return torch.zeros(self.n, self.n, dtype=torch.float64)
        total, self.sum = self.sum.cpu(), None
        for start in range(0, self.n, _BLOCK):
            end = start + _BLOCK
            total[end:, start:end] = total[start:end, end:].T
        return total


def product(a: Tensor, b: Tensor) -> Tensor:
    """a^T b, in their precision also where the caller's autocast would lower it."""
    return a.new_empty(a.shape[1], b.shape[1]).addmm_(a.T, b, beta=0)


def _beside(total: Tensor, part: Tensor) -> Tensor:
    """The sum where the part is, if that device knows float64 and has room for it; otherwise where it was."""
    home = working_device(part)
    if total.device == home or home.type == "cpu":
        return total
    memory = getattr(getattr(torch, home.type, None), "mem_get_info", None)
    if memory is not None:
        free, every = memory(home)
        if free - total.nbytes < _FREE * every:
            return total
    return total.to(home)
