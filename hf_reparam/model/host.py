"""Transformers models inside other objects: where they are, what their layers are called, what calibration calls."""

import os
from collections.abc import Iterable, Iterator
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from hf_reparam.config import METRICS
from hf_reparam.errors import TargetError
from hf_reparam.layers.copies import WorkingCopy
from hf_reparam.layers.factored import Factored
from hf_reparam.model.config import plan_name
from hf_reparam.structures import open_attentions
from hf_reparam.structures.hosts import embeddings_of as embeddings_of
from hf_reparam.structures.hosts import hosts as hosts

_REPLICAS = (nn.DataParallel, nn.parallel.DistributedDataParallel)
_WRAPPED = ["_orig_mod", "_checkpoint_wrapped_module"]  # of torch.compile and of activation checkpointing


def check_model(model: object) -> None:
    """Raise TargetError, which says what to give instead, for what is no `nn.Module`."""
    if isinstance(model, nn.Module):
        return
    got = f"got {type(model).__name__}"
    if isinstance(model, (str, os.PathLike)):
        hint = f"load it first: AutoModel.from_pretrained({os.fspath(model)!r}), or the class of your task"
    elif isinstance(model, type):
        got, hint = f"got the class {model.__name__}", f"give a model of it: {model.__name__}.from_pretrained(...)"
    elif isinstance(getattr(model, "model", None), nn.Module):
        hint = f"give the model that it holds: the `.model` of the {type(model).__name__}"
    else:
        hint = "give what AutoModel.from_pretrained(...) returns, or any nn.Module"
    raise TargetError(f"a model is an nn.Module, {got}: {hint}")


def ties_of(host: Any) -> dict[str, str]:
    """Tied parameters of a Transformers model, target -> source, as it declares them."""
    return getattr(host, "all_tied_weights_keys", None) or {}


def layer_name(model: nn.Module, name: str) -> str:
    """The name under which plans and moments know the layer at this module path.

    In a Transformers model it is relative to the base model. Inside another object it is the path of the Transformers
    model there, and the name that the layer has in that: "0.model." + "encoder.layer.0.output.dense".
    """
    parts = name.split(".")
    module: nn.Module | None = model
    for i, part in enumerate(parts):
        if isinstance(module, PreTrainedModel):
            return ".".join([*parts[:i], plan_name(module, ".".join(parts[i:]))])
        module = None if module is None else module._modules.get(part)
    return name


def metric_of(model: nn.Module) -> str:
    """In which metric the factors of a model, or of the models in an object, were made; "svd" where nothing says it."""
    known = [entry["metric"] for h in hosts(model).values() if (entry := getattr(h.config, "reparam", None))]
    made = {part.metric for part in model.modules() if isinstance(part, Factored)}  # where no configuration says it
    return next(iter(known or [metric for metric in reversed(METRICS) if metric in made]), "svd")


def opened(model: nn.Module) -> WorkingCopy:
    """A working copy in which the projections of every `nn.MultiheadAttention` are layers.

    Not in a Transformers model, whose class would build another skeleton when it is loaded.
    """
    work = WorkingCopy(model)
    if not isinstance(model, PreTrainedModel):
        kept = {part for host in hosts(work.model).values() for part in host.modules()}
        for whole, split in open_attentions(work.model, kept).items():
            work.originals[split] = work.originals.pop(whole)
    return work


def mark_offloaded(model: nn.Module, names: Iterable[str]) -> None:
    """Tell Transformers, which asks when it saves a model, that layers, by their paths, are in files."""
    offloaded = list(names)
    for start, host in hosts(model).items():
        mine = [name.removeprefix(start) for name in offloaded if name.startswith(start)]
        if mine:
            known = getattr(host, "hf_device_map", None) or {"": "cpu"}
            host.hf_device_map = {**known, **dict.fromkeys(mine, "disk")}


def unwrapped(model: nn.Module) -> nn.Module:
    """The model in `torch.compile`, DataParallel, DistributedDataParallel and the like."""
    names = ["module"] if isinstance(model, _REPLICAS) else _WRAPPED
    inner = next((model._modules[name] for name in names if name in model._modules), None)
    return model if inner is None else unwrapped(inner)


def called(model: nn.Module) -> nn.Module:
    """What calibration calls with batches: the model itself, or the only Transformers model of an object that cannot be
    called with them: a wrapper of a whole model, a container, a SentenceTransformer or CrossEncoder. Raises TargetError
    where that holds several."""
    model = unwrapped(model)
    container = isinstance(model, (nn.ModuleDict, nn.ModuleList)) or (type(model) is nn.Sequential and len(model) == 1)
    found = hosts(model) if container or _of_sentence_transformers(model) else {}
    if len(found) > 1:
        paths = sorted(start[:-1] for start in found)
        raise TargetError(
            f"{type(model).__name__} holds {len(found)} Transformers models, {paths}, and cannot be called "
            "with one batch: calibrate and convert each by itself, with inplace=True"
        )
    return next(iter(found.values()), model)


def own_tokenizer(model: nn.Module) -> Any:
    """The tokenizer that a SentenceTransformer or CrossEncoder brings along; None for another object."""
    inner = unwrapped(model)
    return getattr(inner, "tokenizer", None) if _of_sentence_transformers(inner) else None


def _of_sentence_transformers(model: nn.Module) -> bool:
    return any(kind.__module__.startswith("sentence_transformers.") for kind in type(model).__mro__)


def saved_otherwise(model: nn.Module) -> Iterator[tuple[str, str]]:
    """(path, reason) of the modules outside of Transformers models in objects that have a way of saving of their own:
    by the `save_pretrained` of a Transformers model there, and the rest as they know it: dense."""
    inner = {part for host in hosts(model).values() for part in host.modules()}
    if not inner or isinstance(model, PreTrainedModel):
        return
    for path, module in model.named_modules():
        if module not in inner and hasattr(module, "save_pretrained"):
            reason = f"{type(module).__name__} saves it by itself, as a dense layer"
            yield from ((f"{path}.{n}".strip("."), reason) for n, part in module.named_modules() if part not in inner)
