"""What a model folder says of itself is not believed: entries, sizes and names of files, before anything is built."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from hf_reparam.errors import CheckpointError, PlanError

__all__ = ["check_entries", "check_folder"]

_MOST = {"layers": 1000, "n_layer": 1000, "num_labels": 100_000}  # ends of names; more is an attack on time and memory
_INDICES = ("model.safetensors.index*.json", "pytorch_model.bin.index*.json")  # a variant's name comes before .json
_LARGEST_CONFIG = 16 * 2**20  # bytes; a plan of 100000 layers takes 6 MB


def check_entries(data: Mapping[str, Any]) -> None:
    """Refuse what no saved configuration of a low-rank model holds; its plan and the base's fields are checked later.

    Raises:
        PlanError: an entry names an attention implementation, which may be code to download, or is a private name, no
            dtype, or a number of layers or labels that no model has.
    """
    for key, value in data.items():
        if key.startswith("__") or key.endswith("attn_implementation"):
            raise PlanError(f"config.json has the entry {key[:80]!r}, which is never saved")
        most = next((most for end, most in _MOST.items() if key.endswith(end)), None)
        number = isinstance(value, (int, float))
        if (number and most is not None and not -1 <= value <= most) or (key == "num_labels" and not number):
            raise PlanError(f"config.json has {key!r} = {str(value)[:80]}; at most {most} are accepted")
    if not isinstance(data.get("quantization_config") or {}, dict):
        raise PlanError("config.json has a 'quantization_config' that is no object")
    dtype = data.get("dtype", data.get("torch_dtype"))
    known = isinstance(dtype, str) and isinstance(getattr(torch, dtype, None), torch.dtype)
    if not (known or dtype is None or isinstance(dtype, (dict, torch.dtype))):
        raise PlanError(f"config.json has 'dtype' = {str(dtype)[:80]!r}, which is none of torch's")


def check_folder(folder: Path) -> None:
    """Refuse a configuration that only an attack would be so long for, and an index that leads out of the folder.

    Raises:
        CheckpointError: one of these, or an index that is no list of files.
    """
    config = folder / "config.json"
    if config.is_file() and config.stat().st_size > _LARGEST_CONFIG:
        raise CheckpointError(f"{config} has {config.stat().st_size:,} bytes; at most {_LARGEST_CONFIG:,} are accepted")
    for index in sorted(path for name in _INDICES for path in folder.glob(name)):
        try:
            files = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
            outside = [name for name in files if Path(name).name != name or "\\" in name]
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise CheckpointError(f"{index} is no index of weight files: {error!r}") from None
        if outside:
            raise CheckpointError(f"{index} names {outside[0][:80]!r}, which is no file of this folder")
