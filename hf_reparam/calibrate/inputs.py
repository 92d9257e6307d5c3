"""What a model's `forward` takes: names, positions, padding."""

import inspect
import math
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import TransformersKwargs

from hf_reparam.model.host import embeddings_of

_FILL_MASKS = ("ForMaskedLM", "ForPreTraining", "WithLMHeadModel")  # how names of classes end


@dataclass(frozen=True)
class Names:
    """Names of inputs.

    Args:
        known: what `forward` names itself, or a Transformers model inside of a wrapper that passes everything on.
        others: whether `forward` also takes any other (`**kwargs`).
    """

    known: frozenset[str]
    others: bool


def forward_names(model: nn.Module) -> Names:
    """The inputs of a model; of a Transformers model only those that it names, although nearly all take `**kwargs`."""
    known, rest = _parameters(model)
    inside = host(model)
    if rest is None or inside is None:
        return Names(known, rest is not None)
    if inside is not model:
        return Names(known | _parameters(inside)[0], True)
    return Names(known | TransformersKwargs.__annotations__.keys(), rest.annotation is inspect.Parameter.empty)


def _parameters(model: nn.Module) -> tuple[frozenset[str], inspect.Parameter | None]:
    """Names of parameters of `forward`, and its `**kwargs` if it has them."""
    parameters = inspect.signature(model.forward).parameters.values()
    rest = [p for p in parameters if p.kind is p.VAR_KEYWORD]
    return frozenset(p.name for p in parameters if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)), (*rest, None)[0]


def host(model: nn.Module) -> PreTrainedModel | None:
    """The Transformers model that gets the inputs: the model itself, or the first one inside of it."""
    return next((module for module in model.modules() if isinstance(module, PreTrainedModel)), None)


def with_names(model: nn.Module) -> dict[str, bool]:
    """What to call a model with so that it names its outputs, where its configuration says that it gives a tuple."""
    tuples = isinstance(model, PreTrainedModel) and not getattr(model.config, "return_dict", True)
    return {"return_dict": True} if tuples else {}


def without_cache(model: nn.Module) -> dict[str, bool]:
    """What to call a model with so that it names its outputs and keeps no keys, values or states of the past."""
    return with_names(model) | ({"use_cache": False} if "use_cache" in forward_names(model).known else {})


@contextmanager
def same_draws(seed: int = 0) -> Iterator[None]:
    """Have a model that draws numbers in its forward pass, such as masks, draw the same ones in every block, and in
    every call of what this decorates; what is drawn elsewhere stays as it would be.

    `torch.manual_seed` would also seed devices that are not in use yet, where nothing could undo it.
    """
    kind = torch.accelerator.current_accelerator()
    module: Any = None if kind is None else torch.get_device_module(kind)
    used = module is not None and getattr(module, "is_initialized", module.is_available)()
    devices = range(module.device_count() if used else 0)
    with torch.random.fork_rng(devices, device_type="cuda" if kind is None else kind.type):
        torch.default_generator.manual_seed(seed)
        if devices:
            getattr(module, "manual_seed_all", module.manual_seed)(seed)
        yield


def vocabulary(model: nn.Module) -> float:
    """How many token ids a model knows; infinite if nothing says it."""
    inside = host(model)
    words = None if inside is None else embeddings_of(inside)[0]
    return float(getattr(words, "num_embeddings", math.inf))


def positions(model: nn.Module) -> float:
    """How many tokens of text fit into one row: the size of its table of positions; infinite if nothing says it."""
    inside = host(model)
    if inside is None:
        return math.inf
    config: Any = getattr(inside.config, "encoder", None)
    if not isinstance(config, PreTrainedConfig):
        config = inside.config
        with suppress(ValueError):  # several configurations of texts
            config = config.get_text_config()
    sizes = [getattr(config, name, None) for name in ("max_position_embeddings", "max_encoder_position_embeddings")]
    size = min((s for s in sizes if isinstance(s, int) and s > 0), default=None)
    return math.inf if size is None else size - _first_position(inside, size)


def _first_position(model: PreTrainedModel, size: int) -> int:
    """Where a table of positions starts: RoBERTa and its kin count on from the padding token's id."""
    words = embeddings_of(model)[0]
    for module in model.modules():
        if module is not words and getattr(module, "num_embeddings", None) == size:
            padding = getattr(module, "padding_idx", None)
            if padding is not None and padding + 1 < size:
                return int(padding) + 1
    return 0


def padding_id(model: nn.Module, tokenizer: Any) -> int:
    """The id that fills rows up: the model's, the tokenizer's, or any, because padding is masked."""
    own = getattr(getattr(host(model), "config", None), "pad_token_id", None)
    for known in (own, tokenizer.pad_token_id, tokenizer.eos_token_id):
        if isinstance(known, int) and known >= 0:
            return known
    return 0


def predicts_tokens(model: nn.Module) -> bool:
    """Whether a model's labels are tokens: it has output embeddings."""
    inside = host(model)
    return inside is not None and embeddings_of(inside)[1] is not None


def fills_masks(model: nn.Module) -> bool:
    """Whether a model is a masked language model, not inside of anything else."""
    if not isinstance(model, PreTrainedModel) or not predicts_tokens(model):
        return False
    named = any(kind.__name__.endswith(_FILL_MASKS) for kind in type(model).__mro__)
    return named and not getattr(model.config, "is_encoder_decoder", False)


def batches_of_one(model: nn.Module) -> bool:
    """Whether a model may refuse batches of several rows: heads that look for the last token need a padding id."""
    inside = host(model)
    if inside is None or getattr(inside.config, "pad_token_id", None) is not None or predicts_tokens(model):
        return False
    return {"input_ids", "labels"} <= _parameters(inside)[0]
