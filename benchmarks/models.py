"""Whole models with random weights, dense and converted: forward, decoding with a cache, a training step."""

import statistics
import tempfile
import time
from typing import Any

import torch
import transformers
from torch import nn

from benchmarks.timing import medians
from hf_reparam import LowRankConfig, make_plan
from hf_reparam.model.auto import register
from hf_reparam.model.checks import count_parameters
from hf_reparam.model.classes import model_class

__all__ = ["decoding", "forward", "training"]

FORMS = ("pair", "pivoted")
PROMPT, GENERATED = 32, 32


def converted(dense: Any, keep: float, form: str) -> Any:
    """A model of the shape that a conversion by size would give, with random weights: no SVD is needed to time it."""
    plan = make_plan(dense, LowRankConfig(keep=keep, form=form, metric="svd"))
    config = register(type(dense.config))(**dense.config.to_diff_dict(), reparam=plan.to_dict())
    return model_class(type(dense))(config).to(dense.dtype).eval()


def shares(dense: nn.Module, low: nn.Module) -> dict[str, float]:
    """What is kept of the whole model's parameters."""
    return {"parameter_ratio": count_parameters(low) / count_parameters(dense)}


@torch.no_grad()
def forward(keeps: tuple[float, ...]) -> list[dict[str, Any]]:
    """BERT-base, eager, float32: 1, 32 and 1024 tokens."""
    dense = transformers.BertModel(transformers.BertConfig()).eval()
    rows = []
    for keep in keeps:
        models = {"dense": dense, **{form: converted(dense, keep, form) for form in FORMS}}
        for shape, rounds in (((1, 1), 30), ((1, 32), 15), ((8, 128), 5)):
            ids = torch.randint(1000, 30000, shape)
            seconds = medians({name: lambda m=m, i=ids: m(i) for name, m in models.items()}, rounds)
            rows.append({"keep": keep, "tokens": ids.numel()} | compared(models, seconds))
            show("BERT-base forward", rows[-1])
    return rows


@torch.no_grad()
def decoding(keeps: tuple[float, ...]) -> list[dict[str, Any]]:
    """GPT-2 small, eager, batch 1: seconds for each new token after a prompt, keys and values cached."""
    rows = []
    for dtype in (torch.float32, torch.bfloat16):
        dense = transformers.GPT2LMHeadModel(transformers.GPT2Config()).to(dtype).eval()
        for keep in keeps:
            models = {"dense": dense, **{form: converted(dense, keep, form) for form in FORMS}}
            seconds = {
                name: s / GENERATED for name, s in medians({n: decoder(m) for n, m in models.items()}, 3).items()
            }
            rows.append({"dtype": str(dtype)[6:], "keep": keep} | compared(models, seconds))
            show(f"GPT-2 decoding, {rows[-1]['dtype']}", rows[-1])
    return rows


def decoder(model: Any) -> Any:
    """Greedy decoding of GENERATED tokens from a prompt of PROMPT."""
    ids = torch.randint(1000, 30000, (1, PROMPT), generator=torch.Generator().manual_seed(0))

    def run() -> None:
        out = model(ids, use_cache=True)
        for _ in range(GENERATED):
            token = out.logits[:, -1:].argmax(-1)
            out = model(token, past_key_values=out.past_key_values, use_cache=True)

    return run


def compared(models: dict[str, Any], seconds: dict[str, float]) -> dict[str, Any]:
    """Ratios of time and of parameters to the dense model."""
    return {
        "dense_seconds": seconds["dense"],
        "ratio": {form: seconds[form] / seconds["dense"] for form in FORMS},
        "parameter_ratio": {form: shares(models["dense"], models[form])["parameter_ratio"] for form in FORMS},
    }


class Clock(transformers.TrainerCallback):
    """Seconds of every optimizer step."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self.start = time.perf_counter()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.seconds.append(time.perf_counter() - self.start)


def training(keep: float = 0.5, steps: int = 3, turns: int = 2) -> dict[str, Any]:
    """A step of `Trainer`, AdamW, BERT-base with two classes, batch 8 x 128; dense and converted take turns."""
    dense = transformers.BertForSequenceClassification(transformers.BertConfig())
    models = {"dense": dense, **{form: converted(dense, keep, form) for form in FORMS}}
    rows = [{"input_ids": torch.randint(1000, 30000, (128,)), "labels": i % 2} for i in range(8 * (steps + 1))]
    seconds: dict[str, list[float]] = {name: [] for name in models}
    state: dict[str, int] = {}
    for _ in range(turns):
        for name, model in models.items():
            with tempfile.TemporaryDirectory() as folder:
                options = {"max_steps": steps + 1, "per_device_train_batch_size": 8, "save_strategy": "no"}
                quiet = {"report_to": [], "disable_tqdm": True, "logging_strategy": "no", "use_cpu": True}
                clock = Clock()
                arguments = transformers.TrainingArguments(folder, **options, **quiet)
                trainer = transformers.Trainer(model, arguments, train_dataset=rows, callbacks=[clock])
                trainer.train()
            seconds[name] += clock.seconds[1:]  # the first step makes the optimizer's state
            tensors = (v for entry in trainer.optimizer.state.values() for v in entry.values())
            state[name] = sum(t.numel() * t.element_size() for t in tensors if isinstance(t, torch.Tensor))
    medians_of = {name: statistics.median(series) for name, series in seconds.items()}
    found = {"keep": keep, "batch": [8, 128], **compared(models, medians_of)}
    found["optimizer_state_ratio"] = {form: state[form] / state["dense"] for form in FORMS}
    show("BERT-base training step", found)
    return found


def show(what: str, row: dict[str, Any]) -> None:
    ratios = "  ".join(f"{form} {ratio:.2f}" for form, ratio in row["ratio"].items())
    size = "  ".join(f"{ratio:.2f}" for ratio in row["parameter_ratio"].values())
    tokens = f"{row['tokens']:5} tokens  " if "tokens" in row else ""
    print(f"{what:28} keep {row['keep']}  {tokens}time {ratios}  parameters {size}", flush=True)
