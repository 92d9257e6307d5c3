"""Inputs for any model: made by the names of what `forward` takes, in every shape that is usual for a name."""

import inspect
import itertools
import re
import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from census.tiny import VOCAB

__all__ = ["NoInputsError", "find_inputs", "run"]

SEED = 0
BATCH, LENGTH, SAMPLES, FRAMES, VIDEO = 2, 8, 4000, 64, 4
PATIENCE = 10
"""Seconds of processor time for a model whose inputs are sought."""

_TOKENS = r"tokens: (\d+), features:? (\d+)"
_MODALITIES = ("pixel_values", "input_features", "input_values")

Inputs = dict[str, Any]


class NoInputsError(Exception):
    """Why no inputs of a model were found."""


@torch.no_grad()
def run(model: PreTrainedModel, inputs: Inputs) -> list[Tensor]:
    """All floating-point outputs, with random choices from one seed."""
    torch.manual_seed(SEED)
    outputs = list(_floating(model(**inputs)))
    if not outputs:
        raise NoInputsError("the outputs have no numbers to compare")
    return outputs


def _floating(output: Any) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        if output.is_floating_point():
            yield output
    elif isinstance(output, dict):
        for value in output.values():
            yield from _floating(value)
    elif isinstance(output, (list, tuple)):
        for value in output:
            yield from _floating(value)


def find_inputs(model: PreTrainedModel) -> Inputs:
    """The first inputs that the model takes, those with a second modality before those of text alone.

    Raises:
        NoInputsError: it takes none of those that are tried; with what it said to the first.
    """
    reasons: list[str] = []
    end = time.process_time() + PATIENCE
    for inputs in itertools.takewhile(lambda _: time.process_time() < end, _candidates(model)):
        try:
            outputs = _run_with_tokens(model, inputs)
        except Exception as error:  # whatever inputs of a wrong shape lead to
            reasons.append(f"{type(error).__name__}: {' '.join(str(error).split())[:120]}")
            continue
        if all(torch.isfinite(output).all() for output in outputs):
            return inputs
        reasons.append("the outputs are not finite")
    raise NoInputsError(reasons[0] if reasons else f"{_unknown(model)} cannot be made by their names")


def _run_with_tokens(model: PreTrainedModel, inputs: Inputs) -> list[Tensor]:
    """Run; where a text has to hold one placeholder for each feature of an image, put in as many as the error says."""
    for _ in range(3):
        try:
            return run(model, inputs)
        except (ValueError, RuntimeError) as error:
            found = re.search(_TOKENS, str(error))
            if found is None or not _with_placeholders(model.config, inputs, int(found[2]), str(error)):
                raise
    return run(model, inputs)


