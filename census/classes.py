"""Which classes the installed Transformers has."""

import transformers
from transformers import PreTrainedModel

__all__ = ["model_classes"]


def model_classes() -> list[type[PreTrainedModel]]:
    """Every model class that Transformers publishes, by name: not the abstract ones that families derive from."""
    modules = transformers._class_to_module  # name -> module, without importing it
    names = sorted(name for name, module in modules.items() if ".modeling_" in f".{module}")
    found = [getattr(transformers, name) for name in names if not name.endswith("PreTrainedModel")]
    return list(dict.fromkeys(c for c in found if isinstance(c, type) and issubclass(c, PreTrainedModel)))
