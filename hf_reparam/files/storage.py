"""`save` and `load` for converted models that are no `PreTrainedModel`: a plan beside safetensors."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TypeVar

from safetensors import SafetensorError
from safetensors.torch import load_model, save_model
from torch import nn
from transformers import PreTrainedModel

from hf_reparam.compress.planning import fit_plan
from hf_reparam.errors import CheckpointError, PlanError, TargetError
from hf_reparam.files.folder import new_folder
from hf_reparam.layers.embedding import Tables
from hf_reparam.layers.heads import ROLES, Attention, find_attentions
from hf_reparam.layers.linear import LowRankLinear
from hf_reparam.layers.surgery import low_rank_like, replace_modules, undone_on_error
from hf_reparam.layers.targets import find_targets
from hf_reparam.model.host import check_model, layer_name, method_of
from hf_reparam.model.inspection import protected_layers, with_projections
from hf_reparam.model.retype import retype
from hf_reparam.plan import RankPlan
from hf_reparam.record import ConversionRecord

__all__ = ["load", "save"]

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
    ...     load(nn.Sequential(nn.Linear(64, 64)), f"{folder}/small")
    Sequential(
      (0): LowRankLinear(
        in_features=64, out_features=64, rank=8, form=pair
        (down): Linear(in_features=64, out_features=8, bias=False)
        (up): Linear(in_features=8, out_features=64, bias=True)
      )
    )
    """
    check_model(model)
    if isinstance(model, PreTrainedModel):
        raise TargetError(f"{type(model).__name__} is a PreTrainedModel: use its save_pretrained")
    low = {name: module.spec for name, module in model.named_modules() if isinstance(module, LowRankLinear)}
    modules = {layer_name(model, name): spec for name, spec in low.items()}
    widths = {layer_name(model, a.name): a.width for a in find_attentions(model) if a.narrowed}
    tables = [name for name, module in model.named_modules() if isinstance(module, Tables)]
    if tables:
        raise TargetError(
            f"{tables[0]} is an embedding of low rank, which this format does not hold: save the PreTrainedModel that "
            "has it with its save_pretrained, or convert with embeddings=False"
        )
    if not modules and not widths:
        raise TargetError(f"{type(model).__name__} has no low-rank layer and no narrower heads: save it as any module")
    plan = RankPlan(modules, method=method_of(model), head_widths=widths)
    out = Path(path)
    if out.exists() and not force:
        raise CheckpointError(f"{out} exists; choose another place, or replace it with force=True")
    with new_folder(out) as work:
        (work / "new").mkdir()
        (work / "new" / _PLAN).write_text(json.dumps(plan.to_dict(), indent=1) + "\n")
        save_model(model, str(work / "new" / _TENSORS))


@with_projections
def load(model: M, path: str | os.PathLike[str]) -> M:
    """Read what `save` wrote into a freshly built dense model of the same class; changes `model` and returns it.

    No SVD is computed. If anything fails, the model has its own layers, of which some may hold numbers of the file.

    Args:
        model: dense, as it was before it was converted; its numbers are overwritten.
        path: the folder.

    Raises:
        CheckpointError: no such folder, or tensors that are missing, left over or of another shape.
        PlanError: the plan is malformed, or names what is no dense layer of this model.
        TargetError: the model is a `PreTrainedModel`, which has `from_pretrained`.
    """
    check_model(model)
    if isinstance(model, PreTrainedModel):
        raise TargetError(f"{type(model).__name__} is a PreTrainedModel: use from_pretrained")
    folder = Path(path)
    plan = _plan(folder)
    known = {layer_name(model, attention.name): attention for attention in find_attentions(model)}
    _check_widths(plan, known)
    stock = {name: {role: known[name].layer(role) for role in ROLES} for name in plan.head_widths}
    layers: dict[nn.Module, nn.Module] = {}
    try:
        for name, width in plan.head_widths.items():
            known[name].narrow(known[name].empty(width), width)
        targets = find_targets(model, protected=protected_layers(model)).selected
        specs, _ = fit_plan(model, targets, plan)
        chosen = [target for target in targets if target.name in specs]
        layers.update({t.module: low_rank_like(t.module, specs[t.name]) for t in chosen})
        replace_modules(model, layers, inplace=True)
        load_model(model, folder / _TENSORS)
        with undone_on_error(model):
            retype(model, layers.values(), plan.method, ConversionRecord())
    except BaseException as error:
        replace_modules(model, {low: dense for dense, low in layers.items()}, inplace=True)
        for name, old in stock.items():
            known[name].restore(old, known[name].stock_width)
        if isinstance(error, (OSError, RuntimeError, SafetensorError)):
            raise CheckpointError(f"{folder} does not fit {type(model).__name__}: {error}") from None
        raise
    return model


def _check_widths(plan: RankPlan, known: Mapping[str, Attention]) -> None:
    for name, width in plan.head_widths.items():
        if name not in known or width > known[name].stock_width:
            raise PlanError(f"{name}: the plan makes its heads {width} wide, and no attention here can be that")


def _plan(folder: Path) -> RankPlan:
    try:
        return RankPlan.from_dict(json.loads((folder / _PLAN).read_text(encoding="utf-8")))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise CheckpointError(f"{folder} holds no model that `save` wrote: {error}") from None
