"""The long work of a conversion: every layer that a plan names decomposed, cut and stored."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from torch import nn

from hf_reparam.calibrate.collect import layer_name
from hf_reparam.compress.decomposition import Decompositions
from hf_reparam.errors import TargetError, WeightError
from hf_reparam.layers.embedding import low_rank_tables
from hf_reparam.layers.surgery import factor, low_rank_like
from hf_reparam.layers.targets import Target
from hf_reparam.linalg import fingerprint
from hf_reparam.model.offload import aligned, build_layers, execution_device
from hf_reparam.model.summary import layer_report, table_report
from hf_reparam.model.tables import tables_of_plan
from hf_reparam.plan import LayerSpec
from hf_reparam.report import LayerReport

__all__ = ["factor_layers", "factor_tables"]


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

    Raises:
        CheckpointError: as `build_layers`.
    """
    named = {layer_name(model, t.name): t for t in targets if t.name in specs}

    def make(name: str) -> tuple[nn.Module, float]:
        target = named[name]
        spec = specs[target.name]
        decomposition = source.layer(name, target, max_rank=spec.rank)
        with aligned(target.module):
            bias = target.module.bias
            if isinstance(bias, nn.Parameter) and not bias.isfinite().all():
                raise WeightError(f"{target.name}: its bias has NaN or infinite numbers, which would be copied")
            layer = factor(target.module, spec, decomposition, mean=source.mean(name, target))
        return layer, decomposition.relative_error(spec.rank)

    def empty(name: str) -> nn.Module:
        return low_rank_like(named[name].module, specs[named[name].name])

    def made_of(name: str) -> str:
        return fingerprint(source.made_of(name, named[name]), specs[named[name].name])

    devices = {name: execution_device(target.module) for name, target in named.items()}
    built = build_layers(source.costs(named), make, empty, devices, folder, made_of=made_of, desc="Factoring layers")
    layers, rows = {}, []
    for name, (layer, error) in built.items():
        target = named[name]
        spec = specs[target.name]
        layers[target.module] = layer
        again = None if target.spec is None else target.spec.rank
        row = layer_report(target, spec, target.parameters_as(spec), error, source.metric_of(name))
        rows.append(row if again is None else replace(row, error=None, from_rank=again))
    return layers, tuple(rows)


def factor_tables(
    model: nn.Module, embeddings: Mapping[str, int], source: Decompositions
) -> tuple[dict[nn.Module, nn.Module], tuple[LayerReport, ...], set[str]]:
    """Modules that hold tables -> modules of low rank, what the report says of them, and their paths.

    Raises:
        PlanError: as `tables_of_plan`.
        TargetError: a module that should be tied holds another tensor.
    """
    layers: dict[nn.Module, nn.Module] = {}
    rows, paths = [], set()
    for rank, group in tables_of_plan(model, embeddings):
        dense = group.module
        for other, module in group.members.items():
            weight = module.get_parameter("weight")
            if weight is not dense.weight and not weight.is_meta:  # in files it cannot be seen
                raise TargetError(f"{other} is tied to {group.path} by the configuration, and holds another tensor")
        found = source.table(layer_name(model, group.path), dense)
        with aligned(dense):
            weight = dense.weight
            factors = [part.to(weight.device, weight.dtype) for part in found.cut(weight.detach().cpu(), rank)]
        table, up = (nn.Parameter(part.contiguous(), dense.weight.requires_grad) for part in factors)
        layers |= low_rank_tables(set(group.members.values()), table, up)
        rows.append(table_report(group, rank, found.relative_error(rank)))
        paths |= set(group.members)
    return layers, tuple(rows), paths
