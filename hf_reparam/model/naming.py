"""Names in plans and modules of models: which layer a name means in this class."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, TypeVar

from torch import nn
from transformers import PreTrainedModel

from hf_reparam.compat.loading import renaming_for
from hf_reparam.errors import PlanError
from hf_reparam.layers.factored import Factored
from hf_reparam.model.config import HEAD, base_prefix, plan_name, plan_of

V = TypeVar("V")
_loading: ContextVar[bool | None] = ContextVar("loading", default=None)


@contextmanager
def while_loading(*, ignore_mismatched_sizes: bool) -> Iterator[None]:
    """In the block a plan is judged by the file that a model is loaded from, which is read after the model is built;
    with `ignore_mismatched_sizes`, layers of other shapes than those in the file are new ones, and dense."""
    token = _loading.set(ignore_mismatched_sizes)
    try:
        yield
    finally:
        _loading.reset(token)


def loading() -> bool:
    """Whether a model is being loaded, so that a name that it has not may be one of another class."""
    return _loading.get() is not None


def shapes_may_differ() -> bool:
    """Whether a model is being loaded with `ignore_mismatched_sizes`."""
    return bool(_loading.get())


def low_rank(model: nn.Module) -> list[tuple[str, Factored]]:
    """(path, layer) of the low-rank layers in a model."""
    return [(name, module) for name, module in model.named_modules() if isinstance(module, Factored)]


def find_paths(model: PreTrainedModel, names: Iterable[str]) -> dict[str, str]:
    """Plan name -> module path, for names that lead somewhere in this model.

    A plan that another class of the family wrote names its layers as that class does: where tensors of a checkpoint are
    renamed for this class, the same renaming leads to the layer.
    """
    weights, prefix, rename = _weights(model), base_prefix(model), None
    found = {}
    for name in names:
        keys = [prefix + name, name]
        if name.startswith(HEAD):
            keys = [name.removeprefix(HEAD)] if prefix else []
        key = next((f"{key}.weight" for key in keys if f"{key}.weight" in weights), None)
        if key is None and not name.startswith(HEAD):
            rename = rename or renaming_for(model, weights)
            key = rename(f"{name}.weight")
        if key in weights:
            found[name] = key.removesuffix(".weight")
    return found


def renamed(model: PreTrainedModel, names: Iterable[str]) -> list[str]:
    """What Transformers makes of the names of these layers' weights while it loads a checkpoint into this model."""
    rename = renaming_for(model, _weights(model))
    return [rename(f"{name}.weight").removesuffix(".weight") for name in names]


def _weights(model: PreTrainedModel) -> dict[str, Any]:
    """The name that a weight of each module has, or would have -> the module; and of each bare parameter."""
    parts = (*model.named_modules(remove_duplicate=False), *model.named_parameters(remove_duplicate=False))
    return {f"{name}.weight": part for name, part in parts}


def local_names(model: PreTrainedModel, entries: Mapping[str, V]) -> dict[str, V]:
    """Entries of a plan under the names that they have in this model.

    Those that the model does not have keep theirs, but not while it is loaded: there `check_absent` judges them.
    """
    paths = {name: plan_name(model, path) for name, path in find_paths(model, entries).items()}
    return {paths.get(name, name): entry for name, entry in entries.items() if name in paths or not loading()}


def check_absent(model: PreTrainedModel, stored: Iterable[str]) -> None:
    """Raise PlanError if a model's plan names a layer of the base model that neither it has nor the file; `stored` are
    the names of the file's tensors."""
    plan = plan_of(model.config)
    children = {name for name, _ in model.base_model.named_children()}
    paths = find_paths(model, plan.modules)
    absent = {name for name in plan.modules if name not in paths and name.partition(".")[0] in children}
    if absent:
        owners = [key.removesuffix(".weight").removesuffix(".down").split(".") for key in stored]
        absent -= {".".join(parts[i:]) for parts in owners for i in range(len(parts))}
    for name in sorted(absent):
        raise PlanError(f"{name}: the plan names it, and {type(model).__name__} has no such module")
