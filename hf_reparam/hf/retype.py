"""Changing what class a model is: stock to derived after its layers were replaced, and back."""

import copy
import os
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from hf_reparam.hf.auto import register
from hf_reparam.hf.configuration import plan_name, plan_of, stock_config_class
from hf_reparam.hf.modeling import mark_parts, model_class, stock_model_class, unmark_parts
from hf_reparam.hf.offload import aligned
from hf_reparam.hf.remote import forget_file
from hf_reparam.hf.tables import name_ties, table_groups
from hf_reparam.nn.embedding import Tables
from hf_reparam.nn.heads import find_attentions
from hf_reparam.nn.linear import LowRankLinear
from hf_reparam.plan import RankPlan
from hf_reparam.record import ConversionRecord, is_hub_id

__all__ = ["to_reparam", "to_stock"]


def to_reparam(model: Any, method: str, record: ConversionRecord) -> Any:
    """Give a model whose layers were replaced its derived class, and a configuration with the plan. Changes it.

    Args:
        model: the model.
        method: how the new factors were made.
        record: what is to be remembered of it; errors of layers that were low-rank before are kept beside.
    """
    base = stock_config_class(model.config)
    register(base)
    layers = {n: m for n, m in model.named_modules() if isinstance(m, LowRankLinear)}
    plan = RankPlan({plan_name(model, n): m.spec for n, m in layers.items()}, base.model_type, method)
    old = plan_of(model.config)
    absent = {n: s for n, s in old.modules.items() if n not in plan.modules}
    widths = {plan_name(model, a.name): a.width for a in find_attentions(model) if a.narrowed}
    if any(isinstance(module, Tables) for module in model.modules()):
        name_ties(model)
    low = [group for group in table_groups(model) if isinstance(group.module, Tables)]
    tables = {plan_name(model, group.path): group.module.rank for group in low}
    config = _copy_config(model.config, register(base))
    whole = {**plan.modules, **absent}
    known = _remembered(model.config, old, record)
    widths, tables = {**old.head_widths, **widths}, {**old.embeddings, **tables}
    config.reparam = RankPlan(whole, base.model_type, method, known, widths, tables).to_dict()
    result = _retype(model, config, model_class(type(model)), tables=bool(tables))
    mark_parts(result)
    return result


def _remembered(config: PreTrainedConfig, old: RankPlan, record: ConversionRecord) -> ConversionRecord:
    if old.record is not None:
        return replace(record, base_model=old.record.base_model, errors={**old.record.errors, **record.errors})
    source = config._name_or_path
    return replace(record, base_model=source if is_hub_id(source) and not os.path.exists(source) else None)


def to_stock(model: Any) -> Any:
    """Give a model whose layers are dense again its stock class and configuration. Changes the model."""
    config = _copy_config(model.config, stock_config_class(model.config))
    tables = bool(plan_of(model.config).embeddings)
    vars(config).pop("reparam", None)
    forget_file(config)
    vars(model).pop("_weight_conversions", None)  # of the derived class, which saves the names that it has
    unmark_parts(model)
    return _retype(model, config, stock_model_class(model), tables=tables)


def _copy_config(config: PreTrainedConfig, kind: type[PreTrainedConfig]) -> Any:
    new = copy.copy(config)
    new.__dict__ = copy.deepcopy(config.__dict__)
    new.__class__ = kind
    return new


def _retype(model: Any, config: Any, kind: type[PreTrainedModel], *, tables: bool = False) -> Any:
    """One new configuration object for every submodule that shared the old one; other models keep theirs.

    With `tables`, embeddings became of low rank or dense again, and what is tied to them has other parameters.
    """
    old = model.config
    config.architectures = [kind.__name__]
    if getattr(config, "tie_word_embeddings", False) and not _tied(model):
        config.tie_word_embeddings = False  # an adapter's merge can leave it set beside two different tensors
    for module in model.modules():
        module._is_hf_initialized = True  # new layers, too: a later init_weights() must not draw them anew
        if vars(module).get("config") is old:
            module.config = config
    model.__class__ = kind
    if tables:
        name_ties(model)
        model.tie_weights(recompute_mapping=False)
    return model


def _tied(model: PreTrainedModel) -> bool:
    """Whether the word embeddings are one tensor; True where the model has no two to compare."""
    inputs, outputs = model.get_input_embeddings(), model.get_output_embeddings()
    if not isinstance(inputs, nn.Embedding) or outputs is None:
        return True
    if inputs.weight is outputs.weight:
        return True
    with aligned(inputs), aligned(outputs):
        return torch.equal(inputs.weight, outputs.weight)
