"""What vLLM and SGLang, which build models through Transformers, need of this package in each of their processes."""

from collections.abc import Iterable

import torch

from hf_reparam.compat.serving import offer_names
from hf_reparam.errors import CheckpointError
from hf_reparam.layers.factored import Factored
from hf_reparam.model.auto import generated_class
from hf_reparam.model.config import PREFIX


def register() -> None:
    """Let vLLM and SGLang find converted models and load their layers: the entry point of their plugins.

    Both look an architecture, such as "ReparamLlamaForCausalLM", up in `transformers`, where it is made from then on
    when it is asked for; and both let a module load its own tensors by its method `load_weights`. May be called again.
    """
    offer_names(PREFIX, generated_class)
    Factored.load_weights = _load_weights  # type: ignore[attr-defined]


@torch.no_grad()
def _load_weights(layer: Factored, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
    """Load (name within the layer, tensor) each, and return the names. A parameter that the server has sharded loads
    its part by its `weight_loader`. The empty marker is passed over. Raises CheckpointError for any other name."""
    parameters, buffers = dict(layer.named_parameters()), dict(layer.named_buffers())
    loaded = set()
    for name, tensor in weights:
        if name in parameters:
            getattr(parameters[name], "weight_loader", torch.Tensor.copy_)(parameters[name], tensor)
        elif name in buffers:
            setattr(layer, name, tensor.to(next(layer.parameters()).device))
        elif tensor.numel() == 0:
            continue
        else:
            raise CheckpointError(f"a layer of low rank has no {name!r}; it has {sorted({*parameters, *buffers})}")
        loaded.add(name)
    if loaded:
        layer.check_loaded("a layer that a server loads")
    return loaded
