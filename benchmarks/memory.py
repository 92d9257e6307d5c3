"""Peak resident memory of converting: from file to file, in place and by copy, and of calibrating. Linux only.

    python -m benchmarks.memory [--folder FOLDER]        about 20 minutes and 20 GB of disk on 2 cores

A synthetic Llama-shaped checkpoint of about 6 GB (random float32 weights, 4096 wide, 11008 between, 6 layers) is
converted by `hf-reparam convert`, with and without --stream, each in a process of its own whose peak is read; so are
conversions in memory of 4 layers of BERT-large and of four layers of 8192 x 2048, and calibration of the former with
and without `max_memory`. Writes results/memory.json and results/memory.png.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib
import torch
import transformers
from safetensors.torch import save_file

import hf_reparam
from benchmarks.machine import RESULTS, describe

matplotlib.use("Agg")
from matplotlib import pyplot

SEED = 0
STORED = RESULTS / "memory.json"
MB = 1e6
LAYERS, WIDTH, INNER, VOCABULARY = 6, 4096, 11008, 32000
LARGEST = 8 * WIDTH * INNER / MB  # the largest layer in float64


def llama(folder: Path) -> float:
    """Write the checkpoint, one shard for each layer; returns its size in MB."""
    config = transformers.LlamaConfig(num_hidden_layers=LAYERS, architectures=["LlamaForCausalLM"], dtype="float32")
    config.save_pretrained(folder)
    with torch.device("meta"):
        shapes = {name: t.shape for name, t in transformers.LlamaForCausalLM(config).state_dict().items()}
    shards: dict[str, dict[str, torch.Size]] = {}
    for name, shape in shapes.items():
        parts = name.split(".")
        shards.setdefault(f"layer-{parts[2]}" if parts[1] == "layers" else parts[-2], {})[name] = shape
    weight_map, total = {}, 0
    for number, names in enumerate(shards.values(), 1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        tensors = {name: torch.randn(shape) * 0.02 for name, shape in names.items()}
        save_file(tensors, folder / file, {"format": "pt"})
        weight_map |= dict.fromkeys(names, file)
        total += sum(t.numel() * 4 for t in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return total / MB


RUN = """
import sys
from hf_reparam_cli import main
code = main(sys.argv[1:])
lines = open("/proc/self/status").read().splitlines()
print(next(line.split()[1] for line in lines if line.startswith("VmHWM")))
sys.exit(code)
"""


def command(*arguments: Any) -> dict[str, float]:
    """Run `hf-reparam`; seconds, and peak resident memory in MB."""
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", RUN, *map(str, arguments)], stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise SystemExit(f"{arguments} ended with status {done.returncode}")
    return {"seconds": time.perf_counter() - start, "peak_mb": int(done.stdout.split()[-1]) * 1024 / MB}


def folders(folder: Path) -> dict[str, Any]:
    """`hf-reparam` on the checkpoint of 6 GB."""
    source = folder / "llama"
    size = llama(source)
    found: dict[str, Any] = {"checkpoint_mb": size, "largest_layer_float64_mb": LARGEST}
    found["goal_mb"] = 4 * LARGEST + 500
    quick = ["--rank", 128, "--solver", "randomized"]
    runs = {
        "inspect": ["inspect", source],
        "convert --stream --rank 1024": ["convert", source, folder / "a", "--rank", 1024, "--stream"],
        "merge --stream": ["merge", folder / "a", folder / "b", "--stream"],
        "convert --stream --rank 128 --solver randomized": ["convert", source, folder / "c", *quick, "--stream"],
        "convert --rank 128 --solver randomized": ["convert", source, folder / "d", *quick],
    }
    found["runs"] = {}
    for name, arguments in runs.items():
        found["runs"][name] = command(*arguments, "--quiet")
        print(name, found["runs"][name], flush=True)
    return found


def status(key: str) -> float:
    """A line of this process's memory in MB: VmRSS is now, VmHWM the peak."""
    text = Path("/proc/self/status").read_text()
    return float(next(line.split()[1] for line in text.splitlines() if line.startswith(key))) * 1024 / MB


def peak_of(work: Callable[[], Any]) -> float:
    """The peak while `work` runs, above what is resident before it."""
    before = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    work()
    return status("VmHWM") - before


def bert_large() -> transformers.BertModel:
    config = transformers.BertConfig(
        hidden_size=1024, num_hidden_layers=4, num_attention_heads=16, intermediate_size=4096
    )
    return transformers.BertModel(config).eval()


def wide() -> torch.nn.Sequential:
    return torch.nn.Sequential(*(torch.nn.Linear(*shape) for shape in ((2048, 8192), (8192, 2048)) * 2))


def batches() -> list[dict[str, torch.Tensor]]:
    return [{"input_ids": torch.randint(1000, 30000, (4, 64))} for _ in range(4)]


