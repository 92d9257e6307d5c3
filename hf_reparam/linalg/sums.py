"""Sums over tokens, kept in float64 on the device that computes what is added to them, while there is room."""

import math

import torch
from torch import Tensor

from hf_reparam.linalg.factorize import working_device

_BLOCKS = 4  # of columns
_WIDE = 512  # columns from which on blocks are worth their overhead
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
    """As `add`, of the rows of x, summed in float64 where its device knows that."""
    return add(total, x.sum(0, dtype=torch.float64 if working_device(x) == x.device else None))


def add_gram(total: Tensor, x: Tensor) -> Tensor:
    """As `add`, of x^T x, which is symmetric: on a CPU the blocks below the diagonal are copied, not computed."""
    n = x.shape[1]
    if x.device.type != "cpu" or n < _WIDE:
        return add(total, x.T @ x)
    size = math.ceil(n / _BLOCKS)
    for start in range(0, n, size):
        end = min(start + size, n)
        products = x[:, start:end].T @ x[:, start:]
        total[start:end, start:] += products
        total[end:, start:end] += products[:, size:].T
    return total


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
