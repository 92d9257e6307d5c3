"""How often torch compiles one function."""

from contextlib import AbstractContextManager

import torch

_MOST = 10_000  # far above the layers of any model


def without_limit() -> AbstractContextManager[None]:
    """While the block lasts, torch compiles one function for as many shapes as it meets; by itself, for eight."""
    return torch._dynamo.config.patch(recompile_limit=_MOST, accumulated_recompile_limit=_MOST)
