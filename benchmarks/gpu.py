"""What low rank is worth on one GPU: its tests, then conversion, calibration, time of layers and models, memory.

    make gpu
    python -m benchmarks.gpu [--models FOLDER] [--minutes 8] [--small]

Needs torch, transformers, accelerate and safetensors, and pytest for the tests; no network. Random weights in the
shapes of BERT-base, GPT-2 small and a Llama of 1B parameters; FOLDER may hold real models, which are converted and
timed, too.
Parts run in the order below until the minutes are over, and what did not run is named. Every ratio is that of medians
over rounds in which all took their turn. Without a GPU, and with --small, everything is tiny and shows only that it
runs. Writes results/gpu-CARD.json, part by part; OUT with --out.
"""

import argparse
import json
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

import hf_reparam
from benchmarks.machine import RESULTS, describe
from benchmarks.models import converted
from hf_reparam import LowRankConfig
from hf_reparam.compress.clock import drawn, medians
from hf_reparam.layers.dense import dense_matrix
from hf_reparam.structures.linear import Linears

SEED = 0
FORMS = ("pair", "pivoted")
KEEPS = (0.3, 0.5, 0.8)
MODES = {"eager": None, "compiled": "default", "CUDA graphs": "reduce-overhead"}
PLAIN = LowRankConfig(keep=0.5, metric="svd")


@dataclass(frozen=True)
class Setting:
    """Where and how large things run.

    Args:
        device: "cuda" or "cpu".
        small: tiny models, few tokens and rounds.
        models: real models to be timed beside.
    """

    device: torch.device
    small: bool
    models: tuple[Path, ...] = ()

    @property
    def dtypes(self) -> tuple[torch.dtype, ...]:
        return (torch.bfloat16,) if self.small else (torch.bfloat16, torch.float16)

    @property
    def tokens(self) -> tuple[int, ...]:
        return (1, 32) if self.small else (1, 32, 1024, 16384)

    @property
    def modes(self) -> dict[str, str | None]:
        return {"eager": None} if self.small else MODES

    def bert(self) -> Any:
        # small, but wide enough to get faster in bfloat16 on processors with products of their own for it
        size = {"hidden_size": 128, "num_hidden_layers": 1, "intermediate_size": 512, "num_attention_heads": 2}
        config = transformers.BertConfig(**size if self.small else {})
        return transformers.BertForMaskedLM(config).to(self.device).eval()

    def gpt2(self) -> Any:
        size = {"n_embd": 64, "n_layer": 1, "n_head": 2} if self.small else {}
        return transformers.GPT2LMHeadModel(transformers.GPT2Config(**size)).to(self.device).eval()

    def llama(self) -> Any:
        large = {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32}
        tiny = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "num_attention_heads": 2}
        size = (tiny | {"vocab_size": 1000}) if self.small else (large | {"vocab_size": 128_256})
        heads = {"num_key_value_heads": 2 if self.small else 8, "tie_word_embeddings": True}
        with self.device:
            return transformers.LlamaForCausalLM(transformers.LlamaConfig(**size, **heads)).eval()

    def ids(self, *shape: int) -> torch.Tensor:
        return torch.randint(10, 900, shape, device=self.device)


def tests(setting: Setting) -> dict[str, Any]:
    """The tests marked `cuda`."""
    command = [sys.executable, "-m", "pytest", "-m", "cuda", "tests/test_cuda.py", "-p", "no:cacheprovider"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[1])
    last = done.stdout.strip().splitlines()[-12:]
    return {"status": done.returncode, "output": last}


def conversion(setting: Setting) -> dict[str, Any]:
    """Seconds of a plain conversion at half of the weights, and of torch's SVDs of the same weights."""
    found = {}
    for name, build in {"BERT-base": setting.bert, "Llama 1B": setting.llama}.items():
        model = build()
        found[name] = {"convert": once(lambda m=model: hf_reparam.convert(m, PLAIN), setting)}
        weights = [dense_matrix(site.module) for site in Linears().sites(model) if site.reason is None]
        shapes = {tuple(weight.shape): weight for weight in weights}
        for dtype in (torch.float32, torch.float64):
            svd = {
                s: once(lambda w=w, t=dtype: torch.linalg.svd(w.to(t), full_matrices=False), setting)
                for s, w in shapes.items()
            }
            found[name][f"torch.linalg.svd, {str(dtype)[6:]}"] = sum(svd[tuple(weight.shape)] for weight in weights)
        del model, weights, shapes
    return found


