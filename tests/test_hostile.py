"""Folders that somebody tampered with: a named error in good time, never other code, never other tensors."""

import json
import os
import pickle
import random
import shutil
import time
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import hf_reparam
from benchmarks import hostile
from hf_reparam import convert
from hf_reparam.errors import CheckpointError, PlanError
from hf_reparam.files.folder import load
from tests import zoo


@pytest.mark.slow
@pytest.mark.parametrize("part", hostile.PARTS)
def test_a_taste_of_the_attacks(attacked, part):
    assert attacked[part]["first_bad"] == []
    assert attacked[part]["cases"] >= 100
    assert sum(n for end, n in attacked[part]["ends"].items() if "Error" in end) > 50


REFUSED = {"load_seconds": 0.01, "load_error": "CheckpointError", "auto_model_error": "PlanError"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({}, None),
        ({"skeletons": {"bad": 2}}, "skeletons: 2 cases are bad"),
        ({"peak_memory_growth_mb": 9000}, "memory grew by 9000 MB"),
        ({"a_million_layers": REFUSED | {"load_seconds": 2.0}}, "load does not refuse"),
        ({"a_million_layers": {"auto_model_error": "PlanError"}}, "load does not refuse"),
        ({"a_million_layers": {"load_seconds": 0.01}}, "AutoModel does not refuse"),
    ],
)
def test_what_did_not_hold_fails_the_benchmark(monkeypatch, change, message):
    good = {part: {"bad": 0} for part in hostile.PARTS}
    good |= {"peak_memory_growth_mb": 600, "a_million_layers": REFUSED}
    monkeypatch.setattr(hostile, "attack", lambda *_: good | change)
    monkeypatch.setattr(hostile, "million", lambda _: (good | change)["a_million_layers"])
    monkeypatch.setattr("sys.argv", ["hostile", "--no-write"])
    monkeypatch.setattr("sys.stdin", None)  # as it is, again, afterwards
    monkeypatch.setattr(transformers.logging, "set_verbosity", lambda _: None)
    assert hostile.main() == (message is not None)
    assert [text.startswith(message) for text in hostile.failures(good | change)] == [True] * (message is not None)


BUSY = 5.0
"""Seconds for what takes less than one, as `python -m benchmarks.hostile` shows, where nothing else runs."""


@pytest.fixture(scope="module")
def attacked(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hostile, "LIMIT", BUSY)
        return hostile.attack(tmp_path_factory.mktemp("attack"), configs=400, loads=120, files=100)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """What nobody tampered with."""
    place = tmp_path_factory.mktemp("whole")
    convert(zoo.BY_BASE["BertForMaskedLM"].build(), rank=6).save_pretrained(place, max_shard_size="20KB")
    return place


@pytest.fixture
def saved(whole, tmp_path):
    return shutil.copytree(whole, tmp_path / "model")


def change(folder, name, act):
    data = json.loads((folder / name).read_text())
    act(data)
    (folder / name).write_text(json.dumps(data))


def doors(folder):
    """Every way in."""
    yield lambda: transformers.AutoModelForMaskedLM.from_pretrained(folder)
    yield lambda: hf_reparam.ReparamBertForMaskedLM.from_pretrained(pretrained_model_name_or_path=str(folder))
    yield lambda: load(Path(folder))[0]


def refused(folder, kind, match):
    for door in doors(folder):
        start = time.perf_counter()
        with pytest.raises(kind, match=match):
            door()
        assert time.perf_counter() - start < BUSY


@pytest.mark.parametrize("where", ["../outside.safetensors", "/outside.safetensors", "a/../../outside.safetensors", 3])
def test_an_index_that_leads_out_of_the_folder(saved, where):
    index = "model.safetensors.index.json"
    first = json.loads((saved / index).read_text())["weight_map"]["bert.embeddings.word_embeddings.weight"]
    shutil.copy(saved / first, saved.parent / "outside.safetensors")
    place = where if isinstance(where, int) or where.startswith((".", "a")) else str(saved.parent / where[1:])
    change(saved, index, lambda d: d["weight_map"].update({k: place for k, v in d["weight_map"].items() if v == first}))
    refused(saved, CheckpointError, "no file of this folder|no index of weight files")


def test_a_missing_shard(saved):
    next(iter(sorted(saved.glob("*.safetensors")))).unlink()
    refused(saved, (CheckpointError, OSError), "model-00001-of-|shard|cannot be loaded")


@pytest.mark.parametrize("target", ["/dev/zero", "loop", "/etc/hostname"])
def test_a_shard_that_is_a_link_to_something_else(saved, target):
    shard = sorted(saved.glob("*.safetensors"))[0]
    shard.unlink()
    shard.symlink_to(shard.name if target == "loop" else target)
    for door in doors(saved):
        with pytest.raises((OSError, ValueError, RuntimeError, hf_reparam.ReparamError, _safetensors_error())):
            door()


def _safetensors_error():
    from safetensors import SafetensorError

    return SafetensorError


class Bomb:
    def __init__(self, place):
        self.place = place

    def __reduce__(self):
        return os.mkdir, (str(self.place),)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.safetensors", "training_args.bin"])
