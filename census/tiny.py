"""Tiny models of any class: a class's own default configuration with its numbers made small, by their names.

There is no list of families. A number is known by the name of its field ("hidden_size", "num_heads"), lists keep their
ratios, parts of a composite are made small in turn. `census.exceptions` has what this does not get right.
"""

import dataclasses
import re
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from census.exceptions import CONFIGS

__all__ = ["CannotBuildError", "build", "smaller"]

SEED = 0
WIDTH, INNER, HEAD, HEADS, VOCAB, IMAGE, PATCH, POSITIONS = 64, 128, 16, 4, 128, 64, 16, 128
LIMIT = 40_000_000
"""Parameters of the largest model that is tried."""


@dataclass(frozen=True)
class Recipe:
    """How numbers are made small.

    Args:
        layers: how many there may be at most.
        narrow: also make widths small; otherwise layers, vocabulary and positions alone.
        filled: also give a number to what the default leaves open, and some families then miss.
    """

    layers: int = 2
    narrow: bool = True
    filled: bool = False


RECIPES = (
    Recipe(),
    Recipe(layers=4),  # for patterns such as "every fourth layer"
    Recipe(filled=True),
    Recipe(narrow=False),
    Recipe(layers=4, narrow=False),
)
"""In the order in which they are tried."""

Number = Any  # int, float or a list of such


class CannotBuildError(Exception):
    """Why no tiny model of a class can be made."""


def build(kind: type[PreTrainedModel]) -> PreTrainedModel:
    """A tiny model of the class, of random weights, in evaluation mode.

    Raises:
        CannotBuildError: its constructor takes none of the configurations that are tried, or the model is too large.
    """
    reasons = []
    for config_kind in _configurations(kind):
        for recipe in RECIPES:
            try:
                model = _construct(kind, smaller(config_kind, recipe), known_size=not recipe.narrow)
            except CannotBuildError as error:
                reasons.append(str(error))
            except Exception as error:  # whatever a constructor stumbles over
                reasons.append(f"{type(error).__name__}: {_line(error)}")
            else:
                return _drawn(model).eval()
    raise CannotBuildError(reasons[0])


def _configurations(kind: type[PreTrainedModel]) -> list[type[PreTrainedConfig]]:
    """What the constructor says that it takes, unless the class is registered with a kind of it; then the latter."""
    try:
        hints = typing.get_type_hints(kind.__init__)
    except (NameError, TypeError):
        hints = {}
    wanted = hints.get("config")
    said = [c for c in (wanted, *typing.get_args(wanted)) if isinstance(c, type) and issubclass(c, PreTrainedConfig)]
    registered: Any = kind.config_class
    if any(issubclass(registered, c) for c in said):
        said = []
    return list(dict.fromkeys([*said, registered]))


def _construct(kind: type[PreTrainedModel], config: PreTrainedConfig, *, known_size: bool) -> PreTrainedModel:
    try:
        with torch.device("meta"):
            size = sum(p.numel() for p in kind(config).parameters())
    except Exception:  # a constructor that computes with its weights
        if known_size:
            raise
        size = 0
    if size > LIMIT:
        raise CannotBuildError(f"{size / 1e6:.0f} million parameters after its numbers were made small")
    torch.manual_seed(SEED)
    return kind(config)


@torch.no_grad()
def _drawn(model: PreTrainedModel) -> PreTrainedModel:
    """Every parameter moved away from where it starts, so that what is lost on the way shows."""
    generator = torch.Generator().manual_seed(SEED)
    for parameter in model.parameters():
        if parameter.is_floating_point():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float32)
            parameter += (0.15 if parameter.ndim > 1 else 0.05) * noise.to(parameter.dtype)
    return model


def smaller(kind: type[PreTrainedConfig], recipe: Recipe = RECIPES[0]) -> PreTrainedConfig:
    """The default configuration of a class, with small numbers."""
    exceptions = CONFIGS.get(kind.model_type, {})
    parts = {name: part() for name, part in exceptions.get("parts", {}).items()}
    return _smaller(kind(**parts), recipe, exceptions)


def _smaller(config: PreTrainedConfig, recipe: Recipe, exceptions: Mapping[str, Any]) -> PreTrainedConfig:
    own = {f.name: f for f in dataclasses.fields(config)}
    common = {f.name for f in dataclasses.fields(PreTrainedConfig)}
    given: dict[str, Any] = {}
    for name in {**own, **dict.fromkeys(config.sub_configs)}:
        value = _value(config, name, own)
        if isinstance(value, PreTrainedConfig):
            inner = {**CONFIGS.get(value.model_type, {}), **exceptions.get(name, {})}
            given[name] = _smaller(value, recipe, inner)
        elif name == "rope_parameters" and isinstance(value, dict):
            given |= _rope(value) if recipe.narrow else {}
        elif name in own and (name not in common or name.endswith("_token_id")):
            new = number(name, value if _default_of(own[name]) is not None else None, recipe)
            given |= {} if new is None else {name: new}
    if isinstance(getattr(config, "depths", None), (list, tuple)) and getattr(config, "out_features", None):
        given["out_features"] = list(config.out_features)  # of the same stages
    given |= {name: value for name, value in exceptions.items() if not _is_part(given.get(name))}
    given.pop("parts", None)
    return type(config)(**given)


