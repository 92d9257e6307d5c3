"""Empty tensors under the names of dense weights, by which a stock class finds that a folder is none of its own."""

import re
from typing import Any

import torch

from hf_reparam.layers.factored import Factored
from hf_reparam.model.config import HEAD, plan_of
from hf_reparam.model.naming import loading, local_names, renamed
from hf_reparam.model.sites import live_sites
from hf_reparam.patterns import layer_kind

__all__ = ["marker_patterns", "markers"]


def markers(model: Any) -> dict[str, torch.Tensor]:
    """Name -> empty tensor, under the dense weight's name of the first low-rank layer of each kind."""
    low = {site.name: site.module for site in live_sites(model) if isinstance(site.module, Factored)}
    first = {layer_kind(name): f"{name}.{low[name].stands_for}".rstrip(".") for name in reversed(low)}
    return {name: torch.empty(0, dtype=torch.uint8) for name in first.values()}


def marker_patterns(model: Any) -> set[str]:
    """Regular expressions for the names of the empty markers, as the file has them and as they are here."""
    plan = plan_of(model.config)
    names = [*plan.modules, *local_names(model, plan.modules)]
    names += renamed(model, names) if loading() else []
    kinds = {layer_kind(name.removeprefix(HEAD)) for name in names}
    return {r"(^|\.)" + re.escape(kind).replace(r"\*", r"\d+") + r"(\.weight)?$" for kind in kinds}
