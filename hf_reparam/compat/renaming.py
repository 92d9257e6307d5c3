"""How Transformers renames the tensors of checkpoints for a model class."""

from collections.abc import Callable, Mapping
from typing import Any

from transformers import PreTrainedModel, conversion_mapping, core_model_loading

__all__ = ["inherit_conversions", "renaming_for"]


def inherit_conversions(base: type[PreTrainedModel], derived: type[PreTrainedModel]) -> None:
    """Let Transformers rename tensors for a derived class as for its base, where it goes by the name of the class."""
    if base.__module__.startswith("transformers."):
        known = conversion_mapping.get_checkpoint_conversion_mapping(base.__name__)
        if known is not None:
            conversion_mapping.register_checkpoint_conversion_mapping(derived.__name__, known, overwrite=True)


def renaming_for(model: PreTrainedModel, tensors: Mapping[str, Any]) -> Callable[[str], str]:
    """What gives a checkpoint's tensor its name in the model, where Transformers changes nothing but names.

    Args:
        model: that is loaded.
        tensors: by the names that the model has; none is None.
    """
    known = conversion_mapping.get_model_conversion_mapping(model, add_legacy=False)
    changes = [change for change in known if isinstance(change, core_model_loading.WeightRenaming)]
    prefix = model.base_model_prefix
    return lambda name: core_model_loading.rename_source_key(name, changes, [], prefix, tensors)[0]
