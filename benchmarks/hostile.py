"""Hostile model folders: what loading does with configurations and weights that were tampered with.

    python -m benchmarks.hostile                 # 100,000 configurations, 3,000 whole loads, 2,000 weight files
    python -m benchmarks.hostile --configs 500   # a taste

A case is good if it ends within `LIMIT` seconds of processor time with an error of a named kind, or with a model
all of whose tensors are those in the file. Anything else is written down, and the exit status is 1; so it is if a
configuration of a million layers is not refused, or if memory grew by more than `MEMORY` MB.
"""

import argparse
import copy
import importlib
import io
import json
import os
import random
import resource
import shutil
import signal
import struct
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from safetensors.torch import load_file
from tqdm import tqdm

import hf_reparam
from benchmarks.machine import write
from hf_reparam.files.folder import load, skeleton

LIMIT = 1.0
PATIENCE = 30.0
"""For stock configurations: with a million labels Transformers alone takes 4 to 10 s, by what else the machine does."""
MEMORY = 2000
PARTS = ("configurations", "whole_loads", "skeletons", "weight_files")
WRONG = "loaded, with tensors that are not in the file"
SEED = 0
HUGE = 10**6
WORDS = ["", "x" * 100_000, "../../etc/passwd", "/etc/passwd", "os.system", "pair", "bert", "reparam", "\x00", "ÿ"]
VALUES: list[Any] = [None, True, False, -1, 0, 1, 3, 10**5, HUGE, 2**31, 2**63, 10**30, 0.5, -0.5, 1e308]
VALUES += [float("inf"), float("nan"), [], {}, [[]], {"a": {}}, [0] * 1000, *WORDS]
KEYS = ["", "..", "a" * 600, "__class__", "__init__", "reparam", "modules", "rank", "config", "a..b", "query\n", "é"]
DEEP = {f"@deep{n}@": "[" * n + "1" + "]" * n for n in (10, 400, 3000)}  # deeper than Python may nest calls
EXTRA: dict[str, Any] = {
    "auto_map": {"AutoConfig": "evil.Evil", "AutoModel": "evil.Evil", "AutoModelForMaskedLM": "evil.Evil"},
    "quantization_config": {"quant_method": "evil", "load_in_8bit": True},
    "dtype": "__import__('os').system",
    "attn_implementation": "evil/kernel",
    "_attn_implementation": "evil/kernel",
    "trust_remote_code": True,
    "transformers_version": "99.0.0",
    "architectures": ["os.system"],
    "model_type": "bert",
    "torchscript": True,
    "is_decoder": True,
    "num_labels": HUGE,
}


class TooSlow(BaseException):
    """The alarm of a case that takes `PATIENCE` seconds."""


def mutated(config: dict[str, Any], rng: random.Random) -> str:
    """The text of a configuration with one to three wrongs done to it."""
    config = copy.deepcopy(config)
    for _ in range(rng.randint(1, 3)):
        holder, key = _place(config, rng)
        kind = rng.randrange(10)
        if kind < 6:
            holder[key] = copy.deepcopy(rng.choice(VALUES))
        elif kind == 6:
            del holder[key]
        elif kind == 7 and isinstance(holder, dict):
            holder[rng.choice(KEYS)] = holder.pop(key)
        elif kind == 8:
            name, value = rng.choice(list(EXTRA.items()))
            config[name] = copy.deepcopy(value)
        else:
            holder[key] = rng.choice(list(DEEP))
        if not config:
            break
    text = json.dumps(config)
    for name, value in DEEP.items():
        text = text.replace(f'"{name}"', value)
    if rng.randrange(12) == 0:  # and the text itself
        where = rng.randrange(len(text))
        text = rng.choice([text[:where], text[:where] + chr(rng.randrange(256)) + text[where + 1 :], text * 2])
    return text


def told(text: str, config: dict[str, Any]) -> str:
    """What was done to a configuration, in short."""
    try:
        data = json.loads(text)
    except (ValueError, RecursionError):
        return "broken JSON"
    changed = {key: value for key, value in data.items() if config.get(key, data) != value}
    return f"{str(changed)[:400]} without {sorted(set(config) - set(data))}"


def ours(text: str) -> bool:
    """Whether the configuration still says that it is a converted model's: else no code of this package runs."""
    return '"model_type": "hf_reparam"' in text


def _place(config: dict[str, Any], rng: random.Random) -> tuple[Any, Any]:
    """A random entry of the tree: its holder and its key."""
    holder: Any = config
    key = rng.choice(list(holder))
    while isinstance(holder[key], (dict, list)) and holder[key] and rng.random() < 0.7:
        holder = holder[key]
        key = rng.choice(list(holder)) if isinstance(holder, dict) else rng.randrange(len(holder))
    return holder, key


