"""More examples, made of those that are given: the dense model says what they predict, so they need no labels."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from hf_reparam.calibrate.inputs import host, same_draws
from hf_reparam.calibrate.objective import batch_masks
from hf_reparam.calibrate.padding import Padding, Part, decodes
from hf_reparam.layers.progress import each
from hf_reparam.structures.hosts import embeddings_of

_CANNOT_WRITE = (ValueError, RuntimeError, TypeError, LookupError, AttributeError)  # from ids alone
_OF_TOKENS = {"input_ids", "attention_mask", "token_type_ids", "position_ids"}
_GIVEN = 16  # of so many tokens that a text has, one is given
_REPLACED = 0.4  # of the tokens in texts that are put together
_NEAREST = 10  # other tokens, one of which takes the place
_AT_ONCE = 256  # tokens whose nearest are looked for


def synthetic_parts(model: nn.Module, parts: Sequence[Part], times: int) -> Callable[[int], list[Part]]:
    """Epoch -> so many new texts for each that is given, of the same lengths; none where a batch is not of ids alone.

    A language model writes them, once: a few tokens from anywhere in a text are given, what follows is drawn from its
    predictions. For other models, and those that cannot write from ids alone, they are put together, anew for each
    epoch: of the beginning of one text and the end of another of its batch; and 40 % of the tokens, but for the first
    and the last, give way to one of the ten whose embeddings are nearest: a few hundred texts have few of a language's
    words.

    Args:
        model: the dense model, in evaluation mode.
        parts: batches without labels, on the model's device.

    Cost: for a language model, a token is generated for each token of the texts; for others a product of the
    embeddings of the tokens that the texts have with all embeddings.

    Source: texts from the model's own distribution, LLM-QAT, arXiv 2305.17888.
    """
    texts = [part for part in parts if _is_text(part.batch)]
    if not texts or not times:
        return lambda epoch: []
    if made := _written(model, texts * times):
        return lambda epoch: made
    nearest = _nearest(model, texts)

    @lru_cache(maxsize=1)
    def put_together(epoch: int) -> list[Part]:
        chance = torch.Generator().manual_seed(epoch)
        return _parts(model, [_reworded(_crossed(part.batch, chance), nearest, chance) for part in texts * times])

    return put_together


def _parts(model: nn.Module, batches: Sequence[dict[str, Any]]) -> list[Part]:
    return list(Padding(model, {}).parts([(batch, batch_masks(batch)) for batch in batches]))


def _written(model: nn.Module, texts: Sequence[Part]) -> list[Part]:
    """Texts that a language model writes, one for each; none if there is one that it cannot go on from."""
    chance, made = torch.Generator().manual_seed(0), list[dict[str, Any]]()
    with same_draws():
        for part in each(texts, "making texts", "batch"):
            batch = _continued(model, part.batch, chance)
            if not batch:
                return []
            made.append(batch)
    return _parts(model, made)


def _is_text(batch: Mapping[str, Any]) -> bool:
    """Whether a batch is of token ids, (texts, length), and of nothing that they do not tell by themselves."""
    ids = batch.get("input_ids")
    if not isinstance(ids, Tensor) or ids.dim() != 2 or ids.shape[1] < 2 or not batch.keys() <= _OF_TOKENS:
        return False
    return all(isinstance(value, Tensor) and value.shape == ids.shape for value in batch.values())


def _real(batch: Mapping[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    """Which positions are no padding, (texts, length), and where each text begins and ends, (texts,)."""
    ids = batch["input_ids"]
    real = next(iter(batch_masks(batch)), torch.ones_like(ids, dtype=torch.bool))
    start = real.int().argmax(1)
    return real, start, ids.shape[1] - real.flip(1).int().argmax(1)


def _continued(model: Any, batch: Mapping[str, Any], chance: torch.Generator) -> dict[str, Any]:
    """Texts that a language model writes on from a few tokens of others, after the first one where all have the same:
    as a rule it says that a text begins. Nothing from a model that cannot."""
    if not getattr(model, "can_generate", bool)() or decodes(model):
        return {}
    ids, (_, start, end) = batch["input_ids"], _real(batch)
    given = int(max(1, min(ids.shape[1] // _GIVEN, (end - start).min())))
    drawn = torch.rand(len(ids), generator=chance).to(ids.device)
    place = start + (drawn * (end - start - given + 1)).long()
    beginning = ids.gather(1, place[:, None] + torch.arange(given, device=ids.device))
    first = ids.gather(1, start[:, None])
    if bool((first == first[0]).all()):
        beginning[:, :1] = first
    stops = model.generation_config.eos_token_id
    stops = torch.tensor([] if stops is None else stops, device=ids.device).reshape(-1)
    drawing = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "repetition_penalty": 1.0}
    padding = int(stops[0]) if len(stops) else 0
    plain = {"num_beams": 1, "pad_token_id": padding, "return_dict_in_generate": False}
    asked = {"max_new_tokens": ids.shape[1] - given, **plain, **drawing}
    try:
        written = model.generate(beginning, attention_mask=torch.ones_like(beginning), **asked)
    except _CANNOT_WRITE:
        return {}
    stopped = torch.isin(written, stops)
    stopped[:, :given] = False
    real = stopped.cumsum(1) - stopped.long() == 0
    return {"input_ids": written} | ({} if bool(real.all()) else {"attention_mask": real.long()})


def _crossed(batch: Mapping[str, Any], chance: torch.Generator) -> dict[str, Any]:
    """Texts of which the beginning is from one and the rest from another, each at its place."""
    real, start, end = _real(batch)
    count, length = real.shape
    other = torch.randperm(count, generator=chance).to(real.device)
    first, last = torch.maximum(start, start[other]), torch.minimum(end, end[other])
    drawn = torch.rand(count, generator=chance).to(real.device)
    cut = first + 1 + (drawn * (last - first - 1)).long()  # each gives a token at least
    cut = torch.where(first + 1 < last, cut, length)
    mine = torch.arange(length, device=real.device) < cut[:, None]
    return {key: torch.where(mine, value, value[other]) for key, value in batch.items()}


def _nearest(model: Any, parts: Sequence[Part]) -> Tensor:
    """(vocabulary, 10) int64: for each token that texts have, others, by the cosine of their embeddings to its own.

    A token that every text has, as a rule one that structures it, stays and takes no other's place. (0, 0) where the
    model shows no embeddings of all tokens, or few.
    """
    inside = host(model)
    weight = None if inside is None else getattr(embeddings_of(inside)[0], "weight", None)
    texts = [text for part in parts for text in part.batch["input_ids"].tolist()]
    counts = Counter(token for text in texts for token in set(text))
    if not isinstance(weight, Tensor) or weight.is_meta or len(weight) <= max(2 * _NEAREST, *counts):
        return torch.empty(0, 0)
    everywhere = [token for token, count in counts.items() if count == len(texts)]
    others = torch.tensor([token for token, count in counts.items() if count < len(texts)], dtype=torch.int64)
    unit = nn.functional.normalize(weight.detach().float(), dim=-1)
    found = torch.arange(len(unit))[:, None].repeat(1, _NEAREST)
    for tokens in others.split(_AT_ONCE):
        alike = unit[tokens.to(unit.device)] @ unit.T
        alike[:, everywhere] = -1
        found[tokens] = alike.topk(_NEAREST + 1).indices[:, 1:].cpu()
    return found


def _reworded(batch: Mapping[str, Any], nearest: Tensor, chance: torch.Generator) -> dict[str, Any]:
    """Texts with some of their tokens replaced by one of the choices for each, (vocabulary, choices)."""
    ids, (_, start, end) = batch["input_ids"], _real(batch)
    if not nearest.shape[1]:
        return dict(batch)
    place = torch.arange(ids.shape[1], device=ids.device)
    inner = (place > start[:, None]) & (place < end[:, None] - 1)
    hit = inner & (torch.rand(ids.shape, generator=chance) < _REPLACED).to(ids.device)
    which = torch.randint(nearest.shape[1], ids.shape, generator=chance)
    return {**batch, "input_ids": torch.where(hit, nearest[ids.cpu(), which].to(ids.device), ids)}
