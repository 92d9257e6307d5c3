"""Whisper from a folder in the format of CTranslate2 (github.com/OpenNMT/CTranslate2, binary version 6, MIT)."""

import json
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from transformers import GenerationConfig, WhisperConfig, WhisperForConditionalGeneration

__all__ = ["read_variables", "whisper_tiny_en"]

DTYPES = ("<f4", "<i1", "<i2", "<i4", "<f2")  # by the number that the file gives
SELF_ATTENTION = (("q_proj", "k_proj", "v_proj"), ("out_proj",))  # what each linear layer of the file holds
CROSS_ATTENTION = (("q_proj",), ("k_proj", "v_proj"), ("out_proj",))
LAYERS, WIDTH = 4, 384  # of tiny.en, in the encoder and in the decoder


def read_variables(path: Path) -> dict[str, torch.Tensor]:
    """Variables of a model.bin by name, aliases included; floating-point ones in float32.

    Raises:
        ValueError: another version of the format, a number type that is not read here, or bytes left over.
    """
    with path.open("rb") as file:
        version = _number(file, "I")
        if version != 6:
            raise ValueError(f"{path} has binary version {version}, not 6")
        _text(file), _number(file, "I")  # name and revision of the specification
        found: dict[str, torch.Tensor] = {}
        for _ in range(_number(file, "I")):
            name = _text(file)
            shape = [_number(file, "I") for _ in range(_number(file, "B"))]
            dtype, size = _number(file, "B"), _number(file, "I")
            if dtype >= len(DTYPES):
                raise ValueError(f"{name} in {path} has number type {dtype}, one of 0 to {len(DTYPES) - 1} is read")
            values = np.frombuffer(file.read(size), DTYPES[dtype]).reshape(shape)
            found[name] = torch.from_numpy(values.astype(np.float32 if values.dtype.kind == "f" else values.dtype))
        for _ in range(_number(file, "I")):
            alias, name = _text(file), _text(file)
            found[alias] = found[name]
        if file.read(1):
            raise ValueError(f"{path} is longer than its variables")
    return found


def _number(file: BinaryIO, kind: str) -> int:
    return int(struct.unpack(f"<{kind}", file.read(struct.calcsize(f"<{kind}")))[0])


def _text(file: BinaryIO) -> str:
    """A text with its length, the zero byte at its end counted."""
    return file.read(_number(file, "H"))[:-1].decode()


def whisper_tiny_en(folder: Path) -> WhisperForConditionalGeneration:
    """The model of a folder with model.bin, in float32 and evaluation mode, with a generation config for plain text.

    Raises:
        ValueError: not a file of this format; a projection of keys has a bias, which Transformers' Whisper has not.
    """
    special = {"bos_token_id": 50256, "eos_token_id": 50256, "pad_token_id": 50256, "decoder_start_token_id": 50257}
    sides = {"encoder_layers": LAYERS, "encoder_attention_heads": 6, "encoder_ffn_dim": 4 * WIDTH}
    sides |= {name.replace("encoder", "decoder"): value for name, value in sides.items()}
    model = WhisperForConditionalGeneration(WhisperConfig(vocab_size=51864, d_model=WIDTH, **sides, **special))
    weights = _weights(read_variables(folder / "model.bin"))
    model.load_state_dict(weights | {"proj_out.weight": weights["model.decoder.embed_tokens.weight"]})
    settings = json.loads((folder / "config.json").read_text())
    model.generation_config = GenerationConfig(
        **special,
        max_length=448,
        suppress_tokens=settings["suppress_ids"],
        begin_suppress_tokens=settings["suppress_ids_begin"],
        is_multilingual=False,
        no_timestamps_token_id=50362,
        return_timestamps=False,
    )
    return model.eval()


def _weights(variables: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The variables under the names of `WhisperForConditionalGeneration`, joined projections taken apart."""
    found = {"model.decoder.embed_tokens.weight": variables["decoder/embeddings/weight"]}

    def move(new: str, old: str, weight: str = "weight", bias: str = "bias") -> None:
        found[f"{new}.weight"], found[f"{new}.bias"] = variables[f"{old}/{weight}"], variables[f"{old}/{bias}"]

    def move_norm(new: str, old: str) -> None:
        move(new, f"{old}/layer_norm", "gamma", "beta")

    def move_attention(new: str, old: str, joined: Iterable[str]) -> None:
        for number, names in enumerate(joined):
            for kind in ("weight", "bias"):
                parts = variables[f"{old}/linear_{number}/{kind}"].chunk(len(names))
                found.update({f"{new}.{name}.{kind}": part for name, part in zip(names, parts, strict=True)})
        if found.pop(f"{new}.k_proj.bias").any():
            raise ValueError(f"the projection of keys of {old} has a bias")

    for conv in ("conv1", "conv2"):
        move(f"model.encoder.{conv}", f"encoder/{conv}")
    for side in ("encoder", "decoder"):
        found[f"model.{side}.embed_positions.weight"] = variables[f"{side}/position_encodings/encodings"]
        move_norm(f"model.{side}.layer_norm", side)
        for i in range(LAYERS):
            new, old = f"model.{side}.layers.{i}", f"{side}/layer_{i}"
            move_norm(f"{new}.self_attn_layer_norm", f"{old}/self_attention")
            move_attention(f"{new}.self_attn", f"{old}/self_attention", SELF_ATTENTION)
            if side == "decoder":
                move_norm(f"{new}.encoder_attn_layer_norm", f"{old}/attention")
                move_attention(f"{new}.encoder_attn", f"{old}/attention", CROSS_ATTENTION)
            move_norm(f"{new}.final_layer_norm", f"{old}/ffn")
            for number in (0, 1):
                move(f"{new}.fc{number + 1}", f"{old}/ffn/linear_{number}")
    return found
