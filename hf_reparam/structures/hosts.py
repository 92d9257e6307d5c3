"""Transformers models inside an object, and their embeddings, by what Transformers publishes of them."""

from typing import Any

from torch import nn
from transformers import PreTrainedModel


def hosts(model: nn.Module) -> dict[str, Any]:
    """What paths of modules inside of it begin with, "0.model." -> Transformers model, for each in an object that is
    part of no other; {"": model} for one itself.

    Each has a plan of its own, in its own configuration, and is saved by its own `save_pretrained`.
    """
    if isinstance(model, PreTrainedModel):
        return {"": model}
    found = {path: module for path, module in model.named_modules() if isinstance(module, PreTrainedModel)}
    parts = {id(part) for outer in found.values() for part in outer.modules() if part is not outer}
    return {f"{path}.": module for path, module in found.items() if id(module) not in parts}


def embeddings_of(model: PreTrainedModel) -> tuple[nn.Module | None, nn.Module | None]:
    """Input and output embeddings; None where the class knows none."""
    found: list[nn.Module | None] = []
    for get in (model.get_input_embeddings, model.get_output_embeddings):
        try:
            found.append(get())
        except (AttributeError, NotImplementedError):  # what classes without them raise
            found.append(None)
    return found[0], found[1]
