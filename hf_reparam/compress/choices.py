"""What layers can become, and what each choice costs and loses: alone, or with narrower heads."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from hf_reparam.calibrate.collect import layer_name
from hf_reparam.compress.decomposition import Decompositions
from hf_reparam.compress.narrowing import NarrowHeads, attentions_by_name
from hf_reparam.layers.heads import ROLES, Attention
from hf_reparam.layers.targets import Target
from hf_reparam.linalg import Options
from hf_reparam.model.processes import spread
from hf_reparam.model.tables import TableGroup
from hf_reparam.plan import LayerSpec

__all__ = ["Choices", "Steps", "Way", "ways_to_build"]

Choices = tuple[list[LayerSpec | None], Options]
"""Specs of one layer, None for dense, with what they cost and lose in the same order."""

_WIDTHS = 8  # of heads that are tried, in equal steps
_CAUTION = 1.5  # what narrower heads and tables lose counts for more: it meets the errors of other layers


@dataclass(frozen=True)
class Steps:
    """Which ranks a layer may get: multiples of a number, from the first that is not below the least.

    Args:
        form, multiple_of, min_rank: as in `make_plan`.
    """

    form: str
    multiple_of: int
    min_rank: int

    @property
    def least(self) -> int:
        """The first rank."""
        return math.ceil(self.min_rank / self.multiple_of) * self.multiple_of

    @property
    def lowest(self) -> LayerSpec:
        """What a layer is at the first rank."""
        return LayerSpec(self.least, self.form)

    def up_to(self, most: int) -> range:
        """The ranks up to this one."""
        return range(self.least, most + 1, self.multiple_of)


@dataclass(frozen=True)
class Way:
    """One way to build some layers together: ranks to choose from, for each of them.

    Args:
        error: predicted loss of this way at full ranks.
        layers: layer name -> its choices, and what they cost and lose.
        width: of the heads that they belong to; None for the stock width.
    """

    error: float
    layers: Mapping[str, Choices]
    width: int | None = None


def ways_to_build(
    model: nn.Module,
    named: Mapping[str, Target],
    tables: Mapping[str, TableGroup],
    source: Decompositions,
    steps: Steps,
    *,
    joint: bool,
) -> dict[str, list[Way]]:
    """Name of a layer, an attention or a table -> ways to build what belongs to it, the first as it is in the model.

    What has no loss in the common unit is left out.

    Args:
        model: dense.
        named, tables: name in a plan -> what is targeted.
        source: metric and moments.
        steps: the ranks that may be chosen.
        joint: as in `make_plan`.
    """
    spectra = spread(source.costs(named), lambda name: source.losses(name, named[name]), desc="Spectra")
    choices = {n: _choices(t, s, steps) for n, t in named.items() if (s := spectra[n]) is not None}
    ways = {name: [Way(0.0, {name: found})] for name, found in choices.items()}
    if joint:
        heads = _ways_of_heads(model, named, choices, source, steps)
        inside = {name for group in heads.values() for name in group[0].layers}
        ways = {name: group for name, group in ways.items() if name not in inside} | heads
    for name, group in tables.items():
        tokens = source.table_tokens(name)
        if tokens is not None:
            squares = source.table(name, group.module).squares
            ways[name] = [Way(0.0, {name: _choices_of_table(group, squares * tokens, steps)})]
    return ways


def _ways_of_heads(
    model: nn.Module,
    named: Mapping[str, Target],
    choices: Mapping[str, Choices],
    source: Decompositions,
    steps: Steps,
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
        return NarrowHeads(model, heads[name], source).losses(_widths(heads[name], steps.multiple_of))

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
                layers[path] = _choices(like, losses[role], steps)
            ways[name].append(Way(_CAUTION * error, layers, width))
    return ways


def _widths(attention: Attention, multiple_of: int) -> list[int]:
    """Widths in equal steps; the full one only where it splits a fused layer."""
    step = math.ceil(attention.width / _WIDTHS / multiple_of) * multiple_of
    return list(range(step, attention.width + attention.kind.fused, step))


def _choices(target: Target, losses: Tensor, steps: Steps) -> Choices:
    """Every rank at which the layer is smaller than dense, and None for the dense layer itself."""
    specs = [LayerSpec(rank, steps.form) for rank in steps.up_to(target.full_rank)]
    specs = [spec for spec in specs if target.weights(spec) < target.weights()]
    return _and_dense(specs, losses, [*map(target.weights, specs), target.weights()])


def _and_dense(specs: list[LayerSpec], losses: Tensor, costs: list[int]) -> Choices:
    """These ranks and, last, dense, which loses nothing; `costs` of all of them."""
    kept = losses.cumsum(0)[torch.tensor([spec.rank - 1 for spec in specs], dtype=torch.int64)]
    errors = torch.cat([(losses.sum() - kept).clamp_min(0), torch.zeros(1, dtype=torch.float64)])
    return [*specs, None], Options(errors, torch.tensor(costs, dtype=torch.float64))


def _choices_of_table(group: TableGroup, losses: Tensor, steps: Steps) -> Choices:
    """Every rank at which a table is smaller than dense, and None for the dense table."""
    numbers = sum(group.shape)  # for each rank
    most = math.ceil(group.size / numbers) - 1
    specs = [LayerSpec(rank) for rank in steps.up_to(most)]
    return _and_dense(specs, losses * _CAUTION, [*(spec.rank * numbers for spec in specs), group.size])
