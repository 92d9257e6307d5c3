"""Calibration data of any kind, as batches for `model(**batch)` with the padding masks that go with them."""

from collections.abc import Iterable, Iterator, Mapping
from numbers import Number
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from hf_reparam.calibrate.inputs import (
    Names,
    batches_of_one,
    fills_masks,
    forward_names,
    host,
    padding_id,
    predicts_tokens,
    vocabulary,
)
from hf_reparam.calibrate.items import DECODED, INPUTS, LABELS, Words, count, depth, examples, is_row, leaf, length_of
from hf_reparam.calibrate.objective import MASKS, batch_masks, seeds_of, uniforms
from hf_reparam.calibrate.texts import checked_tokenizer, longest, tokenized
from hf_reparam.errors import TargetError
from hf_reparam.layers.progress import stage

Batches = Iterable[Mapping[str, Any]] | Iterable[str]
"""Dicts for `model(**batch)`, rows of a `datasets.Dataset`, or texts."""

Row = dict[str, Tensor]

_SIZE = 32  # texts or rows in a batch
_LEAST_BATCHES = 10  # of little data, so that some can be held out
_MASKED = 0.15  # of the tokens of a masked language model: as BERT was trained, arXiv 1810.04805
_SORTED = 32 * _SIZE  # texts that are sorted by length before they are put into batches: less padding, less time


def prepare(
    model: nn.Module,
    batches: Batches,
    tokenizer: Any = None,
    *,
    max_length: int | None = None,
    max_samples: int | None = None,
    with_labels: bool = False,
    desc: str = "calibrating",
) -> Iterator[tuple[dict[str, Any], tuple[Tensor, ...]]]:
    """Batches for a model, each with its padding masks (batch, length) as booleans; shows progress.

    Rows are put together with rows of their own shape, so that none is padded; texts are tokenized and padded. Of rows
    and batches alike, columns that the model does not take are left out, numbers and arrays become tensors, and `label`
    is taken for `labels`. A batch of no rows is passed over.

    Args:
        max_length: tokens of a text in one row; the rest goes into further rows. Default: the smallest of 512, the
            tokenizer's and the model's limit.
        max_samples: how many examples are used, the first ones.
        with_labels: whether labels, and all that a module not from Transformers is given, stay if it takes them or not.

    Raises:
        TargetError: data or an item that cannot be read, with what to write instead; texts without a tokenizer.
    """
    total, read = count(batches, max_samples), 0
    with stage(desc, total, "example") as advance:
        reader = _Reader(model, tokenizer, max_length, total, with_labels=with_labels)
        for batch, unused, done in reader.read(batches, max_samples):
            yield batch, batch_masks({**unused, **batch})
            advance(done)
            read += done
        advance(max(0, (total or 0) - read))  # empty texts


