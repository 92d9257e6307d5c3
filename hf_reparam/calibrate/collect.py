"""`calibrate`: run calibration batches through a model once, for every size that may be wanted of it."""

import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate.utils import convert_file_size_to_int, gather_object, send_to_device
from torch import Tensor, nn

from hf_reparam.calibrate.batches import Batches, prepare
from hf_reparam.calibrate.inputs import fills_masks, forward_names, same_draws, without_cache
from hf_reparam.calibrate.items import DECODED, check_data
from hf_reparam.calibrate.objective import SummedLosses, examples_in, objective, projection
from hf_reparam.calibrate.padding import Padding, Part, decodes, unlabelled, warn_of_repeats
from hf_reparam.calibrate.predictions import problem_of
from hf_reparam.calibrate.watch import Watcher
from hf_reparam.compat.accelerate import ran_out_of_memory
from hf_reparam.config import METRICS, LowRankConfig
from hf_reparam.errors import ReparamError, TargetError
from hf_reparam.layers.copies import frozen_copy
from hf_reparam.layers.processes import alone, distributed, total
from hf_reparam.layers.progress import one_bar
from hf_reparam.layers.warn import warn
from hf_reparam.linalg.calibration import Calibration, HeldOut
from hf_reparam.linalg.moments import LayerMoments, LayerSums
from hf_reparam.linalg.tables import TableMoments
from hf_reparam.model.checks import check_has_data, check_no_adapters, check_unsharded, outside_inference_mode
from hf_reparam.model.host import called, check_model, hosts, opened, own_tokenizer
from hf_reparam.model.sites import Found, no_site, select

_HOLD_OUT = 5  # about every fifth batch judges what the others predict
_LEAST_PARTS = 3  # batches, of which some can be held out
_PIECES = 10  # into which fewer, if they are large, are split
_MOST_HELD = 256  # examples

S = TypeVar("S", LayerSums, TableMoments)
LossFunction = Callable[[nn.Module, Mapping[str, Any]], Tensor]


