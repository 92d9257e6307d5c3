"""Sums over tokens, kept on the device that computes what is added to them, while there is room."""

import torch
from torch import Tensor

from hf_reparam.linalg.factorize import working_device

_BLOCK = 192  # columns
_MOST_ROWS = 32_768  # that are summed in float32
_FREE = 0.25  # of a device's memory, which sums leave to everything else


def widened(x: Tensor) -> Tensor:
    """In float32 or better, in which products are computed."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def add(total: Tensor, part: Tensor) -> Tensor:
    """The sum, which is `total` itself where that is on the device where it should be."""
    total = _beside(total, working_device(part))
    total += part.to(total.device, torch.float64)
    return total


def add_rows(total: Tensor, x: Tensor) -> Tensor:
    """As `add`, of the rows of x, summed in their own precision."""
    return add(total, x.sum(0))


class Gram:
    """A running sum of x^T x, (n, n), in the precision of x; what is summed there carries over after 32,768 rows.

    It has two parts, one for the digits that the other has no room for: as many bytes as one sum in float64, which a
    product in float32 is added to without a conversion. On a CPU no blocks below the diagonal are computed.

    >>> gram = Gram(2)
    >>> gram.add(torch.tensor([[1.0, 2.0]]))
    >>> gram.add(torch.tensor([[0.0, 1.0]]))
    >>> gram.take()
    tensor([[1., 2.],
            [2., 5.]], dtype=torch.float64)
    """

    def __init__(self, n: int) -> None:
        self.n, self.rows = n, 0
        self.parts: Tensor | None = None  # (2, n, n)

    def add(self, x: Tensor) -> None:
        """Add rows x (rows, n), in float32 or better."""
        if self.parts is None:
            self.parts = torch.zeros(2, self.n, self.n, dtype=x.dtype)
        self.parts = _beside(self.parts, x.device)
        part, x = self.parts[1], x.to(self.parts.dtype)
        if part.device != x.device:
            part += (x.T @ x).to(part.device)
        else:
            step = _BLOCK if x.device.type == "cpu" else self.n
            for start in range(0, self.n, step):
                part[start : start + step, start:].addmm_(x[:, start : start + step].T, x[:, start:])
        self.rows += len(x)
        if self.rows >= _MOST_ROWS:
            self._carry()

    def _carry(self) -> None:
        """The rounded sum of both parts into the first, what was rounded off into the second: T. Dekker's Fast2Sum."""
        assert self.parts is not None
        most, least = self.parts
        total = most + least
        least -= total - most
        most.copy_(total)
        self.rows = 0

    def take(self) -> Tensor:
        """The sum, float64, on the CPU; it begins anew, and takes no memory until then."""
        if self.parts is None:
            return torch.zeros(self.n, self.n, dtype=torch.float64)
        most, least = self.parts.cpu()
        total = most.double().add_(least)
        for start in range(0, self.n, _BLOCK):
            end = start + _BLOCK
            total[end:, start:end] = total[start:end, end:].T
        self.parts, self.rows = None, 0
        return total


def _beside(total: Tensor, home: torch.device) -> Tensor:
    """The sum on a device, if that has room for it; otherwise where it was."""
    if total.device == home or home.type == "cpu":
        return total
    memory = getattr(getattr(torch, home.type, None), "mem_get_info", None)
    if memory is not None:
        free, every = memory(home)
        if free - total.nbytes < _FREE * every:
            return total
    return total.to(home)
