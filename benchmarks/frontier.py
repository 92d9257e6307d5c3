"""What is lost at a size and at a speed: pair, pivoted and `speedup=`, by parameters and by time.

    pip install -e '.[benchmark]'
    python -m benchmarks.frontier --data DATA --models MODELS        about half an hour on 2 busy cores

DATA and MODELS are those of benchmarks.quality. Three real models, each calibrated with 200 examples, are converted
with `keep=` in both forms and with `speedup=`, everything else by default, and judged on test data. Time is that of the
process for one forward pass over 8 texts of 128 random tokens, eager, float32: medians of rounds in which all take
their turn. BERT-base and GPT-2 small are measured by shape, with random weights: what `speedup=` asks for and what the
layers and the whole model reach, at 8 x 128 tokens and at one. Writes results/frontier.json and results/frontier.png.
"""

import argparse
import json
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib
import torch
import transformers
from torch import nn
from transformers import BertConfig, BertModel, GPT2Config, GPT2LMHeadModel

import hf_reparam
from benchmarks import tasks
from benchmarks.machine import RESULTS, describe
from hf_reparam import LowRankConfig, RankPlan
from hf_reparam.compress.clock import Clock, medians
from hf_reparam.model.checks import count_parameters
from hf_reparam.model.host import opened
from hf_reparam.model.sites import select

matplotlib.use("Agg")
from matplotlib import pyplot

STORED = RESULTS / "frontier.json"
EXAMPLES = 200
BATCH, LENGTH = 8, 128
KEEPS = (0.8, 0.6, 0.5, 0.4)
SPEEDUPS = (1.25, 1.5, 2.0)
ROUNDS = 7
WORK = f"ms for {BATCH} x {LENGTH} tokens"
CPU = torch.device("cpu")
SIZES: dict[str, dict[str, Any]] = {
    **{f"keep={keep}, {form}": {"keep": keep, "form": form} for form in ("pivoted", "pair") for keep in KEEPS},
    **{f"speedup={speedup}": {"speedup": speedup} for speedup in SPEEDUPS},
}
TASKS: dict[str, Callable[[Path, Path], tasks.Task]] = {
    "minilm": partial(tasks.similarity, examples=EXAMPLES),
    "gpt2": partial(tasks.gpt2, examples=EXAMPLES),
    "llama": partial(tasks.llama, examples=EXAMPLES),
}
SHAPES: dict[str, Callable[[], nn.Module]] = {
    "BERT-base": lambda: BertModel(BertConfig()),
    "GPT-2 small": lambda: GPT2LMHeadModel(GPT2Config()),
}


def tokens(model: nn.Module, rows: int, length: int) -> dict[str, torch.Tensor]:
    """A batch of random tokens."""
    vocabulary = int(model.config.vocab_size)  # type: ignore[union-attr, arg-type]
    generator = torch.Generator().manual_seed(tasks.SEED)
    return {"input_ids": torch.randint(3, vocabulary, (rows, length), generator=generator)}


def layers_of(plan: RankPlan, model: nn.Module, exclude: tuple[str, ...], rows: int) -> float:
    """Time of the targeted layers over their dense time, measured once more at the ranks of a plan."""
    found = select(opened(model).model, LowRankConfig(exclude_modules=exclude)).selected
    return 1 / Clock(rows).reached([(item.site, plan.modules.get(item.name)) for item in found])


