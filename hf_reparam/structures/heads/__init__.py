"""Narrower heads: queries with keys, and values with outputs, of each head approximated as wholes."""

import math
from collections.abc import Mapping

from torch import Tensor, nn

import hf_reparam.structures.heads.families  # noqa: F401  # registers them
from hf_reparam.errors import RankError
from hf_reparam.layers.dense import dense_like
from hf_reparam.layers.processes import spread
from hf_reparam.linalg.allocate import Options, Way
from hf_reparam.plan import Entry
from hf_reparam.structures.heads.attention import ROLES, Attention, AttentionType, find_attentions, register_attention
from hf_reparam.structures.heads.narrow import NarrowHeads, stock_layers, widened
from hf_reparam.structures.linear import Linears
from hf_reparam.structures.source import Source
from hf_reparam.structures.structure import CAUTION, Built, Replacement, Site, Steps, Structure, reading

__all__ = ["AttentionType", "Heads", "register_attention"]

_WIDTHS = 8  # of heads that are tried, in equal steps


class Heads(Structure):
    """Attentions whose heads can be made narrower: see `register_attention`."""

    forms = ("heads",)
    option = "heads"
    changes_moments = True

    def sites(self, model: nn.Module) -> list[Attention]:
        return find_attentions(model)

    def cost(self, site: Attention, entry: Entry | None) -> int:
        """Nothing beside what its narrower layers cost."""
        if entry is not None and entry.rank > site.out_features:
            raise RankError(f"heads {entry.rank} wide, above the {site.out_features} they have")
        return 0

    def ways(
        self, sites: Mapping[str, Attention], source: Source, steps: Steps, taken: Mapping[str, Options]
    ) -> dict[str, list[Way]]:
        """Its layers as they are, and with heads of every width that is tried."""
        parts = {n: [f"{n}.{a.within(role, split=False)}" for role in ROLES] for n, a in sites.items()}
        heads = {name: a for name, a in sites.items() if all(part in taken for part in parts[name])}

        def work(name: str) -> list[tuple[int, float, dict[str, Tensor]]]:
            a, multiple = heads[name], steps.multiple_of or 1
            # widths in equal steps; the full one only where it splits a fused layer
            step = math.ceil(a.width / _WIDTHS / multiple) * multiple
            return NarrowHeads(name, a, source).losses(range(step, a.width + a.known.fused, step))

        costs = {name: float(a.heads * a.width) ** 3 for name, a in heads.items()}
        ways = {}
        for name, narrow in spread(costs, work, desc="narrowing heads").items() if heads else ():
            a = heads[name]
            ways[name] = [Way(0.0, {part: taken[part] for part in parts[name]})]
            for width, error, losses in narrow:
                layers = {}
                for role in ROLES:
                    choices = Linears().choices(_dense(a, role, width), losses[role], steps)
                    layers[f"{name}.{a.within(role, split=True)}"] = choices
                ways[name].append(Way(CAUTION * error, layers, {name: Entry(width, "heads")}))
        return ways

    def skeleton(self, site: Attention, entry: Entry | None) -> Replacement:
        if entry is None:
            return site.replaced(stock_layers(site), site.out_features)
        empty = {role: dense_like(site.layer(role), site.shape(role, entry.rank)) for role in ROLES}
        return site.replaced(empty, entry.rank)

    def build(self, name: str, site: Attention, entry: Entry | None, source: Source) -> Built:
        if entry is not None:
            return NarrowHeads(name, site, source).build(entry.rank)
        with reading(site.name, *(site.layer(role) for role in ROLES)):
            return Built(site.replaced(widened(site), site.out_features))


def _dense(attention: Attention, role: str, width: int) -> Site:
    n_in, n_out = attention.shape(role, width)
    layer = attention.layer(role)
    return Site(names=(role,), module=layer, kind="", in_features=n_in, out_features=n_out, weights=n_in * n_out)
