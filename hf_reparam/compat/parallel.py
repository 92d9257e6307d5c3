"""Transformers' tensor parallelism: how a model says where it applies, and a style of its own."""

from collections.abc import Callable
from typing import Any

from transformers import PreTrainedModel

__all__ = ["asks_for_rules", "register_style"]


def asks_for_rules() -> bool:
    """Whether this version of Transformers lets a model say how its plan applies to its modules."""
    return hasattr(PreTrainedModel, "_expand_parallel_plan")


def register_style(style: str, prepare: Callable[[Any, Any, Any], Any]) -> None:
    """Add a style, in which a module's first input is prepared, to those that rules may name.

    Args:
        style: its name.
        prepare: (module, input, device mesh) -> the input to go on with.
    """
    from transformers.distributed.tensor_parallel import ALL_PARALLEL_STYLES, TensorParallelLayer

    class Prepared(TensorParallelLayer):
        """Prepares a module's first input."""

        def transform_inputs_pre_forward(self, module: Any, args: Any, kwargs: Any, mesh: Any) -> Any:
            return (prepare(module, args[0], mesh), *args[1:]), kwargs

    if style not in ALL_PARALLEL_STYLES:
        ALL_PARALLEL_STYLES.register(style, Prepared())