def measure(task: tasks.Task) -> dict[str, Any]:
    """Of every size: what is lost, and shares of parameters, of the layers' time and of the model's time."""
    calibration = hf_reparam.calibrate(task.model, task.batches)
    models, rows = {"dense": task.model}, {}
    for name, options in SIZES.items():
        plan = hf_reparam.make_plan(task.model, LowRankConfig(exclude_modules=task.exclude, **options), calibration)
        small = hf_reparam.convert(task.model, plan, calibration=calibration)
        models[name] = small
        rows[name] = {
            **task.score(small),
            "parameters": count_parameters(small) / count_parameters(task.model),
            "layers": layers_of(plan, task.model, task.exclude, BATCH * LENGTH),
        }
        print(task.name, name, rows[name], flush=True)
    taken = tokens(task.model, BATCH, LENGTH)
    took = medians({name: partial(model, **taken) for name, model in models.items()}, CPU, ROUNDS)
    for name, row in rows.items():
        row["whole"] = took[name] / took["dense"]
    dense = {"dense_ms": 1000 * took["dense"], "dense_MB": 4e-6 * count_parameters(task.model)}  # float32
    return {"rows": rows, **dense, "dense": task.score(task.model)}


def reached(make: Callable[[], nn.Module]) -> dict[str, Any]:
    """What `speedup=` reaches of random weights, at 8 x 128 tokens and at one: the layers, and the whole model."""
    torch.manual_seed(tasks.SEED)
    model = make().eval()
    found: dict[str, Any] = {}
    for rows, length in ((BATCH, LENGTH), (1, 1)):
        taken, models, layers = tokens(model, rows, length), {"dense": model}, {}
        for asked in SPEEDUPS:
            plan = hf_reparam.make_plan(model, LowRankConfig(speedup=asked, tokens=rows * length, metric="svd"))
            layers[str(asked)] = 1 / layers_of(plan, model, (), rows * length)
            models[str(asked)] = hf_reparam.convert(model, plan)
        took = medians({name: partial(one, **taken) for name, one in models.items()}, CPU, ROUNDS)
        found[f"{rows} x {length}"] = {
            asked: {"layers": layers[asked], "whole": took["dense"] / took[asked]} for asked in layers
        }
        print(found, flush=True)
    return found


def draw(results: Mapping[str, Any], path: Path) -> None:
    """For every model, what is lost by megabytes and by milliseconds; dashed, what the dense model has."""
    size = (4.6 * len(results), 7.6)
    figure, axes = pyplot.subplots(2, len(results), figsize=size, layout="constrained", squeeze=False)
    for column, (name, result) in enumerate(results.items()):
        units = {"parameters": (result["dense_MB"], "MB of the model"), "whole": (result["dense_ms"], WORK)}
        for axis, (share, (dense, label)) in zip(axes[:, column], units.items(), strict=True):
            for kind, marker in (("pivoted", "o"), ("pair", "s"), ("speedup", "*")):
                rows = [row for size, row in result["rows"].items() if kind in size]
                points = sorted((dense * row[share], row["lost"]) for row in rows)
                axis.plot(*zip(*points, strict=True), marker=marker, label=f"{kind}=" if kind == "speedup" else kind)
            axis.axvline(dense, color="black", ls="--", lw=1, label="dense")
            axis.set(title=name, xlabel=label, ylabel=result["lost"], yscale="log")
            axis.grid(alpha=0.3)
    axes[0, 0].legend()
    figure.suptitle("What is lost at a size, and at a speed (nothing is trained)")
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--models", type=Path, required=True)
    parser.add_argument("--only", choices=[*TASKS, "shapes"], action="append", help="this part alone; may be repeated")
    args = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    for part in args.only or [*TASKS, "shapes"]:
        torch.manual_seed(tasks.SEED)
        stored = json.loads(STORED.read_text()) if STORED.exists() else {"results": {}, "shapes": {}}
        if part == "shapes":
            stored["shapes"] = {name: reached(make) for name, make in SHAPES.items()} | {
                "machine": describe(tasks.SEED)
            }
        else:
            task = TASKS[part](args.data, args.models)
            stored["results"][task.name] = {"lost": task.lost, **measure(task), "machine": describe(tasks.SEED)}
            draw(stored["results"], RESULTS / "frontier.png")
        STORED.write_text(json.dumps(stored, indent=1) + "\n")


if __name__ == "__main__":
    main()