def calibration(setting: Setting) -> dict[str, Any]:
    """Tokens a second of calibration, and of a training step with AdamW; BERT-base."""
    model, batch = setting.bert(), setting.ids(8, 16 if setting.small else 128)
    batches = [{"input_ids": batch}] * 6
    seconds = once(lambda: hf_reparam.calibrate(model, batches), setting) / len(batches)
    optimizer = torch.optim.AdamW(model.parameters())

    def step() -> None:
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    return {"calibration": batch.numel() / seconds, "training": batch.numel() / once(step, setting)}


@torch.inference_mode()
def layers(setting: Setting) -> list[dict[str, Any]]:
    """Time of each form over dense for the distinct layers of BERT-base and the Llama."""
    shapes = (
        ((64, 96),)
        if setting.small
        else ((768, 768), (768, 3072), (3072, 768), (2048, 2048), (2048, 8192), (8192, 2048))
    )
    rows = []
    for dtype in setting.dtypes:
        for n_in, n_out in shapes:
            dense = nn.Linear(n_in, n_out, device=setting.device, dtype=dtype)
            for keep in KEEPS:
                made = {"dense": dense} | {form: sized(dense, keep, form) for form in FORMS}
                for tokens in setting.tokens:
                    x = torch.randn(1, tokens, n_in, device=setting.device, dtype=dtype)
                    seconds = medians({n: lambda m=m, x=x: m(x) for n, m in made.items()}, setting.device)
                    ratio = {form: seconds[form] / seconds["dense"] for form in FORMS}
                    rows.append(
                        {
                            "in": n_in,
                            "out": n_out,
                            "dtype": str(dtype)[6:],
                            "keep": keep,
                            "tokens": tokens,
                            "ratio": ratio,
                        }
                    )
    return rows


def sized(dense: nn.Linear, keep: float, form: str) -> nn.Module:
    """A low-rank layer of this size with drawn numbers."""
    plan = hf_reparam.make_plan(nn.Sequential(dense), LowRankConfig(keep=keep, form=form, metric="svd"))
    return drawn(dense, plan.modules["0"])


