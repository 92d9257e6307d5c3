"""Narrower heads: what they lose by themselves, and what they save in a cache and in decoding.

    python -m benchmarks.heads --data DATA --models MODELS        about 6 minutes on 2 cores; for the folders see
                                                                  benchmarks.quality

*Quality*: every attention at the same width, every layer dense, without retraining: in the metric of weights, by the
formulas of MoDeGPT (arXiv 2408.09632; products of a head in the metric of its inputs), and in this package's.
*Decoding*: a GPT-2 small with random weights, batch 1, after prompts of 32 and 960 tokens: bytes of its cache, and
seconds for a token, in rounds in which all widths took their turn. Writes results/heads.json.
"""

import argparse
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import transformers
from torch import nn

import hf_reparam
from benchmarks import tasks
from benchmarks.machine import write
from benchmarks.timing import medians
from hf_reparam import Entry, RankPlan
from hf_reparam.linalg.heads import HeadMaps, HeadMoments, output_moment
from hf_reparam.model.host import layer_name
from hf_reparam.structures.heads import Heads
from hf_reparam.structures.heads.narrow import NarrowHeads

SHARES = (0.75, 0.5, 0.25)
GENERATED, PROMPTS = 32, (32, 960)


def with_widths(model: Any, share: float, metric: str = "svd") -> RankPlan:
    """Every attention with this share of the width of its heads, and nothing else."""
    sites = {layer_name(model, site.name): site for site in Heads().sites(model)}
    entries = {name: Entry(round(site.out_features * share), "heads") for name, site in sites.items()}
    return RankPlan(entries, model.config.model_type, metric)


def modegpt(heads: NarrowHeads) -> tuple[HeadMoments, HeadMaps]:
    """MoDeGPT's products of a head: W_Q^T W_K and W_O W_V in the uncentred second moment of the inputs."""
    parts = []
    for role in ("key", "query", "value"):
        weight, bias = heads.weight(role)
        seen = heads.moments(role)
        assert seen is not None
        parts.append(output_moment(weight, bias, seen.input_products / seen.tokens, seen.mean()))
    weight, _ = heads.weight("output")
    moments = HeadMoments(heads.attention.heads, *parts, weight.T @ weight)
    return moments, moments.maps()


def quality(task: tasks.Task) -> dict[str, Any]:
    """What is lost at each share of the width, by method."""
    calibration = hf_reparam.calibrate(task.model, task.batches)
    rows: dict[str, dict[str, Any]] = {}
    for name, metric in (("weights", "svd"), ("MoDeGPT", "activation"), ("this package", "fisher")):
        for share in SHARES:
            plan = with_widths(task.model, share, metric)
            prepare = modegpt if name == "MoDeGPT" else NarrowHeads.prepare
            with mock.patch.object(NarrowHeads, "prepare", prepare):
                small = hf_reparam.convert(task.model, plan, calibration=None if metric == "svd" else calibration)
            rows.setdefault(name, {})[str(share)] = task.score(small)
            print(f"{task.name:11} {name:13} {share:<5} {rows[name][str(share)]['lost']:.4f}", flush=True)
    return {"lost": task.lost, "attentions": len(plan.modules), "rows": rows}


def cache_bytes(model: Any, length: int) -> int:
    """Of keys and values after a prompt."""
    cache = model(torch.zeros(1, length, dtype=torch.long), use_cache=True).past_key_values
    return sum(t.numel() * t.element_size() for layer in cache.layers for t in (layer.keys, layer.values))


def decoder(model: nn.Module, length: int) -> Any:
    """Greedy decoding of GENERATED tokens; the prompt is read before."""
    ids = torch.randint(1000, 30000, (1, length), generator=torch.Generator().manual_seed(0))
    prompt = model(ids, use_cache=True)

    def run() -> None:
        out, cache = prompt, prompt.past_key_values
        for _ in range(GENERATED):
            out = model(out.logits[:, -1:].argmax(-1), past_key_values=cache, use_cache=True)
        cache.crop(-GENERATED)

    return run


@torch.no_grad()
def decoding() -> list[dict[str, Any]]:
    """Bytes and seconds of a dense GPT-2 small, of one with narrower heads, and of one that is low-rank, too."""
    torch.manual_seed(tasks.SEED)
    dense = transformers.GPT2LMHeadModel(transformers.GPT2Config()).eval()
    models: dict[str, Any] = {"dense": dense}
    for share in SHARES:
        models[f"heads {share}"] = hf_reparam.convert(dense, with_widths(dense, share))
    config = hf_reparam.LowRankConfig(rank={"*": 0.29}, form="pivoted")
    models["heads 0.5, keep 0.5"] = hf_reparam.convert(models["heads 0.5"], config)
    rows = []
    for length in PROMPTS:
        sizes = {name: cache_bytes(model, length) for name, model in models.items()}
        seconds = medians({name: decoder(model, length) for name, model in models.items()}, 5)
        for name in models:
            ratio = seconds[name] / seconds["dense"]
            row = {"prompt": length, "model": name, "cache_bytes": sizes[name], "seconds": seconds[name] / GENERATED}
            rows.append(row | {"ratio": ratio, "cache_ratio": sizes[name] / sizes["dense"]})
            print(f"prompt {length:4} {name:20} cache {sizes[name]:>12,} bytes  time {ratio:.2f}", flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--models", type=Path, required=True)
    args = parser.parse_args()
    transformers.logging.disable_progress_bar()
    transformers.logging.set_verbosity_error()
    tables = [task(args.data, args.models) for task in (tasks.similarity, tasks.gpt2)]
    write("heads", {"quality": {task.name: quality(task) for task in tables}, "decoding": decoding()}, tasks.SEED)


if __name__ == "__main__":
    main()