def spoiled(data: bytes, rng: random.Random) -> tuple[str, bytes]:
    """What was done to a safetensors file, and the file."""
    header = struct.unpack("<Q", data[:8])[0]
    kind = rng.choice(["truncated", "header flipped", "length changed", "appended", "empty", "text", "shape changed"])
    if kind == "truncated":
        return kind, data[: rng.randrange(len(data))]
    if kind == "header flipped":
        where = 8 + rng.randrange(header)
        return kind, data[:where] + bytes([data[where] ^ (1 << rng.randrange(8))]) + data[where + 1 :]
    if kind == "length changed":
        return kind, struct.pack("<Q", rng.choice([0, 1, 2**40, 2**63, header - 1, header + 1])) + data[8:]
    if kind == "appended":
        return kind, data + b"x" * rng.randrange(1, 100)
    if kind == "shape changed":
        table = json.loads(data[8 : 8 + header])
        name = rng.choice([n for n in table if n != "__metadata__"])
        field = rng.choice(["dtype", "shape", "data_offsets"])
        table[name][field] = rng.choice(["F64", "BOOL", [1], [-1], [2**40, 2**40], [0, 0], [10, 5], None])
        text = json.dumps(table).encode()
        return kind, struct.pack("<Q", len(text)) + text + data[8 + header :]
    return kind, b"" if kind == "empty" else b"no tensors at all, and longer than eight bytes"


NAMED = (hf_reparam.ReparamError, OSError, ValueError, RuntimeError, SafetensorError, StrictDataclassError)
"""Kinds of errors that say what is wrong; RecursionError among them is Python's own word for JSON nested too deeply."""


@contextmanager
def alarm() -> Iterator[None]:
    def ring(*_: object) -> None:
        raise TooSlow

    signal.signal(signal.SIGPROF, ring)
    signal.setitimer(signal.ITIMER_PROF, PATIENCE)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


def _after_us(error: Exception) -> bool:
    """Whether this package had a say before the error: what fails earlier fails so for every model."""
    return any("hf_reparam" in frame.filename for frame in traceback.extract_tb(error.__traceback__))


class Tally:
    """How cases ended."""

    def __init__(self) -> None:
        self.ends: Counter[str] = Counter()
        self.bad: list[str] = []
        self.slowest = 0.0

    def run(self, what: str, act: Callable[[], str], *, converted: bool = True) -> None:
        """Act and count the end: what it returns, or the kind of error it raised; a case that is no converted
        model any more may be slow."""
        start = time.process_time()
        good = True
        try:
            with alarm():
                end = act()
        except TooSlow:
            end, good = "too slow", False
        except Exception as error:
            end = type(error).__name__
            if not isinstance(error, NAMED):
                good = not _after_us(error)
                end += ", unnamed" if not good else " before the plan is read"
        took = time.process_time() - start
        self.slowest = max(self.slowest, took * converted)
        self.ends[end] += 1
        if not good or end == WRONG or (took > LIMIT and converted):
            self.bad.append(f"{end} ({took:.2f} s): {what}")

    def to_dict(self) -> dict[str, Any]:
        return {
            "cases": sum(self.ends.values()),
            "ends": dict(self.ends.most_common()),
            "slowest_seconds": round(self.slowest, 3),
            "bad": len(self.bad),
            "first_bad": self.bad[:10],
        }


def _read(folder: Path) -> str:
    transformers.AutoConfig.from_pretrained(folder)
    return "read"


def _built(folder: Path) -> str:
    skeleton(str(folder))
    return "built"


def whole(folder: Path, stored: dict[str, torch.Tensor]) -> str:
    """Load a folder; "loaded" if every tensor of the model is the stored one."""
    model = load(folder)[0]
    for name, tensor in model.state_dict().items():
        if name not in stored or not torch.equal(tensor, stored[name].to(tensor.dtype)):
            return WRONG
    return "loaded"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.hostile", description=__doc__.partition("\n")[0])
    parser.add_argument("--configs", type=int, default=100_000, help="configurations to read (default: 100,000)")
    parser.add_argument("--loads", type=int, default=3000, help="whole models to load (default: 3,000)")
    parser.add_argument("--files", type=int, default=2000, help="weight files to load (default: 2,000)")
    parser.add_argument("--no-write", action="store_true", help="leave results/hostile.json alone")
    options = parser.parse_args()
    sys.stdin = io.StringIO()  # nobody is there to answer "run the custom code?"
    transformers.logging.set_verbosity(transformers.logging.CRITICAL)
    transformers.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as scratch:
        results = attack(Path(scratch), options.configs, options.loads, options.files)
        results["a_million_layers"] = million(Path(scratch))
    for name, part in results.items():
        print(name, json.dumps(part, indent=1))
    if not options.no_write:
        write("hostile", results, SEED)
    for reason in (reasons := failures(results)):
        print(reason)
    return int(bool(reasons))


def failures(results: dict[str, Any]) -> list[str]:
    """What did not hold."""
    found = [f"{name}: {results[name]['bad']} cases are bad" for name in PARTS if results[name]["bad"]]
    grown, refused = results["peak_memory_growth_mb"], results["a_million_layers"]
    if grown > MEMORY:
        found.append(f"memory grew by {grown} MB, more than {MEMORY}")
    if refused.get("load_seconds", LIMIT) >= LIMIT:
        found.append(f"load does not refuse a million layers within {LIMIT} s")
    if "auto_model_error" not in refused:
        found.append("AutoModel does not refuse a million layers")
    return found