@torch.inference_mode()
def forward(setting: Setting) -> list[dict[str, Any]]:
    """Time of whole models over dense, by mode, dtype and tokens; and of real ones, in bfloat16 and eager."""
    rows = []
    for dtype in setting.dtypes:
        for name, build in {"BERT-base": setting.bert, "Llama 1B": setting.llama}.items():
            dense = build().to(dtype)
            for keep in (0.5,) if setting.small else KEEPS:
                models = {"dense": dense} | {form: converted(dense, keep, form).to(setting.device) for form in FORMS}
                for mode, compiled in setting.modes.items():
                    for tokens in setting.tokens[:3]:
                        ids = setting.ids(max(1, tokens // 128), min(tokens, 128))
                        rows.append(
                            {"model": name, "dtype": str(dtype)[6:], "keep": keep, "mode": mode, "tokens": tokens}
                        )
                        rows[-1]["ratio"] = ratios(models, ids, compiled, setting)
                        torch.compiler.reset()
    for folder in setting.models:
        dense = transformers.AutoModel.from_pretrained(folder, dtype=torch.bfloat16, device_map=setting.device).eval()
        models = {"dense": dense} | {
            form: hf_reparam.convert(dense, LowRankConfig(keep=0.5, form=form, metric="svd")) for form in FORMS
        }
        rows.append({"model": folder.name, "keep": 0.5, "ratio": ratios(models, setting.ids(8, 128), None, setting)})
    return rows


def ratios(models: dict[str, Any], ids: torch.Tensor, mode: str | None, setting: Setting) -> dict[str, float]:
    """Time of a forward pass over the dense model's, and its seconds."""
    made = {n: m if mode is None else torch.compile(m, mode=mode) for n, m in models.items()}
    seconds = medians({n: lambda m=m: m(input_ids=ids) for n, m in made.items()}, setting.device)
    return {form: seconds[form] / seconds["dense"] for form in FORMS} | {"dense seconds": seconds["dense"]}


@torch.inference_mode()
def decoding(setting: Setting) -> list[dict[str, Any]]:
    """Greedy decoding, batch 1, over dense: eager with a dynamic cache, and with the static one, which compiles."""
    rows, new = [], 4 if setting.small else 64
    for name, build in {"GPT-2 small": setting.gpt2, "Llama 1B": setting.llama}.items():
        dense = build().to(torch.bfloat16)
        models = {"dense": dense} | {form: converted(dense, 0.5, form).to(setting.device) for form in FORMS}
        prompt = setting.ids(1, 32)
        for cache in (None,) if setting.small else (None, "static"):
            options = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False, "cache_implementation": cache}
            run = {n: partial(m.generate, prompt, pad_token_id=0, **options) for n, m in models.items()}
            seconds = medians(run, setting.device, rounds=3)
            row = {"model": name, "cache": cache or "dynamic", "dense seconds a token": seconds["dense"] / new}
            rows.append(row | {"ratio": {form: seconds[form] / seconds["dense"] for form in FORMS}})
    return rows


def memory(setting: Setting) -> dict[str, Any]:
    """Bytes on the device at the peak of a conversion in place, over those of the model."""
    if setting.device.type != "cuda":
        return {}
    model = setting.llama()
    held = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    hf_reparam.convert(model, PLAIN, inplace=True)
    return {"dense": held, "peak": torch.cuda.max_memory_allocated(), "after": torch.cuda.memory_allocated()}


def speedup(setting: Setting) -> list[dict[str, Any]]:
    """What was asked of the targeted layers and what was reached, with 8 x 128 tokens a call and with one."""
    rows = []
    for dtype in setting.dtypes:
        model = setting.bert().to(dtype)
        batches = [{"input_ids": setting.ids(8, 16 if setting.small else 128)} for _ in range(5)]
        known = hf_reparam.calibrate(model, batches)
        for asked, tokens in ((1.05, 4096),) if setting.small else ((1.25, 1024), (1.5, 1024), (2.0, 1024), (1.5, 1)):
            tiny = {"min_rank": 1} if setting.small else {}
            config = LowRankConfig(speedup=asked, tokens=tokens, verify=False, **tiny)
            speed = hf_reparam.make_plan(model, config, known).report.speed
            row = {"dtype": str(dtype)[6:], "tokens": tokens, "asked": asked}
            rows.append({**row, "layers": speed.layers, "model": speed.model})
    return rows


def once(run: Callable[[], Any], setting: Setting) -> float:
    """Median seconds of three calls."""
    synchronize = torch.cuda.synchronize if setting.device.type == "cuda" else lambda: None
    took = []
    for _ in range(1 if setting.small else 3):
        synchronize()
        start = time.perf_counter()
        run()
        synchronize()
        took.append(time.perf_counter() - start)
    return statistics.median(took)


PARTS = (tests, layers, speedup, conversion, calibration, forward, decoding, memory)


def measured(setting: Setting, seconds: float) -> Iterator[tuple[str, Any]]:
    """The results of all parts that begin in time, one by one; None for the others."""
    end = time.monotonic() + seconds
    for part in PARTS:
        if time.monotonic() > end:
            yield part.__name__, None
            continue
        torch.manual_seed(SEED)
        start = time.monotonic()
        try:
            result: Any = part(setting)
        except Exception as error:  # the other parts are worth having
            result = {"error": f"{type(error).__name__}: {error}"[:500]}
        yield part.__name__, {"seconds": time.monotonic() - start, "results": result}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, help="a folder of folders of real models")
    parser.add_argument("--minutes", type=float, default=8)
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    cuda = torch.cuda.is_available()
    card = torch.cuda.get_device_name() if cuda else "CPU"
    folders = () if args.models is None else tuple(sorted(p.parent for p in args.models.glob("*/config.json")))
    setting = Setting(torch.device("cuda" if cuda else "cpu"), args.small or not cuda, folders)
    out = args.out or RESULTS / f"gpu-{re.sub(r'[^A-Za-z0-9]+', '-', card).strip('-')}.json"
    stored: dict[str, Any] = {"card": card, "machine": describe(SEED), "small": setting.small, "parts": {}}
    failed = []
    for name, result in measured(setting, 60 * args.minutes):
        stored["parts"][name] = result
        out.write_text(json.dumps(stored, indent=1) + "\n")
        problem = "not run: no time left" if result is None else ""
        if result is not None and isinstance(found := result["results"], dict):
            problem = found.get("error") or ("tests failed" if found.get("status") else "")
        failed += [name] if problem else []
        print(f"{name:12} {problem or 'done'}", flush=True)
    print(f"{out.name}: {len(PARTS) - len(failed)} of {len(PARTS)} parts")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
