"""The front door: one name in `AutoConfig`, behind which any family's derived classes are made and registered.

Importing this package registers "reparam" and nothing else. Building a configuration of that type yields the derived
class of the base that it names, and makes the Auto classes, tokenizer and processor mappings that know the base know
the derived class too. There is no table of families.
"""

import importlib
from typing import Any

import transformers
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.models.auto import auto_factory
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from hf_reparam.errors import PlanError
from hf_reparam.hf.configuration import MODEL_TYPE, PREFIX, config_class
from hf_reparam.hf.families import auto_classes
from hf_reparam.hf.modeling import model_class
from hf_reparam.hf.untrusted import check_entries
from hf_reparam.plan import RankPlan

__all__ = ["ReparamConfig", "generated_class", "register"]

_PREPROCESSORS = ("tokenization", "processing", "image_processing", "feature_extraction", "video_processing")


class ReparamConfig(PreTrainedConfig):
    """What `AutoConfig` knows: called with a saved configuration it returns the derived class, such as
    `ReparamBertConfig`."""

    model_type = MODEL_TYPE

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:  # the base's contract
        if "reparam" not in kwargs:
            return super().__new__(cls)
        plan = RankPlan.from_dict(kwargs["reparam"])
        if plan.base_model_type not in CONFIG_MAPPING or plan.base_model_type == MODEL_TYPE:
            raise PlanError(
                f"'reparam.base_model_type' is {plan.base_model_type!r}, which Transformers {transformers.__version__} "
                "does not know: install the version that has it, or register its configuration with AutoConfig first"
            )
        return register(CONFIG_MAPPING[plan.base_model_type])(*args, **kwargs)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:  # the base's contract
        """As the base's. Raises PlanError for an entry that no saved configuration has."""
        check_entries(config_dict)
        return super().from_dict(config_dict, **kwargs)


_registered: set[type[PreTrainedConfig]] = set()


def register(base: type[PreTrainedConfig]) -> type[PreTrainedConfig]:
    """Make the derived configuration class of a stock one known wherever the stock one is, and return it."""
    derived: type[PreTrainedConfig] = config_class(base)  # type: ignore[arg-type]  # a class is hashable
    if derived is base or base in _registered:
        return derived
    _registered.add(base)
    for _, mapping, found in list(auto_classes(base)):
        classes = tuple(map(_derived_model, found))
        mapping.register(derived, classes if len(classes) > 1 else classes[0], exist_ok=True)
    for kind in _PREPROCESSORS:
        _register_preprocessor(f"transformers.models.auto.{kind}_auto", base, derived)
    return derived


def _derived_model(base: type[Any]) -> type[Any]:
    return model_class(base) if issubclass(base, PreTrainedModel) else base


def _register_preprocessor(module: str, base: type[PreTrainedConfig], derived: type[PreTrainedConfig]) -> None:
    try:
        names = vars(importlib.import_module(module))
    except ImportError:  # a backend such as torchvision is not installed; nothing to register
        return
    for mapping in [v for v in names.values() if isinstance(v, auto_factory._LazyAutoMapping)]:
        if base in mapping:
            try:
                mapping.register(derived, mapping[base], exist_ok=True)
            except (ImportError, KeyError, ValueError):  # listed, and its backend is missing
                continue


def generated_class(name: str) -> type[Any]:
    """The generated class of this name: `ReparamBertForMaskedLM`, `ReparamBertConfig`.

    Raises:
        AttributeError: Transformers has no class behind the name.
    """
    base: Any = getattr(transformers, name.removeprefix(PREFIX), None) if name.startswith(PREFIX) else None
    if isinstance(base, type) and issubclass(base, PreTrainedConfig):
        return register(base)
    if isinstance(base, type) and issubclass(base, PreTrainedModel):
        register(base.config_class)  # type: ignore[attr-defined]
        return model_class(base)
    raise AttributeError(f"module 'hf_reparam' has no attribute {name!r}")


AutoConfig.register(MODEL_TYPE, ReparamConfig, exist_ok=True)