def _with_placeholders(config: PreTrainedConfig, inputs: Inputs, count: int, said: str) -> bool:
    kinds = ("audio",) if "udio" in said.partition("tokens")[0] else ("image", "video")
    tokens = [_setting(config, f"{kind}_token_{end}") for kind in kinds for end in ("id", "index")]
    token = next((t for t in tokens if isinstance(t, int)), None)
    if token is None or "input_ids" not in inputs or count % BATCH or count > 4096:
        return False
    text = inputs["input_ids"][:, :LENGTH].clone()
    inputs["input_ids"] = torch.cat([text, torch.full((BATCH, count // BATCH), token)], dim=1)
    return True


def _candidates(model: PreTrainedModel) -> Iterator[Inputs]:
    known = inspect.signature(model.forward).parameters
    needed = list(_required(model))
    main = model.main_input_name
    needed += [name for name in ([main] if isinstance(main, str) else main) if name in known and name not in needed]
    if "decoder_input_ids" in known and "decoder_input_ids" not in needed:
        needed.append("decoder_input_ids")
    needed += [name for name in ("bbox", "use_cache") if name in known and name not in needed]
    more = [name for name in _MODALITIES if name in known and name not in needed]
    for extra in ([more] if len(more) > 1 else []) + [[name] for name in more] + [[]]:
        names = [*needed, *extra]
        if "pixel_values" in names and "image_grid_thw" in known:
            names.append("image_grid_thw")
        choices = [_choices(name, model.config) for name in names]
        for values in itertools.product(*choices):
            torch.manual_seed(SEED)
            yield {name: make() for name, make in zip(names, values, strict=True)}


def _required(model: PreTrainedModel) -> Iterator[str]:
    for name, parameter in inspect.signature(model.forward).parameters.items():
        if parameter.default is parameter.empty and parameter.kind not in (
            parameter.VAR_KEYWORD,
            parameter.VAR_POSITIONAL,
        ):
            yield name


def _unknown(model: PreTrainedModel) -> str:
    return ", ".join(name for name in _required(model) if not _choices(name, model.config)) or model.main_input_name


def _setting(config: Any, *names: str) -> Any:
    """The first of these settings that the configuration or one of its parts has."""
    configs = [config]
    for one in configs:
        configs += [v for v in vars(one).values() if isinstance(v, PreTrainedConfig) and len(configs) < 30]
    for name in names:
        for one in configs:
            value = getattr(one, name, None)
            if value is not None:
                return value
    return None


def _choices(name: str, config: PreTrainedConfig) -> list[Any]:
    """Makers of what may be meant by a name, the most usual first."""
    size = _setting(config, "image_size", "img_size", "input_size") or 64
    height, width = (size, size) if isinstance(size, int) else (list(size) * 2)[:2]
    channels = _setting(config, "num_channels", "in_channels", "in_chans")
    channels = channels if isinstance(channels, int) else 3
    mels = _setting(config, "num_mel_bins", "feature_size", "input_feat_per_channel", "n_mels", "input_dim", "mel_bins")
    mels = mels if isinstance(mels, int) else 80
    frames = 2 * (_setting(config, "max_source_positions") or FRAMES // 2)
    rows = _setting(config, "max_length", "context_length") or 32
    hidden = _setting(config, "hidden_size", "d_model", "embed_dim") or 64
    hidden = hidden if isinstance(hidden, int) else hidden[-1]  # of towers that widen from stage to stage
    patch = _setting(config, "patch_size") or 16
    patch = patch if isinstance(patch, int) else patch[-1]
    pixels = channels * patch * patch
    steps = _setting(config, "temporal_patch_size") or 1
    grid = lambda: torch.tensor([[1, 4, 4]] * BATCH)  # noqa: E731
    numbers = lambda *shape: lambda: torch.randn(*shape)  # noqa: E731
    tokens = lambda *shape: lambda: torch.randint(3, 60, shape)  # noqa: E731
    images = [numbers(BATCH, channels, height, width), numbers(BATCH, _video(config), channels, height, width)]
    pairs = [numbers(BATCH, count, channels, height, width) for count in (2, 1)]
    patches = [numbers(BATCH * 16, pixels * steps), numbers(BATCH, 16, pixels), numbers(BATCH * 16, pixels)]
    features = [numbers(BATCH, mels, frames), numbers(BATCH, frames, mels), numbers(BATCH, rows, mels)]
    features += [numbers(BATCH, 1, frames, mels), numbers(BATCH, mels, FRAMES), numbers(BATCH, FRAMES, mels)]
    waves = [numbers(BATCH, SAMPLES), numbers(BATCH, 1, SAMPLES), *features[1:3]]
    waves += [numbers(BATCH, frames, mels), tokens(BATCH, LENGTH)]
    table = {
        "input_ids": [lambda: _text(config), tokens(BATCH, 3, LENGTH)],
        "decoder_input_ids": [tokens(BATCH, LENGTH), tokens(BATCH, LENGTH, channels)],
        "bbox": [lambda: torch.randint(0, 10, (BATCH, LENGTH, 4)).sort(-1).values, numbers(BATCH, LENGTH, 8)],
        "use_cache": [lambda: False],
        "qformer_input_ids": [tokens(BATCH, LENGTH)],
        "audio_input_ids": [tokens(BATCH, LENGTH)],
        "pixel_values": [*images, *pairs, *patches],
        "prompt_pixel_values": images[:1],
        "pixel_values_videos": [images[1]],
        "input_values": waves,
        "input_features": features,
        "hidden_states": [*patches, numbers(BATCH, LENGTH, hidden)],
        "inputs_embeds": [numbers(BATCH, LENGTH, hidden)],
        "query_embeds": [numbers(BATCH, LENGTH, hidden)],
        "grid_thw": [grid],
        "image_grid_thw": [grid],
        "attention_mask": [lambda: torch.ones(BATCH, LENGTH, dtype=torch.long)],
        "spectrogram": [numbers(BATCH, LENGTH, mels)],
        "flattened_patches": [lambda: torch.cat([torch.ones(BATCH, 16, 2), torch.randn(BATCH, 16, pixels)], dim=-1)],
        **_series(config, numbers),
    }
    return table.get(name, [])


def _text(config: PreTrainedConfig) -> Tensor:
    """Tokens with an end, which some classifiers look for."""
    ids, end = torch.randint(3, 60, (BATCH, LENGTH)), _setting(config, "eos_token_id")
    if isinstance(end, int) and 0 <= end < VOCAB:
        ids[:, -1] = end
    return ids


def _video(config: PreTrainedConfig) -> int:
    frames = _setting(config, "num_frames")
    return frames if isinstance(frames, int) else VIDEO


def _series(config: PreTrainedConfig, numbers: Any) -> dict[str, list[Any]]:
    """Of models for time series."""
    length = _setting(config, "context_length", "seq_length") or LENGTH
    past = length + max(_setting(config, "lags_sequence") or [0])
    columns = _setting(config, "num_input_channels", "num_time_features") or 1
    future = _setting(config, "prediction_length") or LENGTH
    times = _setting(config, "num_time_features") or 1
    return {
        "past_values": [numbers(BATCH, past), numbers(BATCH, length, columns)],
        "past_time_features": [numbers(BATCH, past, times)],
        "past_observed_mask": [lambda: torch.ones(BATCH, past), lambda: torch.ones(BATCH, length, columns)],
        "future_time_features": [numbers(BATCH, future, times)],
    }
