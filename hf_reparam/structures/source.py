"""Where factors come from: a metric, and what calibration knows of the layers of one model."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from hf_reparam.errors import TargetError, WeightError
from hf_reparam.linalg.calibration import Calibration
from hf_reparam.linalg.curves import Curve, curve
from hf_reparam.linalg.factorize import Decomposition, decompose, spectrum, working_device
from hf_reparam.linalg.fingerprint import fingerprint
from hf_reparam.linalg.metric import Metric
from hf_reparam.linalg.moments import SHRINKAGES, LayerMoments
from hf_reparam.linalg.tables import TableMoments

_ROOM = 1 << 30  # bytes for decompositions that are kept


@dataclass(frozen=True)
class Source:
    """The metric of a conversion, and the moments that it is made of.

    Args:
        metric: "svd", "activation" or "fisher".
        calibration: what the metric is made of; None for "svd".
        solver: "exact" or "randomized".
        kept: name in a plan and shape, which narrower heads change -> decomposition at full rank, which serves several
            plans; None to keep none.
        fitting: whether only the part of the data that is not held out is used, so that the rest can judge.
        origins: name in a plan -> fingerprint of what its weight and moments were computed from, where they were.
    """

    metric: str
    calibration: Calibration | None = None
    solver: str = "exact"
    kept: dict[tuple[str, torch.Size], Decomposition] | None = None
    fitting: bool = False
    origins: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, calibration: Calibration | None, metric: str | None, solver: str = "exact") -> "Source":
        """The metric that was asked for, or the richest that the calibration serves.

        Raises:
            TargetError: a metric that needs calibration data, or data that `calibrate` has not read.
            WeightError: the metric needs gradients that are not there.
        """
        if calibration is not None and not isinstance(calibration, Calibration):
            raise TargetError(
                f"calibration= takes a Calibration here, got {type(calibration).__name__}: give "
                "hf_reparam.calibrate(model, data, tokenizer=tokenizer)"
            )
        metric = metric or (calibration.metric if calibration is not None else "svd")
        if metric != "svd" and calibration is None:
            raise TargetError(f"the metric {metric!r} needs calibration data: give calibration= (--calibration)")
        if metric == "fisher" and calibration is not None and calibration.metric != "fisher":
            raise WeightError("the fisher metric needs gradients: calibrate with metric='fisher'")
        return cls(metric, calibration, solver)

    def moments(self, name: str) -> LayerMoments | None:
        """What the metric knows of a layer; None if nothing."""
        layer = self.calibration.layers.get(name) if self.calibration is not None and self.metric != "svd" else None
        layer = layer.fitting() if layer is not None and self.fitting else layer
        return layer if layer is not None and layer.tokens else None

    def table_moments(self, name: str) -> TableMoments | None:
        """What it knows of a table; None without gradients."""
        return self.calibration.tables.get(name) if self.calibration is not None and self.metric == "fisher" else None

    def metric_of(self, name: str) -> str:
        """The metric of a layer: "svd" if it saw no data, "activation" if no gradient came back to it."""
        if self.table_moments(name) is not None:
            return "fisher"
        moments = self.moments(name)
        return "svd" if moments is None else self.metric if moments.has_gradient() else "activation"

    def curve(self, name: str, weight: Tensor, *, centred: bool) -> Curve:
        """What a weight loses at every rank, per token, and the shrinkage that suits its moments."""
        calibration, metric = self.calibration, self.metric_of(name)
        if calibration is None or metric == "svd":
            return Curve(spectrum(weight).cpu(), SHRINKAGES[0])
        key = (name, metric, fingerprint(weight))
        if key not in calibration.curves:
            calibration.curves[key] = curve(weight, calibration.layers[name], metric, centred=centred)
        found: Curve = calibration.curves[key]
        return found

    def decomposition(self, name: str, weight: Tensor, *, centred: bool, max_rank: int) -> Decomposition:
        """The decomposition of a weight (out, in), up to `max_rank` or further, centred where there is a bias; errors
        as of `decompose`."""
        key = (name, weight.shape)
        if self.kept and key in self.kept:
            return self.kept[key]
        moments, metric = self.moments(name), Metric()
        if moments is not None:
            shrinkage, device = self.curve(name, weight, centred=centred).shrinkage, working_device(weight)
            metric = moments.metric(self.metric_of(name), centred=centred, device=device, shrinkage=shrinkage)
        size = sum(8 * min(shape) * sum(shape) for _, shape in (*(self.kept or ()), key))
        if self.kept is None or size > _ROOM:
            return decompose(weight, max_rank=max_rank, metric=metric, solver=self.solver)
        self.kept[key] = decompose(weight, metric=metric, solver=self.solver)
        return self.kept[key]

    def made_of(self, name: str) -> dict[str, str]:
        """Fingerprints of the moments that the metric has of a site and within it, or of what they were made from."""
        layers = {} if self.calibration is None or self.metric == "svd" else self.calibration.layers
        names = [known for known in layers if known == name or known.startswith(f"{name}.")]
        return {known: self.origins.get(known) or layers[known].fingerprint() for known in names}

    def with_layers(
        self, new: Mapping[str, Callable[[], LayerMoments]], gone: frozenset[str], origins: Mapping[str, str]
    ) -> "Source":
        """The same with moments of other layers in the place of those that are gone."""
        if self.calibration is None or not (new or gone):
            return self
        return replace(self, calibration=self.calibration.with_layers(new, gone), origins={**self.origins, **origins})
