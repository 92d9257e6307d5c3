"""Low-rank models without the package: the file that `save_pretrained(remote_code=True)` puts beside the weights.

`AutoModel...from_pretrained(FOLDER, trust_remote_code=True)` reads it where hf_reparam is not installed. Where it is,
the classes are the package's own. Written by hf_reparam (https://pypi.org/project/hf-reparam/), Apache-2.0.
"""

import functools
import re
from typing import Any

import torch
import transformers
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

# what follows up to the next comment of this kind is replaced by the definitions themselves
from hf_reparam.layers.heads import FusedProjections
from hf_reparam.layers.linear import LowRankLinear, PivotedLinear
from hf_reparam.plan import LayerSpec

_installed: Any = None
_ATTENTIONS: dict[str, dict[str, str]] = {}  # class -> where its projections are
# the definitions end here

_FORMAT_VERSIONS = (1, 2, 3)
_PREFIX = "Reparam"


class _ConfigMixin:
    base_class: Any

    def to_dict(self) -> dict[str, Any]:
        return {**super().to_dict(), "model_type": "reparam"}  # type: ignore[misc]

    @classmethod
    def get_config_dict(cls, *args: Any, **kwargs: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        data, rest = super().get_config_dict(*args, **kwargs)  # type: ignore[misc]
        return {**data, "model_type": cls.base_class.model_type}, rest


class _ModelMixin:
    config: Any

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)  # type: ignore[call-arg]
        _swap(self)
        ignored = self._keys_to_ignore_on_load_unexpected  # type: ignore[has-type]
        kinds = {re.sub(r"(^|\.)\d+(?=\.|$)", r"\1*", name) for name in config.reparam["modules"]}
        patterns = [r"(^|\.)" + re.escape(kind).replace(r"\*", r"\d+") + r"\.weight$" for kind in kinds]
        self._keys_to_ignore_on_load_unexpected = (set if isinstance(ignored, set) else list)(
            [*(ignored or ()), *patterns]
        )

    def post_init(self) -> None:
        _swap(self)
        super().post_init()  # type: ignore[misc]

    def save_pretrained(  # as hf_reparam saves it: with an empty marker that makes the stock class fail
        self, save_directory: Any, is_main_process: bool = True, state_dict: Any = None, **kwargs: Any
    ) -> None:
        state = dict(state_dict or self.state_dict())  # type: ignore[attr-defined]
        for name, module in self.named_modules():  # type: ignore[attr-defined]
            if isinstance(module, LowRankLinear):
                state.setdefault(f"{name}.weight", torch.empty(0, dtype=torch.uint8))
        super().save_pretrained(  # type: ignore[misc]
            save_directory, is_main_process, state, **{**kwargs, "save_original_format": False}
        )

    @classmethod
    def from_pretrained(cls, *args: Any, output_loading_info: bool = False, **kwargs: Any) -> Any:
        model, info = super().from_pretrained(*args, output_loading_info=True, **kwargs)  # type: ignore[misc]
        for name, layer in model.base_model.named_modules():
            if isinstance(layer, LowRankLinear):
                keys = {f"{name}.{key}" for key in layer.state_dict()}
                if keys & {key.removeprefix(f"{model.base_model_prefix}.") for key in info["missing_keys"]}:
                    raise ValueError(f"{name}: factors are missing from the checkpoint, or do not fit its plan")
        for name, layer in model.named_modules():
            if isinstance(layer, PivotedLinear) and not layer.order.is_meta:
                identity = torch.arange(layer.in_features, device=layer.order.device)
                layer.order = identity if f"{name}.order" in info["missing_keys"] else layer.order.to(torch.int64)
                if not torch.equal(layer.order.sort()[0], identity):
                    raise ValueError(f"{name}.order is no permutation of its {layer.in_features} inputs")
        return (model, info) if output_loading_info else model


def _swap(model: Any) -> None:
    """Replace the layers that the configuration names by empty low-rank ones, at every path at which they hang."""
    prefix = f"{model.base_model_prefix}." if model.base_model is not model else ""
    modules = dict(model.named_modules(remove_duplicate=False))
    for name, width in model.config.reparam.get("head_widths", {}).items():
        attention = _named(name, modules, prefix)
        if attention is not None:
            _narrow(name, attention, width)
    modules = dict(model.named_modules(remove_duplicate=False))
    made: dict[nn.Module, nn.Module] = {}
    for name, entry in model.config.reparam["modules"].items():
        dense = _named(name, modules, prefix)  # None: a layer of a head that this model has not
        if dense is not None and not isinstance(dense, LowRankLinear):
            made[dense] = _empty(name, dense, LayerSpec(**entry))
    for module in list(model.modules()):
        for child_name, child in module._modules.items():
            if child in made:
                module._modules[child_name] = made[child]


