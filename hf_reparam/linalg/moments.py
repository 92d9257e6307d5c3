"""Streaming moments of what goes into a layer and of the gradient that comes back to its output."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from hf_reparam.errors import CheckpointError, WeightError
from hf_reparam.linalg.metric import Metric, root

__all__ = ["LayerMoments", "Moments"]

METRICS = ("svd", "activation", "fisher")
SHRINKAGE = {"input": 1e-3, "gradient": 1e-2}
"""Share of the mean variance, and of the mean squared gradient, that is mixed into the moments."""
_FORMAT = "hf_reparam.moments.1"


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
        """Whether a gradient ever came back to the layer."""
        return self.gradient_products is not None and bool(self.gradient_products.diagonal().sum() > 0)

    def mean(self) -> Tensor:
        """E x, (in,)."""
        return self.input_sum / max(self.tokens, 1)

    def metric(self, name: str, *, centred: bool) -> Metric:
        """The Metric of this name; centred where a bias can absorb the error in the mean.

        Raises:
            WeightError: "fisher" was asked for, and the moments have no gradients; or they are not finite.
        """
        if name == "svd" or self.tokens == 0:
            return Metric()
        covariance = self.input_products / self.tokens
        if centred:
            covariance = covariance - torch.outer(self.mean(), self.mean())
        if not bool(torch.isfinite(covariance).all()):
            raise WeightError("the calibration inputs of this layer are not finite")
        inputs = root(covariance, SHRINKAGE["input"])
        if name == "activation":
            return Metric(inputs, scale=float(self.tokens))
        if self.gradient_products is None:
            raise WeightError("the fisher metric needs gradients: collect moments with metric='fisher'")
        if not bool(torch.isfinite(self.gradient_products).all()):
            raise WeightError("the calibration gradients of this layer are not finite")
        return Metric(inputs, root(self.gradient_products / self.tokens, SHRINKAGE["gradient"]), float(self.tokens))


@dataclass(frozen=True)
class Moments:
    """Moments of the layers of one model, reusable for every size of it.

    Args:
        metric: the richest metric they serve: "activation", or "fisher" with gradients.
        layers: layer name -> LayerMoments, names as in the plan.

    >>> a, b = Moments("activation", {"fc": LayerMoments.zeros(4, 3, gradients=False)}), None
    >>> a.layers["fc"].add_inputs(torch.ones(5, 4))
    >>> (a + a).layers["fc"].tokens
    10
    """

    metric: str
    layers: Mapping[str, LayerMoments] = field(default_factory=dict)

    def __add__(self, other: "Moments") -> "Moments":
        """Moments of both data sets together."""
        if self.metric != other.metric or self.layers.keys() != other.layers.keys():
            raise WeightError("moments of different metrics or layers cannot be merged")
        return Moments(self.metric, {name: m + other.layers[name] for name, m in self.layers.items()})

    def save(self, path: str | Path) -> None:
        """Write one safetensors file."""
        tensors: dict[str, Tensor] = {}
        for name, layer in self.layers.items():
            tensors[f"{name}.tokens"] = torch.tensor(layer.tokens)
            tensors[f"{name}.input_sum"] = layer.input_sum
            tensors[f"{name}.input_products"] = layer.input_products
            if layer.gradient_products is not None:
                tensors[f"{name}.gradient_products"] = layer.gradient_products
        save_file(tensors, path, metadata={"format": _FORMAT, "metric": self.metric})

    @classmethod
    def load(cls, path: str | Path) -> "Moments":
        """Read a file that `save` wrote.

        Raises:
            CheckpointError: no such file, or not one that `save` wrote.
        """
        try:
            with safe_open(path, framework="pt") as file:
                header = file.metadata() or {}
                if header.get("format") != _FORMAT or header.get("metric") not in METRICS:
                    raise CheckpointError(f"{path} holds no moments of this version")
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            names = sorted({key.rpartition(".")[0] for key in tensors})
            layers = {name: _read_layer(tensors, name) for name in names}
        except (OSError, SafetensorError, KeyError) as error:
            raise CheckpointError(f"{path} cannot be read as moments: {error}") from None
        return cls(header["metric"], layers)


def _read_layer(tensors: Mapping[str, Tensor], name: str) -> LayerMoments:
    return LayerMoments(
        int(tensors[f"{name}.tokens"]),
        tensors[f"{name}.input_sum"],
        tensors[f"{name}.input_products"],
        tensors.get(f"{name}.gradient_products"),
    )
