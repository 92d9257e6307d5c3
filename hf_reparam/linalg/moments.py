"""Streaming moments of what goes into a layer and of the gradient that comes back to its output."""

import os
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from hf_reparam.config import METRICS
from hf_reparam.errors import CheckpointError, WeightError
from hf_reparam.linalg.fingerprint import fingerprint
from hf_reparam.linalg.metric import Metric, root
from hf_reparam.linalg.tables import TableMoments

__all__ = ["Calibration", "LayerMoments", "shapes_of_layers"]

SHRINKAGE = {"input": 1e-3, "gradient": 1e-2}
"""Share of the mean variance, and of the mean squared gradient, that is mixed into the moments."""
_FORMAT = "hf_reparam.moments.1"
_SUMS = frozenset({"tokens", "input_sum", "input_products"})
_ALL_SUMS = _SUMS | {"gradient_products"}
_TABLE_SUMS = {f.name for f in fields(TableMoments)}


@dataclass
class LayerMoments:
    """Sums over tokens for one layer, all float64 on the CPU.

    Args:
        tokens: rows of x that were seen.
        input_sum: (in,) sum of x.
        input_products: (in, in) sum of x x^T.
        gradient_products: (out, out) sum of g g^T, g = d(summed loss) / dy; None without gradients.
    """

    tokens: int
    input_sum: Tensor
    input_products: Tensor
    gradient_products: Tensor | None = None

    @classmethod
    def zeros(cls, n_in: int, n_out: int, *, gradients: bool) -> "LayerMoments":
        """No tokens yet."""
        square = torch.zeros(n_out, n_out, dtype=torch.float64) if gradients else None
        return cls(0, torch.zeros(n_in, dtype=torch.float64), torch.zeros(n_in, n_in, dtype=torch.float64), square)

    def add_inputs(self, x: Tensor) -> None:
        """Add rows x (tokens, in). Products in float32 or better, sums in float64."""
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        self.tokens += x.shape[0]
        self.input_sum += x.sum(0, dtype=torch.float64).cpu()
        self.input_products += (x.T @ x).to("cpu", torch.float64)

    def add_gradients(self, g: Tensor) -> None:
        """Add rows g (tokens, out)."""
        if self.gradient_products is None:
            raise WeightError("these moments were made without gradients")
        g = g.to(torch.promote_types(g.dtype, torch.float32))
        self.gradient_products += (g.T @ g).to("cpu", torch.float64)

    def __add__(self, other: "LayerMoments") -> "LayerMoments":
        if (self.gradient_products is None) != (other.gradient_products is None):
            raise WeightError("moments with and without gradients cannot be merged")
        gradients = None
        if self.gradient_products is not None and other.gradient_products is not None:
            gradients = self.gradient_products + other.gradient_products
        sums, products = self.input_sum + other.input_sum, self.input_products + other.input_products
        return LayerMoments(self.tokens + other.tokens, sums, products, gradients)

    def map(self, function: Callable[[Tensor], Tensor]) -> "LayerMoments":
        """The same function of every sum, the count of tokens first."""
        tokens = int(function(torch.tensor(self.tokens)))
        sums, products = function(self.input_sum), function(self.input_products)
        gradients = None if self.gradient_products is None else function(self.gradient_products)
        return LayerMoments(tokens, sums, products, gradients)

    def has_gradient(self) -> bool:
        """Whether a gradient ever came back to the layer, be it NaN."""
        return self.gradient_products is not None and bool(self.gradient_products.diagonal().sum() != 0)

    def fingerprint(self) -> str:
        """The same for the same moments: other data differ in some mean or mean square of inputs or gradients."""
        gradients = None if self.gradient_products is None else self.gradient_products.diagonal()
        return fingerprint(self.tokens, self.input_sum, self.input_products.diagonal(), gradients)

    def mean(self) -> Tensor:
        """E x, (in,)."""
        return self.input_sum / max(self.tokens, 1)

    def metric(self, name: str, *, centred: bool, device: torch.device | None = None) -> Metric:
        """The Metric of this name, on a device; centred where a bias can absorb the error in the mean.

        Raises:
            WeightError: "fisher" was asked for, and the moments have no gradients; or they are not finite.
        """
        if name == "svd" or self.tokens == 0:
            return Metric()
        covariance = self.input_products.to(device) / self.tokens
        if centred:
            mean = self.mean().to(device)
            covariance.addr_(mean, mean, alpha=-1)
        if not bool(torch.isfinite(covariance).all()):
            raise WeightError("the calibration inputs of this layer are not finite")
        inputs = root(covariance, SHRINKAGE["input"])
        if name == "activation":
            return Metric(inputs)
        if self.gradient_products is None:
            raise WeightError("the fisher metric needs gradients: collect moments with metric='fisher'")
        gradients = self.gradient_products.to(device) / self.tokens
        if not bool(torch.isfinite(gradients).all()):
            raise WeightError("the calibration gradients of this layer are not finite")
        return Metric(inputs, root(gradients, SHRINKAGE["gradient"]))


