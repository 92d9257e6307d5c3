"""Everything this package raises on purpose.

    ReparamError
    ├── TargetError      which layers: a pattern that matches nothing, nothing left to convert or to merge
    ├── RankError        which rank: zero, negative, not a number, above what the layer or its factors hold
    ├── WeightError      which numbers: NaN or inf, on the meta device, quantized, wrapped by an adapter
    ├── PlanError        a rank plan that is malformed or does not fit its model
    └── CheckpointError  a folder: not there, not loadable, already there, factors missing from it

Each is also a `ValueError`, except `CheckpointError`, which is an `OSError` as Transformers raises for folders.
A message names the layer, what was got, what is allowed and what to do next.
"""

__all__ = ["CheckpointError", "PlanError", "RankError", "ReparamError", "TargetError", "WeightError"]


class ReparamError(Exception):
    """The root of the tree: catch this to catch all of them."""


class TargetError(ReparamError, ValueError):
    """The choice of layers is wrong: a pattern matches nothing, or nothing is left to do."""


class RankError(ReparamError, ValueError):
    """A rank is not a number in range for its layer."""


class WeightError(ReparamError, ValueError):
    """A weight cannot be factored or merged: not finite, without data, quantized, or wrapped."""


class PlanError(ReparamError, ValueError):
    """A rank plan is malformed, of an unknown version, or does not fit the model it is applied to."""


class CheckpointError(ReparamError, OSError):
    """A model folder cannot be read or written as asked."""
