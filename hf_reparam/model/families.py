"""What Transformers' Auto classes know of a configuration class: its models, under which names."""

from collections.abc import Iterator
from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto import auto_factory, modeling_auto

__all__ = ["auto_class_of", "auto_classes"]


def auto_classes(config: type[PreTrainedConfig]) -> Iterator[tuple[str, Any, tuple[type[Any], ...]]]:
    """(name of the Auto class, its mapping, model classes that it has for the configuration class)."""
    for name, auto in vars(modeling_auto).items():
        mapping = getattr(auto, "_model_mapping", None) if isinstance(auto, type) else None
        if isinstance(mapping, auto_factory._LazyAutoMapping) and config in mapping:
            found = mapping[config]
            yield name, mapping, tuple(found) if isinstance(found, (tuple, list)) else (found,)


def auto_class_of(model: type[PreTrainedModel]) -> str | None:
    """The Auto class to load a model class with; None if there is none."""
    names = [name for name, _, found in auto_classes(model.config_class) if model in found and name[0] != "_"]
    return min(names, key=lambda name: name == "AutoModelForPreTraining", default=None)
