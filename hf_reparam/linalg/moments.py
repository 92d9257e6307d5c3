"""Streaming moments of what goes into a layer and of the gradient that comes back to its output."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_reparam.errors import WeightError
from hf_reparam.linalg.fingerprint import fingerprint
from hf_reparam.linalg.metric import Metric, root
from hf_reparam.linalg.sums import Gram, add_rows, widened

Shrinkage = tuple[float, float]
"""Share of the mean variance, and of the mean squared gradient, that is mixed into the moments."""
SHRINKAGES: tuple[Shrinkage, ...] = ((1e-3, 1e-2), (1e-2, 1e-1), (1e-1, 5e-1))
"""Those that cross-validation chooses from, the least first, which serves where there is no choice."""
_NOT_FINITE = "of this layer are not finite: look for NaN in the weights and the data"


class LayerSums:
    """What is summed for one layer (out, in) while data are read; its gradients, too, if they are asked for.

    Products are made in float32 or better, and those of all batches are summed in float64.
    """

    def __init__(self, n_in: int, n_out: int, *, gradients: bool) -> None:
        self.tokens = 0
        self.input_sum = torch.zeros(n_in, dtype=torch.float64)
        self.input_products, self.gradient_products = Gram(n_in), Gram(n_out) if gradients else None

    def add_inputs(self, x: Tensor) -> None:
        """Add rows x (tokens, in)."""
        x = widened(x)
        self.tokens += x.shape[0]
        self.input_sum = add_rows(self.input_sum, x)
        self.input_products.add(x)

    def add_gradients(self, g: Tensor) -> None:
        """Add rows g (tokens, out)."""
        if self.gradient_products is None:
            raise WeightError("these moments were made without gradients")
        self.gradient_products.add(widened(g))

    def take(self) -> "LayerMoments":
        """The sums, which begin anew."""
        inputs, gradients = self.input_products, self.gradient_products
        total = None if gradients is None else gradients.take()
        taken = LayerMoments(self.tokens, self.input_sum.cpu(), inputs.take(), total)
        self.tokens, self.input_sum = 0, torch.zeros_like(self.input_sum)
        return taken


@dataclass
class LayerMoments:
    """Sums over tokens for one layer, all float64, on the CPU.

    Args:
        tokens: rows of x that were seen.
        input_sum: (in,) sum of x.
        input_products: (in, in) sum of x x^T.
        gradient_products: (out, out) sum of g g^T, g = d(summed loss) / dy; None without gradients.
        held: the same sums over the held-out part of the data, which is counted in these, too; None if there is none.
    """

    tokens: int
    input_sum: Tensor
    input_products: Tensor
    gradient_products: Tensor | None = None
    held: "LayerMoments | None" = None

    @classmethod
    def of(cls, sums: Mapping[str, Tensor], held: "LayerMoments | None" = None) -> "LayerMoments":
        """From sums by their names, as `tensors` gives them."""
        return cls(**{**sums, "tokens": int(sums["tokens"])}, held=held)  # type: ignore[arg-type]  # of tensors

    def __add__(self, other: "LayerMoments") -> "LayerMoments":
        if (self.gradient_products is None) != (other.gradient_products is None):
            raise WeightError("moments with and without gradients cannot be merged")
        held = self.held + other.held if self.held and other.held else self.held or other.held
        return self._with(other, torch.add, held)

    def __iadd__(self, other: "LayerMoments") -> "LayerMoments":
        return self._with(other, Tensor.add_, self.held)

    def __sub__(self, other: "LayerMoments") -> "LayerMoments":
        """Without a part of the data."""
        return self._with(other, torch.sub, None)

    def _with(self, other: "LayerMoments", join: Callable[..., Tensor], held: "LayerMoments | None") -> "LayerMoments":
        mine, theirs = self.tensors(), other.tensors()
        return LayerMoments.of({name: join(mine[name], theirs[name]) for name in mine if name in theirs}, held)

    def fitting(self) -> "LayerMoments":
        """Without the held-out part."""
        return self if self.held is None else self - self.held

    def map(self, function: Callable[[Tensor], Tensor]) -> "LayerMoments":
        """The same function of every sum, the count of tokens first."""
        sums = {name: function(value) for name, value in self.tensors().items()}
        return LayerMoments.of(sums, self.held and self.held.map(function))

    def tensors(self) -> dict[str, Tensor]:
        """Every sum by its name, without the held-out part."""
        known = {**vars(self), "tokens": torch.tensor(self.tokens), "held": None}
        return {name: value for name, value in known.items() if value is not None}

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

    def metric(
        self, name: str, *, centred: bool, device: torch.device | None = None, shrinkage: Shrinkage = SHRINKAGES[0]
    ) -> Metric:
        """The Metric of this name, on a device; centred where a bias can absorb the error in the mean.

        Raises:
            WeightError: "fisher" was asked for, and the moments have no gradients; or they are not finite.
        """
        if name == "svd" or self.tokens == 0:
            return Metric()
        inputs, gradients = self.second_moments(name, device=device, centre=self.mean() if centred else None)
        return Metric(root(inputs, shrinkage[0]), None if gradients is None else root(gradients, shrinkage[1]))

    def second_moments(
        self, name: str, *, device: torch.device | None, centre: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """E (x - c)(x - c)^T (in, in) and E g g^T (out, out), the latter in the fisher metric alone.

        Raises:
            WeightError: as `metric`.
        """
        inputs = self.input_products.to(device) / self.tokens
        if centre is not None:
            mean, centre = self.mean().to(device), centre.to(device)
            inputs.addr_(mean, mean, alpha=-1).addr_(mean - centre, mean - centre)
        if not bool(torch.isfinite(inputs).all()):
            raise WeightError(f"the calibration inputs {_NOT_FINITE}")
        if name == "activation":
            return inputs, None
        if self.gradient_products is None:
            raise WeightError("the fisher metric needs gradients: collect moments with metric='fisher'")
        gradients = self.gradient_products.to(device) / self.tokens
        if not bool(torch.isfinite(gradients).all()):
            raise WeightError(f"the calibration gradients {_NOT_FINITE}")
        return inputs, gradients
