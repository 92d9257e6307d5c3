"""Weights that stay in files until they are used, through accelerate's hooks: a model need not fit in memory."""

import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate.hooks import attach_align_device_hook, remove_hook_from_submodules
from accelerate.utils import (
    OffloadedWeightsLoader,
    PrefixedDataset,
    align_module_device,
    offload_state_dict,
    set_module_tensor_to_device,
)
from safetensors import safe_open
from torch import nn

from hf_reparam.errors import CheckpointError
from hf_reparam.layers.processes import alone, distributed, spread

__all__ = ["aligned", "build_layers", "check_stored", "execution_device", "is_offloaded", "recall"]

_RECORD = "layer.json"

L = TypeVar("L", bound=nn.Module)


@contextmanager
def aligned(module: nn.Module) -> Iterator[None]:
    """Have a module's weights in memory while the block runs, wherever accelerate keeps them."""
    with ExitStack() as stack:
        for part in module.modules():
            stack.enter_context(align_module_device(part))
        yield


def build_layers(
    costs: Mapping[str, float],
    make: Callable[[str], tuple[L, float | None]],
    empty: Callable[[str], L],
    devices: Mapping[str, torch.device],
    folder: Path | None,
    *,
    made_of: Callable[[str], str],
    desc: str,
) -> dict[str, tuple[L, float | None]]:
    """New layers and their errors, made one after the other, and by all processes of a distributed run together.

    Args:
        costs: name -> relative cost of making the layer.
        make: name -> the layer and the error it has.
        empty: name -> a layer of the same shape, without its numbers.
        devices: name -> where the layer computes.
        folder: where the layers go; each stays there and is read whenever it computes, so that one at a time is in
            memory, and one that is there already is not made again. None to have all in memory.
        made_of: name -> fingerprint of all that the layer is made from; asked for with a folder alone.
        desc: what the progress bar says.

    Raises:
        CheckpointError: the folder holds a layer that was made from something else, or another run is filling it.
    """

    if folder is None:

        def in_memory(name: str) -> tuple[L, float | None]:
            layer, error = make(name)
            return (layer.cpu() if distributed() else layer), error

        made = spread(costs, in_memory, desc=desc)
        return {name: (layer.to(devices[name]), error) for name, (layer, error) in made.items()}

    def in_folder(name: str) -> float | None:
        place, origin = _place(folder, name), made_of(name)
        if not place.exists():
            _write(place, *make(name), origin)
        return _stored_error(place, origin)

    with alone(folder / ".lock", f"another process is filling {folder} with layers: give each its own folder"):
        _check_names(folder, costs)
        errors = spread(costs, in_folder, desc=desc)
    return {name: (_read_from(_place(folder, name), empty(name), devices[name]), errors[name]) for name in errors}


def execution_device(module: nn.Module) -> torch.device:
    """Where a module computes: accelerate's word for one that it has dispatched, else where its weights are."""
    for part in module.modules():
        hook: Any = getattr(part, "_hf_hook", None)
        for single in getattr(hook, "hooks", (hook,)):
            if getattr(single, "execution_device", None) is not None:
                return torch.device(single.execution_device)
    return next(module.parameters()).device


def is_offloaded(module: nn.Module) -> bool:
    """Whether accelerate keeps a module's weights elsewhere until it computes."""
    hook: Any = getattr(module, "_hf_hook", None)
    return any(getattr(single, "offload", False) for single in getattr(hook, "hooks", (hook,)))


def check_stored(model: nn.Module) -> None:
    """Raise ValueError if a weight that a model will read from a file has another shape there; reads headers alone.

    Transformers compares shapes of weights that it loads, not of those that it leaves on disk.
    """
    places: dict[str, dict[str, tuple[str, torch.Size]]] = {}
    for path, module in model.named_modules():
        weights: Any = getattr(getattr(module, "_hf_hook", None), "weights_map", None)
        for key, parameter in module._parameters.items() if isinstance(weights, PrefixedDataset) else ():
            if parameter is not None and parameter.is_meta:
                name = f"{weights.prefix}{key}"
                entry = weights.dataset.index[name]
                stored = places.setdefault(entry["safetensors_file"], {})
                stored[entry["weight_name"]] = f"{path}.{key}", parameter.shape
    for file, names in places.items():
        with safe_open(file, framework="pt") as tensors:
            for name, (path, shape) in names.items():
                if tuple(found := tensors.get_slice(name).get_shape()) != shape:
                    raise ValueError(f"size mismatch for {path}: {list(found)} in the file, {list(shape)} in the model")


def recall(layer: nn.Module) -> None:
    """Bring a layer that `build_layers` left in a folder into memory, to the device where it computes."""
    for part in layer.modules():
        hook: Any = getattr(part, "_hf_hook", None)
        if hook is not None:  # made like an offloaded layer, its tensors were on the meta device
            hook.original_devices = dict.fromkeys(hook.original_devices, hook.execution_device)
    remove_hook_from_submodules(layer)
    for part in layer.modules():
        vars(part).pop("forward", None)  # accelerate leaves the class's own behind as an attribute of the module


def _place(folder: Path, name: str) -> Path:
    """The folder of one layer; a model that is itself one layer has no name."""
    return folder / (name or "(root)")


def _write(place: Path, layer: nn.Module, error: float | None, origin: str) -> None:
    """Fill the folder of one layer; it appears whole or not at all."""
    unfinished = place.with_name(f"{place.name}~")
    shutil.rmtree(unfinished, ignore_errors=True)
    offload_state_dict(unfinished, layer.state_dict())
    (unfinished / _RECORD).write_text(json.dumps({"error": error, "made_of": origin}))
    unfinished.rename(place)


def _check_names(folder: Path, names: Iterable[str]) -> None:
    """Raise CheckpointError for a layer that this conversion does not make; other files are none of its business."""
    known = {_place(folder, name) for name in names}
    for path in sorted(folder.iterdir()):
        if path not in known and not path.name.endswith("~") and (path / _RECORD).is_file():
            raise _foreign(path)


def _stored_error(place: Path, origin: str) -> float | None:
    """The error that a stored layer has; raises CheckpointError if it was not made from this."""
    try:
        record = json.loads((place / _RECORD).read_text())
        if record["made_of"] != origin:
            raise _foreign(place)
        return None if record["error"] is None else float(record["error"])
    except (FileNotFoundError, NotADirectoryError, ValueError, KeyError, TypeError):
        raise _foreign(place) from None


def _foreign(place: Path) -> CheckpointError:
    return CheckpointError(
        f"{place.parent} holds layers of another conversion (model, data or options differ), among them {place.name}: "
        "give an empty folder or delete it"
    )


def _read_from(place: Path, layer: L, device: torch.device) -> L:
    """Let a layer read its tensors from its folder whenever it computes; in between it holds no memory."""
    weights = OffloadedWeightsLoader(save_folder=place)
    for name, buffer in layer.named_buffers():  # small: they stay in memory
        set_module_tensor_to_device(layer, name, device, value=weights[name], dtype=buffer.dtype)
    attach_align_device_hook(layer, execution_device=device, offload=True, weights_map=weights)
    return layer
