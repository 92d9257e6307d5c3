"""Which rows of a layer's input are padding.

A mask says it of the positions of a batch, (batch, length). That the rows of a layer's input are those positions cannot
be known from its shape alone: audio encoders have fewer, image towers others that may be as many by chance, experts get
some. So a model is tried once with a few examples: where every layer keeps as many rows by the shapes of masks as the
same examples have one by one, without padding, batches are watched as they are. Where it does not, examples are watched
one by one, which is right for every model, and slower.
"""

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from hf_reparam.calibrate.inputs import fills_masks, forward_names, same_draws
from hf_reparam.calibrate.objective import IGNORED, MASKS, batch_masks, examples_in, seeds_of
from hf_reparam.calibrate.predictions import compared, problem_of
from hf_reparam.calibrate.watch import Layout, layouts, shapes_of
from hf_reparam.compat.accelerate import execution_device
from hf_reparam.layers.warn import warn

Batch = Mapping[str, Any]

ANSWERS = ("labels", "start_positions", "end_positions", "next_sentence_label", "mc_labels", "sentence_order_label")
CANNOT_BE_TRIED = (ValueError, RuntimeError, IndexError, TypeError)  # of a model that needs its batch as it is


@dataclass(frozen=True)
class Part:
    """What is given to a model at once.

    Args:
        batch: for `model(**batch)`, on its device.
        masks: (examples, length) booleans, as `batch_masks` gives them, where the data were.
        follows: layer name -> how its rows follow the masks; None where that is not known of any layer.
        tried: whether it is known that the rows that no mask fits are no padding.
        seeds: one for each example, as `seeds_of` gives them.
    """

    batch: dict[str, Any]
    masks: tuple[Tensor, ...] = ()
    follows: Mapping[str, frozenset[Layout]] | None = None
    tried: bool = True
    seeds: tuple[int, ...] = ()

    @property
    def padded(self) -> bool:
        """Whether there is padding in it."""
        return not all(bool(mask.all()) for mask in self.masks)

    def pieces(self, count: int) -> list["Part"]:
        """So many, or one for each example; whole where its rows do not belong to examples."""
        examples = examples_in(self.batch)
        if not splits(self.batch) or any(len(mask) != examples for mask in self.masks):
            return [self]
        made = []
        for rows in torch.arange(examples).tensor_split(min(count, examples)):
            r = rows.tolist()
            masks, seeds = tuple(mask[r] for mask in self.masks), tuple(self.seeds[i] for i in r if self.seeds)
            made.append(replace(self, batch=rows_of(self.batch, r), masks=masks, seeds=seeds))
        return made


