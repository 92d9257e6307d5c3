"""Low rank, int8, and both: what is lost at how many bytes, and how long it takes.

    pip install -e '.[benchmark]'
    python -m benchmarks.bytes --data DATA --models MODELS        about 15 minutes on 2 cores

DATA and MODELS are those of benchmarks.quality. Three real models, calibrated with 200 examples, dense and converted
by default options, are stored in float32, in bfloat16 and in int8 by torchao: weights alone, a scale for each output;
and with dynamic int8 activations, too, one scale for each token. Products of int8 take ten times as long here, so
these are scored with the same rounded inputs and weights multiplied in float32: one layer agrees to 3e-7; over a whole
model, values that are rounded to the other side add up, and "apart" says how far the outputs of both are from each
other. Bytes are those of the targeted layers, scales and biases included: all else stays as it is. Nothing is trained.
Time is that of the process, one forward pass over 8 x 128 random tokens, in rounds in which all take their turn. A
GPT-2's Conv1D are Linears here, for torchao knows no others. Writes results/bytes.json and results/bytes.png.
"""

import copy
import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import matplotlib
import torch
from torch import nn
from torchao.quantization import (
    Int8DynamicActivationInt8WeightConfig,
    Int8Tensor,
    Int8WeightOnlyConfig,
    PerRow,
    quantize_,
)
from transformers.pytorch_utils import Conv1D

import hf_reparam
from benchmarks import tasks
from benchmarks.frontier import BATCH, CPU, LENGTH, ROUNDS, tokens
from benchmarks.machine import RESULTS
from hf_reparam import LowRankConfig
from hf_reparam.compress.clock import medians
from hf_reparam.compress.compare import megabytes
from hf_reparam.model.sites import select

matplotlib.use("Agg")
from matplotlib import pyplot

STORED = RESULTS / "bytes.json"
EXAMPLES = 200
KEEPS = (0.8, 0.6, 0.4)
TASKS: dict[str, Callable[..., tasks.Task]] = {
    "minilm": partial(tasks.similarity, examples=EXAMPLES),
    "gpt2": partial(tasks.gpt2, examples=EXAMPLES),
    "llama": partial(tasks.llama, examples=EXAMPLES),
}
DYNAMIC = "int8, dynamic"
Store = Callable[[nn.Module], Any]


def with_linears(model: nn.Module) -> nn.Module:
    """A copy whose Conv1D are Linears."""
    model = copy.deepcopy(model)
    for name, module in list(model.named_modules()):
        if isinstance(module, Conv1D):
            rows, columns = module.weight.shape
            linear = nn.Linear(rows, columns)
            linear.weight.data, linear.bias = module.weight.data.T.contiguous(), module.bias
            model.set_submodule(name, linear)
    return model


def rounded(layer: nn.Module) -> None:
    """To the nearest numbers of bfloat16; they are computed with in float32, as elsewhere in the model."""
    for parameter in layer.parameters():
        parameter.data = parameter.data.to(torch.bfloat16).float()


def as_dynamic(layer: nn.Module) -> None:
    """Weights and inputs rounded as by dynamic int8; their products are those of float32."""

    def rounded_input(_: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        return (Int8Tensor.from_hp(inputs[0], PerRow()).dequantize(),)

    quantize_(layer, Int8WeightOnlyConfig())
    for module in layer.modules():
        if isinstance(module, nn.Linear):
            module.register_forward_pre_hook(rounded_input)


STORES: dict[str, Store] = {
    "float32": lambda layer: None,
    "bfloat16": rounded,
    "int8": lambda layer: quantize_(layer, Int8WeightOnlyConfig()),
    DYNAMIC: lambda layer: quantize_(layer, Int8DynamicActivationInt8WeightConfig()),
}


def stored(model: nn.Module, names: Sequence[str], store: Store) -> nn.Module:
    """A copy with these layers stored otherwise."""
    made = copy.deepcopy(model)
    for name in names:
        store(made.get_submodule(name))
    return made


@torch.no_grad()
def apart(one: nn.Module, other: nn.Module, taken: Mapping[str, Any]) -> float:
    """The norm of the difference of two models' first outputs, over that of the first."""
    mine, others = one(**taken)[0], other(**taken)[0]
    return float((mine - others).norm() / mine.norm())


def measure(task: tasks.Task) -> dict[str, Any]:
    """Of every keep and dtype: what is lost, megabytes of the targeted layers, time over dense float32."""
    dense = with_linears(task.model)
    calibration = hf_reparam.calibrate(dense, task.batches)
    names = [item.site.name for item in select(dense, LowRankConfig(exclude_modules=task.exclude)).selected]
    models: dict[str, nn.Module] = {}
    rows: dict[str, dict[str, float]] = {}
    taken = tokens(task.model, BATCH, LENGTH)
    for keep in (None, *KEEPS):
        small = dense
        if keep:
            config = LowRankConfig(keep=keep, exclude_modules=task.exclude)
            small = hf_reparam.convert(dense, config, calibration=calibration)
        for kind, store in STORES.items():
            made = stored(small, names, store)
            key = f"{f'keep {keep}' if keep else 'dense'}, {kind}"
            models[key] = made
            layers = sum(megabytes(made.get_submodule(name)) for name in names)
            size = layers / 2 if kind == "bfloat16" else layers
            scored = stored(small, names, as_dynamic) if kind == DYNAMIC else made
            rows[key] = {**task.score(scored), "MB": size, "whole MB": megabytes(made) - layers + size}
            if kind == DYNAMIC:
                rows[key]["apart"] = apart(made, scored, taken)
            print(task.name, key, rows[key], flush=True)
    timed = {key: partial(model, **taken) for key, model in models.items() if "bfloat16" not in key}
    took = medians(timed, CPU, ROUNDS)
    for key, seconds in took.items():
        rows[key]["time"] = seconds / took["dense, float32"]
    return {"rows": rows}


def draw(results: Mapping[str, Any]) -> None:
    """What is lost by the bytes of the layers, a line for every way to store them."""
    figure, axes = pyplot.subplots(
        1, len(results), figsize=(4.6 * len(results), 4), layout="constrained", squeeze=False
    )
    for axis, (name, result) in zip(axes[0], results.items(), strict=True):
        whole = result["rows"]["dense, float32"]["MB"]
        for kind, marker in zip(STORES, "os^v", strict=True):
            found = {key: row for key, row in result["rows"].items() if key.partition(", ")[2] == kind}
            low = sorted((row["MB"] / whole, row["lost"]) for key, row in found.items() if key.startswith("keep"))
            (line,) = axis.plot(*zip(*low, strict=True), marker=marker, ms=4, label=f"low rank, {kind}")
            if kind != "float32":
                row = found[f"dense, {kind}"]
                axis.plot(row["MB"] / whole, row["lost"], "*", ms=13, color=line.get_color(), label=f"dense, {kind}")
        axis.set(title=name, xlabel="bytes of the layers over dense float32", ylabel=result["lost"])
        axis.set_yscale("symlog", linthresh=1e-3)
        axis.grid(alpha=0.3)
    axes[0, 0].legend(fontsize=7)
    figure.savefig(RESULTS / "bytes.png", dpi=110)


if __name__ == "__main__":
    tasks.run(__doc__, TASKS, measure, STORED)
    draw(json.loads(STORED.read_text())["results"])
