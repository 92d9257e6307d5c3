"""Empty tensors under the names of dense weights, by which a stock class finds that a folder is none of its own."""

import re
from typing import Any

import torch

from hf_reparam.layers.embedding import Tables
from hf_reparam.layers.linear import LowRankLinear
from hf_reparam.model.config import HEAD, plan_of
from hf_reparam.model.naming import loading, local_names, renamed
from hf_reparam.model.tables import table_groups
from hf_reparam.plan import layer_kind

__all__ = ["marker_patterns", "markers"]


def markers(model: Any) -> dict[str, torch.Tensor]:
    """Name -> empty tensor, under the dense weight's name of the first low-rank layer of each kind."""
    names = [name for name, module in model.named_modules() if isinstance(module, LowRankLinear)]
    names += [group.path for group in table_groups(model) if isinstance(group.module, Tables)]
    first = {layer_kind(name): name for name in reversed(names)}
    return {f"{name}.weight": torch.empty(0, dtype=torch.uint8) for name in first.values()}


def marker_patterns(model: Any) -> set[str]:
    """Regular expressions for the names of the empty markers, as the file has them and as they are here."""
    plan = plan_of(model.config)
    names = [*plan.modules, *plan.embeddings, *local_names(model, {**plan.modules, **plan.embeddings})]
    names += renamed(model, names) if loading() else []
    kinds = {layer_kind(name.removeprefix(HEAD)) for name in names}
    return {r"(^|\.)" + re.escape(kind).replace(r"\*", r"\d+") + r"\.weight$" for kind in kinds}
