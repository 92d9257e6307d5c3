"""The long work of a conversion: every layer that a plan names decomposed, cut and stored."""

from collections.abc import Mapping
from pathlib import Path

from torch import nn

from hf_reparam.calibration import layer_name
from hf_reparam.decomposition import Decompositions
from hf_reparam.hf.offload import aligned, build_layers, execution_device
from hf_reparam.hf.summary import layer_report
from hf_reparam.nn.surgery import factor, low_rank_like
from hf_reparam.nn.targets import Target
from hf_reparam.plan import LayerSpec
from hf_reparam.report import LayerReport

__all__ = ["factor_layers"]


def factor_layers(
    model: nn.Module,
    targets: tuple[Target, ...],
    specs: Mapping[str, LayerSpec],
    source: Decompositions,
    folder: Path | None = None,
) -> tuple[dict[nn.Module, nn.Module], tuple[LayerReport, ...]]:
    """Dense layer -> low-rank layer, and what the report says of it, for the layers that have a spec.

    Args:
        model: the model that the layers are in; it is not changed.
        targets: its layers.
        specs: path -> rank and form.
        source: their decompositions.
        folder: where new layers go instead of into memory; layers that it holds already are taken from there.
    """
    named = {layer_name(model, t.name): t for t in targets if t.name in specs}

    def make(name: str) -> tuple[nn.Module, float]:
        target = named[name]
        spec = specs[target.name]
        decomposition = source.layer(name, target, max_rank=spec.rank)
        with aligned(target.module):
            layer = factor(target.module, spec, decomposition, mean=source.mean(name, target))
        return layer, decomposition.relative_error(spec.rank)

    def empty(name: str) -> nn.Module:
        return low_rank_like(named[name].module, specs[named[name].name])

    devices = {name: execution_device(target.module) for name, target in named.items()}
    built = build_layers(source.costs(named), make, empty, devices, folder, desc="Factoring layers")
    layers, rows = {}, []
    for name, (layer, error) in built.items():
        target = named[name]
        spec = specs[target.name]
        layers[target.module] = layer
        rows.append(layer_report(target, spec, target.parameters_as(spec), error))
    return layers, tuple(rows)
