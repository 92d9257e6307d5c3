"""`collect_moments`: run calibration batches through a model once, for every size that may be wanted of it."""

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils.logging import tqdm

from hf_reparam.errors import TargetError
from hf_reparam.hf.modeling import plan_name
from hf_reparam.hf.objective import batch_masks, objective
from hf_reparam.hf.retype import protected_layers
from hf_reparam.linalg import LayerMoments, Moments
from hf_reparam.linalg.moments import METRICS
from hf_reparam.nn.calibrate import watch
from hf_reparam.nn.targets import Target, find_targets

__all__ = ["collect_moments", "layer_name"]

_TEXTS_PER_BATCH = 32

LossFunction = Callable[[nn.Module, Mapping[str, Any]], Tensor]


def collect_moments(
    model: nn.Module,
    batches: Iterable[Mapping[str, Any]] | Iterable[str],
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
        batches: dicts for `model(**batch)` (a list, a DataLoader, a generator), or texts with a tokenizer.
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
    named = {layer_name(model, t): t for t in targets.selected}
    fisher = metric == "fisher"
    moments = {n: LayerMoments.zeros(t.in_features, t.out_features, gradients=fisher) for n, t in named.items()}
    seen = 0
    with _frozen(model), watch({n: t.module for n, t in named.items()}, moments) as watcher:
        for batch in tqdm(_batches(batches, tokenizer), desc="Calibrating", unit="batch"):
            seen += 1
            batch = _on_device(_distinct_lengths(model, batch), model)
            watcher.masks = batch_masks(batch)
            with torch.set_grad_enabled(fisher):
                loss = _loss(model, batch, watcher.masks, loss_fn if fisher else None, fisher)
            if fisher:
                loss.backward()
    if not seen:
        raise TargetError("the calibration data is empty: give at least one batch")
    unseen = [name for name, layer in moments.items() if layer.tokens == 0]
    if unseen:
        warnings.warn(f"{len(unseen)} layers saw no data and will get plain SVD: {unseen[:5]}", stacklevel=2)
    return Moments(metric, moments)


def layer_name(model: nn.Module, target: Target) -> str:
    """The name under which plans and moments know a layer."""
    return plan_name(model, target.name) if isinstance(model, PreTrainedModel) else target.name


def _loss(
    model: nn.Module, batch: Any, masks: tuple[Tensor, ...], loss_fn: LossFunction | None, fisher: bool
) -> Tensor:
    if loss_fn is not None:
        return loss_fn(model, batch)
    outputs = model(**batch)
    return objective(outputs, batch, masks) if fisher else torch.zeros(())


def _batches(batches: Iterable[Any], tokenizer: Any) -> Iterator[Mapping[str, Any]]:
    texts: list[str] = []
    for item in batches:
        if isinstance(item, str):
            texts.append(item)
            if len(texts) == _TEXTS_PER_BATCH:
                yield _tokenize(texts, tokenizer)
                texts = []
        elif isinstance(item, Mapping):
            yield item
        else:
            raise TargetError(f"a calibration batch is a dict for model(**batch) or a text, got {type(item).__name__}")
    if texts:
        yield _tokenize(texts, tokenizer)


def _tokenize(texts: list[str], tokenizer: Any) -> Mapping[str, Any]:
    if tokenizer is None:
        raise TargetError("calibration texts need a tokenizer: collect_moments(model, texts, tokenizer=...)")
    longest = min(tokenizer.model_max_length, 512)
    batch: Mapping[str, Any] = tokenizer(texts, padding=True, truncation=True, max_length=longest, return_tensors="pt")
    return batch


def _on_device(batch: Mapping[str, Any], model: nn.Module) -> dict[str, Any]:
    device = next(model.parameters()).device
    return {key: value.to(device) if isinstance(value, Tensor) else value for key, value in batch.items()}


def _distinct_lengths(model: nn.Module, batch: Mapping[str, Any]) -> dict[str, Any]:
    """For an encoder-decoder: a mask and a length of its own for each, so that a shape tells whose tokens are seen."""
    decoded = batch.get("decoder_input_ids", batch.get("labels"))
    ids = batch.get("input_ids")
    if not getattr(getattr(model, "config", None), "is_encoder_decoder", False) or ids is None or decoded is None:
        return dict(batch)
    mask = batch.get("attention_mask", torch.ones_like(ids))
    decoder_mask = batch.get("decoder_attention_mask")
    if decoder_mask is None:
        decoder_mask = (decoded != -100).long()
    if decoded.shape == ids.shape:
        ids, mask = nn.functional.pad(ids, (0, 1)), nn.functional.pad(mask, (0, 1))
    return {**batch, "input_ids": ids, "attention_mask": mask, "decoder_attention_mask": decoder_mask}


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
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
