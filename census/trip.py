"""One model there and back: converted, saved, loaded, merged, saved, loaded, with everything compared on the way."""

import re
import tempfile
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from tempfile import gettempdir
from typing import Any

import torch
import transformers
from safetensors import safe_open
from torch import Tensor
from transformers import PreTrainedModel

import hf_reparam
from census.inputs import Inputs, NoInputsError, find_inputs, run
from census.tiny import CannotBuildError, build
from hf_reparam.compat.auto import auto_class_of
from hf_reparam.errors import RankError, TargetError
from hf_reparam.layers.linear import LowRankLinear

__all__ = ["FAILED", "LEFT_OUT", "OUTPUTS", "TENSORS", "travel"]

RANK = 4
OUTPUTS, TENSORS, LEFT_OUT, FAILED = "outputs equal", "tensors equal", "left out", "failed"
"""How a trip ends: all was equal; all that can be compared without inputs; it could not start; something differs."""

SAME = 1e-5
"""Largest difference of outputs, relative to the largest output, of equal tensors: they lie elsewhere in memory."""
ROUNDED = 1e-3
"""The same between a low-rank model and its merged one."""


@dataclass
class Loaded:
    """What a folder gave."""

    model: PreTrainedModel
    info: dict[str, Any]


def travel(kind: type[PreTrainedModel]) -> dict[str, Any]:
    """What happened to a class: {"ends": ..., "why": ..., and figures of the model}."""
    row: dict[str, Any] = {"class": kind.__name__, "type": getattr(kind.config_class, "model_type", "")}
    try:
        dense = build(kind)
    except CannotBuildError as error:
        return row | {"ends": LEFT_OUT, "why": f"no tiny model: {error}"}
    row |= {"type": dense.config.model_type, "parameters": sum(p.numel() for p in dense.parameters())}
    if not row["parameters"]:
        return row | {"ends": LEFT_OUT, "why": "no parameters: what other classes derive from"}
    try:
        inputs, without = find_inputs(dense), ""
    except NoInputsError as error:
        inputs, without = None, str(error)
    with tempfile.TemporaryDirectory() as folder:
        return row | _outcome(dense, inputs, without, Path(folder))


def _outcome(dense: PreTrainedModel, inputs: Inputs | None, without: str, folder: Path) -> dict[str, Any]:
    dense.save_pretrained(folder / "dense")
    stock = _stage("the dense class does not load what it saved", _faults_of_stock, dense, inputs, folder / "dense")
    form = ("pair", "pivoted")[zlib.crc32(type(dense).__name__.encode()) % 2]
    try:
        small = hf_reparam.convert(dense, hf_reparam.LowRankConfig(rank=RANK, form=form))
    except (TargetError, RankError) as error:
        return {"ends": LEFT_OUT, "why": f"nothing to convert: {_line(error)}"}
    except Exception as error:
        return {"ends": FAILED, "why": [f"convert: {type(error).__name__}: {_line(error)}"]}
    layers = sum(isinstance(module, LowRankLinear) for module in small.modules())
    row: dict[str, Any] = {"form": form, "layers": layers}
    faults = _stage("load", _faults_of_small, small, inputs, folder / "small")
    faults += _stage("merge", _faults_of_merged, small, inputs, folder)
    if stock and faults:
        return row | {"ends": LEFT_OUT, "why": f"stock fails, too: {stock[0]}"}
    if faults:
        return row | {"ends": FAILED, "why": faults}
    if inputs is None:
        return row | {"ends": TENSORS, "why": f"no inputs: {without}"}
    if all(map(torch.equal, run(dense, inputs), run(small, inputs))):
        return row | {"ends": TENSORS, "why": "the outputs do not depend on the layers that were converted"}
    return row | {"ends": OUTPUTS, "why": ""}


def _stage(name: str, compare: Any, *args: Any) -> list[str]:
    """What is different, or what was raised."""
    try:
        return [f"{name}: {fault}" for fault in compare(*args)]
    except Exception as error:
        return [f"{name}: {type(error).__name__}: {_line(error)}"]


def _faults_of_stock(dense: PreTrainedModel, inputs: Inputs | None, folder: Path) -> list[str]:
    return list(_differences(dense, _load(type(dense), folder), inputs))


