"""Tensor parallelism: what a plan says of a dense layer, said of the factors that stand in its place.

A column-parallel layer shards its outputs: `up` does, and `down` is whole everywhere. A row-parallel layer shards its
inputs: `down` does, and what is added up between processes is rank numbers a token instead of out. With pivots it needs
every input for its gather: the inputs are brought together, and `up` shards its outputs, which are gathered.
"""

from collections.abc import Iterable
from typing import Any

import torch

from hf_reparam.compat.loading import register_style
from hf_reparam.config import layer_kind
from hf_reparam.errors import PlanError
from hf_reparam.layers.linear import LowRankLinear

_GATHER_INPUT = "hf_reparam_gather_input"


def factor_entries(plan: dict[str, str], layers: Iterable[tuple[str, Any]]) -> dict[str, str]:
    """Entries for the factors of (path, layer) each, by the styles that a plan has for the layers.

    They are for servers, which take the first pattern that a module's name begins with: it would be the layer's, and
    they would shard both factors alike. A pivoted layer with sharded inputs is left out, because it needs them whole.
    """
    entries: dict[str, str] = {}
    for path, layer in layers:
        name = layer_kind(path)
        style = plan.get(name, "") if isinstance(layer, LowRankLinear) else ""
        if "colwise" in style:
            entries |= {f"{name}.down": "replicate", f"{name}.up": style}
        elif "rowwise" in style and layer.form == "pair":
            entries |= {f"{name}.down": style, f"{name}.up": "replicate"}
    return entries


def factor_rules(rules: dict[str, str], name: str, layer: Any) -> dict[str, str]:
    """The rules, path of a module or parameter -> style, with that of a low-rank layer moved to its factors, which have
    no others. Raises PlanError for a style that shards packed inputs, where the layer has pivots."""
    style = rules.get(name, "") if hasattr(layer, "down") else ""
    if "colwise" in style:
        moved = _rules(f"{name}.up", layer.up, style)
    elif "rowwise" in style and layer.form != "pivoted":
        moved = _rules(f"{name}.down", layer.down, style)
    elif style == "rowwise":
        register_style(_GATHER_INPUT, _whole)
        moved = {name: _GATHER_INPUT, **_rules(f"{name}.up", layer.up, "colwise_gather_output")}
    elif "rowwise" in style:
        raise PlanError(f"{name}: a pivoted layer cannot be sharded in the style {style!r}; convert with form='pair'")
    else:
        return rules
    return {key: value for key, value in rules.items() if key != name and not key.startswith(f"{name}.")} | moved


def _rules(name: str, linear: torch.nn.Linear, style: str) -> dict[str, str]:
    """Parameters, to be sharded, before their module, to be hooked."""
    return {**{f"{name}.{key}": style for key, _ in linear.named_parameters()}, name: style}


def _whole(layer: Any, x: Any, mesh: Any) -> Any:
    """The inputs of a layer, brought together, that the layer before has left sharded."""
    from torch.distributed.tensor import DTensor, Replicate, Shard

    if not isinstance(x, DTensor):
        shape = (*x.shape[:-1], layer.in_features)
        stride = torch.empty(shape, device="meta").stride()
        x = DTensor.from_local(x, mesh, [Shard(-1)], run_check=False, shape=torch.Size(shape), stride=stride)
    return x.redistribute(placements=[Replicate()]).to_local()
