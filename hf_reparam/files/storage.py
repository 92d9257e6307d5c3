"""`save` and `load` for converted models that are no `PreTrainedModel`: a plan beside safetensors."""

import os
from pathlib import Path
from typing import TypeVar

from safetensors import SafetensorError
from safetensors.torch import load_model, save_model
from torch import nn
from transformers import PreTrainedModel

from hf_reparam.errors import CheckpointError, TargetError
from hf_reparam.files.out import new_folder, read_plan, write_plan
from hf_reparam.layers.surgery import undone_on_error
from hf_reparam.model.build import Made, install
from hf_reparam.model.host import check_model, metric_of, opened
from hf_reparam.model.naming import low_rank
from hf_reparam.model.retype import retype
from hf_reparam.model.sites import check_forms, entries_of, fit
from hf_reparam.plan import ConversionRecord, RankPlan
from hf_reparam.structures import STRUCTURES

M = TypeVar("M", bound=nn.Module)

_PLAN, _TENSORS = "plan.json", "model.safetensors"


def save(model: nn.Module, path: str | os.PathLike[str], *, force: bool = False) -> None:
    """Write a converted model that is no `PreTrainedModel`: `plan.json` and `model.safetensors` in a folder.

    Transformers models inside of it are part of it; each can also be saved by its own `save_pretrained`.

    The folder appears whole or not at all. Of tensors that are shared one is stored.

    Args:
        model: what `convert` returned for a plain module, trained or not.
        path: the folder to make.
        force: replace the folder if it exists.

    Raises:
        TargetError: the model is a `PreTrainedModel`, which has `save_pretrained`, nothing in it was converted, or it
            has embeddings of low rank.
        CheckpointError: the folder exists, or cannot be written.

    >>> import tempfile
    >>> from hf_reparam.compress.convert import convert
    >>> small = convert(nn.Sequential(nn.Linear(64, 64)), rank=8)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save(small, f"{folder}/small")
    ...     load(nn.Sequential(nn.Linear(64, 64)), f"{folder}/small")[0].rank
    8
    """
    check_model(model)
    if isinstance(model, PreTrainedModel):
        raise TargetError(f"{type(model).__name__} is a PreTrainedModel: use its save_pretrained")
    work = opened(model).model
    entries = entries_of(work)
    tied = [site.name for kind in STRUCTURES if kind.ties for site in kind.sites(work) if site.entry]
    if tied:
        raise TargetError(
            f"{tied[0]} is an embedding of low rank, which this format does not hold: save the PreTrainedModel that "
            "has it with its save_pretrained, or convert without embeddings=True"
        )
    if not entries:
        raise TargetError(f"{type(model).__name__} has nothing of low rank: save it as any module")
    for name, layer in low_rank(model):
        layer.check_loaded(name)
    with new_folder(Path(path), force=force) as work:
        (work / "new").mkdir()
        write_plan(RankPlan(entries, metric=metric_of(model)), work / "new" / _PLAN)
        save_model(model, str(work / "new" / _TENSORS))


def load(model: M, path: str | os.PathLike[str]) -> M:
    """Read what `save` wrote into a freshly built dense model of the same class; changes `model` and returns it.

    No SVD is computed. If anything fails, the model has its own layers, of which some may hold numbers of the file.

    Args:
        model: dense, as it was before it was converted; its numbers are overwritten.
        path: the folder.

    Raises:
        CheckpointError: no such folder, or tensors that are missing, left over or of another shape.
        PlanError: the plan is malformed, or names what is not a dense layer of this model.
        TargetError: the model is a `PreTrainedModel`, which has `from_pretrained`.
    """
    check_model(model)
    if isinstance(model, PreTrainedModel):
        raise TargetError(f"{type(model).__name__} is a PreTrainedModel: use from_pretrained")
    folder = Path(path)
    if not (folder / _PLAN).is_file():
        raise CheckpointError(f"{folder} holds no model that `save` wrote")
    plan = read_plan(folder / _PLAN)
    check_forms(plan)
    work, made = opened(model), Made()
    for structure in STRUCTURES:
        for found, entry in fit(plan, work.model, structure, strict=True).values():
            made.put(structure.skeleton(found.site, entry), work.model)
    with undone_on_error(model):
        install(model, work, made)
        try:
            load_model(model, folder / _TENSORS)
        except (OSError, RuntimeError, SafetensorError) as error:
            raise CheckpointError(f"{folder} does not fit {type(model).__name__}: {error}") from None
        retype(model, made.modules, plan.metric, plan.record or ConversionRecord())
    return model
