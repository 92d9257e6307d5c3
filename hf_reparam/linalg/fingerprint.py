"""One short text for all that a result was made from: the same for the same values, another for others."""

import hashlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor


def fingerprint(*parts: object) -> str:
    """A checksum of values: tensors by dtype, shape and every byte, mappings entry by entry, anything else by its repr.

    Cost: one pass over the bytes, about 1 % of what decomposing a weight takes.

    >>> x = torch.ones(2, 3)
    >>> fingerprint("fc", x) == fingerprint("fc", x.clone()), fingerprint("fc", x) == fingerprint("fc", x.double())
    (True, False)
    """
    hashed = hashlib.sha256()
    for part in parts:
        for piece in _pieces(part):
            hashed.update(piece)
    return hashed.hexdigest()[:32]


def _pieces(part: object) -> Iterator[bytes | memoryview]:
    if isinstance(part, Mapping):
        for key, value in part.items():
            yield repr(key).encode()
            yield from _pieces(value)
    elif isinstance(part, Tensor):
        yield f"{part.dtype} {tuple(part.shape)} {part.is_meta}\0".encode()
        if not part.is_meta:
            numbers: Any = part.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()
            yield memoryview(numbers)
    else:
        yield f"{part!r}\0".encode()