@dataclass
class Padding:
    """Batches of one model in parts in which padding can be told.

    Args:
        model: what the batches are for.
        layers: name -> module, of the layers that are watched; without any, what the model predicts is.
    """

    model: nn.Module
    layers: Mapping[str, nn.Module]
    _whole: dict[bool, bool] = field(default_factory=dict)  # with padding or without -> whether shapes tell it
    _follows: Mapping[str, frozenset[Layout]] = field(default_factory=dict)

    def parts(self, batches: Iterable[tuple[Batch, tuple[Tensor, ...]]]) -> Iterator[Part]:
        """The batches that `prepare` gives, whole or one example at a time. Tries the model out in the first of them.

        All that has to be known of a batch is read where the data are: a device need not be waited for.

        Cost: three small forward passes, for the first batch, and for the first one with padding.
        """
        device = execution_device(self.model)
        for part in self._told_apart(batches):
            seeds = tuple(seeds_of(part.batch, part.masks))
            yield replace(part, batch=send_to_device(part.batch, device), seeds=seeds)

    def _told_apart(self, batches: Iterable[tuple[Batch, tuple[Tensor, ...]]]) -> Iterator[Part]:
        for batch, masks in batches:
            usable = {k: v.clone() if isinstance(v, Tensor) and v.is_inference() else v for k, v in batch.items()}
            known = _to_window(self.model, _with_decoder_mask(self.model, usable))  # with all masks that can be known
            whole = Part(known, batch_masks(known), tried=False)
            if masks and not whole.masks:  # the model takes none of them
                yield replace(whole, masks=masks)
                continue
            count, padded, told = examples_in(whole.batch), whole.padded, None
            if count == 1 and padded and splits(whole.batch):
                told = False
            elif count > 1 and isinstance(self.model, PreTrainedModel) and splits(whole.batch):
                told = self._told(whole)
            if told is None:
                yield whole
            elif told:
                yield Part(whole.batch, whole.masks, self._follows if padded else None)
            else:
                yield from (self._single(whole, i) for i in range(count))

    def _single(self, part: Part, i: int) -> Part:
        """One example without the padding at its ends."""
        alone = _to_window(self.model, _trimmed(rows_of(part.batch, [i])))
        return Part(alone, batch_masks(alone))

    def _told(self, whole: Part) -> bool | None:
        """Whether shapes tell the padding of such a batch; None if the model cannot be tried."""
        padded = whole.padded
        if padded not in self._whole:
            try:
                told = self._try(whole)
            except CANNOT_BE_TRIED:
                return None
            if told is None:  # to be tried with another batch
                return False
            self._whole[padded] = told
            if told:
                self._whole.setdefault(False, True)
        return self._whole[padded]

    def _try(self, whole: Part) -> bool | None:
        """As `_told`, from the rows that layers get of a few examples; None if lengths do not tell masks apart."""
        widths = [mask.shape[-1] for mask in whole.masks]
        count = 3 if 2 in widths else 2
        if whole.padded and (len(set(widths)) < len(widths) or min(count, examples_in(whole.batch)) in widths):
            return None
        examples = examples_in(whole.batch)
        real = sum((mask.reshape(examples, -1).sum(1) for mask in whole.masks), torch.arange(examples) / examples)
        order = real.argsort().tolist()
        chosen = order[: count - 1] + order[-1:]
        alone: Counter[str] = Counter()
        for i in chosen:
            alone += self._rows(self._single(whole, i))[0]
        few = rows_of(whole.batch, chosen)
        for batch in [few, _trimmed(few)] if whole.padded else [few]:  # of another length: it may equal some other
            together, follows = self._rows(Part(batch, batch_masks(batch)))
            if together == alone:
                self._follows = follows if whole.padded else self._follows
                return True
        return False

    @torch.no_grad()
    def _rows(self, part: Part) -> tuple[Counter[str], dict[str, frozenset[Layout]]]:
        """How many rows each layer, or prediction, keeps by the shapes of masks, and how its rows follow them."""
        found: Counter[str] = Counter()
        follows: dict[str, frozenset[Layout]] = {}
        run = partial(same_draws()(self.model), **send_to_device(part.batch, execution_device(self.model)))
        for name, shape in shapes_of(self.layers, run) if self.layers else self._shapes(run()):
            layout = next(layouts(shape, part.masks), None)
            found[name] += math.prod(shape[:-1])
            if layout is not None:
                mask = part.masks[layout.mask]
                found[name] -= math.prod(shape[:-1]) // mask.numel() * int((~mask).sum())
            follows[name] = follows.get(name, frozenset()) | ({layout} if layout else set())
        return found, follows

    def _shapes(self, outputs: Any) -> list[tuple[str, torch.Size]]:
        """Of what the model predicts."""
        return [(name, value.shape) for name, value in compared(outputs, problem_of(self.model)).items()]


def warn_of_repeats(judging: Iterable[Part], fitting: Iterable[Part]) -> None:
    """Warn where most of the examples that judge are among the others, too."""
    known = {seed for part in fitting for seed in part.seeds}
    held = [seed in known for part in judging for seed in part.seeds]
    if 2 * sum(held) > len(held):
        warn(
            f"{sum(held)} of {len(held)} held-out examples are among the others, too, and judge too favourably: leave "
            "out what is repeated"
        )


def splits(batch: Batch) -> bool:
    """Whether all of a batch belongs to examples, row by row."""
    count = examples_in(batch)
    held = [value for value in batch.values() if isinstance(value, (Tensor, list, tuple, dict))]
    vector = all(isinstance(v, Tensor) and v.dim() == 1 and v.is_floating_point() for v in held)  # of one example
    return not vector and all(isinstance(v, Tensor) and (not v.dim() or len(v) in (1, count)) for v in held)


def rows_of(batch: Batch, rows: list[int]) -> dict[str, Any]:
    """Some examples of a batch; what it has but one row of belongs to all of them."""
    count = examples_in(batch)
    split = {key for key, value in batch.items() if isinstance(value, Tensor) and value.dim() and len(value) == count}
    return {key: value[rows] if key in split else value for key, value in batch.items()}


