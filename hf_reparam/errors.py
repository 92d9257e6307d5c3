"""What this package raises on purpose, nearly always: `ReparamError` and its five kinds.

Each is also a `ValueError`, except `CheckpointError`, which is an `OSError` as Transformers raises for folders.
A message names the layer, what was got, what is allowed and what to do next.
"""

__all__ = ["CheckpointError", "PlanError", "RankError", "ReparamError", "TargetError", "WeightError"]


class ReparamError(Exception):
    """The root of the tree: catch this to catch all of them."""


class TargetError(ReparamError, ValueError):
    """What was asked is wrong: no size or two, options that do not go together, a pattern that matches
    nothing, unfit data, or nothing to convert or to merge."""


class RankError(ReparamError, ValueError):
    """A rank, a size or another number that was asked for is out of range."""


class WeightError(ReparamError, ValueError):
    """A weight cannot be read, factored, merged or written to: not finite, quantized, in parts, on the meta device, or
    without its calibration data."""


class PlanError(ReparamError, ValueError):
    """A rank plan is malformed, of an unknown version, or does not fit the model it is applied to."""


class CheckpointError(ReparamError, OSError):
    """A model folder cannot be read or written as asked."""
