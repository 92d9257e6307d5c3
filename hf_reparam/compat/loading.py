"""Where a derived model class takes part in its base class's loading, initialisation and sharding."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, initialization, modeling_utils

__all__ = ["LoadingSeam", "draw_as_class", "drawing_nothing", "fill", "record_outputs_as", "unexpected_names"]


class LoadingSeam:
    """Private methods of `PreTrainedModel`, overridden to call methods that a subclass defines.

    Before the base class in the order of resolution, so that the base's method is the next one.
    """

    def before_loading(
        self, state: Mapping[str, Any] | None, files: Iterable[str] | None, *, ignore_mismatched_sizes: bool
    ) -> None:
        """Called on the built model with what is about to be loaded: tensors, or paths of safetensors files."""
        raise NotImplementedError

    def on_wrong_shapes(self, wrong: Sequence[tuple[str, Any, Any]]) -> None:
        """Called with (name, shape in the file, shape in the model), sorted, where other shapes are not allowed."""
        raise NotImplementedError

    def parallel_rules(self, rules: dict[str, str]) -> dict[str, str]:
        """The tensor-parallel rules to apply, of those that the base gives: path of a module or parameter -> style."""
        raise NotImplementedError

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        """As of the base class, whose code is looked at."""
        return bool(cls.base_class._can_set_experts_implementation())  # type: ignore[attr-defined]

    def _expand_parallel_plan(self, plan: dict[str, str]) -> dict[str, str]:
        return self.parallel_rules(super()._expand_parallel_plan(plan))  # type: ignore[misc]

    @staticmethod
    def _load_pretrained_model(model: Any, state_dict: Any, files: Any, load_config: Any, *args: Any) -> Any:
        model.before_loading(state_dict, files, ignore_mismatched_sizes=load_config.ignore_mismatched_sizes)
        base: Any = super(LoadingSeam, type(model))
        return base._load_pretrained_model(model, state_dict, files, load_config, *args)

    @staticmethod
    def _finalize_model_loading(model: Any, load_config: Any, loading_info: Any) -> Any:
        """The base's draws random numbers of the configuration's shapes before it raises for a wrong one."""
        wrong = sorted(loading_info.mismatched_keys)
        if wrong and not load_config.ignore_mismatched_sizes:
            model.on_wrong_shapes(wrong)
        base: Any = super(LoadingSeam, type(model))
        return base._finalize_model_loading(model, load_config, loading_info)


@contextmanager
def unexpected_names(kind: Any) -> Iterator[set[str]]:
    """While a class loads, collect the names that it has no place for, before those that it ignores are struck out."""
    found: set[str] = set()
    base = kind._adjust_missing_and_unexpected_keys

    def adjust(self: Any, info: Any) -> None:
        found.update(info.unexpected_keys)
        base(self, info)

    kind._adjust_missing_and_unexpected_keys = adjust
    try:
        yield found
    finally:
        del kind._adjust_missing_and_unexpected_keys  # the base class has it


def record_outputs_as(base: type[PreTrainedModel], derived: type[PreTrainedModel]) -> None:
    """Let `output_hidden_states` and the like work on instances that no constructor made: retyped, or unpickled.

    Transformers fills this registry, class name -> outputs to record, when a model is constructed.
    """
    registry = vars(modeling_utils).get("_CAN_RECORD_REGISTRY")
    if registry is not None:
        dict.__setitem__(registry, str(derived), base._can_record_outputs)


def drawing_nothing() -> AbstractContextManager[None]:
    """While the block builds a model, its numbers are not drawn."""
    return initialization.no_init_weights()


def draw_as_class(model: PreTrainedModel, module: nn.Module) -> None:
    """Draw numbers for a module, without its parts, as the model's class does."""
    model._init_weights(module)


def fill(tensor: torch.Tensor, value: torch.Tensor | float) -> None:
    """Give numbers to a tensor that was not loaded: these, or normal ones of this deviation; zeros for 0."""
    if isinstance(value, torch.Tensor):
        initialization.copy_(tensor, value)
    elif value:
        initialization.normal_(tensor, std=value)
    else:
        initialization.zeros_(tensor)
