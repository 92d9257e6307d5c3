"""`merge`: multiply the factors out and give the plain dense model back."""

import os
from pathlib import Path
from typing import Any, TypeVar

from torch import nn

from hf_reparam.calibrate.inputs import same_draws
from hf_reparam.errors import TargetError
from hf_reparam.layers.factored import Factored
from hf_reparam.layers.surgery import check_copyable
from hf_reparam.model.build import Made, build, finished
from hf_reparam.model.checks import check_convertible, outside_inference_mode
from hf_reparam.model.classes import ReparamMixin
from hf_reparam.model.host import check_model, hosts, layer_name, opened, unwrapped
from hf_reparam.model.retype import to_stock
from hf_reparam.model.sites import Found
from hf_reparam.structures import STRUCTURES
from hf_reparam.structures.source import Source

M = TypeVar("M", bound=nn.Module)


@outside_inference_mode()
@same_draws()
def merge(model: M, *, inplace: bool = False, workdir: str | os.PathLike[str] | None = None) -> M:
    """Multiply every product out, W = up @ down in float64, and return the dense model.

    Heads that are narrower are filled up with zeros, which is exact, and a fused layer that was split is fused.

    A `PreTrainedModel`, and every one inside another object, comes back as its stock class with its stock
    configuration; saved, it loads where hf_reparam was never installed. Tied weights stay tied, and
    `tie_word_embeddings` says what the tensors are.

    Args:
        model: a converted model, trained or not.
        inplace: change `model` itself; otherwise the result is a copy that shares no tensor with it.
        workdir: where dense layers stay until they compute, as in `convert`; not the folder of its layers.

    Returns:
        The dense model, of the same dtype, device, `requires_grad` and training mode.

    Raises:
        TargetError: the model has nothing of low rank, is sharded, or cannot be copied.
        WeightError: factors are wrapped by an adapter, quantized, or without data.
        CheckpointError: `workdir` holds layers of another model, or another process is filling it.

    Cost: r * in * out multiply-adds for each layer. The relative error of each weight is rounding alone.

    >>> from hf_reparam.compress.convert import convert
    >>> merge(convert(nn.Sequential(nn.Linear(64, 64)), rank=16))
    Sequential(
      (0): Linear(in_features=64, out_features=64, bias=True)
    )
    """
    check_model(model)
    check_convertible(model, inplace=inplace)
    if isinstance(model, Factored):
        if inplace:
            raise TargetError("a model that is itself one low-rank layer cannot be changed in place: use inplace=False")
        whole: Any = merge(nn.Sequential(model), workdir=workdir)
        return whole[0]
    found = any(site.entry is not None for structure in STRUCTURES for site in structure.sites(model))
    if not found and not any(isinstance(module, ReparamMixin) for module in model.modules()):
        raise TargetError(f"{type(model).__name__} has no low-rank layer: there is nothing to merge")
    work = opened(model)
    if not inplace:
        check_copyable(unwrapped(model), [module for module in model.modules() if isinstance(module, Factored)])
    made, folder = Made(), None if workdir is None else Path(workdir)
    for structure in reversed(STRUCTURES):
        low = {layer_name(work.model, s.name): s for s in structure.sites(work.model) if s.entry is not None}
        parts = {name: (Found(name, structure, site), None) for name, site in low.items()}
        if parts:
            build(work, structure, parts, Source("svd"), made, folder, desc="merging")
    return finished(model, work, made, _to_stock, inplace=inplace)


def _to_stock(model: nn.Module) -> None:
    for start, host in hosts(model).items():
        if not start or any(isinstance(module, ReparamMixin) for module in host.modules()):
            to_stock(host)
