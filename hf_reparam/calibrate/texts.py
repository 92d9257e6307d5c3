"""Texts, pairs and chats as rows of tokens; what is longer than a row becomes several."""

from typing import Any

from torch import nn
from transformers import PreTrainedTokenizerBase, ProcessorMixin

from hf_reparam.calibrate.inputs import positions
from hf_reparam.calibrate.items import Words
from hf_reparam.errors import TargetError

Tokens = dict[str, list[int]]

_LONGEST = 512


def checked_tokenizer(tokenizer: Any) -> Any:
    """The tokenizer, or the one of a processor; None if there is none.

    Raises:
        TargetError: anything else.
    """
    if isinstance(tokenizer, ProcessorMixin):
        tokenizer = getattr(tokenizer, "tokenizer", tokenizer)
    if tokenizer is None or isinstance(tokenizer, PreTrainedTokenizerBase):
        return tokenizer
    raise TargetError(
        f"tokenizer= must be a tokenizer of Transformers, got {type(tokenizer).__name__}: "
        "give AutoTokenizer.from_pretrained(NAME), or PreTrainedTokenizerFast(tokenizer_object=...); images and sound "
        "are given as batches of what their processor makes of them"
    )


def longest(model: nn.Module, tokenizer: Any, max_length: int | None) -> int:
    """Tokens of a row: `max_length`, or the smallest of 512, the tokenizer's and the model's own limit.

    Raises:
        TargetError: `max_length` has no room for a token, or the model has fewer positions.
    """
    most, least = positions(model), tokenizer.num_special_tokens_to_add() + 1
    if max_length is None:
        max_length = int(min(_LONGEST, most, tokenizer.model_max_length or _LONGEST))
    if not isinstance(max_length, int) or not least <= max_length <= most:
        raise TargetError(
            f"max_length must be an integer from {least} (a token beside the special ones) to {most}, "
            f"the model's positions; got {max_length!r}"
        )
    return max_length


def tokenized(words: Words, tokenizer: Any, length: int, *, single: bool) -> list[Tokens]:
    """Rows of at most `length` tokens, each with the tokenizer's special tokens.

    A pair is cut to one row, and so is anything if it has to be a `single` row.

    Raises:
        TargetError: there is no tokenizer, or it has no chat template for a chat.
    """
    if tokenizer is None:
        raise TargetError("texts need a tokenizer: give tokenizer=AutoTokenizer.from_pretrained(NAME)")
    if isinstance(words, tuple):
        return [dict(tokenizer(*words, truncation=True, max_length=length))]
    special = isinstance(words, str)  # a chat template writes them itself
    if not special and tokenizer.chat_template is None:
        raise TargetError("calibration data are chats, and the tokenizer has no chat_template: set it, or give texts")
    text = words if special else tokenizer.apply_chat_template(words, tokenize=False)
    whole = dict(tokenizer(text, add_special_tokens=special, verbose=False))
    if len(whole["input_ids"]) <= length:
        return [whole]
    blocks = _blocks(whole, tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], length)
    return blocks[:1] if single else blocks


def _blocks(whole: Tokens, bare: list[int], length: int) -> list[Tokens]:
    """Cut tokens between the special ones before and after them, which every block gets."""
    ids, size = whole["input_ids"], len(bare)
    start = next((k for k in range(len(ids) - size + 1) if ids[k : k + size] == bare), 0)
    if ids[start : start + size] != bare:
        size = len(ids)  # special tokens in the midst of the text: they stay where they are
    room = length - (len(ids) - size)
    return [
        {
            key: [*values[:start], *values[start + i : start + min(i + room, size)], *values[start + size :]]
            for key, values in whole.items()
        }
        for i in range(0, size, room)
    ]
