"""Calibration data item by item: what is a text, what a row, what a batch, and what is none of these."""

import os
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor

from hf_reparam.calibrate.inputs import Names
from hf_reparam.errors import TargetError

Words = str | tuple[str, str] | list[Mapping[str, str]]
"""A text, a pair of texts, or the messages of a chat."""

INPUTS = {"input_ids": 1, "inputs_embeds": 2, "pixel_values": 3, "input_values": 1, "input_features": 2}
"""The main inputs of models, with the dimensions that one example has."""

LABELS = ("labels", "label", "label_ids")
DECODED = frozenset({"labels", "decoder_input_ids", "decoder_inputs_embeds"})
"""Any of these says what a decoder reads."""

_TEXTS = ("text", "sentence", "content")
_PAIRS = (
    ("text", "text_pair"),
    ("sentence1", "sentence2"),
    ("premise", "hypothesis"),
    ("question1", "question2"),
    ("question", "context"),
    ("question", "sentence"),
    ("question", "passage"),
    ("query", "passage"),
    ("query", "document"),
    ("text1", "text2"),
    ("text_a", "text_b"),
    ("sentence_a", "sentence_b"),
    ("sentence_A", "sentence_B"),
)
_NAMES_OF_ROWS = ("id", "idx", "index", "guid", "uid", "uuid", "key", *LABELS)


def check_data(data: Any) -> None:
    """Raise TargetError for what is no collection of texts, rows or batches, and say what to write instead."""
    name = type(data).__name__
    if isinstance(data, (str, bytes, os.PathLike)):
        what = (
            f"a {name}, {str(data)[:60]!r}: for one text write [text]; a file is read with "
            "Path(file).read_text().splitlines(), moments with Calibration.load(file)"
        )
    elif isinstance(data, Mapping):
        what = (
            f"a {name} of {sorted(map(str, data))}: for one batch write [batch], for one of several data sets data[KEY]"
        )
    elif isinstance(data, Tensor) or hasattr(data, "__array__"):
        frame = hasattr(data, "to_dict")
        if getattr(getattr(data, "dtype", None), "kind", "") in ("U", "O", "T"):  # an array or a column of texts
            return
        main = "pixel_values" if depth(data) == 4 else "input_ids"
        instead = "data.to_dict('records'), or data[COLUMN].tolist()" if frame else f'[{{"{main}": data}}]'
        what = f"a {name}: write {instead}"
    elif not isinstance(data, Iterable) and not _by_index(data):
        what = f"a {name}"
    else:
        return
    raise TargetError(f"calibration data is a list (or DataLoader, Dataset ...) of texts, rows or batches, got {what}")


def _by_index(data: Any) -> bool:
    """Whether this is a data set that is read by numbers alone, as those of PyTorch are."""
    return not hasattr(data, "__iter__") and hasattr(data, "__getitem__") and hasattr(data, "__len__")


def count(data: Any, max_samples: int | None) -> int | None:
    """How many examples will be read, as far as that can be told."""
    try:
        items = len(data)
    except TypeError:
        return max_samples
    if isinstance(data, (list, tuple)):
        items = sum(1 if not isinstance(item, Mapping) or is_row(item) else length_of(item) for item in data)
    else:
        items *= getattr(data, "batch_size", None) or 1
    return items if max_samples is None else min(items, max_samples)


def examples(
    data: Any, names: Names, max_samples: int | None = None
) -> Iterator[tuple[Mapping[str, Any], Words | None]]:
    """Rows and batches, each with the words it has to be tokenized from, if any; a text is a row of words alone.

    No more than `max_samples` examples altogether. Texts without words are passed over, and do not count.

    Raises:
        TargetError: `data` or an item of it is nothing that can be read, or `max_samples` is below 1.
    """
    check_data(data)
    if max_samples is not None and (not isinstance(max_samples, int) or max_samples < 1):
        raise TargetError(f"max_samples must be an integer of at least 1, got {max_samples!r}")
    left = max_samples
    for item in (data[i] for i in range(len(data))) if _by_index(data) else data:
        for row, words in _opened(item, names):
            size = 1 if words is not None or is_row(row) else length_of(row)
            yield row if left is None or size <= left else _shortened(row, size, left), words
            if left is not None and (left := left - size) <= 0:
                return