def _faults_of_small(small: PreTrainedModel, inputs: Inputs | None, folder: Path) -> list[str]:
    small.save_pretrained(folder)
    return list(_differences(small, _load(_front_door(type(small)), folder), inputs))


def _faults_of_merged(small: PreTrainedModel, inputs: Inputs | None, folder: Path) -> list[str]:
    """Of the model merged from its folder, and of the names that merging in the converting process gives."""
    stock: Any = type(small).base_class
    merged = hf_reparam.merge(_load(_front_door(type(small)), folder / "small").model)
    faults = [] if type(merged) is stock else [f"a {type(merged).__name__} came back"]
    merged.save_pretrained(folder / "merged")
    faults += _differences(merged, _load(stock, folder / "merged"), inputs)
    hf_reparam.merge(small).save_pretrained(folder / "at once")
    wanted = _stored(folder / "dense")
    for name in ("merged", "at once"):
        faults += [f"{name}, {fault}" for fault in _apart("names in the file", _stored(folder / name), wanted)]
    if inputs is not None and not _close(run(merged, inputs), run(small, inputs), ROUNDED):
        faults.append("the outputs are not those of the low-rank model")
    return faults


def _front_door(kind: Any) -> Any:
    """The Auto class that knows a derived class, else the derived class by its name in the package."""
    name = auto_class_of(kind)
    if name in (None, "AutoBackbone"):  # which takes names of the Hub, and no folder
        return getattr(hf_reparam, kind.__name__)
    return getattr(transformers, name)


def _load(kind: Any, folder: Path) -> Loaded:
    model, info = kind.from_pretrained(str(folder), output_loading_info=True)
    return Loaded(model.eval(), info)


def _differences(made: PreTrainedModel, loaded: Loaded, inputs: Inputs | None) -> Iterable[str]:
    """Everything in which a loaded model differs from the one that was saved."""
    if type(loaded.model) is not type(made):
        yield f"a {type(loaded.model).__name__} came back"
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if found := sorted(map(str, loaded.info[kind])):
            yield f"{kind.replace('_', ' ')}: {_few(found)}"
    old, new = _tensors(made), _tensors(loaded.model)
    yield from _apart("tensors", dict.fromkeys(new), dict.fromkeys(old))
    if different := [name for name in old if name in new and not _equal(old[name], new[name])]:
        yield f"tensors differ: {_few(different)}"
    if inputs is not None and not _close(run(loaded.model, inputs), run(made, inputs), SAME):
        yield "outputs differ"


def _tensors(model: PreTrainedModel) -> dict[str, Tensor]:
    """Parameters and buffers, those that are not saved, too."""
    return {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }


def _equal(a: Tensor, b: Tensor) -> bool:
    """Bit for bit."""
    if a.shape != b.shape or a.dtype != b.dtype or a.is_meta != b.is_meta:
        return False
    a, b = (t.detach().contiguous().reshape(-1) for t in (a, b))
    return a.is_meta or torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def _close(found: list[Tensor], wanted: list[Tensor], tolerance: float) -> bool:
    if [t.shape for t in found] != [t.shape for t in wanted]:
        return False
    pairs = [(a.double(), b.double()) for a, b in zip(found, wanted, strict=True) if b.numel()]
    return all(float((a - b).abs().max()) <= tolerance * max(1.0, float(b.abs().max())) for a, b in pairs)


def _stored(folder: Path) -> dict[str, Any]:
    """Name -> shape of the tensors in a folder's weights."""
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            found |= {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    return found


def _apart(what: str, found: dict[str, Any], wanted: dict[str, Any]) -> Iterable[str]:
    if lost := sorted(wanted.keys() - found.keys()):
        yield f"{what} lost: {_few(lost)}"
    if new := sorted(found.keys() - wanted.keys()):
        yield f"{what} added: {_few(new)}"
    if shaped := sorted(name for name in wanted.keys() & found.keys() if wanted[name] != found[name]):
        yield f"{what} of another shape: {_few(shaped)}"


def _few(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _line(error: BaseException) -> str:
    text = re.sub(re.escape(gettempdir()) + r"/\w+", "FOLDER", " ".join(str(error).split()))  # of this run alone
    return text[:240]
