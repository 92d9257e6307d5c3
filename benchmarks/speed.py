"""How long low-rank layers and models take against dense ones, and how long factoring takes.

    python -m benchmarks.speed        about 25 minutes on 2 cores

Layers of BERT-base and GPT-2 small (compiled: of BERT-base) at equal stored weights, float32 and bfloat16, 1, 32 and
1024 tokens, 0.3, 0.5 and 0.8 of the weights; the forward pass of BERT-base, decoding with GPT-2 small, a training step;
queries, keys and values whose `down`s run as one product; factoring against the SVDs of torch (and of the package
goldcrest: pip install -e '.[peers]'). Every ratio is that of medians over rounds in which all took their turn. Writes
results/speed.json and results/speed.png.
"""

import argparse
import json
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib
import torch
import transformers
from torch import nn
from transformers.pytorch_utils import Conv1D

from benchmarks import models
from benchmarks.machine import RESULTS, describe
from benchmarks.solvers import factoring
from benchmarks.timing import medians
from hf_reparam import LowRankConfig, make_plan
from hf_reparam.compress.clock import drawn
from hf_reparam.compress.clock import medians as in_turns
from hf_reparam.structures.linear import Linears

matplotlib.use("Agg")
from matplotlib import pyplot

SEED = 0
SHAPES = {
    "BERT 768 x 768": lambda: nn.Linear(768, 768),
    "BERT 768 x 3072": lambda: nn.Linear(768, 3072),
    "BERT 3072 x 768": lambda: nn.Linear(3072, 768),
    "GPT-2 768 x 768": lambda: Conv1D(768, 768),
    "GPT-2 768 x 2304": lambda: Conv1D(2304, 768),
    "GPT-2 768 x 3072": lambda: Conv1D(3072, 768),
    "GPT-2 3072 x 768": lambda: Conv1D(768, 3072),
}
KEEPS = (0.3, 0.5, 0.8)
ROUNDS = {1: 200, 32: 60, 1024: 9}
FORMS = ("pair", "pivoted")
PARTS = ("layers", "compiled", "models", "packed", "training", "factoring")
STORED = RESULTS / "speed.json"


def layers(dense: nn.Module, keep: float, dtype: torch.dtype) -> dict[str, nn.Module]:
    """The dense layer, and one of each form with at most `keep` of its weights, drawn at random."""
    made = {"dense": dense}
    for form in FORMS:
        entry = make_plan(nn.Sequential(dense), LowRankConfig(keep=keep, form=form, metric="svd")).modules["0"]
        made[form] = drawn(dense, entry)
    return {form: layer.to(dtype).eval() for form, layer in made.items()}


@torch.no_grad()
def layer_ratios(compiled: bool) -> list[dict[str, Any]]:
    """Time of each form over dense, and the share of the multiply-adds, for every layer, type and count of tokens."""
    rows: list[dict[str, Any]] = []
    for dtype in (torch.float32, torch.bfloat16):
        for name, build in SHAPES.items():
            if compiled and not name.startswith("BERT"):
                continue  # compiled, a Conv1D is a Linear
            for keep in KEEPS:
                made = layers(build(), keep, dtype)
                (site,) = Linears().sites(made["pair"])
                kept = {form: Linears().cost(site, made[form].entry) / site.weights for form in FORMS}
                called = {n: torch.compile(m, dynamic=False) if compiled else m for n, m in made.items()}
                for tokens, rounds in ROUNDS.items():
                    x = torch.randn(tokens, site.in_features, dtype=dtype)
                    seconds = medians({n: lambda c=c, x=x: c(x) for n, c in called.items()}, rounds, warmup=5)
                    ratios = {form: seconds[form] / seconds["dense"] for form in FORMS}
                    row = {"layer": name, "dtype": str(dtype)[6:], "keep": keep, "tokens": tokens}
                    rows.append(row | {"compiled": compiled, "ratio": ratios, "multiply_adds": kept})
                    shown = "  ".join(f"{form} {ratio:.2f}" for form, ratio in ratios.items())
                    print(f"{row['dtype']:9}{name:17} keep {keep}  {tokens:5} tokens  {shown}", flush=True)
                torch.compiler.reset()  # it gives up on a function after eight shapes
    return rows