def _opened(item: Any, names: Names) -> Iterator[tuple[Mapping[str, Any], Words | None]]:
    """An item of the data as a row or batch; a batch of texts as its rows; nothing for an empty text."""
    if not isinstance(item, (str, Mapping)):
        inner = f" of {type(item[0]).__name__}" if isinstance(item, (list, tuple)) and item else ""
        got = type(item).__name__ + inner
        raise TargetError(
            f"a calibration batch is a dict for model(**batch) or a text, got a {got}: for ids write "
            '{"input_ids": ids}, for two texts {"text": a, "text_pair": b}, for a chat {"messages": messages}, '
            "for images or sound what the model's processor makes of them"
        )
    for row in _rows_of_texts({"text": item} if isinstance(item, str) else item, names):
        words = _words_of(row, names)
        if words is None or not isinstance(words, str) or words.strip():
            yield row, words


def _rows_of_texts(item: Mapping[str, Any], names: Names) -> Iterator[Mapping[str, Any]]:
    """The rows of a batch that has lists of texts under the names of texts; anything else as it is."""
    known = {column for pair in _PAIRS for column in pair}.union(_TEXTS)
    texts = [
        value for key, value in item.items() if key in known and depth(value) == 1 and isinstance(leaf(value), str)
    ]
    if not texts or _has_inputs(item, names):
        yield item
        return
    size = len(texts[0])
    columns = {key: value for key, value in item.items() if depth(value) and len(value) == size}
    for i in range(size):
        yield {key: value[i] for key, value in columns.items()}


def leaf(value: Any) -> Any:
    """The first value in nested lists, or the value itself."""
    while isinstance(value, (list, tuple)) and value:
        value = value[0]
    return value


def depth(value: Any) -> int:
    """Dimensions of a tensor, an array or nested lists; 0 for anything else."""
    if isinstance(value, (list, tuple)):
        return 1 + (depth(value[0]) if value else 0)
    return getattr(value, "ndim", 0)


def is_row(item: Mapping[str, Any]) -> bool:
    """Whether a dict holds one example, prepared for a model but for its batch dimension."""
    found = [key for key in INPUTS if item.get(key) is not None]
    return bool(found) and depth(item[found[0]]) <= INPUTS[found[0]]


def length_of(batch: Mapping[str, Any]) -> int:
    """How many examples a batch holds: the length of its main input, or of its first tensor or list."""
    values = [*(batch.get(key) for key in INPUTS), *batch.values()]
    return next((len(value) for value in values if depth(value)), 1)


def _shortened(batch: Mapping[str, Any], whole: int, size: int) -> dict[str, Any]:
    """The first examples of a batch."""
    return {k: v[:size] if depth(v) and len(v) == whole else v for k, v in batch.items()}


def _has_inputs(item: Mapping[str, Any], names: Names) -> bool:
    """Whether a dict holds what a model takes, so that nothing in it has to be tokenized."""
    named = names.known.difference(LABELS)
    single = (str, bool, int, float, type(None))
    return any(item.get(key) is not None for key in INPUTS) or any(
        key in named and not isinstance(value, single) for key, value in item.items()
    )


def _words_of(item: Mapping[str, Any], names: Names) -> Words | None:
    """The text, pair or chat that a row has to be tokenized from; None if it holds tensors already.

    Raises:
        TargetError: no column of the row, or several, can be its text.
    """
    if _has_inputs(item, names):
        return None
    if depth(item.get("messages")):
        return list(item["messages"])
    for first, second in _PAIRS:
        if isinstance(item.get(first), str) and isinstance(item.get(second), str):
            return item[first], item[second]
    named = [key for key in _TEXTS if key in item and (item[key] is None or isinstance(item[key], str))]
    texts = [key for key, value in item.items() if isinstance(value, str) and not _names_a_row(key)]
    chosen = named or texts
    if not named and names.others and any(depth(v) and not isinstance(leaf(v), (str, Mapping)) for v in item.values()):
        return None  # forward takes any name
    if len(chosen) == 1:
        return item[chosen[0]] or ""
    if "translation" in item:
        raise TargetError(
            "a row of calibration data holds a 'translation', which has to be tokenized on both sides: give rows "
            'tokenizer(source, text_target=target), source being row["translation"][LANGUAGE]'
        )
    why = f"{chosen} can all be the text" if chosen else "none is a text or an input of the model"
    raise TargetError(
        f"a row of calibration data has the columns {list(item)}, and {why}: give [row[COLUMN] for row in data], "
        'pairs as {"text": a, "text_pair": b}, chats as {"messages": messages}, tokenized rows with "input_ids", or '
        "for images and sound what the model's processor makes of them"
    )


def _names_a_row(column: str) -> bool:
    return column.lower() in _NAMES_OF_ROWS or column.lower().endswith(("_id", "-id"))
