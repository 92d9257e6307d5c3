"""What a file holds against what a model was built for: factors that are missing or left over, heads that are new."""

from collections.abc import Collection, Iterable, Mapping
from typing import Any

from safetensors import safe_open
from torch import nn

from hf_reparam.errors import CheckpointError
from hf_reparam.layers.factored import Factored
from hf_reparam.layers.surgery import replace_modules
from hf_reparam.model.config import base_prefix

__all__ = ["check_factors", "check_loaded", "renew_layers", "stored_shapes"]

Shapes = Mapping[str, tuple[int, ...]]
_FIRST = (".down.weight", ".table.weight", ".down")  # one for each low-rank part


def stored_shapes(state: Mapping[str, Any] | None, files: Iterable[str] | None) -> Shapes:
    """Name -> shape of the tensors that are about to be loaded; of files the headers are read."""
    if state is not None:
        return {name: tuple(tensor.shape) for name, tensor in state.items()}
    shapes: dict[str, tuple[int, ...]] = {}
    for file in files or ():
        with safe_open(file, framework="pt") as tensors:
            shapes |= {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118
    return shapes


def renew_layers(model: Any, stored: Shapes, *, ignore_mismatched_sizes: bool) -> None:
    """Make layers dense whose factors belong to another head: a new head is drawn as the base class does.

    Args:
        model: built for its plan, on the meta device.
        stored: what is about to be loaded.
        ignore_mismatched_sizes: layers of other shapes than those in the file are new, too.
    """
    prefix = base_prefix(model)
    low: dict[nn.Module, nn.Module] = {}
    for path, layer in model.named_modules():
        if not isinstance(layer, Factored):
            continue
        head = bool(prefix) and not path.startswith(prefix)
        places = [path, path.removeprefix(prefix), f"{model.base_model_prefix}.{path}"]
        sizes = next((found for place in places if (found := layer.stored_shape(stored, place)) is not None), None)
        shape = layer.in_features, layer.out_features
        if (sizes is None and head) or (ignore_mismatched_sizes and sizes is not None and sizes != shape):
            low[layer] = layer.stand_in()
    replace_modules(model, low)


def check_factors(
    model: Any, missing: Collection[str], unexpected: Collection[str], source: str, *, ignore_mismatched_sizes: bool
) -> None:
    """Raise CheckpointError for factors that the base model lacks, and for factors that found no low-rank layer."""
    base, prefix = model.base_model, base_prefix(model)
    absent = {key.removeprefix(prefix) for key in missing}
    factored = [(name, module) for name, module in base.named_modules() if isinstance(module, Factored)]
    needed = {f"{name}.{part}" for name, module in factored for part in module.state_dict()}
    lost = sorted(absent & needed) or _homeless(absent, unexpected, prefix, exact=not ignore_mismatched_sizes)
    if not lost and any(key.endswith(_FIRST) for key in unexpected) and set(model.state_dict()) <= set(missing):
        lost = sorted(missing)
    if lost:
        raise CheckpointError(
            f"{source}: {len(lost)} tensors of low-rank layers are missing or do not fit the plan, among them "
            f"{lost[:3]}. The checkpoint is incomplete, its plan was edited, or it is of another class, whose names "
            f"{type(model).__name__} does not know (load it with the Auto class, or as the class that saved it); "
            "loading it would leave random layers"
        )


def _homeless(absent: Collection[str], unexpected: Iterable[str], prefix: str, *, exact: bool) -> list[str]:
    """Dense weights that are missing, and of which the file has factors, under this path or a longer or shorter one.

    Args:
        absent: names of what is missing.
        unexpected: names of what was left over.
        prefix: of the base model.
        exact: also under the very same path.
    """
    lost = set()
    for key in unexpected:
        first = next((end for end in _FIRST if key.endswith(end)), None)
        if first is not None:
            weight = f"{key.removeprefix(prefix).removesuffix(first)}.weight"
            lost |= {name for name in absent if (name == weight and exact) or _ends_alike(name, weight)}
    return sorted(lost)


def _ends_alike(name: str, other: str) -> bool:
    """Whether one is the other with more in front; "dense.weight" is too short to tell."""
    short, long = sorted((name, other), key=len)
    return short.count(".") > 1 and long.endswith(f".{short}")


def check_loaded(model: nn.Module, source: str) -> None:
    """Raise CheckpointError for numbers of factors that cannot be."""
    for name, module in model.named_modules():
        if isinstance(module, Factored):
            module.check_loaded(f"{source}: {name}")
