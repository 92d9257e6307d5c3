"""Weights that stay in files until they are used, through accelerate's hooks: a model need not fit in memory."""

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

import torch
from safetensors import safe_open
from torch import nn

from hf_reparam.compat.accelerate import leave_in, places_in_files, write_tensors
from hf_reparam.errors import CheckpointError
from hf_reparam.layers.processes import alone, distributed, spread

_RECORD = "layer.json"

L = TypeVar("L", bound=nn.Module)


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
    """New layers and their errors, as `make` gives them, by all processes of a distributed run together.

    With a folder each layer stays there and is read into an `empty` one whenever it computes, so that one at a time is
    in memory. One that is there already, made of what has the fingerprint `made_of`, is not made again. Raises
    CheckpointError for one that was made of something else, and if another run is filling the folder.
    """
    if folder is None:

        def in_memory(name: str) -> tuple[L, float | None]:
            layer, error = make(name)
            return (layer.cpu() if distributed() else layer), error

        made = spread(costs, in_memory, desc=desc)
        return {name: (layer.to(devices[name]), error) for name, (layer, error) in made.items()}

    places = {name: folder / (name or "(root)") for name in costs}  # a model that is itself one layer has no name

    def in_folder(name: str) -> float | None:
        origin = made_of(name)
        if not places[name].exists():
            _write(places[name], *make(name), origin)
        return _stored_error(places[name], origin)

    with alone(folder / ".lock", f"another process is filling {folder} with layers: give each its own folder"):
        for path in sorted({*folder.iterdir()} - {*places.values()}):  # other files are none of its business
            if not path.name.endswith("~") and (path / _RECORD).is_file():
                raise _foreign(path)
        errors = spread(costs, in_folder, desc=desc)
    stored = {}
    for name, error in errors.items():
        layer = empty(name)
        leave_in(places[name], layer, devices[name])
        stored[name] = layer, error
    return stored


def check_stored(model: nn.Module) -> None:
    """Raise ValueError if a weight that a model will read from a file has another shape there; reads headers alone."""
    for file, names in places_in_files(model).items():
        with safe_open(file, framework="pt") as tensors:
            for name, (path, shape) in names.items():
                if tuple(found := tensors.get_slice(name).get_shape()) != shape:
                    raise ValueError(f"size mismatch for {path}: {list(found)} in the file, {list(shape)} in the model")


def _write(place: Path, layer: nn.Module, error: float | None, origin: str) -> None:
    """Fill the folder of one layer; it appears whole or not at all."""
    unfinished = place.with_name(f"{place.name}~")
    shutil.rmtree(unfinished, ignore_errors=True)
    write_tensors(unfinished, layer.state_dict())
    (unfinished / _RECORD).write_text(json.dumps({"error": error, "made_of": origin}))
    unfinished.rename(place)


def _stored_error(place: Path, origin: str) -> float | None:
    """The error that a stored layer has; raises CheckpointError if it was not made from this."""
    try:
        record = json.loads((place / _RECORD).read_text())
        if record["made_of"] != origin:
            raise ValueError
        return None if record["error"] is None else float(record["error"])
    except (FileNotFoundError, NotADirectoryError, ValueError, KeyError, TypeError):
        raise _foreign(place) from None


def _foreign(place: Path) -> CheckpointError:
    return CheckpointError(
        f"{place.parent} holds layers of another conversion (model, data or options differ), among them {place.name}: "
        "give an empty folder or delete it"
    )
