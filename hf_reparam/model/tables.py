"""Tables of a model, a row for each token: input embeddings with what is tied to them, and an untied output head."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from hf_reparam.errors import PlanError, TargetError
from hf_reparam.layers.embedding import Tables
from hf_reparam.model.host import embeddings_of, hosts, layer_name

__all__ = ["TableGroup", "check_tables", "name_ties", "table_groups", "tables_of_plan"]


@dataclass(frozen=True)
class TableGroup:
    """Modules that hold one table.

    Args:
        path: of the input embeddings, or of an untied head.
        members: path -> module, for this one and all that are tied to it.
    """

    path: str
    members: Mapping[str, nn.Module]

    @property
    def module(self) -> Any:
        """The module at the path."""
        return self.members[self.path]

    @property
    def shape(self) -> tuple[int, int]:
        """(tokens, d)."""
        module = self.module
        return (module.out_features, module.in_features) if isinstance(module, Tables) else tuple(module.weight.shape)

    @property
    def size(self) -> int:
        """Numbers in the dense table."""
        tokens, width = self.shape
        return tokens * width

    def why_not(self) -> str | None:
        """Why it cannot be of low rank, or None."""
        for path, module in self.members.items():
            if isinstance(module, Tables):
                return f"{path} is of low rank already"
            if type(module) not in (nn.Embedding, nn.Linear):
                return f"{path} is a {type(module).__name__}"
            if isinstance(module, nn.Embedding) and (module.max_norm is not None or module.sparse):
                return f"{path} has max_norm or sparse gradients"
        return None


def table_groups(model: nn.Module) -> list[TableGroup]:
    """The tables of a Transformers model, or of those in another object."""
    groups: list[TableGroup] = []
    for path, host in hosts(model).items():
        start = f"{path}." if path else ""
        for group in _groups_of(host):
            members = {start + name: module for name, module in group.members.items()}
            groups.append(TableGroup(start + group.path, members))
    return groups


def _groups_of(model: PreTrainedModel) -> list[TableGroup]:
    groups: list[TableGroup] = []
    for wanted in embeddings_of(model):
        path = next((name for name, module in model.named_modules() if module is wanted), "")
        if path and not any(path in group.members for group in groups):
            groups.append(TableGroup(path, _tied_to(model, path)))
    return groups


def check_tables(model: nn.Module) -> None:
    """Raise TargetError for embeddings of low rank that a plan of the whole Transformers model cannot name."""
    for path, host in hosts(model).items():
        low = {name for name, module in host.named_modules() if isinstance(module, Tables)}
        try:
            known = {name for group in _groups_of(host) for name in group.members} if low else set()
        except ValueError:  # ties of tables, of which only some became of low rank
            known = set()
        if low - known:
            name = min(low - known)
            raise TargetError(
                f"{f'{path}.' if path else ''}{name} is of low rank, and neither input nor output of the whole "
                f"{type(host).__name__}, whose plan has no place for it: merge this part first, hf_reparam.merge(part)"
            )


def _tied_to(model: PreTrainedModel, name: str) -> dict[str, nn.Module]:
    modules: dict[str, nn.Module] = dict(model.named_modules(remove_duplicate=False))
    groups = [{path for path, module in modules.items() if module is modules[name]}]
    for target, source in model.get_expanded_tied_weights_keys(all_submodels=True).items():
        if target.endswith(".weight") and source.endswith(".weight"):
            groups.append({_owner(target), _owner(source)})
    found = {name}
    while any(group & found and not group <= found for group in groups):
        found |= {path for group in groups if group & found for path in group}
    return {path: module for path, module in modules.items() if path in found}


def _owner(key: str) -> str:
    """The path of the module that a parameter of a table belongs to."""
    return key.removesuffix(".weight").removesuffix(".table").removesuffix(".up")


def tables_of_plan(model: nn.Module, embeddings: Mapping[str, int]) -> list[tuple[int, TableGroup]]:
    """Ranks in a plan and the tables that they are for. Names of another head's modules are left out.

    Raises:
        PlanError: a name is that of no table, of one that cannot be of low rank, or its rank is too high.
    """
    if not embeddings:
        return []
    if not hosts(model):
        raise PlanError("the plan makes embeddings of low rank, and only those of Transformers models are known")
    known = {layer_name(model, group.path): group for group in table_groups(model)}
    base = model.base_model if isinstance(model, PreTrainedModel) else model
    children = {name for name, _ in base.named_children()}
    found = []
    for name, rank in embeddings.items():
        group = known.get(name)
        if group is None:
            if name.partition(".")[0] in children:
                raise PlanError(f"{name}: the plan makes it of low rank, and the tables here are {sorted(known)}")
            continue
        most = min(group.shape) - 1
        reason = group.why_not()
        if reason is None and rank > most:
            reason = f"rank {rank} is above the {most} that it can have"
        if isinstance(group.module, Tables) and group.module.rank == rank:
            continue
        if reason is not None:
            raise PlanError(f"{name}: the plan makes it of low rank, and that cannot be: {reason}")
        found.append((rank, group))
    return found


def name_ties(model: PreTrainedModel) -> None:
    """Tell a model, and those inside of it, which parameters are tied now: tables, or the factors of tables.

    Their classes name tables. Where these became of low rank the objects name factors, until they are dense again.
    """
    models = [module for module in model.modules() if isinstance(module, PreTrainedModel)]
    for module in models:
        keys = module._tied_weights_keys
        ties = None if keys is None else _ties_now(module, keys)
        if ties != keys:
            module._tied_weights_keys = ties
    for module in models:
        if "all_tied_weights_keys" in vars(module):
            module.all_tied_weights_keys = module.get_expanded_tied_weights_keys(all_submodels=True)


def _ties_now(model: PreTrainedModel, keys: Mapping[str, str]) -> dict[str, str]:
    """Tied parameters, target -> source, of tables as they are: "x.weight", or "x.table.weight" and "x.up.weight"."""
    ties: dict[str, str] = {}
    modules: dict[str, Any] = dict(model.named_modules(remove_duplicate=False))
    for target, source in keys.items():
        owner, other = _owner(target), _owner(source)
        if not target.endswith(".weight") or owner not in modules:
            ties[target] = source
        elif isinstance(modules[owner], Tables):
            ties |= {f"{owner}.{part}.weight": f"{other}.{part}.weight" for part in ("table", "up")}
        else:
            ties[f"{owner}.weight"] = f"{other}.weight"
    return ties
