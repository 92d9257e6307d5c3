"""The front door: one name in `AutoConfig`, behind which any family's derived classes are made and registered.

Importing this package registers "hf_reparam" and the dense layers of Transformers. Building a configuration of that
type yields the derived class of the base that it names, and makes the Auto classes, tokenizer and processor mappings
that know the base know the derived class too. There is no table of families.
"""

import functools
from importlib import import_module
from typing import Any

import torch
import transformers
from torch import nn
from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from hf_reparam.compat.auto import auto_class_of, register_like
from hf_reparam.errors import PlanError, TargetError
from hf_reparam.layers.dense import register_dense
from hf_reparam.model.classes import ReparamMixin, model_class
from hf_reparam.model.config import MODEL_TYPE, PREFIX, PUBLIC_MODULE, CheckedConfig, config_class, stock_class
from hf_reparam.model.host import hosts
from hf_reparam.plan import RankPlan


class ReparamConfig(CheckedConfig, PreTrainedConfig):
    """What `AutoConfig` knows: called with a saved configuration it makes one of the derived class."""

    model_type = MODEL_TYPE

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:  # the base's contract
        if "reparam" not in kwargs:
            return super().__new__(cls)
        plan = RankPlan.from_dict(kwargs["reparam"])
        if plan.base_model_type not in CONFIG_MAPPING or plan.base_model_type == MODEL_TYPE:
            raise PlanError(
                f"'reparam.base_model_type' is {plan.base_model_type!r}, which Transformers {transformers.__version__} "
                "does not know: install the version that has it, or register its configuration with AutoConfig first"
            )
        return register(CONFIG_MAPPING[plan.base_model_type])(*args, **kwargs)


@functools.cache
def register(base: Any) -> Any:
    """Make the derived configuration class of a stock one known wherever the stock one is, and return it."""
    derived = config_class(base)
    if derived is not base:
        register_like(base, derived, model_class)
    return derived


def check_loadable(model: nn.Module) -> None:
    """Raise TargetError for a model with code from a repository, if the Auto classes could not load it converted."""
    for start, part in hosts(model).items():
        kind, config = stock_class(part), stock_class(part.config)
        if not any(code.__module__.startswith("transformers_modules.") for code in (kind, config)):
            continue
        known = config.model_type in CONFIG_MAPPING and CONFIG_MAPPING[config.model_type] is config
        if not known or auto_class_of(kind) is None:
            where = f"{start[:-1]} is a {kind.__name__}, which" if start else kind.__name__
            raise TargetError(
                f"{where} came with trust_remote_code, and its low-rank model could be saved and never loaded: "
                f"register its code first, AutoConfig.register({config.model_type!r}, type(model.config)) and "
                "AutoModel.register(type(model.config), type(model)), here and wherever the result is loaded"
            )


def generated_class(name: str) -> type[Any]:
    """The generated class of this name: `ReparamBertForMaskedLM`, `ReparamBertConfig`. Raises AttributeError where
    neither Transformers nor a module that was imported has a class behind it."""
    own = name.removeprefix(PREFIX)
    base: Any = (getattr(transformers, own, None) or _imported(own)) if name.startswith(PREFIX) and own else None
    if isinstance(base, type) and issubclass(base, PreTrainedConfig):
        return register(base)
    if isinstance(base, type) and issubclass(base, PreTrainedModel):
        register(base.config_class)  # type: ignore[attr-defined]
        return model_class(base)
    raise AttributeError(f"module 'hf_reparam' has no attribute {name!r}")


def _imported(name: str) -> type[PreTrainedModel] | None:
    """The model class of this name that somebody else defined, if its module was imported."""
    found: list[type[PreTrainedModel]] = [PreTrainedModel]
    for kind in found:
        found += [sub for sub in kind.__subclasses__() if not issubclass(sub, ReparamMixin) and sub not in found]
    return next((kind for kind in reversed(found) if kind.__name__ == name), None)


def _linear(path: str, n_in: int, n_out: int, bias: bool, device: torch.device, dtype: torch.dtype) -> Any:
    module, _, name = path.rpartition(".")
    return getattr(import_module(module), name)(n_in, n_out, bias=bias).to(device=device, dtype=dtype)


register_dense(
    Conv1D,
    matrix=lambda module: module.weight.T,
    build=lambda n_in, n_out, bias, device, dtype: Conv1D(n_out, n_in).to(device=device, dtype=dtype),
)
for _path in (  # y = x W^T + b, as no other subclass of nn.Linear; by name, so that no module is imported for them
    "transformers.models.falcon.modeling_falcon.FalconLinear",
    "transformers.models.esm.modeling_esmfold.EsmFoldLinear",
):
    register_dense(_path, matrix=lambda linear: linear.weight, build=functools.partial(_linear, _path))
if PUBLIC_MODULE == "hf_reparam":
    AutoConfig.register(MODEL_TYPE, ReparamConfig, exist_ok=True)
