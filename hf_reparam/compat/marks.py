"""What Transformers and accelerate leave on the objects of others, under names that are not documented."""

from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

NO_CODE_FILE: Mapping[str, Any] = {"_auto_class": None}
"""Attributes of a generated class, beside whose weights and configuration no file of code goes."""


def set_initialized(target: Any) -> None:
    """Keep Transformers from initializing a module, a tensor, or all objects of a class."""
    target._is_hf_initialized = True


def has_numbers(module: nn.Module) -> bool:
    """Whether Transformers has loaded or drawn a module, or all of its tensors."""
    tensors = (*module.parameters(), *module.buffers())
    return "_is_hf_initialized" in vars(module) or all(hasattr(tensor, "_is_hf_initialized") for tensor in tensors)


def drawn_parameters(model: nn.Module) -> list[str]:
    """Names of what the checkpoint of a model did not have, and nothing has changed since; none if none was loaded."""
    loaded = {name: hasattr(value, "_is_hf_initialized") for name, value in model.named_parameters()}
    if not any(loaded.values()):
        return []
    drawn = [name for name, there in loaded.items() if not there and model.get_parameter(name)._version < 2]
    biases = [model.get_parameter(name) for name in drawn if name.endswith(".bias")]
    if any(not bias.is_meta and bool(bias.any()) for bias in biases):  # fused optimizers change no version
        return []
    return drawn


def tied_keys(model: nn.Module) -> dict[str, Mapping[str, str]]:
    """Attribute -> tied parameters, target -> source: as a model's class declares them, and as they were found."""
    known = {key: getattr(model, key, None) for key in ("_tied_weights_keys", "all_tied_weights_keys")}
    return {attribute: keys for attribute, keys in known.items() if isinstance(keys, Mapping)}


def ignore_in_files(model: Any, patterns: Iterable[str]) -> None:
    """Have a model ignore tensors of files for which it has no place, by regular expressions for their names."""
    ignored = model._keys_to_ignore_on_load_unexpected or ()
    model._keys_to_ignore_on_load_unexpected = {*ignored, *patterns}


def forget_conversions(model: Any) -> None:
    """Have a model saved under the names that its class usually has, not under those of the file it came from."""
    vars(model).pop("_weight_conversions", None)


def hook_of(module: nn.Module) -> Any:
    """accelerate's hook on a module, which moves weights and inputs to where it computes; None if there is none."""
    return getattr(module, "_hf_hook", None)
