"""Changing what class a model is: stock to derived after its layers were replaced, and back."""

import copy
import os
from collections import Counter
from collections.abc import Collection
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from hf_reparam.compat.accelerate import aligned
from hf_reparam.compat.marks import forget_conversions, set_initialized
from hf_reparam.model.auto import register
from hf_reparam.model.classes import ReparamMixin, model_class
from hf_reparam.model.config import ReparamConfigMixin, plan_of, stock_class
from hf_reparam.model.host import embeddings_of, hosts, ties_of
from hf_reparam.model.remote import forget_file
from hf_reparam.model.sites import entries_of
from hf_reparam.plan import ConversionRecord, RankPlan, is_hub_id


def retype(model: nn.Module, new: Collection[nn.Module], metric: str, record: ConversionRecord) -> None:
    """Give the Transformers models in an object, or the object itself, their derived classes, and configurations with
    their plans. Changes them. Models in another object that have nothing new stay as they are.

    Args:
        model: a Transformers model, or an object with such models in it.
        new: modules that were put in.
        metric: in which the new factors were made.
        record: what is to be remembered, with errors and metrics by the names that layers have in a plan of the whole
            object; those of layers that were low-rank before are kept beside.
    """
    put_in = set(new)
    for start, host in hosts(model).items():
        if start and put_in.isdisjoint(host.modules()):
            continue
        old, base = plan_of(host.config), stock_class(host.config)
        errors = {n.removeprefix(start): e for n, e in record.errors.items() if n.startswith(start)}
        metrics = {n.removeprefix(start): m for n, m in record.metrics.items() if n.startswith(start)}
        source, plan_metric, noted = host.config.name_or_path, metric, record
        if old.record is not None:
            metric_of_each = {n: old.record.metrics.get(n, old.metric) for n in old.record.errors if n not in errors}
            if metric_of_each:  # what was known of layers that stay
                tokens = record.calibration_tokens or old.record.calibration_tokens
                refitted = min(old.record.refitted_layers, len(metric_of_each))
                noted = replace(record, calibration_tokens=tokens, refitted_layers=refitted)
            metric_of_each |= {n: metrics.get(n, metric) for n in errors}
            plan_metric = Counter(metric_of_each.values()).most_common(1)[0][0] if metric_of_each else metric
            metrics = {n: known for n, known in metric_of_each.items() if known != plan_metric}
            source, errors = old.record.base_model, {**old.record.errors, **errors}
        elif not is_hub_id(source) or os.path.exists(source):
            source = None
        entries = {**old.modules, **entries_of(host)}  # of another head, too
        own_record = replace(noted, base_model=source, errors=errors, metrics=metrics)
        plan = RankPlan(entries, base.model_type, plan_metric, own_record)
        configs = _new_configs(host, register(base))
        configs[id(host.config)].reparam = plan.to_dict()
        _retype(host, configs, model_class(type(host)))  # type: ignore[arg-type]  # a class is hashable


def retie(model: nn.Module, new: Collection[nn.Module]) -> None:
    """Let the Transformers models in an object tie their parameters anew, after new modules came in. Changes them."""
    own = {module: module._parameters.get("bias") for module in new}
    for host in hosts(model).values():
        host.tie_weights(recompute_mapping=False)
    for module, bias in own.items():
        now = module._parameters.get("bias")
        if bias is not None and now is not None and now.is_meta:  # tied to one in a file, which nobody would bring in
            module._parameters["bias"] = bias


def to_stock(model: Any) -> None:
    """Give a model whose layers are dense again its stock class and configuration. Changes the model."""
    configs = _new_configs(model, stock_class(model.config))
    for config in configs.values():
        forget_file(config)
    forget_conversions(model)  # of the derived class, which saves the names that it has
    _retype(model, configs, stock_class(model))


def _new_configs(model: Any, kind: type[PreTrainedConfig]) -> dict[int, Any]:
    """id of a configuration -> the one that takes its place, for all that the model's modules hold or share.

    The model's own becomes one of `kind`. Parts of it stay parts of it, and so the very objects that modules hold: what
    is set on one is seen, and saved, by the other. Only the model's own has a plan.
    """
    config = copy.copy(model.config)
    new: dict[int, Any] = {id(model.config): config}  # copy.deepcopy adds every object that it reaches
    config.__dict__ = copy.deepcopy(vars(model.config), new)
    for other in [v for m in model.modules() for v in vars(m).values() if isinstance(v, ReparamConfigMixin)]:
        copy.deepcopy(other, new)  # one that a class made for a part of it
    made = {key: value for key, value in new.items() if isinstance(value, PreTrainedConfig)}
    for value in made.values():
        vars(value).pop("quantization_config", None)  # left over: the weights are not quantized
        if isinstance(value, ReparamConfigMixin):
            vars(value).pop("reparam", None)
            value.__class__ = stock_class(value)
    config.__class__ = kind
    return made


def _retype(model: Any, configs: dict[int, Any], kind: type[PreTrainedModel]) -> None:
    """New configuration objects for the model and every part of it; other models keep theirs. Parts become stock."""
    config = configs[id(model.config)]
    config.architectures = [kind.__name__]
    if getattr(config, "tie_word_embeddings", False) and not _tied(model):
        config.tie_word_embeddings = False  # an adapter's merge can leave it set beside two different tensors
    for module in model.modules():
        set_initialized(module)  # new layers, too: a later init_weights() must not draw them anew
        for key, value in vars(module).items():
            if isinstance(value, PreTrainedConfig) and id(value) in configs:
                vars(module)[key] = configs[id(value)]
        if module is not model and isinstance(module, ReparamMixin):
            module.__class__ = stock_class(module)
            module.config.architectures = [type(module).__name__]
    model.__class__ = kind


def _tied(model: PreTrainedModel) -> bool:
    """Whether the output embeddings are the tensor that they are declared to be tied to; True where they are not
    declared to be tied: other modules may be."""
    outputs: Any = embeddings_of(model)[1]
    modules = dict(model.named_modules())
    key = next((f"{name}.weight" for name, module in modules.items() if module is outputs), "")
    source: Any = modules.get(ties_of(model).get(key, "").removesuffix(".weight"))
    if not isinstance(source, nn.Embedding) or source.weight is outputs.weight:
        return True
    with aligned(source, outputs):
        return torch.equal(source.weight, outputs.get_parameter("weight"))
