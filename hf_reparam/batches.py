"""Calibration data of any kind, as batches for `model(**batch)` with the padding masks that go with them."""

import inspect
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import default_collate
from transformers.utils.logging import tqdm

from hf_reparam.errors import TargetError
from hf_reparam.hf.objective import batch_masks
from hf_reparam.hf.offload import execution_device

__all__ = ["Batches", "batched", "prepare"]

Batches = Iterable[Mapping[str, Any]] | Iterable[str]
"""Dicts for `model(**batch)`, rows of a `datasets.Dataset`, or texts."""

_SIZE = 32  # texts or rows in a batch
_SORTED = 32 * _SIZE  # texts that are sorted by length before they are put into batches: less padding, less time
_ROW_DIMENSIONS = {"input_ids": 1, "inputs_embeds": 2, "pixel_values": 3, "input_values": 1, "input_features": 2}


def prepare(
    model: nn.Module, batches: Batches, tokenizer: Any = None, *, desc: str = "Calibrating"
) -> Iterator[tuple[dict[str, Any], tuple[Tensor, ...]]]:
    """Batches on the model's device, each with its padding masks (batch, length) as booleans; shows progress.

    Rows are put together with rows of their own shape, so that none is padded; columns that the model does not take
    are left out, and `label` is taken for `labels`. Texts are tokenized, padded, and cut at 512 tokens. A batch of no
    rows is passed over.

    Raises:
        TargetError: an item that is neither dict nor text, a row without a column that the model takes, or texts
            without a tokenizer.
    """
    device = execution_device(model)
    for batch in tqdm(batched(model, batches, tokenizer), desc=desc, unit="batch"):
        if any(isinstance(value, Tensor) and value.dim() and not len(value) for value in batch.values()):
            continue
        moved = {key: value.to(device) if isinstance(value, Tensor) else value for key, value in batch.items()}
        moved = _distinct_lengths(model, moved)
        yield moved, batch_masks(moved)


def batched(model: nn.Module, items: Iterable[Any], tokenizer: Any) -> Iterator[Mapping[str, Any]]:
    """Batches as `prepare` makes them of any data, not yet moved to a device."""
    texts: list[str] = []
    rows: dict[Any, list[dict[str, Tensor]]] = {}
    for item in items:
        if isinstance(item, Mapping) and (row := _as_row(model, item, tokenizer)) is not None:
            alike = rows.setdefault(tuple((key, value.shape) for key, value in row.items()), [])
            alike.append(row)
            if len(alike) == _SIZE:
                yield default_collate(alike)
                alike.clear()
        elif isinstance(item, Mapping):
            yield item
        elif isinstance(item, str):
            texts.append(item)
            if len(texts) == _SORTED:
                yield from _by_length(texts, tokenizer)
                texts = []
        else:
            raise TargetError(f"a calibration batch is a dict for model(**batch) or a text, got {type(item).__name__}")
    yield from _by_length(texts, tokenizer)
    yield from (default_collate(alike) for alike in rows.values() if alike)


def _as_row(model: nn.Module, item: Mapping[str, Any], tokenizer: Any) -> dict[str, Tensor] | None:
    """A single example as tensors without a batch dimension, or None for a batch."""
    found = [key for key in _ROW_DIMENSIONS if key in item]
    if found and torch.as_tensor(item[found[0]]).dim() > _ROW_DIMENSIONS[found[0]]:
        return None
    if not found:
        strings = [value for value in item.values() if isinstance(value, str)]
        if not strings:
            return None
        item = dict(_tokenize(item.get("text", strings[0]), tokenizer)) | dict(item)
    accepted = inspect.signature(model.forward).parameters
    named = {"labels" if key in ("label", "label_ids") else key: value for key, value in item.items()}
    return {key: torch.as_tensor(value) for key, value in named.items() if key in accepted and value is not None}


def _by_length(texts: list[str], tokenizer: Any) -> Iterator[Mapping[str, Any]]:
    ordered = sorted(texts, key=len)
    for i in range(0, len(ordered), _SIZE):
        yield _tokenize(ordered[i : i + _SIZE], tokenizer)


def _tokenize(texts: list[str] | str, tokenizer: Any) -> Mapping[str, Any]:
    """A padded batch of texts, or one text without a batch dimension."""
    if tokenizer is None:
        raise TargetError("calibration texts need a tokenizer: collect_moments(model, texts, tokenizer=...)")
    longest = min(tokenizer.model_max_length, 512)
    options = {} if isinstance(texts, str) else {"padding": True, "return_tensors": "pt"}
    batch: Mapping[str, Any] = tokenizer(texts, truncation=True, max_length=longest, **options)
    return batch


def _distinct_lengths(model: nn.Module, batch: dict[str, Any]) -> dict[str, Any]:
    """For an encoder-decoder: a mask and a length of its own for each, so that a shape tells whose tokens are seen."""
    decoded = batch.get("decoder_input_ids", batch.get("labels"))
    ids = batch.get("input_ids")
    if not getattr(getattr(model, "config", None), "is_encoder_decoder", False) or ids is None or decoded is None:
        return batch
    mask = batch.get("attention_mask", torch.ones_like(ids))
    decoder_mask = batch.get("decoder_attention_mask")
    if decoder_mask is None:
        decoder_mask = (decoded != -100).long()
    if decoded.shape == ids.shape:
        ids, mask = nn.functional.pad(ids, (0, 1)), nn.functional.pad(mask, (0, 1))
    return {**batch, "input_ids": ids, "attention_mask": mask, "decoder_attention_mask": decoder_mask}