@dataclass(frozen=True, repr=False)
class Calibration:
    """What calibration data say of the layers of one model, reusable for every size of it.

    Args:
        metric: the richest metric that it serves: "activation", or "fisher" with gradients.
        layers: layer name -> LayerMoments, names as in a plan; in memory, or read from files when asked for.
        tables: name of input embeddings -> TableMoments.

    >>> a = Calibration("activation", {"fc": LayerMoments.zeros(4, 3, gradients=False)})
    >>> a.layers["fc"].add_inputs(torch.ones(5, 4))
    >>> a + a
    Calibration(metric='activation', layers=1, tokens=10)
    """

    metric: str
    layers: Mapping[str, LayerMoments] = field(default_factory=dict)
    tables: Mapping[str, TableMoments] = field(default_factory=dict)
    spectra: dict[Any, Tensor] = field(default_factory=dict, compare=False)  # of weights that were planned with it

    def __repr__(self) -> str:
        return f"Calibration(metric={self.metric!r}, layers={len(self.layers)}, tokens={self.tokens})"

    def __add__(self, other: "Calibration") -> "Calibration":
        """What both data sets say together."""
        same = self.layers.keys() == other.layers.keys() and self.tables.keys() == other.tables.keys()
        if self.metric != other.metric or not same:
            raise WeightError("calibrations of different metrics or layers cannot be merged")
        tables = {name: table + other.tables[name] for name, table in self.tables.items()}
        return Calibration(self.metric, {name: m + other.layers[name] for name, m in self.layers.items()}, tables)

    def with_layers(self, new: Mapping[str, Callable[[], LayerMoments]], gone: Collection[str]) -> "Calibration":
        """The same with moments of other layers, computed when they are asked for, in the place of those `gone`."""
        return Calibration(self.metric, _Changed(self.layers, gone, new), self.tables, self.spectra)

    def fingerprint(self) -> str:
        """The same for the same moments; reads all of them."""
        layers = {name: layer.fingerprint() for name, layer in self.layers.items()}
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
            tensors[f"{name}.tokens"] = torch.tensor(layer.tokens)
            tensors[f"{name}.input_sum"] = layer.input_sum
            tensors[f"{name}.input_products"] = layer.input_products
            if layer.gradient_products is not None:
                tensors[f"{name}.gradient_products"] = layer.gradient_products
        for name, table in self.tables.items():
            tensors |= {f"{name}.{f.name}": getattr(table, f.name) for f in fields(table)}
        unfinished = path.with_name(f".{path.name}.{os.getpid()}.part")
        try:
            save_file(tensors, unfinished, metadata={"format": _FORMAT, "metric": self.metric, **header})
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
        headers = {}
        for file in files:
            headers[file], names, found = _contents(file)
            twice = sorted({*where, *tables} & {*names, *found})
            if twice:
                raise CheckpointError(f"{path} holds moments of several runs: {twice[0]} is in more than one file")
            where.update(dict.fromkeys(names, file))
            tables |= {name: TableMoments(**_read(file, name)) for name in found}
        metrics = {header["metric"] for header in headers.values()}
        if len(metrics) > 1:
            raise CheckpointError(f"{path} holds moments of several metrics, {sorted(metrics)}")
        if Path(path).is_dir() and (missing := _missing_parts(headers)):
            raise CheckpointError(
                f"{path} holds moments of a broken run: {missing} files are missing; collect them anew"
            )
        return cls(metrics.pop(), _Stored(where), tables)


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