def _value(config: PreTrainedConfig, name: str, own: Mapping[str, Any]) -> Any:
    try:
        return getattr(config, name, None)
    except Exception:  # of Transformers' own kind: it differs from layer to layer
        return _default_of(own[name])


def _is_part(value: object) -> bool:
    return isinstance(value, PreTrainedConfig)


def _default_of(field: Any) -> Any:
    """None for a number that the configuration works out from others."""
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def _rope(value: dict[str, Any]) -> dict[str, Any]:
    """A base where the default has none; and sections of a rotary embedding share out half a head."""
    new = {name: 10000.0 if name == "rope_theta" and entry is None else entry for name, entry in value.items()}
    if sections := value.get("mrope_section"):
        half = int(HEAD * value.get("partial_rotary_factor", 1.0)) // 2
        others = [half * part // sum(sections) for part in sections[1:]]
        new["mrope_section"] = [half - sum(others), *others]
    return {} if new == value else {"rope_parameters": new}


def _at_most(top: int) -> Callable[[Number], Number]:
    return lambda value: min(value, top) if isinstance(value, int) else [min(v, top) for v in value]


def _width(top: int) -> Callable[[Number], Number]:
    """Of a list the largest becomes `top`, and the others keep their ratios to it."""

    def change(value: Number) -> Number:
        if isinstance(value, int):
            return min(value, top)
        step = max(max(value) / top, 1)
        return [max(int(v / step), min(v, 4)) for v in value]

    return change


def _heads(value: Number) -> Number:
    return min(value, HEADS) if isinstance(value, int) else [max(v // min(value), 1) for v in value]


def _patch(value: Number) -> Number:
    change = lambda v: PATCH if v > 8 else v  # noqa: E731
    return change(value) if isinstance(value, int) else [change(v) for v in value]


def _keep(value: Number) -> Number:
    return value


_RULES: tuple[tuple[str, Callable[[Number], Number]], ...] = (
    (r"kernel|stride|dilation|ratio|factor|rates?$|scale", _keep),
    (r"codebook_size$|vocab|codevectors_per_group|num_embeddings$", _at_most(VOCAB)),
    (r"key_value_heads|kv_heads|num_key_heads", _at_most(2)),
    (r"heads$|n_head$|num_heads", _heads),
    (r"head_dim$|rotary_dim|d_kv|kv_channels|head_size|d_head$", _at_most(HEAD)),
    (r"index_topk", _at_most(16)),
    (r"experts_per_tok|experts_per_token|top_?k$|experts_top_k|moe_k", _at_most(2)),
    (r"n_group|topk_group", _at_most(1)),
    (r"experts?$|num_local_experts|experts_num", _at_most(4)),
    (r"first_k_dense", _at_most(1)),
    (r"intermediate|ffn|feedforward|d_ff|mlp_dim|inner_dim|d_inner|mlp_hidden", _at_most(INNER)),
    (r"image_size|img_size|pretrain_size", _at_most(IMAGE)),
    (r"patch_size$", _patch),
    (r"sliding_window|attention_window|local_window", _at_most(16)),
    (r"window_size", _at_most(4)),
    (r"position|max_seq|max_length|context_length|seq_len|seq_length|max_target|max_source", _at_most(POSITIONS)),
    (r"lora_rank|time_step_rank|_rank$", _at_most(16)),
    (r"filters", _at_most(8)),
    (r"num_quer(y|ies)|query_tokens|proposals|num_latents", _at_most(10)),
    (r"num_frames|frames$", _at_most(4)),
    (
        r"hidden_dim|hidden_size|d_model|embed|dims?$|width|channels?$|channel_sizes|d_latents|groups$|n_embd|hidden$|size_out",
        _width(WIDTH),
    ),
)


_FILLED = {
    "decoder_hidden_size": WIDTH,
    "head_dim": HEAD,
    "moe_intermediate_size": INNER,
    "n_routed_experts": 4,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "num_key_value_heads": 2,
    "top_k_experts": 2,
    "vocab_size": VOCAB,
}


def number(name: str, value: Any, recipe: Recipe) -> Any:
    """What becomes of a field; None to leave it at its default."""
    if name.endswith(("_token_id", "_token_index", "_token_ids")):
        return _token(name, value)
    if value is None and recipe.filled:
        return _FILLED.get(name)
    plain = isinstance(value, int) and not isinstance(value, bool)
    listed = isinstance(value, (list, tuple)) and value and all(type(v) is int for v in value)
    if not plain and not listed:
        return None
    if re.search(r"layers?$|depths?$|blocks$", name):
        if plain:
            return min(value, recipe.layers)
        return [1] * len(value) if recipe.narrow and re.search(r"depth|num", name) else None
    if not recipe.narrow and not re.search(r"vocab|position|max_seq|experts?$", name):
        return None
    new = next((rule for pattern, rule in _RULES if re.search(pattern, name)), _keep)(value)
    return list(new) if listed else new  # a list, as read from a file: some classes add lists to it


def _token(name: str, value: Any) -> Any:
    """Special tokens inside the small vocabulary, those of different names apart."""
    if name == "pad_token_id":
        return 0 if value is None or not 0 <= value < VOCAB else value
    if value is None or (isinstance(value, int) and value < VOCAB // 2):
        return value
    if not isinstance(value, int):
        return [min(v, VOCAB - 1) for v in value]
    return VOCAB // 2 + sum(map(ord, name)) % (VOCAB // 2)


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:160]
