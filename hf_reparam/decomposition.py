"""`decompose`: every layer of a model decomposed once, in one metric, to be cut at any rank in no time."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from accelerate.utils import align_module_device
from torch import Tensor, nn
from transformers.utils.logging import tqdm

from hf_reparam.calibration import layer_name
from hf_reparam.errors import TargetError, WeightError
from hf_reparam.hf.retype import protected_layers
from hf_reparam.linalg import Decomposition, LayerMoments, Metric, Moments, spectrum
from hf_reparam.linalg import decompose as decompose_weight
from hf_reparam.linalg.moments import METRICS
from hf_reparam.nn.dense import dense_matrix
from hf_reparam.nn.targets import Target, find_targets

__all__ = ["Decompositions", "as_decompositions", "decompose"]


@dataclass(frozen=True)
class Decompositions:
    """The layers of one model in the coordinates of one metric.

    Args:
        metric: "svd", "activation" or "fisher".
        moments: what the metric was made of; None for "svd".
        layers: layer name -> Decomposition, names as in a plan. A layer that is not there is decomposed when it is
            asked for, and not kept.
    """

    metric: str
    moments: Moments | None = None
    layers: Mapping[str, Decomposition] = field(default_factory=dict)

    def layer(self, name: str, target: Target, *, max_rank: int | None = None) -> Decomposition:
        """The decomposition of a layer, up to `max_rank` or further.

        Raises:
            WeightError: weight or moments are not finite, or the weight has no data; names the layer.
        """
        if name in self.layers:
            return self.layers[name]
        coordinates = self._coordinates(name, target)
        try:
            with align_module_device(target.module):  # offloaded weights are brought in, one layer at a time
                return decompose_weight(dense_matrix(target.module), max_rank=max_rank, metric=coordinates)
        except WeightError as error:
            raise WeightError(f"{target.name}: {error}") from None

    def complete(self, targets: Mapping[str, Target]) -> "Decompositions":
        """The same with every one of these layers decomposed and kept."""
        steps = tqdm(targets.items(), desc="Decomposing", unit="layer")
        return Decompositions(self.metric, self.moments, {name: self.layer(name, target) for name, target in steps})

    def losses(self, name: str, target: Target) -> Tensor | None:
        """What dropping each direction costs, (min(in, out),) float64 on the CPU, descending; one unit for all layers.

        None for a layer without a gradient in the fisher metric: it has no such unit.
        """
        moments = self._moments(name)
        if self.metric == "fisher" and not (moments is not None and moments.has_gradient()):
            return None
        coordinates = self._coordinates(name, target)
        if name in self.layers:
            squares = self.layers[name].singular_values.square()
        else:
            try:
                with align_module_device(target.module):
                    squares = spectrum(dense_matrix(target.module), coordinates)
            except WeightError as error:
                raise WeightError(f"{target.name}: {error}") from None
        return squares.cpu() * coordinates.scale

    def mean(self, name: str, target: Target) -> Tensor | None:
        """E x (in,), where a bias can absorb the error in it."""
        moments = self._moments(name)
        return None if moments is None or not target.bias_parameters else moments.mean()

    def _moments(self, name: str) -> LayerMoments | None:
        layer = self.moments.layers.get(name) if self.moments is not None and self.metric != "svd" else None
        return layer if layer is not None and layer.tokens else None

    def _coordinates(self, name: str, target: Target) -> Metric:
        moments = self._moments(name)
        if moments is None:
            return Metric()
        metric = self.metric if moments.has_gradient() else "activation"
        try:
            return moments.metric(metric, centred=target.bias_parameters > 0)
        except WeightError as error:
            raise WeightError(f"{target.name}: {error}") from None


def decompose(
    model: nn.Module,
    moments: Moments | None = None,
    *,
    metric: str | None = None,
    include: str | Iterable[str] | None = None,
    exclude: str | Iterable[str] = (),
) -> Decompositions:
    """Decompose every layer that can be factored, for any number of plans and conversions.

    Args:
        model: a dense model.
        moments: what `collect_moments` returned; None for plain SVD.
        metric: "svd", "activation" or "fisher"; the richest that the moments serve by default.
        include, exclude: as in `convert`.

    Returns:
        Decompositions, to be given to `make_plan` and `convert` in the place of the moments.

    Raises:
        TargetError: unknown metric, or patterns as in `convert`.
        WeightError: a weight or its moments are not finite, or the metric needs moments that are not there.

    Cost: one symmetric eigenproblem of order min(in, out) for each layer; 8 min(in, out) (in + out) bytes each, on
    the weight's device.

    >>> net = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    >>> decompose(net).layers["1"].singular_values.shape
    torch.Size([64])
    """
    lazy = as_decompositions(moments, metric)
    targets = find_targets(model, include=include, exclude=exclude, protected=protected_layers(model)).selected
    return lazy.complete({layer_name(model, target.name): target for target in targets})


def as_decompositions(source: Moments | Decompositions | None, metric: str | None) -> Decompositions:
    """Decompositions in a metric, made when they are asked for; those that are made already stay.

    Raises:
        TargetError: unknown metric, or not the one of the decompositions.
        WeightError: the metric needs moments, or gradients, that are not there.
    """
    metric = metric or (source.metric if source is not None else "svd")
    if metric not in METRICS:
        raise TargetError(f"metric must be one of {list(METRICS)}, got {metric!r}")
    if isinstance(source, Decompositions):
        if metric != source.metric:
            raise TargetError(f"the decompositions were made in the {source.metric} metric, not in {metric}")
        return source
    if metric != "svd" and source is None:
        raise TargetError(f"the metric {metric!r} needs calibration data: give calibration=")
    if metric == "fisher" and source is not None and source.metric != "fisher":
        raise WeightError("the fisher metric needs gradients: collect moments with metric='fisher'")
    return Decompositions(metric, source)
