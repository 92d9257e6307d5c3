"""What a model says of itself: which layers have to stay dense, whether it is quantized, how large it is."""

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar, cast

from torch import nn
from transformers import PreTrainedModel

from hf_reparam.errors import WeightError
from hf_reparam.nn.attention import split_attention

__all__ = ["check_unquantized", "count_parameters", "protected_layers", "split_projections", "with_projections"]

F = TypeVar("F", bound=Callable[..., Any])


def protected_layers(model: nn.Module) -> dict[str, str]:
    """Layers that stay dense: the output embeddings, and whatever a model declares as tied; none of a plain module."""
    reasons: dict[str, str] = {}
    if not isinstance(model, PreTrainedModel):
        return reasons
    output = model.get_output_embeddings()
    for name, module in model.named_modules(remove_duplicate=False):
        if output is not None and module is output:
            reasons[name] = "output embeddings"
    for target, source in (getattr(model, "all_tied_weights_keys", None) or {}).items():
        for key in (target, source):
            reasons.setdefault(key.rpartition(".")[0], "tied: another module holds the same parameter")
    return reasons


def check_unquantized(model: nn.Module) -> None:
    """Raise WeightError for a `PreTrainedModel` that a quantizer has loaded."""
    if not isinstance(model, PreTrainedModel):
        return
    if getattr(model, "is_quantized", False) or getattr(model.config, "quantization_config", None):
        raise WeightError(
            f"{type(model).__name__} is quantized: convert the full-precision model, then quantize the result"
        )


def count_parameters(model: nn.Module) -> int:
    """Numbers in a model's parameters, shared ones counted once."""
    tied = getattr(model, "all_tied_weights_keys", None) or {}  # on the meta device sharing cannot be seen
    return sum(p.numel() for name, p in model.named_parameters() if not (p.is_meta and name in tied))


def split_projections(model: object) -> AbstractContextManager[None]:
    """The projections of every `nn.MultiheadAttention` as layers, while the block lasts; see `split_attention`.

    Not in a `PreTrainedModel`, whose class would build another skeleton when it is loaded.
    """
    plain = isinstance(model, nn.Module) and not isinstance(model, PreTrainedModel)
    return split_attention(model) if plain else nullcontext()  # type: ignore[arg-type]  # a module


def with_projections(function: F) -> F:
    """A function of a model, its first argument, that sees the projections of attentions as layers."""

    @functools.wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        with split_projections(args[0] if args else kwargs.get("model")):
            return function(*args, **kwargs)

    return cast(F, wrapped)
