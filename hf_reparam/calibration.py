"""`collect_moments`: run calibration batches through a model once, for every size that may be wanted of it."""

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import reduce
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_reparam.batches import Batches, prepare
from hf_reparam.errors import TargetError
from hf_reparam.hf.modeling import plan_name
from hf_reparam.hf.objective import objective
from hf_reparam.hf.retype import protected_layers
from hf_reparam.linalg import LayerMoments, Moments
from hf_reparam.linalg.moments import METRICS
from hf_reparam.nn.calibrate import watch
from hf_reparam.nn.targets import find_targets

__all__ = ["collect_moments", "frozen", "layer_name"]

LossFunction = Callable[[nn.Module, Mapping[str, Any]], Tensor]


def collect_moments(
    model: nn.Module,
    batches: Batches,
    *,
    metric: str = "fisher",
    tokenizer: Any = None,
    loss_fn: LossFunction | None = None,
) -> Moments:
    """Moments of every layer that can be factored, over calibration data.

    The second moments of inputs, and for "fisher" of output gradients, are sums over real tokens: padding is left out
    by `attention_mask` and `decoder_attention_mask`, and neither batch size, padding nor order matters. The gradient is
    that of the model's loss where a batch has `labels`; otherwise of labels drawn from the model's own predictions; for
    a headless model of a random projection of its last hidden states. The model's mode, gradients, `requires_grad` and
    hooks are as before, also after an error.

    Args:
        model: a dense or converted model.
        batches: dicts for `model(**batch)` (a list, a DataLoader, a generator), a `datasets.Dataset` of examples, or
            texts with a tokenizer. In a distributed run every process gives its own share, and all get the sum.
        metric: "activation" for inputs alone, "fisher" for gradients, too.
        tokenizer: for texts; needs a padding token.
        loss_fn: (model, batch) -> scalar *summed* over the batch, instead of the choice above.

    Returns:
        Moments, which can be saved, merged and used for any number of conversions.

    Raises:
        TargetError: no such metric, no layer to watch, no batch, a batch that is no dict, or texts without a tokenizer.

    Cost: one forward pass for each batch, and one backward pass for "fisher"; tokens * (in^2 + out^2) multiply-adds
    and in^2 + out^2 float64 numbers for each layer.

    Source: K-FAC, J. Martens and R. Grosse, arXiv 1503.05671.

    >>> net = nn.Sequential(nn.Linear(8, 4))
    >>> data = [{"input": torch.ones(5, 8)}]
    >>> collect_moments(net, data, metric="activation").layers["0"].tokens
    5
    """
    if metric not in METRICS[1:]:
        raise TargetError(f"metric must be one of {list(METRICS[1:])} to collect moments, got {metric!r}")
    targets = find_targets(model, protected=protected_layers(model))
    if not targets.selected:
        raise TargetError(f"{type(model).__name__} has no layer that can be factored")
    named = {layer_name(model, t.name): t for t in targets.selected}
    fisher = metric == "fisher"
    moments = {n: LayerMoments.zeros(t.in_features, t.out_features, gradients=fisher) for n, t in named.items()}
    seen = 0
    with frozen(model), watch({n: t.module for n, t in named.items()}, moments) as watcher:
        for batch, watcher.masks in prepare(model, batches, tokenizer):
            seen += 1
            with torch.set_grad_enabled(fisher):
                loss = _loss(model, batch, watcher.masks, loss_fn if fisher else None, fisher)
            if fisher:
                loss.backward()
    seen = _sum_over_processes(moments, seen)
    if not seen:
        raise TargetError("the calibration data is empty: give at least one batch")
    unseen = [name for name, layer in moments.items() if layer.tokens == 0]
    if unseen:
        warnings.warn(f"{len(unseen)} layers saw no data and will get plain SVD: {unseen[:5]}", stacklevel=2)
    return Moments(metric, moments)


def layer_name(model: nn.Module, name: str) -> str:
    """The name under which plans and moments know the layer at this module path."""
    return plan_name(model, name) if isinstance(model, PreTrainedModel) else name


def _loss(
    model: nn.Module, batch: Any, masks: tuple[Tensor, ...], loss_fn: LossFunction | None, fisher: bool
) -> Tensor:
    if loss_fn is not None:
        return loss_fn(model, batch)
    outputs = model(**batch)
    if not fisher:
        return torch.zeros(())
    multi_label = getattr(getattr(model, "config", None), "problem_type", None) == "multi_label_classification"
    return objective(outputs, batch, masks, multi_label=multi_label)


def _sum_over_processes(moments: Mapping[str, LayerMoments], seen: int) -> int:
    """Add up what the processes of a distributed run saw, so that all of them hold the same moments."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return seen
    device = PartialState().device
    for layer in moments.values():
        total = layer.map(lambda tensor: reduce(tensor.to(device), "sum").cpu())
        vars(layer).update(vars(total))
    return int(reduce(torch.tensor(seen, device=device), "sum"))


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Evaluation mode and no parameter gradients, put back afterwards."""
    modes = {module: module.training for module in model.modules()}
    trainable = [p for p in model.parameters() if p.requires_grad]
    model.eval()
    for parameter in trainable:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)
        for module, mode in modes.items():
            module.training = mode
