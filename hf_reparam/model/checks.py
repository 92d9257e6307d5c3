"""What a model says of itself: which layers stay dense, whether it is quantized, how large it is."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy
from transformers import PreTrainedModel

from hf_reparam.compat.accelerate import is_offloaded
from hf_reparam.compat.auto import default_model
from hf_reparam.compat.marks import drawn_parameters
from hf_reparam.errors import TargetError, WeightError
from hf_reparam.model.config import stock_class
from hf_reparam.model.host import embeddings_of, hosts, saved_otherwise, ties_of, unwrapped

_QUANTIZERS = ("torchao.", "bitsandbytes.", "torch.ao.nn.quantized.", "hqq.", "optimum.quanto.", "compressed_tensors.")
_PACKED = ("weight", "qweight", "weight_packed", "W_q")  # buffers that hold quantized weights
_PACKED_TYPES = (torch.int16, torch.int32)


def optional_layers(model: nn.Module) -> dict[str, str]:
    """What stays dense unless a pattern asks for it: heads, poolers and routers of Transformers models in a model.

    A head is what a model has beside the Transformers models inside of it, unless `AutoModel` gives its class.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    models = sorted((name for name, m in modules.items() if isinstance(m, PreTrainedModel)), key=len, reverse=True)
    with_head = {name for name in models if _has_head(modules[name])}
    reasons: dict[str, str] = {}
    for name in modules:
        owner = next((path for path in models if not path or f"{name}.".startswith(f"{path}.")), None)
        role = None if owner is None else "task head" if owner in with_head else _role(name, modules)
        if role is not None:
            reasons[name] = f"{role}: dense unless target_modules names it"
    return reasons


def fresh_heads(model: nn.Module) -> list[str]:
    """Parameters of task heads that no checkpoint gave and no training has changed."""
    heads = tuple(f"{name}." for name, reason in optional_layers(model).items() if reason.startswith("task head"))
    drawn = (start + name for start, host in hosts(model).items() for name in drawn_parameters(host))
    return [name for name in drawn if name.startswith(heads)]


def _has_head(model: Any) -> bool:
    inner = any(isinstance(part, PreTrainedModel) for part in model.modules() if part is not model)
    known = default_model(stock_class(model.config))
    return inner and (known is None or not isinstance(model, known))


def _role(name: str, modules: Mapping[str, nn.Module]) -> str | None:
    """What a module inside a body is for, by the names that models have for it."""
    parts = name.split(".")
    if any(part.endswith("pooler") for part in parts):
        return "pooler"
    beside_experts = parts[-1] == "gate" and "experts" in modules[".".join(parts[:-1])]._modules
    return "router" if beside_experts or any("router" in part for part in parts) else None


def protected_layers(model: nn.Module) -> dict[str, str]:
    """Layers that stay dense, and why: the output embeddings, whatever a Transformers model declares as tied, and what
    an object around it saves by itself; none of a plain module."""
    reasons: dict[str, str] = {}
    for start, host in hosts(model).items():
        _, output = embeddings_of(host)
        for name, module in host.named_modules(remove_duplicate=False):
            if module is output:
                reasons[start + name] = "output embeddings"
        for key in (key for pair in ties_of(host).items() for key in pair):
            reasons.setdefault(start + key.rpartition(".")[0], "tied: another module holds the same parameter")
    return {**reasons, **dict(saved_otherwise(model))}


def check_unquantized(model: nn.Module) -> None:
    """Raise WeightError for quantized weights in Transformers models, whatever is left over in their configuration."""
    for start, host in hosts(model).items():
        where = next(_quantized(host), "" if getattr(host, "hf_quantizer", None) is not None else None)
        if where is not None:
            place = f"{start[:-1]}: " if start else ""
            raise WeightError(
                f"{place}{type(host).__name__} is quantized{where}: convert the full-precision model, then quantize "
                "the result"
            )


def _quantized(model: PreTrainedModel) -> Iterator[str]:
    """Where a model is quantized, for a message."""
    for name, module in model.named_modules():
        if type(module).__module__.startswith(_QUANTIZERS):
            yield f" ({name} is a {type(module).__module__}.{type(module).__name__})"
        packed = {key: value for key, value in module._buffers.items() if key in _PACKED}
        for key, value in (module._parameters | packed).items():
            if value is None or value.dim() < 2 or value.dtype is torch.bool:
                continue
            foreign = type(value).__module__.startswith(_QUANTIZERS)
            if foreign or value.dtype.itemsize == 1 or value.dtype in _PACKED_TYPES:
                yield f" ({name}.{key} is a {type(value).__name__} of {value.dtype})"


def check_no_adapters(model: nn.Module) -> None:
    """Raise TargetError, which names the place, for a model with adapters that are not merged."""
    for path, module in model.named_modules():
        kind = type(module)
        if kind.__module__.startswith("peft.") or {"base_layer", "lora_A"} & module._modules.keys():
            place = f"{path} is" if path else "it is"
            raise TargetError(
                f"{type(model).__name__} has an adapter that is not merged: {place} a {kind.__name__}. Merge the "
                "adapter first: model = peft_model.merge_and_unload(); or convert the model before it gets adapters"
            )


def check_has_data(model: nn.Module) -> None:
    """Raise WeightError for a model on the meta device whose weights are nowhere else."""
    if {p.device.type for p in model.parameters()} == {"meta"} and not any(map(is_offloaded, model.modules())):
        raise WeightError("the model is on the meta device and has no data: load it onto a real device first")


def check_unsharded(model: nn.Module) -> None:
    """Raise TargetError for a model in FullyShardedDataParallel, which holds all weights in flat tensors."""
    for path, module in model.named_modules():
        if type(module).__name__ == "FullyShardedDataParallel":
            place = f"{path} of {type(model).__name__}" if path else "the model"
            raise TargetError(
                f"{place} is wrapped by FullyShardedDataParallel, which holds weights in flat tensors: convert or "
                "merge the model before it is wrapped"
            )


def check_convertible(model: nn.Module, *, inplace: bool) -> None:
    """Raise TargetError for a model that is sharded or compiled in parts, or whose parameters replicas know."""
    check_unsharded(model)
    if inplace and any(isinstance(m, nn.parallel.DistributedDataParallel) for m in model.modules()):
        raise TargetError(
            "DistributedDataParallel would go on with the old parameters: change model.module in place and wrap it "
            "anew, or use inplace=False"
        )
    for start, host in hosts(model).items():
        for name, module in host.named_modules():
            if unwrapped(module) is not module:
                raise TargetError(
                    f"{start}{name} is wrapped by {type(module).__name__} inside of "
                    f"{type(host).__name__}, whose folder would have names that nothing loads: unwrap it first"
                )


def count_parameters(model: nn.Module) -> int:
    """Numbers in a model's parameters, shared ones counted once."""
    known = {name: p for name, p in model.named_parameters() if not is_lazy(p)}
    for start, host in hosts(model).items():
        for target, source in ties_of(host).items():  # on the meta device sharing cannot be seen
            if any(p is not None and p.is_meta for p in (known.get(start + target), known.get(start + source))):
                known.pop(start + target, None)
    return sum(p.numel() for p in known.values())


@contextmanager
def outside_inference_mode() -> Iterator[None]:
    """Tensors of the block can be trained, also where it runs inside `torch.inference_mode()`."""
    gradients = torch.is_grad_enabled()  # not in inference mode, which leaving it would change
    with torch.inference_mode(False), torch.set_grad_enabled(gradients):
        yield
