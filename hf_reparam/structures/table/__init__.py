"""Tables with a row for each token: input embeddings with what is tied to them, and an untied output head."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_reparam.compat.marks import tied_keys
from hf_reparam.errors import RankError, TargetError, WeightError
from hf_reparam.linalg.tables import TableMoments, decompose_table
from hf_reparam.plan import Entry
from hf_reparam.structures.hosts import embeddings_of, hosts
from hf_reparam.structures.source import Source
from hf_reparam.structures.structure import CAUTION, Built, Replacement, Site, Structure, reading
from hf_reparam.structures.table.modules import LowRankEmbedding, LowRankTable, low_rank_table, stock_table


@dataclass(frozen=True, kw_only=True)
class TableSite(Site):
    """Modules that hold one table."""

    host: PreTrainedModel  # the Transformers model that they are in
    members: Mapping[str, nn.Module]  # path in the host -> module, for this one and all that are tied to it


class Tables(Structure):
    """Input embeddings, with a head that is tied to them, and an untied head of Transformers models."""

    forms = ("table",)
    option = "embeddings"
    stays_in_memory = True
    ties = True

    def sites(self, model: nn.Module) -> list[TableSite]:
        return [site for start, host in hosts(model).items() for site in _sites(start, host)]

    def cost(self, site: TableSite, entry: Entry | None) -> int:
        if entry is not None and entry.rank >= site.full_rank:
            raise RankError(f"rank {entry.rank}, above the {site.full_rank - 1} that it can have")
        return super().cost(site, entry)

    def losses(self, name: str, site: TableSite, source: Source) -> Tensor | None:
        seen = source.table_moments(name)
        if seen is None:
            return None
        return decompose_table(site.module.get_parameter("weight"), seen).squares * seen.tokens * CAUTION

    def sums(self, name: str, site: TableSite, *, gradients: bool) -> dict[str, Any]:
        return {} if site.entry is not None else {name: TableMoments.zeros(*_shape(site.module))}

    def watch(self, name: str, site: TableSite, sums: Mapping[str, Any], watcher: Any) -> None:
        if not sums:
            return
        table: TableMoments = sums[name]
        real = partial(watcher.real, "")
        rows = (lambda ids: table.add_ids(real(ids[..., None])[:, 0]), lambda g: table.add_gradients(real(g)))
        head = (lambda x: table.add_head(real(x), None), lambda g: table.add_head(None, real(g)))
        for module in set(site.members.values()):
            watcher.watch(module, *(rows if isinstance(module, nn.Embedding) else head))

    def skeleton(self, site: TableSite, entry: Entry | None) -> Replacement:
        """Modules with factors of their own: what is missing in a file would be taken for tied."""
        modules: dict[nn.Module, nn.Module] = {}
        members: set[Any] = set(site.members.values())
        for module in members:
            if entry is None:
                modules[module] = module.stand_in()
            else:
                parts = (nn.Parameter(module.weight.new_empty(n, entry.rank)) for n in _shape(module))
                modules[module] = low_rank_table(module, *parts)
        return Replacement(modules, _ties(site.host, modules))

    @torch.no_grad()
    def build(self, name: str, site: TableSite, entry: Entry | None, source: Source) -> Built:
        """Modules that share the best factors in the metric; that share the product for None.

        Raises:
            TargetError: a module that should be tied holds another tensor.
        """
        held: Any = site.module
        for path, module in site.members.items() if entry is not None else ():
            weight = module.get_parameter("weight")
            if weight is not held.weight and not weight.is_meta:  # in files it cannot be seen
                raise TargetError(f"{path} is tied to {site.name} by the configuration, and holds another tensor")
        members, error = set(site.members.values()), None
        with reading(site.name, *members):
            if entry is None:
                weight = held.up.weight
                if weight.is_meta:
                    raise WeightError("the embeddings are on the meta device and have no data")
                dense = nn.Parameter(held.matrix().to(weight.dtype), weight.requires_grad)
                modules = {module: stock_table(module, dense) for module in members}
            else:
                weight = held.weight
                found = decompose_table(weight, source.table_moments(name))
                parts = [part.to(weight).contiguous() for part in found.cut(weight.detach().cpu(), entry.rank)]
                table, up = (nn.Parameter(part, weight.requires_grad) for part in parts)
                modules = {module: low_rank_table(module, table, up) for module in members}
                error = found.relative_error(entry.rank)
        return Built(Replacement(modules, _ties(site.host, modules)), error)


def _sites(start: str, host: PreTrainedModel) -> Iterator[TableSite]:
    modules: dict[str, nn.Module] = dict(host.named_modules(remove_duplicate=False))
    low = {path: module for path, module in modules.items() if isinstance(module, LowRankTable)}
    known: set[str] = set()
    inputs_and_outputs = [(module, False) for module in embeddings_of(host)]
    for wanted, stray in (*inputs_and_outputs, *((low[path], True) for path in sorted(low))):
        path = next((path for path, module in modules.items() if module is wanted), "")
        if not path or path in known or not isinstance(wanted, (nn.Embedding, nn.Linear, LowRankTable)):
            continue
        members = {path: wanted} if stray else _tied_to(host, path, modules)
        if isinstance(wanted, LowRankTable):  # whatever is declared: adapters may have changed what is shared
            members |= {name: m for name, m in low.items() if m.table.weight is wanted.table.weight}
        known |= set(members)
        reason = _why_not(members)
        if stray:
            reason = (
                f"{start}{path} is of low rank, and neither input nor output of the whole {type(host).__name__}, whose "
                "plan has no place for it: merge this part first, hf_reparam.merge(part)"
            )
        tokens, width = _shape(wanted)
        embedding = isinstance(wanted, (nn.Embedding, LowRankEmbedding))
        bias = getattr(wanted, "bias", None)
        yield TableSite(
            names=tuple(start + name for name in dict.fromkeys([path, *members])),
            module=wanted,
            kind="Embedding" if embedding else "Linear",
            in_features=tokens if embedding else width,
            out_features=width if embedding else tokens,
            weights=tokens * width,
            others=0 if bias is None else bias.numel(),
            entry=wanted.entry if isinstance(wanted, LowRankTable) else None,
            reason=reason,
            stray=stray,
            host=host,
            members=members,
        )


def _shape(module: Any) -> tuple[int, int]:
    """(tokens, width)."""
    low = isinstance(module, LowRankTable)
    return (module.out_features, module.in_features) if low else tuple(module.weight.shape)


def _why_not(members: Mapping[str, nn.Module]) -> str | None:
    for path, module in members.items():
        if isinstance(module, LowRankTable):
            return f"{path} is of low rank already: merge the model, and convert the dense one"
        if type(module) not in (nn.Embedding, nn.Linear):
            return f"{path} is a {type(module).__name__}"
        if isinstance(module, nn.Embedding) and (module.max_norm is not None or module.sparse):
            return f"{path} has max_norm or sparse gradients"
    return None


def _tied_to(host: PreTrainedModel, name: str, modules: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    found = {path for path, module in modules.items() if module is modules[name]}
    try:
        ties = host.get_expanded_tied_weights_keys(all_submodels=True)
    except ValueError:  # ties of tables, of which only some became of low rank
        return {name: modules[name]}
    groups = [{_owner(t), _owner(s)} for t, s in ties.items() if t.endswith(".weight") and s.endswith(".weight")]
    while any(group & found and not group <= found for group in groups):
        found |= {path for group in groups if group & found for path in group}
    return {path: module for path, module in modules.items() if path in found}


def _owner(key: str) -> str:
    """The path of the module that a parameter of a table belongs to."""
    return key.removesuffix(".weight").removesuffix(".table").removesuffix(".up")


def _ties(host: PreTrainedModel, modules: Mapping[nn.Module, nn.Module]) -> list[tuple[nn.Module, str, Any]]:
    """What the Transformers models must say is tied, once these modules are in place: tables, or their factors.

    Their classes name tables. Where these became of low rank the objects name factors, until they are dense again.
    """
    attributes = []
    for part in (m for m in host.modules() if isinstance(m, PreTrainedModel)):
        paths = part.named_modules(remove_duplicate=False)
        low = {path: isinstance(modules.get(m, m), LowRankTable) for path, m in paths}
        for attribute, known in tied_keys(part).items():
            ties = {}
            for target, source in known.items():
                owner, other = _owner(target), _owner(source)
                if not target.endswith(".weight") or owner not in low:
                    ties[target] = source
                else:
                    names = ("table.weight", "up.weight") if low[owner] else ("weight",)
                    ties |= {f"{owner}.{name}": f"{other}.{name}" for name in names}
            if ties != dict(known):
                attributes.append((part, attribute, ties))
    return attributes
