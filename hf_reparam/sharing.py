"""Layers that get one and the same input: which they are, and what they lose when they use one `down`."""

from collections.abc import Mapping

from torch import Tensor

from hf_reparam.decomposition import Decompositions
from hf_reparam.hf.processes import spread
from hf_reparam.nn.targets import Target

__all__ = ["same_inputs", "stack_losses"]


def same_inputs(named: Mapping[str, Target], source: Decompositions) -> list[tuple[str, ...]]:
    """Names of layers that got the very same rows in calibration, the one with most outputs first.

    They are children of one module, wherever it hangs, and all have a bias, or none has.

    Args:
        named: layer name -> dense layer.
        source: with moments of the layers; those without are left out.
    """
    known = source.moments
    if known is None or source.metric == "svd":
        return []
    groups: dict[tuple[object, ...], list[str]] = {}
    for name, target in named.items():
        if name in known.layers:
            tokens, inputs = known.inputs(name)
            parents = tuple(path.rpartition(".")[0] for path in target.names)
            rows = (tokens, inputs.numpy().tobytes())  # the same sums to the last bit
            groups.setdefault((parents, target.bias_parameters > 0, *rows), []).append(name)
    ordered = (sorted(names, key=lambda name: -named[name].out_features) for names in groups.values())
    return [tuple(names) for names in ordered if len(names) > 1]


def stack_losses(
    stacks: list[tuple[str, ...]], named: Mapping[str, Target], source: Decompositions
) -> dict[str, Tensor]:
    """First name of a stack -> what dropping each direction of it costs, in the unit of `Decompositions.losses`.

    Cost: as for one layer with the inputs of one and the outputs of all.
    """
    layers = {names[0]: {name: named[name] for name in names} for names in stacks}
    costs = {first: sum(source.costs(targets).values()) for first, targets in layers.items()}
    return spread(costs, lambda first: source.stack_losses(layers[first]), desc="Shared inputs") if layers else {}