def calibrate(
    model: nn.Module,
    data: Batches,
    *,
    metric: str = "fisher",
    tokenizer: Any = None,
    loss_fn: LossFunction | None = None,
    max_length: int | None = None,
    max_samples: int | None = None,
    folder: str | os.PathLike[str] | None = None,
    max_memory: int | str | None = None,
    target_modules: str | Iterable[str] | None = None,
    embeddings: bool = False,
) -> Calibration:
    """Collect what the data say about every layer that is factored by default, or that `target_modules` matches.

    About every fifth batch, until there are 256 examples, is held out to judge what the others predict; it is counted
    in all sums, too. Its content alone decides whether a batch is held out, so that order does not matter. One or two
    batches of together ten examples or more are split for that.
    The second moments of inputs, and for "fisher" of output gradients, are sums over real tokens: padding is left out
    by `attention_mask` and `decoder_attention_mask`, and neither batch size, padding nor order matters. A Transformers
    model first reads a few examples together and one by one. If the shapes of masks do not tell its padding (audio
    encoders have fewer positions inside, experts get some, a layer may see all positions once a batch), and examples
    can be taken apart, they are watched one by one, which is slower. The gradient is that of the model's own loss where
    it gives one (a batch has `labels`), summed over whatever the head counts; otherwise, and for masked language
    models, of labels drawn from the model's own predictions; without logits, of a random projection of what the head
    gives, or of the last hidden states, or of all that is returned. The model's mode, gradients, `requires_grad` and
    hooks are as before, also after an error.

    Args:
        model: a dense or converted model, or an object with such models in it; of one that cannot be called with
            batches (a container, a SentenceTransformer, a wrapper of a whole model) the only Transformers model inside
            is called.
        data: dicts for `model(**batch)` (a list, a DataLoader, a generator), a `datasets.Dataset` of examples, or
            texts with a tokenizer: strings, or rows with a column `text`, `sentence` or `content` or only one of
            strings, a known pair of columns (`premise`, `hypothesis` ...), or a chat (`messages`). Columns that
            `forward` does not name are left out, and `label` is taken for `labels`. A masked language model gets texts
            with 15 % of their tokens masked. In a distributed run every process gives its own share, and all get the
            sum.
        metric: "activation" for inputs alone, "fisher" for gradients, too.
        tokenizer: for texts; or a processor that has one. A SentenceTransformer or CrossEncoder brings its own along.
        loss_fn: (model, batch) -> scalar *summed* over the batch, instead of the choice above. The batch has `labels`
            and, for a module that is not from Transformers, every other column, too, if `forward` names them or not.
        max_length: tokens of a text in one row; the rest goes into further rows (pairs and texts with labels are cut).
            Default: the smallest of 512, the tokenizer's and the model's limit.
        max_samples: how many texts, rows or rows of batches are used, the first ones.
        folder: where moments go, in place of memory; `Calibration.load` opens it again. What a broken run left there is
            deleted; finished moments are not replaced.
        max_memory: bytes, or a text such as "8GB", that moments may take in memory: layers are watched in groups, in
            one pass over the data each, and every group goes to `folder`. The data must allow several passes.
        target_modules: patterns as in `LowRankConfig`: a conversion that includes a head needs a calibration of it.
        embeddings: whether the input embeddings and a tied or untied output head are watched, too, for conversions
            with `embeddings=True`; with "fisher" alone.

    Returns:
        Calibration, which can be saved, merged and used for any number of conversions of this model, or of one with the
        same base and another head.

    Warns:
        UserWarning: layers that saw no data, or fewer rows than they have inputs; padding that cannot be told; examples
            that are repeated.

    Raises:
        TargetError: no model, one with adapters, or with several Transformers models and no way to call them; no
            such metric, no layer to watch, no batch, data that cannot be read (the message says what to write instead),
            texts without a tokenizer, a `max_length` or `max_samples` out of range, `max_memory` without `folder` or
            too small for one layer, or data for one pass only.
        WeightError: a model on the meta device, or weights in parts (FSDP, DeepSpeed).
        CheckpointError: `folder` holds moments already, cannot be written, or another process is filling it.

    Cost: one forward pass for each batch, and one backward pass for "fisher", for each group of layers; tokens *
    (in^2 + out^2) multiply-adds and 16 (in^2 + out^2) bytes for each layer. While data are read, half of them are on
    the layer's device as long as a quarter of its memory stays free; no batch waits for a copy to the CPU.

    Source: K-FAC, J. Martens and R. Grosse, arXiv 1503.05671.

    >>> net = nn.Sequential(nn.Linear(8, 4))
    >>> data = [{"input": torch.ones(5, 8)}]
    >>> calibrate(net, data, metric="activation")
    Calibration(metric='activation', layers=1, tokens=5)
    """
    if metric not in METRICS[1:]:
        raise TargetError(f"metric must be one of {list(METRICS[1:])} to collect moments, got {metric!r}")
    check_data(data)
    check_model(model)
    check_no_adapters(model)
    check_unsharded(model)
    check_has_data(model)
    if max_memory is not None and folder is None:
        raise TargetError("max_memory= needs folder=, a place for the moments of layers that were watched")
    with outside_inference_mode(), one_bar():
        work = frozen_copy(opened(model).model)
        watched = LowRankConfig(target_modules=target_modules, embeddings=embeddings and metric == "fisher")
        selection = select(work, watched)
        if not any(found.structure.option is None for found in selection.selected):
            raise no_site(selection)
        groups = _groups(selection.selected, metric, max_memory)
        if len(groups) > 1 and iter(data) is data:
            raise TargetError(
                f"max_memory={max_memory!r} takes {len(groups)} passes over the data: give a list, no iterator"
            )
        tokenizer = tokenizer or own_tokenizer(model)
        reading = {"tokenizer": tokenizer, "max_length": max_length, "max_samples": max_samples}
        rows: dict[str, int] = {}
        with ExitStack() as stack:
            if folder is not None:
                refusal = f"another process is filling {folder} with moments: give each its own folder"
                stack.enter_context(alone(Path(folder) / ".lock", refusal))
                Calibration.open_folder(folder)
            for number, group in enumerate(groups):
                seen = _watch_group(work, group, data, metric, reading, loss_fn, alone=len(groups) == 1)
                rows |= {f.name: seen.layers[f.name].tokens for f in group if f.name in seen.layers}
                if folder is not None:
                    (replace(seen, batches=()) if number else seen).save_part(folder, number, len(groups))
                    del seen  # before the next group takes its memory
    _warn_of_little_data(rows, {found.name: found.site.in_features for found in selection.selected})
    return seen if folder is None else Calibration.load(folder)


def size_in_bytes(option: str, value: int | str) -> int:
    """Bytes, from a number of them or a text such as "8GB"; raises TargetError, which names the option, for others."""
    try:
        return convert_file_size_to_int(value)
    except (ValueError, TypeError):
        raise TargetError(f"{option} must be a number of bytes or a text such as '8GB', got {value!r}") from None