class _Reader:
    """Makes batches for one model."""

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        max_length: int | None,
        examples: int | None,
        *,
        with_labels: bool = False,
    ) -> None:
        self.model = model
        self.names = forward_names(model)
        self.with_labels = with_labels
        self.with_all = with_labels and not isinstance(model, PreTrainedModel)
        self.tokenizer = checked_tokenizer(tokenizer)
        self.length = 0 if self.tokenizer is None else longest(model, self.tokenizer, max_length)
        self.padding = 0 if self.tokenizer is None else padding_id(model, self.tokenizer)
        self.vocabulary = vocabulary(model)
        self.fills_masks = fills_masks(model)
        few = _SIZE if examples is None else max(1, examples // _LEAST_BATCHES)
        self.size = 1 if batches_of_one(model) else min(_SIZE, few)
        self.dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
        self.tokens_are_labels = predicts_tokens(model)

    def read(self, data: Batches, max_samples: int | None) -> Iterator[tuple[dict[str, Any], dict[str, Any], int]]:
        """Batches, padding masks that came with them but are nothing to the model, and how many examples they are."""
        waiting: dict[Any, list[tuple[Row, int]]] = {}
        for item, words in examples(data, self.names, max_samples):
            if words is None and not is_row(item):
                batch = self._batch(item)
                if not _is_empty(batch):
                    yield batch, {k: item[k] for k in MASKS if k in item and k not in batch}, length_of(batch)
                continue
            for number, (row, padded) in enumerate(self._rows(item, words)):
                alike = tuple((key, None if key in padded else value.shape) for key, value in row.items())
                rows = waiting.setdefault((alike, bool(padded)), [])
                rows.append((row, int(number == 0)))
                if len(rows) == (_SORTED if padded else self.size):
                    yield from self._collated(rows)
                    rows.clear()
        for rows in waiting.values():
            yield from self._collated(rows)

    def _collated(self, rows: list[tuple[Row, int]]) -> Iterator[tuple[Row, dict[str, Any], int]]:
        """Batches of rows of about one length, padded to the longest of them."""
        rows = sorted((r for r in rows if not _is_empty(r[0])), key=lambda r: len(r[0].get("input_ids", ())))
        for i in range(0, len(rows), self.size):
            part = [row for row, _ in rows[i : i + self.size]]
            batch = {key: _stacked([r[key] for r in part], self.padding * (key == "input_ids")) for key in part[0]}
            if self.fills_masks:
                batch = _masked(batch, self.tokenizer)
            yield batch, {}, sum(first for _, first in rows[i : i + self.size])

    def _rows(self, item: Mapping[str, Any], words: Words | None) -> Iterator[tuple[Row, frozenset[str]]]:
        """What one example gives, with the names of inputs that may be padded: several rows for a long text."""
        others = self._row(item)
        if words is None:
            self._check(item, others)
            yield others, frozenset()
            return
        _check_decoder(self.model, self.names, others)
        for tokens in tokenized(words, self.tokenizer, self.length, single="labels" in others):
            if max(tokens["input_ids"], default=0) >= self.vocabulary:
                raise TargetError(
                    f"the tokenizer gives token id {max(tokens['input_ids'])}, and {type(self.model).__name__} knows "
                    f"{self.vocabulary:.0f}: give the tokenizer of this model"
                )
            tokens.setdefault("attention_mask", [1] * len(tokens["input_ids"]))
            row = self._row(tokens)
            self._check(item, row if "input_ids" in row else {})
            yield row | others, frozenset(row) if "attention_mask" in row else frozenset()

    def _row(self, item: Mapping[str, Any]) -> Row:
        """What the model takes of one example, as tensors without a batch dimension."""
        every = self.names.others and not self.names.known.intersection(INPUTS)
        taken = self._taken(item, every or self.with_all, ranks=1)
        taken = {k: v for k, v in taken.items() if v is not None and not isinstance(leaf(v), (str, Mapping))}
        return {key: self._tensor(key, value) for key, value in taken.items()}

    def _batch(self, item: Mapping[str, Any]) -> dict[str, Any]:
        """What the model takes of a batch; what is neither an array nor a list of numbers stays as it is."""
        taken = self._taken(item, self.names.others or self.with_all, ranks=2)
        self._check(item, taken)
        if isinstance(self.model, PreTrainedModel):  # which needs no None
            taken = {k: v for k, v in taken.items() if v is not None}
        return {k: self._tensor(k, v) if depth(v) and _is_number(leaf(v)) else v for k, v in taken.items()}

    def _taken(self, item: Mapping[str, Any], every: bool, *, ranks: int) -> dict[str, Any]:
        """Columns under the model's names for them, main inputs first; labels of tokens have so many dimensions."""
        found: dict[str, Any] = {}
        for key in sorted(item, key=lambda key: (key not in INPUTS, key not in self.names.known, key in LABELS)):
            name, value = key, item[key]
            if key in LABELS[1:] and key not in self.names.known:
                if self.tokens_are_labels and depth(value) < ranks:  # the class of a text
                    continue
                name = "labels"
            told = self.with_labels and name == "labels" and not isinstance(leaf(value), str)
            if name in self.names.known or every or told:
                if name == "labels" and isinstance(leaf(value), str):
                    raise TargetError(
                        f"{key!r} is a text, {leaf(value)!r}: give its number, model.config.label2id[...]"
                    )
                found.setdefault(name, value)
        return found

    def _check(self, item: Mapping[str, Any], taken: Mapping[str, Any]) -> None:
        known = self.names.known
        if not any(name not in LABELS for name in taken):
            raise TargetError(
                f"{type(self.model).__name__} takes none of {list(item)} for its input; "
                f"it takes {sorted(known.intersection(INPUTS) or known)}"
            )

    def _tensor(self, name: str, value: Any) -> Tensor:
        """Numbers as a tensor: integers as int64, others in the model's dtype; a tensor as it is."""
        if isinstance(value, Tensor):
            return value
        try:
            if isinstance(value, (list, tuple)) and any(isinstance(v, Tensor) for v in value):
                return torch.stack(list(value))
            tensor = torch.as_tensor(value)
        except (TypeError, ValueError, RuntimeError) as error:
            raise TargetError(
                f"{name!r} of the calibration data is no tensor and no even list of numbers ({error}): "
                "pad rows to one length, as tokenizer(texts, padding=True) does, or give them one by one"
            ) from None
        if tensor.is_floating_point():
            return tensor.to(self.dtype)
        return tensor.long() if tensor.dtype in (torch.int32, torch.int16) or not tensor.numel() else tensor


def _is_number(value: Any) -> bool:
    return not isinstance(value, (Tensor, str)) and (isinstance(value, Number) or hasattr(value, "__array__"))


def _stacked(values: list[Tensor], padding: int) -> Tensor:
    return pad_sequence(values, batch_first=True, padding_value=padding) if values[0].dim() else torch.stack(values)


def _masked(batch: Row, tokenizer: Any) -> Row:
    """A batch with 15 % of the tokens masked, as such a model is used; as it is where some are masked already."""
    ids, mask = batch.get("input_ids"), getattr(tokenizer, "mask_token_id", None)
    if ids is None or mask is None or bool((ids == mask).any()):
        return batch
    masks = batch_masks(batch)
    words = ~torch.isin(ids, torch.tensor(tokenizer.all_special_ids))
    drawn = uniforms(ids[..., None], 1, seeds_of(batch, masks), masks)[..., 0] < _MASKED
    return batch | {"input_ids": ids.masked_fill(words & drawn, mask)}


def _is_empty(batch: Mapping[str, Any]) -> bool:
    """Whether there are no rows, or no columns of a main input."""
    tensors = {key: value for key, value in batch.items() if isinstance(value, Tensor) and value.dim()}
    return any(not len(value) or (key in INPUTS and not value.numel()) for key, value in tensors.items())


def _check_decoder(model: nn.Module, names: Names, others: Mapping[str, Any]) -> None:
    """Raise if the texts are those of an encoder, and nothing says what its decoder reads."""
    inside = host(model)
    if inside is None or not getattr(inside.config, "is_encoder_decoder", False):
        return
    makes_its_own = "labels" in names.known and not predicts_tokens(model)  # classification
    given = DECODED.intersection(others)
    if given or makes_its_own or "decoder_input_ids" not in names.known:
        return
    raise TargetError(
        f"{type(model).__name__} has a decoder, and texts say nothing of what it reads: give labels or "
        "decoder_input_ids, as rows tokenizer(source, text_target=target)"
    )