def worker(name: str) -> dict[str, float]:
    """One measurement on 4 layers of BERT-large, in this process."""
    torch.manual_seed(SEED)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    hf_reparam.convert(torch.nn.Sequential(torch.nn.Linear(1024, 4096)), rank=64)  # what libraries allocate at first
    model: torch.nn.Module = wide() if name.startswith("convert 8192") else bert_large()
    data = batches()
    if isinstance(model, transformers.BertModel):
        with torch.no_grad():
            model(**data[0])
    layers = [m.weight.numel() for m in model.modules() if isinstance(m, torch.nn.Linear)]
    found = {
        "model_mb": sum(p.numel() * 4 for p in model.parameters()) / MB,
        "largest_layer_float64_mb": 8 * max(layers) / MB,
    }
    if name.startswith("convert"):
        inplace, form = "in place" in name, "pivoted" if "pivoted" in name else "pair"
        held: dict[str, Any] = {"model": model}
        del model
        config = hf_reparam.LowRankConfig(rank=256, form=form)
        work = lambda: held.update(model=hf_reparam.convert(held["model"], config, inplace=inplace))  # noqa: E731
        return found | {"peak_above_mb": peak_of(work)}
    with tempfile.TemporaryDirectory() as folder:
        limit = {} if name == "calibrate" else {"folder": folder, "max_memory": name.split()[-1]}
        start = time.perf_counter()
        peak = peak_of(lambda: hf_reparam.calibrate(model, data, **limit))
        return found | {"peak_above_mb": peak, "seconds": time.perf_counter() - start}


WORKERS = (
    "convert in place, pair",
    "convert in place, pivoted",
    "convert a copy, pair",
    "calibrate",
    "calibrate within 500MB",
    "calibrate within 300MB",
    "convert 8192 x 2048 in place, pair",
)
GIVEN_BACK = {"MALLOC_MMAP_THRESHOLD_": str(2**18)}  # glibc then keeps no freed block: what is resident is in use


def in_memory() -> dict[str, Any]:
    """Every measurement in a process of its own, conversions with and without blocks that glibc keeps."""
    found = {}
    runs = [(name, {}) for name in WORKERS] + [(name, GIVEN_BACK) for name in WORKERS[:3]]
    for name, settings in runs:
        arguments = [sys.executable, "-m", "benchmarks.memory", "--worker", name]
        done = subprocess.run(arguments, capture_output=True, text=True, env={**os.environ, **settings})
        if done.returncode:
            raise SystemExit(done.stderr)
        label = name + (", memory in use" if settings else "")
        found[label] = json.loads(done.stdout.splitlines()[-1])
        print(label, found[label], flush=True)
    return found


def draw(results: dict[str, Any], path: Path) -> None:
    """Peaks as bars: of the commands on the left, of calls in memory on the right, once both are there."""
    if len(results) < 2:
        return
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(14, 4), layout="constrained")
    files = results["from_file_to_file"]
    bars = {name: run["peak_mb"] for name, run in files["runs"].items()}
    left.barh(list(bars), list(bars.values()))
    left.axvline(files["goal_mb"], color="black", linestyle=":", label="4 x largest layer in float64 + 500 MB")
    left.axvline(files["checkpoint_mb"], color="gray", label="the checkpoint")
    left.set(title="hf-reparam on a checkpoint of 6 GB: peak", xlabel="MB")
    large = {name: run for name, run in results["in_memory"].items() if "8192" not in name}
    bars = {name: run["peak_above_mb"] for name, run in large.items()}
    right.barh(list(bars), list(bars.values()), color="tab:green")
    first = next(iter(results["in_memory"].values()))
    right.axvline(
        3 * first["largest_layer_float64_mb"], color="black", linestyle=":", label="3 x largest layer in float64"
    )
    right.axvline(first["model_mb"], color="gray", label="the model")
    right.set(title="4 layers of BERT-large: peak", xlabel="MB above what was resident before the call")
    for axis in (left, right):
        axis.invert_yaxis()
        axis.legend(fontsize=8)
        axis.grid(alpha=0.3, axis="x")
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="where 20 GB of files may lie meanwhile, if not in a temporary one")
    parser.add_argument("--only", choices=("in_memory", "from_file_to_file"), help="one part alone")
    parser.add_argument("--worker", choices=WORKERS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        print(json.dumps(worker(args.worker)))
        return
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        parts = {"in_memory": in_memory, "from_file_to_file": lambda: folders(Path(folder))}
        for name, measure in parts.items():
            if args.only in (None, name):
                torch.manual_seed(SEED)
                found = {"machine": describe(SEED), "results": measure()}
                stored = json.loads(STORED.read_text()) if STORED.exists() else {}
                STORED.write_text(json.dumps(stored | {name: found}, indent=1) + "\n")
    draw({name: part["results"] for name, part in json.loads(STORED.read_text()).items()}, RESULTS / "memory.png")


if __name__ == "__main__":
    main()
