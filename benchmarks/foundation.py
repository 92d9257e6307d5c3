"""Exactness and speed of conversion, loading and forward, on BERT-base-shaped models with random weights.

    python -m benchmarks.foundation          about 5 minutes on 2 cores; writes results/foundation.json

Times are medians over rounds in which every candidate runs once, so that all see the same noise. Random weights have
the flattest spectra there are, which makes them the hardest case for a partial solver.
"""

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

import hf_reparam
from benchmarks.machine import write
from hf_reparam.linalg.factorize import decompose
from hf_reparam.model.checks import count_parameters

SEED = 0
RANK = 128


def bert() -> transformers.BertModel:
    torch.manual_seed(SEED)
    return transformers.BertModel(transformers.BertConfig()).eval()


def half(model: nn.Module) -> dict[str, int]:
    """The rank of each encoder layer at which its pair holds half of the dense weight, a multiple of 16."""
    shapes = {row.name: (row.in_features, row.out_features) for row in hf_reparam.report(model).layers}
    return {name: round(n_in * n_out / 2 / (n_in + n_out) / 16) * 16 for name, (n_in, n_out) in shapes.items()}


def rounds(candidates: dict[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """Median seconds of each candidate over interleaved rounds, after one round that does not count."""
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(repeats + 1):
        for name, run in candidates.items():
            start = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(series[1:]) for name, series in times.items()}


@torch.no_grad()
def exactness() -> dict[str, Any]:
    """Full rank against dense, and the error of a cut against the optimum."""
    dense = bert()
    full = hf_reparam.convert(dense, hf_reparam.LowRankConfig(rank=1.0, allow_larger=True))
    ids = torch.randint(1000, 30000, (2, 64))
    gap = (full(ids).last_hidden_state - dense(ids).last_hidden_state).abs().max().item()
    excess = {}
    for shape in ((768, 768), (768, 3072), (3072, 768)):
        weight = torch.randn(shape, dtype=torch.float64)
        up, down = decompose(weight, max_rank=RANK).cut(RANK)
        optimum = torch.linalg.svdvals(weight)[RANK:].square().sum().item()
        error = (weight - up @ down).square().sum().item()
        excess[f"{shape[0]}x{shape[1]}"] = error / optimum - 1
    return {"full_rank_largest_output_difference": gap, f"relative_excess_error_rank_{RANK}_float64": excess}


def factoring() -> dict[str, Any]:
    """All dense layers of a BERT-base-shaped model at rank 128 against loops of torch.linalg.svd."""
    weights = [m.weight.detach() for m in bert().modules() if isinstance(m, nn.Linear)]
    loops = {
        "hf_reparam": lambda w: decompose(w, max_rank=RANK).cut(RANK),
        "torch.linalg.svd, float32, full_matrices=False": lambda w: torch.linalg.svd(w, full_matrices=False),
        "torch.linalg.svd, float64, full_matrices=False": lambda w: torch.linalg.svd(w.double(), full_matrices=False),
    }
    seconds = rounds({name: lambda f=f: [f(w) for w in weights] for name, f in loops.items()}, repeats=3)
    start = time.perf_counter()
    for weight in weights:
        torch.linalg.svd(weight)
    seconds["torch.linalg.svd, float32, default arguments (one run)"] = time.perf_counter() - start
    errors = {}
    for name, solve in loops.items():
        worst = 0.0
        for weight in weights[:6]:
            result = solve(weight)
            if name == "hf_reparam":
                product = result[0] @ result[1]
            else:
                u, s, v = (part.double() for part in result)
                product = u[:, :RANK] * s[:RANK] @ v[:RANK]
            worst = max(worst, ((weight.double() - product).norm() / weight.double().norm()).item())
        errors[name] = worst
    ours = seconds["hf_reparam"]
    speedups = {name: s / ours for name, s in seconds.items() if name != "hf_reparam"}
    return {
        "layers": len(weights),
        "rank": RANK,
        "seconds": seconds,
        "times_faster": speedups,
        "largest_relative_error": errors,
    }


def evict(folder: Path) -> None:
    """Drop a folder's files from the page cache, so that the next read comes from the disk."""
    for path in folder.glob("*.safetensors"):
        handle = os.open(path, os.O_RDONLY)
        os.fsync(handle)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(handle)


def loading(dense: nn.Module, small: nn.Module) -> dict[str, Any]:
    """`AutoModel.from_pretrained`: the call alone (weights are mapped, not read), and until every weight was read."""
    load = transformers.AutoModel.from_pretrained

    def read(folder: Path) -> None:
        for parameter in load(folder).parameters():
            parameter.sum().item()

    def cold(folder: Path) -> None:
        evict(folder)
        read(folder)

    results = {}
    with tempfile.TemporaryDirectory() as temporary:
        folders = {"dense": Path(temporary) / "dense", "converted": Path(temporary) / "converted"}
        dense.save_pretrained(folders["dense"])
        small.save_pretrained(folders["converted"])
        for name, run in (("call alone, warm", load), ("weights read, warm", read), ("weights read, cold cache", cold)):
            seconds = rounds({key: lambda f=folder, r=run: r(f) for key, folder in folders.items()}, repeats=9)
            results[name] = {**seconds, "ratio": seconds["converted"] / seconds["dense"]}
    return {"parameter_ratio": count_parameters(small) / count_parameters(dense), **results}


@torch.no_grad()
def forward(dense: nn.Module, small: nn.Module) -> dict[str, Any]:
    """Batch 8 x 128 tokens, float32, eager."""
    ids = torch.randint(1000, 30000, (8, 128))
    seconds = rounds({"dense": lambda: dense(ids), "converted": lambda: small(ids)}, repeats=9)
    return {"batch": [8, 128], **seconds, "ratio": seconds["converted"] / seconds["dense"]}


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    torch.manual_seed(SEED)
    transformers.logging.disable_progress_bar()
    transformers.logging.set_verbosity_error()
    dense = bert()
    small = hf_reparam.convert(dense, rank=half(dense))
    report = hf_reparam.report(small)
    results = {
        "exactness": exactness(),
        "factoring": factoring(),
        "half_of_the_weights": {"factored_before": report.factored_before, "factored_after": report.factored_after},
        "loading": loading(dense, small),
        "forward": forward(dense, small),
    }
    print(write("foundation", results, SEED).read_text())


if __name__ == "__main__":
    main()
