"""Configurations: for any `BertConfig` a `ReparamBertConfig(BertConfig)`, made on demand, that carries a rank plan."""

import functools
from dataclasses import replace
from typing import Any

from transformers import PreTrainedConfig

from hf_reparam.errors import PlanError
from hf_reparam.hf.untrusted import check_entries
from hf_reparam.plan import RankPlan

__all__ = [
    "MODEL_TYPE",
    "PREFIX",
    "PUBLIC_MODULE",
    "ReparamConfigMixin",
    "config_class",
    "note_refit",
    "plan_name",
    "plan_of",
    "stock_config_class",
]

MODEL_TYPE = "reparam"
"""`model_type` on disk. In memory a configuration has its base's `model_type`, by which Transformers chooses code."""

PREFIX = "Reparam"
PUBLIC_MODULE = "hf_reparam"
"""Module under whose name generated classes are published, imported and unpickled."""


class ReparamConfigMixin:
    """What a derived configuration adds to its base: the entry `reparam`, a rank plan as JSON."""

    base_class: type[PreTrainedConfig]
    reparam: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """All fields of the base, the plan, and `model_type` "reparam"."""
        return {**super().to_dict(), "model_type": MODEL_TYPE}  # type: ignore[misc]

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:  # base's contract
        """As the base's. Raises PlanError for an entry that no saved configuration has."""
        check_entries(config_dict)
        return super().from_dict(config_dict, **kwargs)  # type: ignore[misc]

    @classmethod
    def get_config_dict(cls, *args: Any, **kwargs: Any) -> tuple[dict[str, Any], dict[str, Any]]:  # base's contract
        """Read `config.json`, naming the type as the base does, so that no mismatch is reported."""
        data, rest = super().get_config_dict(*args, **kwargs)  # type: ignore[misc]
        return (
            {**data, "model_type": cls.base_class.model_type} if data.get("model_type") == MODEL_TYPE else data
        ), rest


@functools.cache
def config_class(base: type[PreTrainedConfig]) -> type[PreTrainedConfig]:
    """The derived configuration class of a stock one; a derived one is returned as it is.

    The derived class takes the base's fields and `reparam`, the JSON form of a RankPlan (empty if absent). Its
    constructor raises PlanError for a plan that is malformed or made for another model type.
    """
    if issubclass(base, ReparamConfigMixin):
        return base

    def __init__(self, *args, reparam=None, **kwargs):  # type: ignore[no-untyped-def]  # noqa: N807
        # Transformers turns config classes into dataclasses and wraps every class without an __init__ of its own.
        kwargs.pop("model_type", None)
        base.__init__(self, *args, **kwargs)
        plan = RankPlan(base_model_type=base.model_type) if reparam is None else RankPlan.from_dict(reparam)
        if plan.base_model_type != base.model_type:
            raise PlanError(
                f"the plan was made for model type {plan.base_model_type!r}, and this is {base.model_type!r}"
            )
        self.reparam = plan.to_dict()

    body = {"__module__": PUBLIC_MODULE, "__doc__": f"`{base.__name__}` of a low-rank model.", "__init__": __init__}
    make: Any = type(base)
    return make(f"{PREFIX}{base.__name__}", (ReparamConfigMixin, base), {**body, "base_class": base})


def stock_config_class(config: PreTrainedConfig) -> type[PreTrainedConfig]:
    """The dense class behind a configuration."""
    return config.base_class if isinstance(config, ReparamConfigMixin) else type(config)


def note_refit(config: PreTrainedConfig, layers: int) -> None:
    """Remember in a derived configuration how many layers were refitted."""
    plan = plan_of(config)
    if plan.record is not None and isinstance(config, ReparamConfigMixin):
        config.reparam = replace(plan, record=replace(plan.record, refitted_layers=layers)).to_dict()


def plan_of(config: PreTrainedConfig) -> RankPlan:
    """The plan that a configuration carries; an empty one for a stock configuration."""
    if isinstance(config, ReparamConfigMixin):
        return RankPlan.from_dict(config.reparam)
    return RankPlan(base_model_type=config.model_type)


def plan_name(model: Any, name: str) -> str:
    """The name a plan uses for a module path: relative to the base model, or to the head model for head modules."""
    prefix = f"{model.base_model_prefix}." if model.base_model is not model else ""
    return name.removeprefix(prefix)