def _trimmed(batch: Batch) -> dict[str, Any]:
    """A batch without the positions at both ends that are padding in every row."""
    out = dict(batch)
    for name in MASKS:
        mask = batch.get(name)
        for seen in batch_masks({name: mask}):
            real = seen.any(0).nonzero()
            axis = 2 if isinstance(mask, Tensor) and mask.dim() == 3 else 1
            along = _along(batch, name, axis, seen.shape[1])
            if len(real) and along:
                ends = slice(int(real[0]), int(real[-1]) + 1)
                out |= {key: batch[key][(slice(None),) * axis + (ends,)] for key in along}
                out[name] = batch[name][..., ends, ends] if batch[name].dim() == 4 else batch[name][..., ends]
    return out


def _along(batch: Batch, name: str, axis: int, length: int) -> list[str]:
    """What has the positions of a mask on an axis."""
    decoding = "decoder_attention_mask" in batch
    decoders = {key for key in batch if key.startswith("decoder_") or (decoding and key == "labels")}
    mine = decoders if name.startswith("decoder_") else batch.keys() - decoders
    tensors = {key: batch[key] for key in mine - set(MASKS) if isinstance(batch[key], Tensor)}
    return [key for key, value in tensors.items() if value.dim() > axis and value.shape[axis] == length]


def _with_decoder_mask(model: nn.Module, batch: dict[str, Any]) -> dict[str, Any]:
    """The mask of a decoder whose inputs are made of labels, or that was left out."""
    decoded = batch.get("decoder_input_ids", batch.get("labels"))
    known = "decoder_attention_mask" in batch or "decoder_attention_mask" not in forward_names(model).known
    if known or not isinstance(decoded, Tensor) or decoded.dim() != 2 or not decodes(model):
        return batch
    real = (decoded != IGNORED).long()
    return {**batch, "decoder_attention_mask": real.flip(1).cummax(1).values.flip(1)}  # labels may start late


def unlabelled(model: nn.Module, batch: Batch) -> dict[str, Any]:
    """A batch without labels, where the model does not make its decoder's inputs of them: they may be another head's,
    or -1 where they are not known."""
    return {key: value for key, value in batch.items() if decodes(model) or key not in ANSWERS}


def taken_by(model: nn.Module, batch: Batch) -> dict[str, Any]:
    """What a model's `forward` takes of a batch, without labels."""
    names = forward_names(model)
    return {key: value for key, value in unlabelled(model, batch).items() if key in names.known or names.others}


def decodes(model: nn.Module) -> bool:
    """Whether a model has a decoder whose inputs it can make of labels."""
    return bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))


def predicts_next(model: nn.Module) -> bool:
    """Whether position t of what a model predicts is for label t + 1: it writes texts, with no encoder of its own, and
    fills no masks. Wrong for XLNet and the decoders of BART and its kin alone: they write, and shift no labels."""
    return bool(getattr(model, "can_generate", bool)()) and not decodes(model) and not fills_masks(model)


def _to_window(model: nn.Module, batch: dict[str, Any]) -> dict[str, Any]:
    """A batch as long as a model that attends within windows (Longformer, LED, BigBird) would make it itself, with a
    mask that knows of it."""
    inputs, config = batch.get("input_ids", batch.get("inputs_embeds")), getattr(model, "config", None)
    sizes = getattr(config, "attention_window", None)
    if sizes is None and getattr(config, "attention_type", None) == "block_sparse":
        sizes = getattr(config, "block_size", None)
    step = max(sizes, default=0) if isinstance(sizes, (list, tuple)) else sizes
    if not isinstance(inputs, Tensor) or not isinstance(step, int) or step < 2 or not inputs.shape[1] % step:
        return batch
    mask = batch.get("attention_mask", inputs.new_ones(inputs.shape[:2], dtype=torch.long))
    batch = {**batch, "attention_mask": mask}
    fill = {"input_ids": getattr(config, "pad_token_id", None) or 0, "labels": IGNORED}
    for key in [*_along(batch, "attention_mask", 1, inputs.shape[1]), "attention_mask"]:
        sides = (0, 0) * (batch[key].dim() - 2) + (0, -inputs.shape[1] % step)
        batch[key] = F.pad(batch[key], sides, value=fill.get(key, 0))
    return batch
