"""What layers can become, and what each choice costs and loses: alone, with narrower heads, with one `down`."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from hf_reparam.calibration import layer_name
from hf_reparam.decomposition import Decompositions
from hf_reparam.hf.processes import spread
from hf_reparam.hf.tables import TableGroup
from hf_reparam.linalg import Options
from hf_reparam.narrowing import NarrowHeads, attentions_by_name
from hf_reparam.nn.heads import ROLES, Attention
from hf_reparam.nn.targets import Target
from hf_reparam.plan import LayerSpec
from hf_reparam.sharing import same_inputs, stack_losses

__all__ = ["Choices", "Way", "ways_to_build"]

Choices = tuple[list[LayerSpec | None], Options]
"""Specs of one layer, None for dense, with what they cost and lose in the same order."""

_WIDTHS = 8  # of heads that are tried, in equal steps
_CAUTION = 1.5  # what narrower heads and tables lose counts for more: it meets the errors of other layers


@dataclass(frozen=True)
class Way:
    """One way to build some layers together: ranks to choose from, for each of them.

    Args:
        error: predicted loss of this way at full ranks.
        layers: layer name -> its choices, and what they cost and lose.
        width: of the heads that they belong to; None for the stock width.
        users: name of one of them -> other layers, which use its `down`, and whose choices and losses are among its.
    """

    error: float
    layers: Mapping[str, Choices]
    width: int | None = None
    users: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


def ways_to_build(
    model: nn.Module,
    named: Mapping[str, Target],
    tables: Mapping[str, TableGroup],
    source: Decompositions,
    form: str,
    multiple_of: int,
    *,
    joint: bool,
    shared: bool,
) -> dict[str, list[Way]]:
    """Name of a layer, an attention or a table -> ways to build what belongs to it, the first as it is in the model.

    What has no loss in the common unit is left out.

    Args:
        model: dense.
        named, tables: name in a plan -> what is targeted.
        source: metric and moments.
        form, multiple_of, joint, shared: as in `make_plan`.
    """
    spectra = spread(source.costs(named), lambda name: source.losses(name, named[name]), desc="Spectra")
    choices = {n: _choices(t, s, form, multiple_of) for n, t in named.items() if (s := spectra[n]) is not None}
    ways = {name: [Way(0.0, {name: found})] for name, found in choices.items()}
    if joint:
        heads = _ways_of_heads(model, named, choices, source, form, multiple_of)
        inside = {name for group in heads.values() for name in group[0].layers}
        ways = {name: group for name, group in ways.items() if name not in inside} | heads
    if shared:
        known = {name: named[name] for name in choices}
        stacks = same_inputs(known, source)
        for names, losses in zip(stacks, stack_losses(stacks, known, source).values(), strict=True):
            _add_stack(ways, names, _choices_of_stack(names, known, losses, form, multiple_of))
    for name, group in tables.items():
        tokens = source.table_tokens(name)
        if tokens is not None:
            squares = source.table(name, group.module).squares
            ways[name] = [Way(0.0, {name: _choices_of_table(group, squares * tokens, multiple_of)})]
    return ways


def _add_stack(ways: dict[str, list[Way]], names: tuple[str, ...], choices: Choices) -> None:
    """Let layers with one input also use one `down`, that of the first of them."""
    touched = [key for key, group in ways.items() if set(names) & set(group[0].layers)]
    if len(touched) > 1 and any(len(ways[key]) > 1 for key in touched):
        return  # part of an attention, with layers outside of it
    separate = [ways.pop(key) for key in touched]
    layers = {name: found for group in separate for name, found in group[0].layers.items()}
    rest = {name: found for name, found in layers.items() if name not in names}
    way = Way(0.0, {**rest, names[0]: choices}, users={names[0]: names[1:]})
    ways[touched[0]] = [*separate[0], way] if len(separate) == 1 else [Way(0.0, layers), way]


def _choices_of_stack(
    names: tuple[str, ...], named: Mapping[str, Target], losses: Tensor, form: str, multiple_of: int
) -> Choices:
    """As `_choices`, for layers that use the `down` of the first of them, whose rank cannot exceed its outputs."""
    lender = named[names[0]]
    whole = replace(lender, out_features=sum(named[name].out_features for name in names))
    specs, found = _choices(whole, losses, form, multiple_of)
    fit = [i for i, spec in enumerate(specs) if spec is None or spec.rank <= lender.full_rank]
    return [specs[i] for i in fit], Options(found.errors[fit], found.costs[fit])


def _ways_of_heads(
    model: nn.Module,
    named: Mapping[str, Target],
    choices: Mapping[str, Choices],
    source: Decompositions,
    form: str,
    multiple_of: int,
) -> dict[str, list[Way]]:
    """Attention -> its layers as they are, and with heads of every width that is tried."""
    found: dict[str, dict[str, str]] = {}
    heads = attentions_by_name(model)
    for name, attention in heads.items():
        parts = {role: layer_name(model, attention.path(role, split=False)) for role in ROLES}
        # a projection that hangs elsewhere, too, cannot change its shape
        alone = all(part in choices and len(named[part].names) == len(attention.names) for part in parts.values())
        if alone:
            found[name] = parts

    def work(name: str) -> list[tuple[int, float, dict[str, Tensor]]]:
        return NarrowHeads(model, heads[name], source).losses(_widths(heads[name], multiple_of))

    costs = {name: float(heads[name].heads * heads[name].width) ** 3 for name in found}
    ways = {}
    for name, narrow in spread(costs, work, desc="Widths of heads").items() if found else ():
        attention = heads[name]
        ways[name] = [Way(0.0, {part: choices[part] for part in found[name].values()})]
        for width, error, losses in narrow:
            layers = {}
            for role in ROLES:
                n_in, n_out = attention.shape(role, width)
                like = replace(named[found[name][role]], in_features=n_in, out_features=n_out)
                path = layer_name(model, attention.path(role, split=True))
                layers[path] = _choices(like, losses[role], form, multiple_of)
            ways[name].append(Way(_CAUTION * error, layers, width))
    return ways


def _widths(attention: Attention, multiple_of: int) -> list[int]:
    """Widths in equal steps; the full one only where it splits a fused layer."""
    step = math.ceil(attention.width / _WIDTHS / multiple_of) * multiple_of
    return list(range(step, attention.width + attention.kind.fused, step))


def _choices(target: Target, losses: Tensor, form: str, multiple_of: int) -> Choices:
    """Every rank at which the layer is smaller than dense, and None for the dense layer itself."""
    least = target.weights(LayerSpec(multiple_of, form)) if multiple_of <= target.full_rank else target.weights()
    step = multiple_of if least < target.weights() else 1  # too narrow for one multiple
    specs = [LayerSpec(rank, form) for rank in range(step, target.full_rank + 1, step)]
    specs = [spec for spec in specs if target.weights(spec) < target.weights()]
    return _and_dense(specs, losses, [*map(target.weights, specs), target.weights()])


def _and_dense(specs: list[LayerSpec], losses: Tensor, costs: list[int]) -> Choices:
    """These ranks and, last, dense, which loses nothing; `costs` of all of them."""
    kept = losses.cumsum(0)[[spec.rank - 1 for spec in specs]]
    errors = torch.cat([(losses.sum() - kept).clamp_min(0), torch.zeros(1, dtype=torch.float64)])
    return [*specs, None], Options(errors, torch.tensor(costs, dtype=torch.float64))


def _choices_of_table(group: TableGroup, losses: Tensor, multiple_of: int) -> Choices:
    """Every rank at which a table is smaller than dense, and None for the dense table."""
    numbers = sum(group.shape)  # for each rank
    most = math.ceil(group.size / numbers) - 1
    specs = [LayerSpec(rank) for rank in range(min(multiple_of, most), most + 1, multiple_of)]
    return _and_dense(specs, losses * _CAUTION, [*(spec.rank * numbers for spec in specs), group.size])