def _groups(found: Sequence[Found], metric: str, max_memory: int | str | None) -> list[list[Found]]:
    """The sites in groups whose moments fit into `max_memory`, in the model's order."""
    if max_memory is None:
        return [list(found)]
    most = size_in_bytes("max_memory", max_memory)
    optional = [item for item in found if item.structure.option is not None]  # with the first group
    groups: list[list[Found]] = []
    room = 0
    for item in (item for item in found if item.structure.option is None):
        site, squares = item.site, item.site.in_features**2
        squares += site.out_features**2 if metric == "fisher" else 0
        size = 16 * len(site.moments(item.name)) * squares
        if size > most:
            raise TargetError(f"{item.name}: its moments take {size:,} bytes, and max_memory allows {most:,}")
        if size > room:
            groups.append([])
            room = most
        groups[-1].append(item)
        room -= size
    return [optional + groups[0], *groups[1:]]


def _watch_group(
    work: nn.Module,
    group: Sequence[Found],
    data: Batches,
    metric: str,
    reading: Mapping[str, Any],
    loss_fn: LossFunction | None,
    *,
    alone: bool,
) -> Calibration:
    """What one pass over the data says of some sites of a frozen copy; `alone` if there are no others."""
    fisher, inner = metric == "fisher", called(work)
    sums = {found.name: found.structure.sums(found.name, found.site, gradients=fisher) for found in group}
    plain = {f.name: f.site.module for f in group if f.structure.of_rows}
    seen, held, before = list[Part](), list[Part](), dict[str, LayerMoments]()  # seen: without their numbers
    read = prepare(inner, data, with_labels=loss_fn is not None, **reading)
    if loss_fn is None and fills_masks(inner):  # labels of masked tokens alone say less than drawn ones of all
        read = ((unlabelled(inner, batch), masks) for batch, masks in read)
    parts = _enough(Padding(inner, plain).parts(read))
    with ExitStack() as hooks, torch.enable_grad():
        watcher = Watcher(hooks)
        for found in group:
            found.structure.watch(found.name, found.site, sums[found.name], watcher)
        for part, last in _held_out_last(parts):
            if last and not held:
                before = {name: known.take() for name, known in _of(LayerSums, sums).items()}
            if last:
                held.append(part)
            seen.append(replace(part, batch={}, masks=()))
            batch = part.batch
            guessing = 0 if part.tried or not part.padded else examples_in(batch)
            with _noting(batch), same_draws(sum(part.seeds)):
                with watcher.seeing(part.masks, part.follows, guessing), torch.set_grad_enabled(fisher):
                    if not fisher:
                        inner(**without_cache(inner) | batch)
                        continue
                    loss = _loss(inner, part, alone=alone) if loss_fn is None else _own_loss(loss_fn, work, batch)
                if loss.requires_grad:  # it need not depend on every group: a pooler without a head
                    loss.backward()
                elif alone:
                    raise _no_gradient(plain)
    _warn_of_padding(watcher.unfitting(), watcher.masks)
    for host in hosts(work).values():
        if "disk" in (getattr(host, "hf_device_map", None) or {}).values():
            host.tie_weights()  # accelerate puts new meta parameters in the place of those that it has read
    layers = {name: known.take() for name, known in _of(LayerSums, sums).items()}
    tables = {name: known.map(Tensor.cpu) for name, known in _of(TableMoments, sums).items()}
    if total(torch.tensor(len(held))):
        layers = {name: _with_held(layer, before.pop(name, None)) for name, layer in layers.items()}
    every: list[Any] = [*layers.values(), *tables.values()]
    for known in every if distributed() else ():
        vars(known).update(vars(known.map(total)))
    if not total(torch.tensor(len(seen))):
        raise TargetError("the calibration data is empty: give at least one batch")
    warn_of_repeats(held, seen[: len(seen) - len(held)])
    names = forward_names(inner)  # a loss of one's own gets more than they
    known = {"labels"}.union(*(part.batch for part in held)) if names.others else {"labels", *names.known}
    kept: list[HeldOut] = [
        send_to_device(({k: v for k, v in part.batch.items() if k in known}, part.masks), "cpu") for part in held
    ]
    return Calibration(metric, layers, tables, gather_object(kept) if distributed() else kept)


@contextmanager
def _noting(batch: Mapping[str, Any]) -> Iterator[None]:
    """Have errors of the model's own say what it was called with, and what may be wrong with it."""
    try:
        yield
    except (IndexError, RuntimeError, ValueError) as error:
        tensors = {key: value for key, value in batch.items() if isinstance(value, Tensor)}
        given = ", ".join(f"{k} {tuple(v.shape)} {str(v.dtype).removeprefix('torch.')}" for k, v in tensors.items())
        advice = " If that is one example, make it a batch of one: tensor[None]."
        if ran_out_of_memory(error):
            advice = " Memory ran out: give smaller batches, or shorter texts by max_length=."
        if not isinstance(error, ReparamError):
            error.add_note(f"It was called with {given}.{advice}")
        raise


