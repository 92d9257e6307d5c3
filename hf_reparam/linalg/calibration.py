"""`Calibration`: what data say of the layers of one model, in memory or in files."""

import json
import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from hf_reparam.config import METRICS
from hf_reparam.errors import CheckpointError, WeightError
from hf_reparam.linalg.fingerprint import fingerprint
from hf_reparam.linalg.moments import LayerMoments
from hf_reparam.linalg.tables import TableMoments

HeldOut = tuple[dict[str, Any], tuple[Tensor, ...]]
"""A batch for `model(**batch)`, with its padding masks."""
_BATCH, _MASK = "batch:", "mask:"  # no name of a layer has a colon
_FORMAT = "hf_reparam.moments.1"
_SUMS = frozenset({"tokens", "input_sum", "input_products"})
_ALL_SUMS = _SUMS | {"gradient_products"}
_HELD = "held_"  # before the names of sums over the held-out part
_KINDS = [kind | {_HELD + name for name in kind} for kind in (_SUMS, _ALL_SUMS)] + [_SUMS, _ALL_SUMS]
_TABLE_SUMS = {f.name for f in fields(TableMoments)}


@dataclass(frozen=True, repr=False, eq=False)
class Calibration:
    """What calibration data say of the layers of one model, reusable for every size of it.

    Args:
        metric: the richest metric that it serves: "activation", or "fisher" with gradients.
        layers: layer name -> LayerMoments, names as in a plan; in memory, or read from files when asked for.
        tables: name of input embeddings -> TableMoments.
        batches: the held-out part of the data, on which plans are judged.
        curves, probes, times: what was found of weights that were planned with it, and of layers like them; a cache, of
            which `probes`, which cost forward passes, are stored.

    >>> from hf_reparam.linalg.moments import LayerSums
    >>> sums = LayerSums(4, 3, gradients=False)
    >>> sums.add_inputs(torch.ones(5, 4))
    >>> a = Calibration("activation", {"fc": sums.take()})
    >>> a + a
    Calibration(metric='activation', layers=1, tokens=10)
    """

    metric: str
    layers: Mapping[str, LayerMoments] = field(default_factory=dict)
    tables: Mapping[str, TableMoments] = field(default_factory=dict)
    batches: Sequence[HeldOut] = ()
    curves: dict[Any, Any] = field(default_factory=dict)
    probes: dict[Any, float] = field(default_factory=dict)
    times: dict[Any, Any] = field(default_factory=dict)

    def __repr__(self) -> str:
        return f"Calibration(metric={self.metric!r}, layers={len(self.layers)}, tokens={self.tokens})"

    def __add__(self, other: "Calibration") -> "Calibration":
        """What both data sets say together."""
        same = self.layers.keys() == other.layers.keys() and self.tables.keys() == other.tables.keys()
        if self.metric != other.metric or not same:
            raise WeightError("calibrations of different metrics or layers cannot be merged")
        tables = {name: table + other.tables[name] for name, table in self.tables.items()}
        layers = {name: m + other.layers[name] for name, m in self.layers.items()}
        return Calibration(self.metric, layers, tables, (*self.batches, *other.batches))

    def with_layers(self, new: Mapping[str, Callable[[], LayerMoments]], gone: Collection[str]) -> "Calibration":
        """The same with moments of other layers, computed when they are asked for, in the place of those `gone`."""
        kept = {name: partial(self.layers.__getitem__, name) for name in self.layers if name not in gone}
        return replace(self, layers=_Lazy({**kept, **new}))

    def fingerprint(self) -> str:
        """The same for the same moments; reads all of them."""
        layers = {name: self.layers[name].fingerprint() for name in sorted(self.layers)}
        return fingerprint(self.metric, layers, {name: vars(table) for name, table in self.tables.items()})

    @property
    def tokens(self) -> int:
        """Tokens that were seen, by the layer that saw most; of stored moments only these counts are read."""
        layers = self.layers
        counts = layers.tokens() if isinstance(layers, _Stored) else (layer.tokens for layer in layers.values())
        return max(counts, default=0)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write one safetensors file, which appears whole or not at all.

        Raises:
            CheckpointError: it cannot be written, as on a full disk.
        """
        self._write(Path(path), {})

    def save_part(self, folder: str | os.PathLike[str], part: int, parts: int) -> None:
        """Write one of the files of a folder that `open_folder` made ready: layers `part` of so many groups.

        Raises:
            CheckpointError: as `save`.
        """
        self._write(Path(folder) / f"{part:05}.safetensors", {"part": str(part), "parts": str(parts)})

    def _write(self, path: Path, header: dict[str, str]) -> None:
        tensors: dict[str, Tensor] = {}
        for name, layer in self.layers.items():
            tensors |= {f"{name}.{key}": value for key, value in layer.tensors().items()}
            held = {} if layer.held is None else layer.held.tensors()
            tensors |= {f"{name}.{_HELD}{key}": value for key, value in held.items()}
        for i, (batch, masks) in enumerate(self.batches):
            held = {f"{_BATCH}{i}.{key}": value for key, value in batch.items()}
            held |= {f"{_MASK}{i}.{j}": mask for j, mask in enumerate(masks)}
            if all(isinstance(value, Tensor) for value in held.values()):  # labels may be the ids themselves
                tensors |= {key: value.clone(memory_format=torch.contiguous_format) for key, value in held.items()}
        for name, table in self.tables.items():
            tensors |= {f"{name}.{f.name}": getattr(table, f.name) for f in fields(table)}
        unfinished = path.with_name(f".{path.name}.{os.getpid()}.part")
        try:
            probes = json.dumps([[*key, value] for key, value in self.probes.items()])
            header = {"format": _FORMAT, "metric": self.metric, "probes": probes, **header}
            save_file(tensors, unfinished, metadata=header)
            unfinished.replace(path)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{path} cannot be written: {error}") from None
        finally:
            unfinished.unlink(missing_ok=True)

    @staticmethod
    def open_folder(folder: str | os.PathLike[str]) -> None:
        """Make a folder ready for `save_part`: make it, and delete what a broken run left in it.

        Raises:
            CheckpointError: it holds moments already, which may be in use, or other .safetensors files; or it cannot be
                written.
        """
        folder = Path(folder)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            files = sorted(folder.glob("*.safetensors"))
            if files and not _missing_parts({file: _contents(file)[0] for file in files}):
                raise CheckpointError(f"{folder} holds moments already: give an empty folder or delete it")
            for file in (*files, *folder.glob(".*.safetensors.*.part")):
                file.unlink(missing_ok=True)
        except CheckpointError:
            raise
        except OSError as error:
            raise CheckpointError(f"{folder} cannot be written: {error.strerror or error}") from None

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Calibration":
        """Open a file that `save` wrote, or a folder of such files; layers are read when they are asked for.

        Raises:
            CheckpointError: no such file, or not one that `save` wrote; of a folder also: files are missing, as after
                a broken run, or have layers in common.
        """
        files = sorted(Path(path).glob("*.safetensors")) if Path(path).is_dir() else [Path(path)]
        if not files:
            raise CheckpointError(f"{path} holds no moments: there is no .safetensors file in it")
        where: dict[str, Path] = {}
        tables: dict[str, TableMoments] = {}
        batches: list[HeldOut] = []
        probes: dict[Any, float] = {}
        headers = {}
        for file in files:
            headers[file], names, found, held = _contents(file)
            twice = sorted({*where, *tables} & {*names, *found})
            if twice:
                raise CheckpointError(f"{path} holds moments of several runs: {twice[0]} is in more than one file")
            where.update(dict.fromkeys(names, file))
            tables |= {name: TableMoments(**_read(file, name)) for name in found}
            batches += [_read_batch(file, number) for number in held]
            probes |= _probes(headers[file])
        metrics = {header["metric"] for header in headers.values()}
        if len(metrics) > 1:
            raise CheckpointError(f"{path} holds moments of several metrics, {sorted(metrics)}")
        if Path(path).is_dir() and (missing := _missing_parts(headers)):
            raise CheckpointError(
                f"{path} holds moments of a broken run: {missing} files are missing; collect them anew"
            )
        return cls(metrics.pop(), _Stored(where), tables, batches, probes=probes)


def shapes_of_layers(layers: Mapping[str, LayerMoments]) -> dict[str, tuple[int, int | None]]:
    """Inputs and outputs of each layer, None for outputs without gradients; of stored moments no sums are read."""
    if isinstance(layers, _Stored):
        return layers.shapes()
    return {
        n: (len(m.input_sum), None if m.gradient_products is None else len(m.gradient_products))
        for n, m in layers.items()
    }


def _missing_parts(headers: Mapping[Path, Mapping[str, str]]) -> int:
    """How many files of a folder that `save_part` filled are not there; 0 for files that `save` wrote."""
    parts = max(int(header.get("parts", 0)) for header in headers.values())
    return parts and parts - len(headers)


class _Lazy(Mapping[str, LayerMoments]):
    """Moments that are computed, or read, whenever they are asked for."""

    def __init__(self, made: Mapping[str, Callable[[], LayerMoments]]) -> None:
        self._made = made

    def __getitem__(self, name: str) -> LayerMoments:
        return self._made[name]()

    def __contains__(self, name: object) -> bool:
        return name in self._made

    def __iter__(self) -> Iterator[str]:
        return iter(self._made)

    def __len__(self) -> int:
        return len(self._made)


class _Stored(_Lazy):
    """Layers in files."""

    def __init__(self, where: Mapping[str, Path]) -> None:
        super().__init__({name: partial(_layer, path, name) for name, path in where.items()})
        self._where = where

    def tokens(self) -> Iterator[int]:
        """The count of every layer."""
        for path in set(self._where.values()):
            with safe_open(path, framework="pt") as file:
                names = {f"{name}.tokens" for name in self._where}.intersection(file.keys())
                yield from (int(file.get_tensor(name)) for name in sorted(names))

    def shapes(self) -> dict[str, tuple[int, int | None]]:
        """As `shapes_of_layers`."""
        sizes: dict[str, int] = {}
        for path in set(self._where.values()):
            with safe_open(path, framework="pt") as file:
                sizes |= {key: (file.get_slice(key).get_shape() or [0])[0] for key in file.keys()}  # noqa: SIM118
        return {n: (sizes[f"{n}.input_sum"], sizes.get(f"{n}.gradient_products")) for n in self._where}


def _layer(path: Path, name: str) -> LayerMoments:
    tensors = _read(path, name)
    held = {key.removeprefix(_HELD): tensors.pop(key) for key in list(tensors) if key.startswith(_HELD)}
    return LayerMoments.of(tensors, LayerMoments.of(held) if held else None)


def _read(path: Path, name: str) -> dict[str, Tensor]:
    """The sums of one layer or table in a file, or the inputs of a batch, whose names may have dots."""
    start = f"{name}."
    try:
        with safe_open(path, framework="pt") as file:
            own = {key.removeprefix(start): key for key in file.keys() if key.startswith(start)}  # noqa: SIM118
            return {n: file.get_tensor(key) for n, key in own.items() if "." not in n or name.startswith(_BATCH)}
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} cannot be read as moments: {error}") from None


def _read_batch(path: Path, number: int) -> HeldOut:
    masks = _read(path, f"{_MASK}{number}")
    return _read(path, f"{_BATCH}{number}"), tuple(masks[j] for j in sorted(masks))


def _contents(path: Path) -> tuple[dict[str, str], list[str], list[str], list[int]]:
    """The header, the names of layers and of tables, and the numbers of the held-out batches of a file."""
    try:
        with safe_open(path, framework="pt") as file:
            header, keys = file.metadata() or {}, list(file.keys())
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} cannot be read as moments: {error}") from None
    sums: dict[str, set[str]] = {}
    for key in keys:
        sums.setdefault(key.rpartition(".")[0], set()).add(key.rpartition(".")[2])
    tables = sorted(name for name, found in sums.items() if found == _TABLE_SUMS)
    layers = {n: found for n, found in sums.items() if n not in tables and not n.startswith((_BATCH, _MASK))}
    batches = {key.partition(".")[0].removeprefix(_BATCH) for key in keys if key.startswith(_BATCH)}
    known = header.get("format") == _FORMAT and header.get("metric") in METRICS
    known = known and all(number.isdecimal() for number in (header.get("parts", "0"), *batches))
    try:
        _probes(header)
    except (TypeError, ValueError, OverflowError, RecursionError):
        known = False
    if not known or not all(found in _KINDS for found in layers.values()):
        raise CheckpointError(f"{path} holds no moments of this version")
    return header, sorted(layers), tables, sorted(map(int, batches))


def _probes(header: Mapping[str, str]) -> dict[Any, float]:
    """(fingerprint of the judge, metric, layer, rank) -> divergence."""
    return {tuple(key): float(value) for *key, value in json.loads(header.get("probes", "[]"))}
