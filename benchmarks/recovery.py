"""What fine-tuning gives back after conversion, with and without the dense model as a teacher.

    python -m benchmarks.recovery --data DATA        about 25 minutes on 2 cores

MiniLM fine-tuned on SST-2 (DATA/sst2, as for benchmarks.quality), converted to a quarter of its layers' weights, then
trained for one epoch on the training sentences: plainly, and with `distillation_loss`. Once from plain SVD, which loses
much, and once from calibrated factors. Same data, order, steps and learning rate; several seeds. With the sizes and
times of the converted models. Writes results/recovery.json.
"""

import argparse
import copy
import json
import statistics
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

import hf_reparam
from benchmarks.frontier import BATCH, CPU, LENGTH, tokens
from benchmarks.machine import RESULTS, describe
from benchmarks.tasks import SEED, sentiment, sentiment_rows, train_epoch
from hf_reparam.compress.clock import medians
from hf_reparam.compress.compare import megabytes

STORED = RESULTS / "recovery.json"
KEEP = 0.25
SEEDS = (0, 1, 2)


def sizes(small: nn.Module, dense: nn.Module) -> dict[str, float]:
    """Megabytes of two models, and the first one's time for 8 x 128 tokens over the second one's."""
    taken = tokens(dense, BATCH, LENGTH)
    took = medians({name: partial(model, **taken) for name, model in (("small", small), ("dense", dense))}, CPU)
    return {"MB": megabytes(small), "dense MB": megabytes(dense), "time": took["small"] / took["dense"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--sizes", action="store_true", help="sizes and times alone; what was trained stays as stored")
    args = parser.parse_args()
    transformers.logging.set_verbosity_error()
    torch.manual_seed(SEED)
    task, rows = sentiment(args.data, args.data), sentiment_rows(args.data, "train")
    score = lambda model: task.score(model)["accuracy"]  # noqa: E731
    dense = score(task.model)
    results: dict[str, Any] = {"dense": dense, "keep": KEEP, "train_sentences": len(rows), "seeds": SEEDS}
    old = json.loads(STORED.read_text()) if args.sizes else {}
    calibration = hf_reparam.calibrate(task.model, task.batches)
    svd = {"metric": "svd", "allocation": "uniform", "form": "pair"}
    for start, options in {"plain SVD": svd, "calibrated": {}}.items():
        config = hf_reparam.LowRankConfig(keep=KEEP, exclude_modules=task.exclude, **options)
        small = hf_reparam.convert(task.model, config, calibration=calibration)
        converted = score(small)
        measured = {"converted": converted, **sizes(small, task.model)}
        print(start, measured, flush=True)
        if args.sizes:
            results[start] = old["results"][start] | measured
            continue
        found: dict[str, Any] = {"fine-tuned": [], "distilled": [], **measured}
        for seed in SEEDS:
            for way in ("fine-tuned", "distilled"):
                model = copy.deepcopy(small)
                if way == "distilled":
                    with hf_reparam.distillation_loss(task.model, model, alpha=0.9, hidden=1.0) as loss:
                        train_epoch(model, rows, seed=seed, loss=loss)
                else:
                    train_epoch(model, rows, seed=seed)
                found[way].append(score(model))
                print(f"{start}: dense {dense:.4f}, converted {converted:.4f}, {way} {found[way][-1]:.4f}", flush=True)
        lost = dense - converted
        found["regained"] = {
            way: (statistics.mean(found[way]) - converted) / lost for way in ("fine-tuned", "distilled")
        }
        results[start] = found
    machine = {"machine": old["machine"], "machine of sizes": describe(SEED)} if old else {"machine": describe(SEED)}
    STORED.write_text(json.dumps({**machine, "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
