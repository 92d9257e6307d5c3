"""Configurations: for any `BertConfig` a `ReparamBertConfig(BertConfig)`, made on demand, that carries a rank plan."""

import functools
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from transformers import PreTrainedConfig

from hf_reparam.compat.auto import name_lora_targets
from hf_reparam.compat.marks import NO_CODE_FILE
from hf_reparam.errors import PlanError
from hf_reparam.plan import RankPlan

MODEL_TYPE = "hf_reparam"
"""`model_type` on disk. In memory a configuration has its base's, by which Transformers chooses code."""
PREFIX = "Reparam"
PUBLIC_MODULE = __name__.removesuffix(".model.config")
"""Where generated classes are published: the package, or the one file for where it is not installed."""
HEAD = "."
"""Before the name of a head's layer in a plan where the base model has a module that begins with the same name."""

_MOST = {"layers": 1000, "n_layer": 1000, "num_labels": 100_000}  # ends of names; more is an attack on time and memory


def check_entries(data: Mapping[str, Any]) -> None:
    """Raise PlanError for what no saved configuration holds: an attention implementation, which may be code to
    download, a private name, no dtype, a number of layers or labels that no model has."""
    for key, value in data.items():
        if key.startswith("__") or key.endswith("attn_implementation"):
            raise PlanError(f"config.json has the entry {key[:80]!r}, which is never saved")
        most = next((most for end, most in _MOST.items() if key.endswith(end)), None)
        number = isinstance(value, (int, float))
        if (number and most is not None and not -1 <= value <= most) or (key == "num_labels" and not number):
            raise PlanError(f"config.json has {key!r} = {str(value)[:80]}; at most {most} are accepted")
    if not isinstance(data.get("quantization_config") or {}, dict):
        raise PlanError("config.json has a 'quantization_config' that is no object")
    dtype = data.get("dtype", data.get("torch_dtype"))
    known = isinstance(dtype, str) and isinstance(getattr(torch, dtype, None), torch.dtype)
    if not (known or dtype is None or isinstance(dtype, (dict, torch.dtype))):
        raise PlanError(f"config.json has 'dtype' = {str(dtype)[:80]!r}, which is none of torch's")


class CheckedConfig:
    """A configuration that believes nothing of a file."""

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:  # base's contract
        """As the base's. Raises PlanError for an entry that no saved configuration has."""
        check_entries(config_dict)
        return super().from_dict(config_dict, **kwargs)  # type: ignore[misc]


class Derived:
    """An object of a class that `derive` has made of a stock one."""

    base_class: type[Any]
    derive: Callable[[Any], Any]

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickle by the base class, which may be one of the user's; the derived class is made anew from it."""
        made: Any = super().__reduce_ex__(max(protocol, 2))
        return (made_anew, (self.derive, self.base_class), *made[2:])


class ReparamConfigMixin(Derived, CheckedConfig):
    """What a derived configuration adds to its base: the entry `reparam`, a rank plan as JSON."""

    base_config_key: str
    reparam: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """All fields of the base, the plan, and `model_type` "hf_reparam"."""
        name_lora_targets(MODEL_TYPE, ["down", "up"])  # PEFT looks them up by the model type in `to_dict`
        return {**super().to_dict(), "model_type": MODEL_TYPE}  # type: ignore[misc]

    @classmethod
    def get_config_dict(cls, *args: Any, **kwargs: Any) -> tuple[dict[str, Any], dict[str, Any]]:  # base's contract
        """Read `config.json`, naming the type as the base does, so that no mismatch is reported.

        A class of a part finds the plan of the whole in the part's entry.
        """
        data, rest = super().get_config_dict(*args, **kwargs)  # type: ignore[misc]
        if data.get("model_type") != MODEL_TYPE:
            return data, rest
        plan, mine = data.get("reparam"), cls.base_class.model_type
        whole = plan.get("base_model_type") if isinstance(plan, dict) else mine
        if whole == mine or not isinstance(whole, str):
            return {**data, "model_type": mine}, rest
        for key, part in data.items():
            found = isinstance(part, dict) and (key == cls.base_config_key or part.get("model_type") == mine)
            if found and "reparam" not in part:
                data = {**data, key: {**part, "reparam": {**plan, "base_model_type": mine}}}
        return {**data, "model_type": whole}, rest


def made_anew(derive: Callable[[Any], Any], base: type[Any]) -> Any:
    """An empty object of the class that is derived from another, for unpickling and copying."""
    derived = derive(base)
    return derived.__new__(derived)


@functools.cache
def config_class(base: Any) -> Any:
    """The derived configuration class of a stock one; a derived one is returned as it is.

    Its constructor takes the base's fields and `reparam`, the JSON form of a RankPlan (empty if absent), and raises
    PlanError for a plan that is malformed or made for another model type.
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

    own = {"__init__": __init__, "base_class": base, "derive": staticmethod(config_class)}
    body = {"__module__": PUBLIC_MODULE, "__doc__": f"`{base.__name__}` of a low-rank model.", **own}
    make: Any = type(base)
    return make(f"{PREFIX}{base.__name__}", (ReparamConfigMixin, base), {**NO_CODE_FILE, **body})


def stock_class(of: Any) -> Any:
    """The dense class behind a model, or behind a configuration."""
    return of.base_class if isinstance(of, Derived) else type(of)


def note_refit(config: Any, layers: int) -> None:
    """Remember in a derived configuration how many layers were refitted: the higher count, if it was done twice."""
    plan = plan_of(config)
    if plan.record is not None:
        most = max(layers, plan.record.refitted_layers)
        config.reparam = replace(plan, record=replace(plan.record, refitted_layers=most)).to_dict()


def plan_of(config: PreTrainedConfig) -> RankPlan:
    """The plan that a configuration carries; an empty one for a stock configuration."""
    if isinstance(config, ReparamConfigMixin):
        return RankPlan.from_dict(config.reparam)
    return RankPlan(base_model_type=config.model_type)


def base_prefix(model: Any) -> str:
    """What paths of the base model's modules begin with: "bert.", or nothing where the model is its own base."""
    return f"{model.base_model_prefix}." if model.base_model is not model else ""


def plan_name(model: Any, name: str) -> str:
    """The name a plan uses for a module path: relative to the base model, or to the head model for head modules.

    These get `HEAD` before them where the base model would claim the name for itself.
    """
    prefix = base_prefix(model)
    if not prefix or name.startswith(prefix):
        return name.removeprefix(prefix)
    return f"{HEAD}{name}" if hasattr(model.base_model, name.partition(".")[0]) else name
