"""Dense and converted models in ONNX Runtime and OpenVINO, beside eager PyTorch.

    pip install -e '.[benchmark]'
    python -m benchmarks.export        about 6 minutes on 2 cores

BERT-base and GPT-2 small, without heads, with random weights: dense, and at half of the layers' weights as pairs and
with pivots. Each is exported by torch.onnx.export for one text of 128 tokens, float32. Every runtime has to give what
PyTorch does, with as many threads. Times are medians of rounds in which all models in all runtimes took their turn.
Writes results/export.json; --tiny prints what tiny models give.
"""

import argparse
import json
import logging
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy
import onnxruntime
import openvino
import torch
import transformers

from benchmarks.machine import write
from benchmarks.models import FORMS, converted, shares
from benchmarks.timing import medians
from hf_reparam.layers.linear import PivotedLinear

SEED = 0
KEEP, TOKENS, ROUNDS = 0.5, 128, 15
TINY_BERT = {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 256}
TINY_GPT2 = {"n_embd": 128, "n_layer": 2, "n_head": 2}
CLOSE = 1e-3  # of the largest output: float32, and other orders of sums
Call = Callable[[], numpy.ndarray]


def bert(tiny: bool) -> Any:
    return transformers.BertModel(transformers.BertConfig(**(TINY_BERT if tiny else {})))


def gpt2(tiny: bool) -> Any:
    return transformers.GPT2Model(transformers.GPT2Config(**(TINY_GPT2 if tiny else {}), use_cache=False))


DENSE = {"BERT-base": bert, "GPT-2 small": gpt2}


def with_any_pivots(model: torch.nn.Module) -> torch.nn.Module:
    """The pivots of random layers are the first inputs, which is cheaper to gather than what a conversion finds."""
    for module in model.modules():
        if isinstance(module, PivotedLinear):
            module.order.copy_(torch.randperm(len(module.order)))
    return model


def runtimes(model: Any, ids: torch.Tensor, folder: Path) -> tuple[dict[str, Call], dict[str, float]]:
    """Runtime -> call that gives the last hidden states, and what the export took and is."""
    path, threads, start = folder / "model.onnx", torch.get_num_threads(), time.perf_counter()
    torch.onnx.export(model, (), path, kwargs={"input_ids": ids}, dynamo=True, verbose=False)
    facts = {"export_seconds": time.perf_counter() - start}
    facts["megabytes"] = sum(file.stat().st_size for file in folder.iterdir()) / 1e6

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(path, options)
    settings = {"INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": "f32", "PERFORMANCE_HINT": "LATENCY"}
    compiled = openvino.Core().compile_model(path, "CPU", settings)
    inputs = {"input_ids": ids.numpy()}
    calls: dict[str, Call] = {
        "torch": lambda: model(ids).last_hidden_state.numpy(),
        "onnxruntime": lambda: session.run(None, inputs)[0],
        "openvino": lambda: compiled(inputs)[0],
    }
    return calls, facts


@torch.no_grad()
def measure(name: str, dense: Any, rounds: int) -> dict[str, Any]:
    """Seconds of every model in every runtime, time over the dense model's there, and how far outputs are apart."""
    ids = torch.randint(1000, 30000, (1, TOKENS))
    models = {"dense": dense, **{form: with_any_pivots(converted(dense, KEEP, form)) for form in FORMS}}
    calls: dict[tuple[str, str], Call] = {}
    row: dict[str, Any] = {"model": name, "keep": KEEP, "tokens": TOKENS, "export": {}, "difference": {}}
    row["parameter_ratio"] = {form: shares(dense, models[form])["parameter_ratio"] for form in FORMS}
    with tempfile.TemporaryDirectory() as folder:
        for form, model in models.items():
            place = Path(folder) / form
            place.mkdir()
            made, row["export"][form] = runtimes(model, ids, place)
            expected = made["torch"]()
            apart = {kind: float(abs(call() - expected).max() / abs(expected).max()) for kind, call in made.items()}
            if max(apart.values()) > CLOSE:
                raise SystemExit(f"{name}, {form}: outputs differ from PyTorch's by {apart} of the largest")
            row["difference"][form] = apart
            calls |= {(kind, form): call for kind, call in made.items()}
        found = medians({f"{kind} {form}": call for (kind, form), call in calls.items()}, rounds, warmup=2)
    kinds = dict.fromkeys(kind for kind, _ in calls)
    row["seconds"] = {kind: {form: found[f"{kind} {form}"] for form in models} for kind in kinds}
    row["ratio"] = {kind: {form: s[form] / s["dense"] for form in FORMS} for kind, s in row["seconds"].items()}
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--tiny", action="store_true", help="tiny models, whose figures are printed and not stored")
    args = parser.parse_args()
    transformers.logging.set_verbosity_error()
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    torch.manual_seed(SEED)
    rows = []
    for name, build in DENSE.items():
        rows.append(measure(name, build(args.tiny).eval(), args.rounds))
        print(json.dumps(rows[-1], indent=1), flush=True)
    if not args.tiny:
        packages = {package: version(package) for package in ("onnx", "onnxruntime", "onnxscript", "openvino")}
        write("export", {"packages": packages, "results": rows}, SEED)


if __name__ == "__main__":
    main()
