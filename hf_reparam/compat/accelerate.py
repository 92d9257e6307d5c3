"""accelerate's hooks, through which weights stay in files, or on another device, until they are used."""

import logging
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate.hooks import attach_align_device_hook, remove_hook_from_submodules
from accelerate.utils import (
    OffloadedWeightsLoader,
    PrefixedDataset,
    align_module_device,
    offload_state_dict,
    set_module_tensor_to_device,
)
from accelerate.utils.memory import should_reduce_batch_size
from torch import nn

from hf_reparam.compat.marks import hook_of


@contextmanager
def aligned(*modules: nn.Module) -> Iterator[None]:
    """Have the weights of modules in memory while the block runs, wherever accelerate keeps them."""
    with ExitStack() as stack:
        for part in (part for module in modules for part in module.modules()):
            stack.enter_context(align_module_device(part))
        yield


def execution_device(module: nn.Module) -> torch.device:
    """Where a module computes: accelerate's word for one that it has dispatched, else where its weights are."""
    said = (getattr(hook, "execution_device", None) for part in module.modules() for hook in _single_hooks(part))
    device = next((device for device in said if device is not None), None)
    return next(module.parameters()).device if device is None else torch.device(device)


def is_offloaded(module: nn.Module) -> bool:
    """Whether accelerate keeps a module's weights elsewhere until it computes."""
    return any(getattr(single, "offload", False) for single in _single_hooks(module))


def _single_hooks(module: nn.Module) -> Any:
    hook = hook_of(module)
    return getattr(hook, "hooks", (hook,))


def places_in_files(model: nn.Module) -> dict[str, dict[str, tuple[str, torch.Size]]]:
    """File -> name of a tensor there -> (path, shape) of the weight that a model will read from it."""
    places: dict[str, dict[str, tuple[str, torch.Size]]] = {}
    for path, module in model.named_modules():
        weights: Any = getattr(hook_of(module), "weights_map", None)
        for key, parameter in module._parameters.items() if isinstance(weights, PrefixedDataset) else ():
            if parameter is not None and parameter.is_meta:
                entry = weights.dataset.index[f"{weights.prefix}{key}"]
                stored = places.setdefault(entry["safetensors_file"], {})
                stored[entry["weight_name"]] = f"{path}.{key}", parameter.shape
    return places


@contextmanager
def meant_for_disk() -> Iterator[None]:
    """Without the warning that parameters are on disk, where it was asked to leave them."""
    log = logging.getLogger("accelerate.big_modeling")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(level)


def write_tensors(folder: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Make a folder with tensors, from which `leave_in` has a module read."""
    offload_state_dict(folder, tensors)


def leave_in(folder: Path, module: nn.Module, device: torch.device) -> None:
    """Let a module read its tensors from a folder whenever it computes; in between it holds no memory."""
    weights = OffloadedWeightsLoader(save_folder=folder)
    for name, buffer in module.named_buffers():  # small: they stay in memory
        set_module_tensor_to_device(module, name, device, value=weights[name], dtype=buffer.dtype)
    attach_align_device_hook(module, execution_device=device, offload=True, weights_map=weights)


def recall(module: nn.Module) -> None:
    """Bring a module that `leave_in` left in a folder into memory, to the device where it computes."""
    for part in module.modules():
        hook = hook_of(part)
        if hook is not None:  # made like an offloaded layer, its tensors were on the meta device
            hook.original_devices = dict.fromkeys(hook.original_devices, hook.execution_device)
    remove_hook_from_submodules(module)
    for part in module.modules():
        vars(part).pop("forward", None)  # accelerate leaves the class's own behind as an attribute of the module


def ran_out_of_memory(error: Exception) -> bool:
    """Whether an error says that a device has no memory left."""
    return bool(should_reduce_batch_size(error))