def attack(scratch: Path, configs: int, loads: int, files: int) -> dict[str, Any]:
    """Every kind of attack on a pair and a pivoted model, so many times each."""
    with suppress(ImportError):  # a configuration can make Transformers import it, which takes a second by itself
        importlib.import_module("bitsandbytes")
    rng, sources = random.Random(SEED), []
    for form in ("pair", "pivoted"):
        sources.append(_source(scratch / form, form))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    results: dict[str, Any] = {}
    folder = scratch / "folder"

    def configure(
        desc: str, count: int, act: Callable[[dict[str, torch.Tensor]], str], *, weights: bool = False
    ) -> Any:
        tally = Tally()
        for number in tqdm(range(count), desc=desc):
            config, stored, path = sources[number % 2]
            text = mutated(config, rng)
            _write(folder, text, path if weights else None)
            tally.run(told(text, config), lambda stored=stored: act(stored), converted=ours(text))
        return tally.to_dict()

    results["configurations"] = configure("Configurations", configs, lambda _: _read(folder))
    results["whole_loads"] = configure("Whole loads", loads, lambda stored: whole(folder, stored), weights=True)
    results["skeletons"] = configure("Skeletons", min(loads, 1000), lambda _: _built(folder))
    tally = Tally()
    for number in tqdm(range(files), desc="Weight files"):
        config, stored, path = sources[number % 2]
        _write(folder, json.dumps(config))
        kind, data = spoiled(path.read_bytes(), rng)
        (folder / "model.safetensors").write_bytes(data)
        tally.run(kind, lambda stored=stored: whole(folder, stored))
    results["weight_files"] = tally.to_dict()
    results["peak_memory_growth_mb"] = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024
    return results


def million(scratch: Path) -> dict[str, Any]:
    """Seconds until a configuration of 10^6 layers is refused, by this package's `load` and by `AutoModel`, and
    seconds in which stock Transformers reads a stock configuration with the same entries."""
    folder = scratch / "million"
    config = _source(folder, "pair")[0]
    entries = {f"encoder.layer.{i}.output.dense": {"rank": 1, "form": "pair"} for i in range(10**6)}
    config["reparam"]["modules"] = entries
    _write(folder, json.dumps(config))
    results: dict[str, Any] = {"megabytes": round((folder / "config.json").stat().st_size / 1e6, 1)}
    for name, act in (("load", load), ("auto_model", transformers.AutoModelForMaskedLM.from_pretrained)):
        start = time.process_time()
        try:
            act(folder)
        except hf_reparam.ReparamError as error:
            results[f"{name}_seconds"] = round(time.process_time() - start, 3)
            results[f"{name}_error"] = type(error).__name__
    transformers.BertConfig().save_pretrained(folder)
    stock = json.loads((folder / "config.json").read_text())
    _write(folder, json.dumps(stock | {"entries": entries}))
    start = time.process_time()
    transformers.AutoConfig.from_pretrained(folder)
    return results | {"stock_configuration_seconds": round(time.process_time() - start, 3)}


def _source(folder: Path, form: str) -> tuple[dict[str, Any], dict[str, torch.Tensor], Path]:
    """Configuration, tensors and weight file of a small converted model: of pairs, or pivoted with narrower heads and
    tables."""
    torch.manual_seed(SEED)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    model = transformers.BertForMaskedLM(transformers.BertConfig(vocab_size=50, max_position_embeddings=16, **sizes))
    if form == "pivoted":
        entries = {f"encoder.layer.{i}.attention": hf_reparam.Entry(5, "heads") for i in range(2)}
        entries["embeddings.word_embeddings"] = hf_reparam.Entry(6, "table")
        plan = hf_reparam.RankPlan(entries, "bert")
        small = hf_reparam.convert(hf_reparam.convert(model, plan), hf_reparam.LowRankConfig(rank=4, form=form))
    else:
        small = hf_reparam.convert(model, rank=4)
    small.save_pretrained(folder)
    path = folder / "model.safetensors"
    stored = load_file(path)
    for name, tensor in list(stored.items()):  # what is tied is stored once
        if name.startswith("bert.embeddings.word_embeddings."):
            stored[name.replace("bert.embeddings.word_embeddings", "cls.predictions.decoder")] = tensor
    stored["cls.predictions.decoder.bias"] = stored["cls.predictions.bias"]
    return json.loads((folder / "config.json").read_text()), stored, path


def _write(folder: Path, config: str, weights: Path | None = None) -> None:
    if not folder.exists():
        folder.mkdir()
    (folder / "config.json").write_text(config, encoding="utf-8", errors="surrogatepass")
    if weights is not None:
        shutil.copyfile(weights, folder / "model.safetensors")


if __name__ == "__main__":
    sys.exit(main())
