"""What the Auto classes know of a configuration class, and how a derived class becomes known to them."""

import importlib
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from typing import Any

from transformers import AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.models.auto import auto_factory, modeling_auto

_PREPROCESSORS = ("tokenization", "processing", "image_processing", "feature_extraction", "video_processing")
_USUAL = ("AutoModel", "AutoModelForCausalLM", "AutoModelForSeq2SeqLM", "AutoModelForSpeechSeq2Seq")
_RARE = ("AutoModelForTextEncoding", "AutoModelForPreTraining")


def auto_classes(config: type[PreTrainedConfig]) -> Iterator[tuple[str, Any, tuple[type[Any], ...]]]:
    """(name of an Auto class, its mapping, model classes there for a configuration class), for each that has some."""
    for name, auto in vars(modeling_auto).items():
        mapping = getattr(auto, "_model_mapping", None) if isinstance(auto, type) else None
        if isinstance(mapping, auto_factory._LazyAutoMapping) and config in mapping:
            found = mapping[config]
            yield name, mapping, tuple(found) if isinstance(found, (tuple, list)) else (found,)


def auto_class_of(model: type[PreTrainedModel]) -> str | None:
    """The Auto class to load a model class with; None if there is none."""
    names = [name for name, _, found in auto_classes(model.config_class) if model in found and name[0] != "_"]
    return min(names, key=lambda name: (name not in _USUAL, name in _RARE), default=None)


def default_model(config: type[PreTrainedConfig]) -> Any:
    """The class that `AutoModel` makes of a configuration class; None if it knows none, or one that is not there."""
    with suppress(ValueError):
        return AutoModel._model_mapping.get(config, None)
    return None


def register_like(
    base: type[PreTrainedConfig], derived: type[PreTrainedConfig], model_of: Callable[[Any], Any]
) -> None:
    """Make a new configuration class, `derived`, known to every Auto class, of models or preprocessors, that knows
    `base`; `model_of` gives for a model class of `base` that of `derived`."""
    for _, mapping, found in list(auto_classes(base)):
        classes = tuple(model_of(kind) if issubclass(kind, PreTrainedModel) else kind for kind in found)
        mapping.register(derived, classes if len(classes) > 1 else classes[0], exist_ok=True)
    for kind in _PREPROCESSORS:
        with suppress(ImportError):  # a backend such as torchvision is not installed; nothing to register
            names = vars(importlib.import_module(f"transformers.models.auto.{kind}_auto"))
            for mapping in [v for v in names.values() if isinstance(v, auto_factory._LazyAutoMapping) and base in v]:
                with suppress(ImportError, KeyError, ValueError):  # listed, and its backend is missing
                    mapping.register(derived, mapping[base], exist_ok=True)


def name_lora_targets(model_type: str, targets: Sequence[str]) -> None:
    """Let a `LoraConfig()` without targets adapt layers of these names in models of a type, if PEFT is imported."""
    constants = sys.modules.get("peft.utils.constants")
    if constants is not None:
        constants.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING.setdefault(model_type, list(targets))