@torch.no_grad()
def packed() -> list[dict[str, Any]]:
    """Three pairs with one input, their `down`s as one product: processor time over that of three products."""
    rows = []
    for width in (384, 768, 2048):
        for keep in (0.5, 0.8):
            three = [layers(nn.Linear(width, width), keep, torch.float32)["pair"] for _ in range(3)]
            together = torch.cat([layer.down.weight for layer in three])
            for tokens in ROUNDS:
                x = torch.randn(tokens, width)

                def one(x: torch.Tensor = x, together: torch.Tensor = together, three: Any = three) -> list[Any]:
                    parts = nn.functional.linear(x, together).chunk(3, -1)
                    return [layer.up(part) for layer, part in zip(three, parts, strict=True)]

                calls = {"packed": one, "apart": lambda x=x, three=three: [layer(x) for layer in three]}
                took = in_turns(calls, x.device, rounds=15)
                rows.append({"width": width, "keep": keep, "tokens": tokens, "ratio": took["packed"] / took["apart"]})
                print(rows[-1], flush=True)
    return rows


def summary(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Median over a family's layers, the pivoted form's time over the pair's, and how many layers keep to the goal.

    The goal: at 32 tokens and more the share of the multiply-adds + 0.10, at one token the share of the weights + 0.15.
    """
    out = []
    key_of = lambda r: (r["layer"].split()[0], r["dtype"], r["compiled"], r["tokens"], r["keep"])  # noqa: E731
    for key in dict.fromkeys(map(key_of, rows)):
        alike = [r for r in rows if key_of(r) == key]
        values: dict[str, Any] = {form: statistics.median(r["ratio"][form] for r in alike) for form in FORMS}
        values["pivoted / pair"] = statistics.median(r["ratio"]["pivoted"] / r["ratio"]["pair"] for r in alike)
        more = 0.15 if key[3] == 1 else 0.10
        values["within_goal"] = {
            form: f"{sum(r['ratio'][form] <= r['multiply_adds'][form] + more for r in alike)} of {len(alike)}"
            for form in FORMS
        }
        out.append(dict(zip(("family", "dtype", "compiled", "tokens", "keep"), key, strict=True)) | values)
    return out


def draw(found: Mapping[str, list[dict[str, Any]]], path: Path) -> None:
    """Time of whole models over dense, in float32, by the share of the layers' parameters: pair and pivoted."""
    panels = {f"BERT-base, {n} token{'s' * (n > 1)}": [r for r in found["forward"] if r["tokens"] == n] for n in ROUNDS}
    panels["GPT-2 small, decoding"] = [r for r in found["decoding"] if r["dtype"] == "float32"]
    figure, axes = pyplot.subplots(1, len(panels), figsize=(3.4 * len(panels), 3.6), sharey=True, layout="constrained")
    for axis, (name, rows) in zip(axes, panels.items(), strict=True):
        for form, marker in zip(FORMS, "so", strict=True):
            axis.plot([r["keep"] for r in rows], [r["ratio"][form] for r in rows], marker=marker, label=form)
        axis.axhline(1, color="black", ls="--", lw=1, label="dense")
        axis.set(title=name, xlabel="keep")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("time over dense")
    axes[0].set_ylim(bottom=0)
    axes[0].legend()
    figure.suptitle("The more tokens a call has, the more of the saved parameters is saved time")
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=PARTS, help="one part alone")
    args = parser.parse_args()
    transformers.logging.set_verbosity_error()
    parts = {
        "layers": lambda: layer_ratios(compiled=False),
        "compiled": lambda: layer_ratios(compiled=True),
        "models": lambda: {"forward": models.forward(KEEPS), "decoding": models.decoding(KEEPS)},
        "packed": packed,
        "training": models.training,
        "factoring": factoring,
    }
    for name, measure in parts.items():
        if args.only in (None, name):
            torch.manual_seed(SEED)
            stored = json.loads(STORED.read_text()) if STORED.exists() else {}
            stored[name] = {"machine": describe(SEED), "results": measure()}
            if name in ("layers", "compiled"):
                found = [row for part in ("layers", "compiled") if part in stored for row in stored[part]["results"]]
                stored["summary"] = summary(found)
            if name == "models":
                draw(stored[name]["results"], RESULTS / "speed.png")
            STORED.write_text(json.dumps(stored, indent=1) + "\n")


if __name__ == "__main__":
    main()