class _Changed(Mapping[str, LayerMoments]):
    """Moments of which some are computed when they are asked for, in the place of others."""

    def __init__(
        self, known: Mapping[str, LayerMoments], gone: Collection[str], new: Mapping[str, Callable[[], LayerMoments]]
    ) -> None:
        self._known, self._new = known, new
        self._names = dict.fromkeys([*(name for name in known if name not in gone), *new])

    def __getitem__(self, name: str) -> LayerMoments:
        if name not in self._names:
            raise KeyError(name)
        return self._new[name]() if name in self._new else self._known[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


class _Stored(Mapping[str, LayerMoments]):
    """Layers in files, each read anew when it is asked for."""

    def __init__(self, where: Mapping[str, Path]) -> None:
        self._where = where

    def __getitem__(self, name: str) -> LayerMoments:
        tensors = _read(self._where[name], name)
        return LayerMoments(int(tensors.pop("tokens")), **tensors)

    def __contains__(self, name: object) -> bool:
        return name in self._where

    def tokens(self) -> Iterator[int]:
        """The count of every layer."""
        for path in set(self._where.values()):
            with safe_open(path, framework="pt") as file:
                yield from (int(file.get_tensor(key)) for key in file.keys() if key.endswith(".tokens"))  # noqa: SIM118

    def shapes(self) -> dict[str, tuple[int, int | None]]:
        """As `shapes_of_layers`."""
        sizes: dict[str, int] = {}
        for path in set(self._where.values()):
            with safe_open(path, framework="pt") as file:
                sizes |= {key: (file.get_slice(key).get_shape() or [0])[0] for key in file.keys()}  # noqa: SIM118
        return {n: (sizes[f"{n}.input_sum"], sizes.get(f"{n}.gradient_products")) for n in self._where}

    def __iter__(self) -> Iterator[str]:
        return iter(self._where)

    def __len__(self) -> int:
        return len(self._where)


def _read(path: Path, name: str) -> dict[str, Tensor]:
    """The sums of one layer or table in a file."""
    try:
        with safe_open(path, framework="pt") as file:
            return {
                key.rpartition(".")[2]: file.get_tensor(key)
                for key in file.keys()  # noqa: SIM118  # it is no mapping
                if key.rpartition(".")[0] == name
            }
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} cannot be read as moments: {error}") from None


def _contents(path: Path) -> tuple[dict[str, str], list[str], list[str]]:
    """The header, the layer names and the names of tables of a file."""
    try:
        with safe_open(path, framework="pt") as file:
            header, keys = file.metadata() or {}, list(file.keys())
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} cannot be read as moments: {error}") from None
    sums: dict[str, set[str]] = {}
    for key in keys:
        sums.setdefault(key.rpartition(".")[0], set()).add(key.rpartition(".")[2])
    tables = sorted(name for name, found in sums.items() if found == _TABLE_SUMS)
    layers = {name: found for name, found in sums.items() if name not in tables}
    kinds = set(map(frozenset, layers.values()))
    known = header.get("metric") in METRICS and header.get("parts", "0").isdecimal()
    if header.get("format") != _FORMAT or not known or not kinds <= {_SUMS, _ALL_SUMS}:
        raise CheckpointError(f"{path} holds no moments of this version")
    return header, sorted(layers), tables