def test_a_pickle_is_never_opened(saved, tmp_path, name):
    for file in saved.glob("model*"):
        file.unlink()
    (saved / name).write_bytes(pickle.dumps({"bert.x": Bomb(tmp_path / "exploded")}))
    torch.save({"bert.x": Bomb(tmp_path / "exploded")}, saved / f"{name}.zip.bin")
    for door in doors(saved):
        with pytest.raises((OSError, ValueError, RuntimeError, _safetensors_error())):
            door()
    assert not (tmp_path / "exploded").exists()
    pickle.loads((saved / name).read_bytes())  # it is a bomb
    assert (tmp_path / "exploded").exists()


def test_moments_are_no_pickle(tmp_path):
    (tmp_path / "moments.safetensors").write_bytes(pickle.dumps({"x": Bomb(tmp_path / "exploded")}))
    with pytest.raises(CheckpointError, match="cannot be read as moments"):
        hf_reparam.Calibration.load(tmp_path / "moments.safetensors")
    assert not (tmp_path / "exploded").exists()


@pytest.mark.slow
def test_code_beside_the_weights_is_not_run(saved, tmp_path):
    (saved / "evil.py").write_text(f"import os\nos.mkdir({str(tmp_path / 'ran')!r})\nclass Evil: ...\n")
    evil = {"AutoConfig": "evil.Evil", "AutoModel": "evil.Evil", "AutoModelForMaskedLM": "evil.Evil"}
    change(saved, "config.json", lambda d: d.update(auto_map=evil))
    expected = load_file(sorted(saved.glob("*.safetensors"))[0])
    for door in doors(saved):
        model = door()
        assert type(model).__name__ == "ReparamBertForMaskedLM"
        told = {key: value for key, value in expected.items() if value.numel() and value.dim() != 1}
        assert told
        assert all(torch.equal(model.state_dict()[key], value) for key, value in told.items())
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("entry", "value", "message"),
    [
        ("_attn_implementation", "evil/kernel", "never saved"),
        ("attn_implementation", "evil/kernel", "never saved"),
        ("__class__", "dict", "never saved"),
        ("num_hidden_layers", 10**6, "at most 1000 are accepted"),
        ("num_labels", 10**7, "at most 100000 are accepted"),
        ("num_labels", [[1]], "at most 100000 are accepted"),
        ("dtype", "__import__('os')", "none of torch's"),
        ("dtype", "load", "none of torch's"),
        ("quantization_config", [0], "is no object"),
    ],
)
def test_entries_that_no_saved_configuration_has(saved, entry, value, message):
    change(saved, "config.json", lambda d: d.update({entry: value}))
    refused(saved, PlanError, message)


def test_entries_that_only_look_like_a_number_of_layers(saved):
    change(saved, "config.json", lambda d: d.update(vocab_size_per_layer_input=262_144, num_labels=7))
    assert transformers.AutoConfig.from_pretrained(saved).num_labels == 7


@pytest.mark.slow
def test_far_too_many_layers(saved):
    spec = {"rank": 1, "form": "pair"}
    long = "x" * 130  # so few as are refused make a file that is
    change(
        saved, "config.json", lambda d: d["reparam"].update(modules={f"layer.{i}.{long}": spec for i in range(100_001)})
    )
    with pytest.raises(PlanError, match="names 100001 modules; at most 100000 are accepted"):
        transformers.AutoConfig.from_pretrained(saved)
    start = time.perf_counter()
    with pytest.raises(CheckpointError, match="bytes; at most 16,777,216 are accepted"):
        load(saved)
    assert time.perf_counter() - start < 1


@pytest.mark.slow
def test_shapes_are_compared_before_memory_is_taken(saved):
    """A table of 3.2 x 10^12 numbers."""
    change(saved, "config.json", lambda d: d.update(max_position_embeddings=10**11))
    refused(saved, (RuntimeError, CheckpointError), "position_embeddings.weight.*100000000000, 32")


def test_flipped_bits_of_numbers_show_only_in_the_numbers(saved):
    """No checksum: what is promised is that the tensors are those in the file."""
    shard = sorted(saved.glob("*.safetensors"))[0]
    data = bytearray(shard.read_bytes())
    rng = random.Random(0)
    for _ in range(20):
        data[-1 - rng.randrange(1000)] ^= 1 << rng.randrange(8)
    shard.write_bytes(data)
    stored = load_file(shard)
    state = load(saved)[0].state_dict()
    assert stored.keys() & state.keys()
    assert all(state[k].numpy().tobytes() == v.numpy().tobytes() for k, v in stored.items() if k in state)


@pytest.mark.slow
def test_tensors_of_another_type(saved):
    shard = sorted(saved.glob("*.safetensors"))[0]
    stored = load_file(shard)
    save_file(
        {k: v.to(torch.int32) if v.dim() == 2 else v for k, v in stored.items()}, shard, metadata={"format": "pt"}
    )
    for door in doors(saved):
        model = door()
        assert all(p.is_floating_point() for p in model.parameters())
