"""Where a derived model class takes part in its base class's loading, renaming, initialisation and sharding."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, conversion_mapping, core_model_loading, initialization, modeling_utils


class LoadingSeam:
    """Private methods of `PreTrainedModel`, overridden to call methods that a subclass defines:

    `before_loading(state, files)` on the built model, with what is about to be loaded: tensors, or paths of safetensors
    files; `on_wrong_shapes(wrong)` with (name, shape in the file, shape in the model), sorted, where other shapes are
    not allowed; `parallel_rules(rules)` with path of a module or parameter -> style, which gives the rules to apply.
    """

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        """As of the base class, whose code is looked at."""
        return bool(cls.base_class._can_set_experts_implementation())  # type: ignore[attr-defined]

    def _expand_parallel_plan(self, plan: dict[str, str]) -> Any:
        return self.parallel_rules(super()._expand_parallel_plan(plan))  # type: ignore[misc,attr-defined]

    @staticmethod
    def _load_pretrained_model(model: Any, state_dict: Any, checkpoint_files: Any, *args: Any, **kwargs: Any) -> Any:
        """Adapters for a model that is there come with the keys to expect, the model's own tensors without."""
        if kwargs.get("expected_keys") is None:
            model.before_loading(state_dict, checkpoint_files)
        base: Any = super(LoadingSeam, type(model))
        return base._load_pretrained_model(model, state_dict, checkpoint_files, *args, **kwargs)

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


def inherit_conversions(base: type[PreTrainedModel], derived: type[PreTrainedModel]) -> None:
    """Let Transformers rename tensors for a derived class as for its base, where it goes by the name of the class."""
    known = conversion_mapping.get_checkpoint_conversion_mapping(base.__name__)
    if known is not None and base.__module__.startswith("transformers."):
        conversion_mapping.register_checkpoint_conversion_mapping(derived.__name__, known, overwrite=True)


def renaming_for(model: PreTrainedModel, tensors: Mapping[str, Any]) -> Callable[[str], str]:
    """What gives a checkpoint's tensor its name in the model that is loaded, where Transformers changes nothing but
    names. The tensors are by the names that the model has; none is None."""
    known = conversion_mapping.get_model_conversion_mapping(model, add_legacy=False)
    changes = [change for change in known if isinstance(change, core_model_loading.WeightRenaming)]
    prefix = model.base_model_prefix
    return lambda name: core_model_loading.rename_source_key(name, changes, [], prefix, tensors)[0]


def record_outputs_as(base: type[PreTrainedModel], derived: type[PreTrainedModel]) -> None:
    """Let `output_hidden_states` and the like work on instances that no constructor made: retyped, or unpickled.

    Transformers fills this registry, class name -> outputs to record, when a model is constructed.
    """
    registry = vars(modeling_utils).get("_CAN_RECORD_REGISTRY")
    if registry is not None:
        dict.__setitem__(registry, str(derived), base._can_record_outputs)


def register_style(style: str, prepare: Callable[[Any, Any, Any], Any]) -> None:
    """Add a style to those that tensor-parallel rules may name, in which a module's first input is prepared by
    (module, input, device mesh) -> the input to go on with."""
    from transformers.distributed.tensor_parallel import ALL_PARALLEL_STYLES, TensorParallelLayer

    class Prepared(TensorParallelLayer):
        def transform_inputs_pre_forward(self, module: Any, args: Any, kwargs: Any, mesh: Any) -> Any:
            return (prepare(module, args[0], mesh), *args[1:]), kwargs

    if style not in ALL_PARALLEL_STYLES:
        ALL_PARALLEL_STYLES.register(style, Prepared())


def drawing_nothing() -> AbstractContextManager[None]:
    """While the block builds a model, its numbers are not drawn."""
    return initialization.no_init_weights()


def draw_as_class(model: PreTrainedModel, module: nn.Module) -> None:
    """Initialize a module, without its parts, as the model's class does."""
    model._init_weights(module)


def fill(tensor: torch.Tensor, value: torch.Tensor | float) -> None:
    """Give numbers to a tensor that was not loaded: these, or normal ones of this deviation; zeros for 0."""
    if isinstance(value, torch.Tensor):
        initialization.copy_(tensor, value)
    elif value:
        initialization.normal_(tensor, std=value)
    else:
        initialization.zeros_(tensor)