def _named(name: str, modules: dict[str, nn.Module], prefix: str) -> Any:
    """The module that a plan means; a dot before a name says that it is the head's, and not the base model's."""
    if name.startswith("."):
        return modules.get(name[1:]) if prefix else None
    return modules.get(prefix + name, modules.get(name))


def _narrow(name: str, attention: Any, width: Any) -> None:
    """Give an attention empty layers for heads of this width."""
    entry = _ATTENTIONS.get(f"{type(attention).__module__}.{type(attention).__qualname__}")
    if entry is None:
        raise ValueError(f"{name} is a {type(attention).__name__}, whose heads cannot be made narrower")
    holder = attention.get_submodule(entry["holder"])
    stock, first = getattr(holder, entry["width"]), attention.get_submodule(entry["query"])
    fused = entry["query"] == entry["key"]
    if isinstance(first, FusedProjections) or (stock == width and not fused):
        return  # it is done
    if not (isinstance(width, int) and 1 <= width <= stock):
        raise ValueError(f"{name}: heads cannot be {width!r} wide")
    inner = getattr(holder, entry["size"]) // stock * width
    for role in ("query", "output") if fused else ("query", "key", "value", "output"):
        parent, _, child = entry[role].rpartition(".")
        owner = attention.get_submodule(parent)
        dense = getattr(owner, child)
        n_out, n_in = dense.weight.shape if type(dense) is nn.Linear else dense.weight.T.shape
        if role == "output":
            new = _dense(dense, inner, n_out)
        elif fused:
            new = FusedProjections(*(_dense(dense, n_in, inner) for _ in range(3)))
        else:
            new = _dense(dense, n_in, inner)
        setattr(owner, child, new)
    setattr(holder, entry["width"], width)
    if entry["split"]:
        setattr(holder, entry["split"], inner)


def _dense(like: Any, n_in: int, n_out: int) -> nn.Module:
    options: dict[str, Any] = {"device": like.weight.device, "dtype": like.weight.dtype}
    if type(like) is nn.Linear:
        return nn.Linear(n_in, n_out, bias=like.bias is not None, **options)
    return Conv1D(n_out, n_in).to(**options)


def _empty(name: str, dense: Any, spec: LayerSpec) -> LowRankLinear:
    if type(dense) not in (nn.Linear, Conv1D):
        raise ValueError(f"{name} is a {type(dense).__name__}, no dense layer")
    n_out, n_in = dense.weight.shape if type(dense) is nn.Linear else dense.weight.T.shape
    most = min(n_in - (spec.form == "pivoted"), n_out)
    if not (isinstance(spec.rank, int) and 1 <= spec.rank <= most):
        raise ValueError(f"{name}: rank {spec.rank!r} does not fit {n_in} inputs and {n_out} outputs")
    like: dict[str, Any] = {"device": dense.weight.device, "dtype": dense.weight.dtype}
    up = nn.Linear(spec.rank, n_out, bias=dense.bias is not None, **like)
    if spec.form == "pair":
        return LowRankLinear(nn.Linear(n_in, spec.rank, bias=False, **like), up, dense_type=type(dense))
    down = nn.Linear(n_in - spec.rank, spec.rank, bias=False, **like)
    order = torch.arange(n_in, device=dense.weight.device)
    return PivotedLinear(down, up, order=order, dense_type=type(dense))


@functools.cache
def _config_class(base: Any) -> Any:
    def __init__(self, *args, reparam=None, **kwargs):  # type: ignore[no-untyped-def]  # noqa: N807
        kwargs.pop("model_type", None)
        base.__init__(self, *args, **kwargs)
        plan = {"format_version": 1, "modules": {}} if reparam is None else reparam
        if plan.get("format_version") not in _FORMAT_VERSIONS:
            raise ValueError(f"format version {plan.get('format_version')!r}: pip install -U hf-reparam")
        self.reparam = plan

    body = {"__module__": __name__, "__init__": __init__, "base_class": base}
    return type(base)(f"{_PREFIX}{base.__name__}", (_ConfigMixin, base), body)


@functools.cache
def _model_class(base: Any) -> Any:
    body = {"__module__": __name__, "config_class": _config_class(base.config_class), "base_class": base}
    return type(base)(f"{_PREFIX}{base.__name__}", (_ModelMixin, base), body)


def __getattr__(name: str) -> Any:
    """`ReparamBertConfig`, `ReparamBertForMaskedLM` ...: the package's where it is installed, else made here."""
    base = getattr(transformers, name.removeprefix(_PREFIX), None) if name.startswith(_PREFIX) else None
    if not isinstance(base, type):
        raise AttributeError(name)
    if _installed is not None:
        return getattr(_installed, name)
    if issubclass(base, PreTrainedConfig):
        return _config_class(base)
    if issubclass(base, PreTrainedModel):
        return _model_class(base)
    raise AttributeError(name)
