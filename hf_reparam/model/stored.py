"""What a folder holds against what a model was built for: markers, factors that are missing or left over, new heads."""

import json
import re
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn

from hf_reparam.config import layer_kind
from hf_reparam.errors import CheckpointError
from hf_reparam.layers.factored import Factored
from hf_reparam.layers.surgery import replace_modules
from hf_reparam.model.config import HEAD, base_prefix, plan_of
from hf_reparam.model.naming import loading, local_names, low_rank, renamed, shapes_may_differ
from hf_reparam.model.sites import live_sites

Shapes = Mapping[str, tuple[int, ...]]
_FIRST = (".down.weight", ".table.weight", ".down")  # one for each low-rank part
_INDICES = ("model.safetensors.index*.json", "pytorch_model.bin.index*.json")  # a variant's name comes before .json
_LARGEST_CONFIG = 16 * 2**20  # bytes; a plan of 100000 layers takes 6 MB


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


def markers(model: Any) -> dict[str, torch.Tensor]:
    """Name -> empty tensor, under the dense weight's name of the first low-rank layer of each kind.

    By these a stock class finds that a folder is none of its own.
    """
    low = {site.name: site.module for site in live_sites(model) if isinstance(site.module, Factored)}
    first = {layer_kind(name): f"{name}.{low[name].stands_for}".rstrip(".") for name in reversed(low)}
    return {name: torch.empty(0, dtype=torch.uint8) for name in first.values()}


def marker_patterns(model: Any) -> set[str]:
    """Regular expressions for the names of the empty markers, as the file has them and as they are here. No dense layer
    matches one: servers drop what does."""
    plan = plan_of(model.config)
    names = [*plan.modules, *local_names(model, plan.modules)]
    names += renamed(model, names) if loading() else []
    return {r"(^|\.)" + re.escape(name.removeprefix(HEAD)) + r"(\.weight)?$" for name in names}


def stored_shapes(state: Mapping[str, Any] | None, files: Iterable[str] | None) -> Shapes:
    """Name -> shape of the tensors that are about to be loaded; of files the headers are read."""
    if state is not None:
        return {name: tuple(tensor.shape) for name, tensor in state.items()}
    shapes: dict[str, tuple[int, ...]] = {}
    for file in files or ():
        with safe_open(file, framework="pt") as tensors:
            shapes |= {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118
    return shapes


def renew_layers(model: Any, stored: Shapes) -> None:
    """Make layers of a model that is about to be loaded dense where their factors belong to another head, or have other
    shapes and may: a new head is drawn as the base class does."""
    prefix = base_prefix(model)
    new: dict[nn.Module, nn.Module] = {}
    for path, layer in low_rank(model):
        head = bool(prefix) and not path.startswith(prefix)
        places = [path, path.removeprefix(prefix), f"{model.base_model_prefix}.{path}"]
        sizes = next((found for place in places if (found := layer.stored_shape(stored, place)) is not None), None)
        other = sizes is not None and sizes != (layer.in_features, layer.out_features)
        if (sizes is None and head) or (other and shapes_may_differ()):
            new[layer] = layer.stand_in()
    replace_modules(model, new)


def check_factors(model: Any, missing: Collection[str], unexpected: Collection[str], source: str) -> None:
    """Raise CheckpointError for factors that the base model lacks, and for factors that found no low-rank layer."""
    prefix = base_prefix(model)
    absent = {key.removeprefix(prefix) for key in missing}
    needed = {f"{name}.{part}" for name, layer in low_rank(model.base_model) for part in layer.state_dict()}
    lost = sorted(absent & needed) or _homeless(absent, unexpected, prefix)
    if not lost and any(key.endswith(_FIRST) for key in unexpected) and set(model.state_dict()) <= set(missing):
        lost = sorted(missing)
    if lost:
        raise CheckpointError(
            f"{source}: {len(lost)} tensors of low-rank layers are missing or do not fit the plan, among them "
            f"{lost[:3]}. The checkpoint is incomplete, its plan was edited, or it is of another class, whose names "
            f"{type(model).__name__} does not know (load it with the Auto class, or as the class that saved it); "
            "loading it would leave random layers"
        )


def _homeless(absent: Collection[str], unexpected: Iterable[str], prefix: str) -> list[str]:
    """Dense weights that are absent, of which the file has factors, under this path or a longer or shorter one."""
    lost = set()
    for key in unexpected:
        first = next((end for end in _FIRST if key.endswith(end)), None)
        if first is not None:
            weight = f"{key.removeprefix(prefix).removesuffix(first)}.weight"
            if weight in absent and not shapes_may_differ():
                lost.add(weight)
            for name in absent:
                short, long = sorted((name, weight), key=len)
                if short.count(".") > 1 and long.endswith(f".{short}"):  # "dense.weight" is too short to tell
                    lost.add(name)
    return sorted(lost)
