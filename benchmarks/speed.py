"""Forward time of one layer as a pair and with pivots against dense, at equal stored weights: what a size costs.

    python -m benchmarks.speed [--compile]        about 2 minutes on 2 cores, 5 with --compile

Layers of BERT-base (768 x 768, 768 x 3072, 3072 x 768), float32 and bfloat16, 1, 32 and 1024 tokens, 0.3, 0.5 and 0.8
of the weights. Every number is the median over rounds in which all forms took their turn, with factors of their own, so
that none finds its weights in a cache that another filled. Writes results/speed.json and results/speed.png and prints
ratios to dense.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib
import torch
from torch import nn

from benchmarks.machine import RESULTS, write
from hf_reparam.nn.surgery import low_rank_like
from hf_reparam.planning import make_plan

matplotlib.use("Agg")
from matplotlib import pyplot

SEED = 0
SHAPES = ((768, 768), (768, 3072), (3072, 768))
KEEPS = (0.3, 0.5, 0.8)
ROUNDS = {1: 300, 32: 100, 1024: 15}
FORMS = ("pair", "pivoted")


def layers(n_in: int, n_out: int, keep: float, dtype: torch.dtype) -> dict[str, nn.Module]:
    """The dense layer, and one of each form with at most `keep` of its weights, drawn at random."""
    dense = nn.Linear(n_in, n_out)
    made: dict[str, nn.Module] = {"dense": dense}
    for form in FORMS:
        spec = make_plan(nn.Sequential(dense), keep=keep, form=form).modules["0"]
        low = low_rank_like(dense, spec)
        low.down.reset_parameters()
        low.up.reset_parameters()
        if form == "pivoted":
            low.order.copy_(torch.randperm(n_in))
        made[form] = low
    return {form: layer.to(dtype).eval() for form, layer in made.items()}


@torch.no_grad()
def medians(calls: dict[str, Callable[[torch.Tensor], Any]], x: torch.Tensor, rounds: int) -> dict[str, float]:
    """Median seconds of each call, in turns."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds + 5):
        for name, call in calls.items():
            start = time.perf_counter()
            call(x)
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(series[5:]) for name, series in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--compile", action="store_true", help="also with torch.compile")
    args = parser.parse_args()
    torch.manual_seed(SEED)
    rows: list[dict[str, Any]] = []
    for dtype in (torch.float32, torch.bfloat16):
        for n_in, n_out in SHAPES:
            for keep in KEEPS:
                made = layers(n_in, n_out, keep, dtype)
                for compiled in (False, True) if args.compile else (False,):
                    calls = {n: torch.compile(m, dynamic=False) if compiled else m for n, m in made.items()}
                    for tokens, rounds in ROUNDS.items():
                        seconds = medians(calls, torch.randn(tokens, n_in, dtype=dtype), rounds)
                        ratios = {form: seconds[form] / seconds["dense"] for form in FORMS}
                        name = f"{n_in} x {n_out}"
                        row = {"layer": name, "dtype": str(dtype)[6:], "keep": keep, "tokens": tokens}
                        rows.append(row | {"compiled": compiled, "dense_seconds": seconds["dense"], "ratio": ratios})
                        shown = "  ".join(f"{form} {ratio:.2f}" for form, ratio in ratios.items())
                        print(f"{row['dtype']:9}{name:12} keep {keep}  {tokens:5} tokens  {shown}", flush=True)
                torch.compiler.reset()
    write("speed", {"ratios_to_dense": rows, "summary": summary(rows)}, SEED)
    draw(rows, RESULTS / "speed.png")


def summary(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Median over the three layers, and the pivoted form's time over the pair's."""
    out = []
    for key in dict.fromkeys((r["dtype"], r["compiled"], r["tokens"], r["keep"]) for r in rows):
        alike = [r["ratio"] for r in rows if (r["dtype"], r["compiled"], r["tokens"], r["keep"]) == key]
        values: dict[str, Any] = {form: statistics.median(r[form] for r in alike) for form in FORMS}
        values["pivoted / pair"] = statistics.median(r["pivoted"] / r["pair"] for r in alike)
        out.append(dict(zip(("dtype", "compiled", "tokens", "keep"), key, strict=True)) | values)
    return out


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Ratio to dense against size, one panel for each count of tokens, float32 without compilation."""
    figure, axes = pyplot.subplots(1, len(ROUNDS), figsize=(4.4 * len(ROUNDS), 4), sharey=True, layout="constrained")
    for axis, tokens in zip(axes, ROUNDS, strict=True):
        for form, marker in zip(FORMS, "os", strict=True):
            points = [
                r for r in summary(rows) if (r["dtype"], r["compiled"], r["tokens"]) == ("float32", False, tokens)
            ]
            axis.plot([r["keep"] for r in points], [r[form] for r in points], marker=marker, label=form)
        axis.plot(KEEPS, KEEPS, "k:", label="share of the multiply-adds")
        axis.set(title=f"{tokens} tokens", xlabel="share of the weights kept")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("time / dense, median of three layers")
    axes[0].legend()
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
