"""`lora_targets`: what a `LoraConfig` for the dense model names, as the converted model names it."""

import re
from collections.abc import Iterable

from torch import nn

from hf_reparam.errors import TargetError
from hf_reparam.layers.dense import dense_type
from hf_reparam.layers.factored import Factored
from hf_reparam.model.checks import check_no_adapters


def lora_targets(model: nn.Module, targets: str | Iterable[str]) -> str | list[str]:
    """`target_modules` of a `LoraConfig` for the dense model -> those for the converted one.

    PEFT adapts plain layers, and a low-rank layer is two of them. LoRA goes to both, `down` and `up`: with `up` alone
    the layer would see no more of its input than `down` lets through. Layers that stayed dense are adapted as ever.

    Args:
        model: a converted model, before it gets adapters.
        targets: as PEFT reads them: names of layers or ends of names, or a string as a regular expression for whole
            names. "all-linear" means the same layers in both models, and is returned as it is.

    Returns:
        Sorted ends of names: "query" becomes "query.down" and "query.up". Where some layers of a name stayed dense and
        others did not, the dense ones go by their whole names, to which PEFT does not apply `layers_to_transform`.

    Raises:
        TargetError: a target is no regular expression, or means no layer, or one whose factors cannot be adapted
            (embeddings and experts of low rank), or the model has adapters.

    Cost: reads names only. An adapter of rank r holds r (in + out) parameters for a dense layer, and r (in + out + 2k)
    for a pair of rank k.

    Source: LoRA, arXiv 2106.09685.

    >>> from hf_reparam import convert
    >>> attention = nn.ModuleDict({"query": nn.Linear(32, 32), "value": nn.Linear(32, 32)})
    >>> lora_targets(convert(attention, rank={"query": 8}), ["query", "value"])
    ['query.down', 'query.up', 'value']
    """
    if targets == "all-linear":
        return "all-linear"
    check_no_adapters(model)
    modules = dict(model.named_modules())
    ends: dict[str, str] = {}  # whole name of a layer to adapt -> the end of it that says so
    for target in [targets] if isinstance(targets, str) else targets:
        pattern = target if isinstance(targets, str) else rf"(.*\.)?{re.escape(target)}"
        try:
            meant = [name for name in modules if re.fullmatch(pattern, name)]
        except re.error as error:
            raise TargetError(f"lora_targets: {target!r} is no regular expression: {error}") from None
        if not meant:
            raise TargetError(f"lora_targets: no layer of {type(model).__name__} is named {target!r}")
        for name in meant:
            end = name if isinstance(targets, str) else target
            ends |= {name + part: end + part for part in _adaptable(name, modules[name])}

    def means_these_alone(end: str) -> bool:
        return all(name in ends for name in modules if f".{name}".endswith(f".{end}"))

    return sorted({end if means_these_alone(end) else name for name, end in ends.items()})


def _adaptable(name: str, module: nn.Module) -> list[str]:
    """What to append to a layer's name for the plain layers in its place; an empty string for one that is itself."""
    if not isinstance(module, Factored) and not getattr(module, "of_one_layer", False):
        return [""]
    parts = [f".{path}" for path, part in module.named_modules() if dense_type(type(part)) is not None]
    if not parts:
        raise TargetError(
            f"{name} is a {type(module).__name__}, whose factors are no layers that PEFT can adapt: leave it out, or "
            "convert without it"
        )
    return parts