def _enough(parts: Iterator[Part]) -> Iterator[Part]:
    """The same, in pieces where there are too few to hold some out, but many examples."""
    first = list(islice(parts, _LEAST_PARTS))
    if len(first) < _LEAST_PARTS and sum(examples_in(part.batch) for part in first) >= _PIECES:
        first = [piece for part in first for piece in part.pieces(_PIECES)]
    yield from first
    yield from parts


def _held_out_last(parts: Iterable[Part]) -> Iterator[tuple[Part, bool]]:
    """All parts, those that are held out at the end, and whether each is.

    A part's own content says whether it is, so that neither order nor processes matter: about one of five, and if that
    is none, or all, the one with the lowest number.
    """

    def number(part: Part) -> int:
        return sum(part.seeds)

    held, others, count = list[Part](), list[Part](), 0  # others: the lowest of those that are not held out
    for part in parts:
        count += 1
        if number(part) % _HOLD_OUT == 0 and sum(examples_in(other.batch) for other in held) < _MOST_HELD:
            held.append(part)
        else:
            lowest, *passed = sorted([*others, part], key=number)
            others = [lowest]
            yield from ((one, False) for one in passed)
    if int(total(torch.tensor(count))) < _LEAST_PARTS:
        held, others = [], held + others
    elif len(held) in (0, count) and not distributed():
        first, *others = sorted(held + others, key=number)
        held = [first]
    yield from ((part, False) for part in others)
    yield from ((part, True) for part in held)


def _with_held(layer: LayerMoments, rest: LayerMoments | None) -> LayerMoments:
    """All that a layer saw: what was held out, and the rest; None if this process held nothing out."""
    if rest is None:
        return replace(layer, held=layer - layer)
    rest += layer
    return replace(rest, held=layer)


def _of(kind: type[S], sums: Mapping[str, Mapping[str, Any]]) -> dict[str, S]:
    """The sums of this kind of all sites, by their names."""
    return {name: known for group in sums.values() for name, known in group.items() if isinstance(known, kind)}


def _warn_of_little_data(rows: Mapping[str, int], inputs: Mapping[str, int]) -> None:
    unseen = [name for name, count in rows.items() if count == 0]
    if unseen:
        warn(f"{len(unseen)} layers saw no data and will get plain SVD: {unseen[:5]}")
    few = sorted((count / inputs[n], n) for n, count in rows.items() if 0 < count < inputs.get(n, 0))
    if few:
        worst = [f"{name}: {rows[name]:,} rows, {inputs[name]:,} inputs" for _, name in few[:3]]
        warn(
            f"{len(few)} of {len(rows)} layers saw fewer rows than they have inputs, e.g. {'; '.join(worst)}: "
            "give more calibration data"
        )


def _warn_of_padding(layers: list[str], masks: tuple[Tensor, ...]) -> None:
    if layers:
        shapes = " and ".join(str(tuple(mask.shape)) for mask in masks)
        warn(
            f"a mask of shape {shapes} fits no input of {len(layers)} layers, among them {layers[:3]}: if they get "
            "padding, it was counted; give examples one by one, or rows of one length"
        )


def _no_gradient(layers: Mapping[str, object]) -> TargetError:
    names = f"{len(layers)} layers, among them {list(layers)[:3]}"
    return TargetError(
        f"the loss depends on none of the {names}: give a loss_fn(model, batch) that does, or metric='activation'"
    )


def _own_loss(function: LossFunction, model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
    """What a loss function of the user's gives; TargetError for anything but a scalar."""
    loss = function(model, batch)
    if not isinstance(loss, Tensor) or loss.dim():
        shape = f"of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else f"{loss!r}"
        raise TargetError(f"loss_fn must return a scalar tensor, summed over the batch; it returned one {shape}")
    return loss


def _loss(model: nn.Module, part: Part, *, alone: bool) -> Tensor:
    """What the gradient is taken of; `alone` if all layers are watched at once, so that it has to depend on some."""
    try:
        with SummedLosses() as losses:
            outputs = model(**without_cache(model) | part.batch)
    except (IndexError, RuntimeError, ValueError) as error:
        if "labels" in part.batch and re.search("out of bounds|target|batch_size|can't be cast", str(error), re.I):
            raise TargetError(f"the model's loss takes no such labels ({error}): leave `labels` out") from None
        if decodes(model) and DECODED.isdisjoint(part.batch) and isinstance(error, ValueError):
            raise TargetError(f"{type(model).__name__} has a decoder: give labels or decoder_input_ids") from error
        raise
    told = {"problem": problem_of(model), "summed": losses.met, "seeds": part.seeds}
    loss = objective(outputs, part.batch, part.masks, **told)
    if loss.requires_grad or not alone:
        return loss
    return projection(outputs, part.seeds, part.masks)
