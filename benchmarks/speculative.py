"""A converted model as the assistant of its dense one: what is accepted, and what that is in time.

    pip install -e '.[benchmark]'
    python -m benchmarks.speculative --data DATA --models MODELS        about 3 minutes on 2 cores; for the folders see
                                                                        benchmarks.quality

The GPT-2 of benchmarks.quality, converted by default on all of its calibration data and held as pairs, proposes four
tokens at a time: greedy texts of 96 tokens after prompts of 32 that were not calibrated with, batch 1. It checks that
they are the dense model's. Times are medians of rounds in which all took their turn. Writes results/speculative.json.
"""

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoTokenizer

import hf_reparam
from benchmarks import tasks
from benchmarks.machine import write
from benchmarks.timing import medians

KEEPS = (0.8, 0.6, 0.4)
PROMPTS, PROMPT, GENERATED, ROUNDS = 8, 32, 96, 3
PROPOSED = 4  # tokens for each call of the dense model


def prompts(data: Path, models: Path, count: int) -> list[torch.Tensor]:
    """(1, PROMPT) token ids each, from all over the text that nothing was calibrated with."""
    tokenizer = AutoTokenizer.from_pretrained(models / "gpt2-novels")
    text = (data / "novels" / "heldout.txt").read_text()
    ids = torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"])
    starts = torch.linspace(0, len(ids) - PROMPT, count).long().tolist()
    return [ids[start : start + PROMPT][None] for start in starts]


@contextmanager
def counted(model: torch.nn.Module) -> Iterator[list[int]]:
    """In the block, one entry for each call of a model."""
    calls: list[int] = []
    hook = model.register_forward_hook(lambda *_: calls.append(1))
    try:
        yield calls
    finally:
        hook.remove()


@torch.no_grad()
def text(model: Any, ids: torch.Tensor, helper: Any = None) -> torch.Tensor:
    """Greedy; it does not end before GENERATED tokens."""
    options = {"do_sample": False, "max_new_tokens": GENERATED, "min_new_tokens": GENERATED}
    found = model.generate(ids, attention_mask=torch.ones_like(ids), assistant_model=helper, **options)
    return torch.as_tensor(found)


def assistant(small: Any) -> Any:
    """A converted model that always proposes PROPOSED tokens; by default it stops where it is not confident."""
    model = hf_reparam.to_pairs(small)
    model.generation_config.num_assistant_tokens = PROPOSED
    model.generation_config.num_assistant_tokens_schedule = "constant"
    model.generation_config.assistant_confidence_threshold = 0.0
    return model


def acceptance(dense: Any, small: Any, starts: list[torch.Tensor], expected: list[torch.Tensor]) -> dict[str, float]:
    """Tokens for each call of the dense model, of which one is its own, and the share of proposals that it accepts."""
    with counted(dense) as calls, counted(small) as proposals:
        found = [text(dense, ids, small) for ids in starts]
    if not all(map(torch.equal, found, expected)):
        raise SystemExit("an assisted text is not the dense model's")
    tokens = GENERATED * len(starts)
    return {"tokens_per_call": tokens / len(calls), "accepted": (tokens - len(calls)) / len(proposals)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--models", type=Path, required=True)
    parser.add_argument("--tiny", action="store_true", help="one prompt and little data; nothing is stored")
    args = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.manual_seed(tasks.SEED)
    task = tasks.gpt2(args.data, args.models, 40 if args.tiny else None)
    dense: Any = task.model.eval()
    starts = prompts(args.data, args.models, 1 if args.tiny else PROMPTS)
    expected = [text(dense, ids) for ids in starts]
    calibration = hf_reparam.calibrate(dense, task.batches)
    assistants: dict[str, Any] = {}
    rows: dict[str, dict[str, float]] = {}
    for keep in KEEPS:
        assistants[str(keep)] = assistant(hf_reparam.convert(dense, keep=keep, calibration=calibration))
        rows[str(keep)] = acceptance(dense, assistants[str(keep)], starts, expected)
        print(keep, rows[str(keep)], flush=True)
    calls = {name: lambda m=model: [text(dense, ids, m) for ids in starts] for name, model in assistants.items()}
    seconds = medians({"dense": lambda: [text(dense, ids) for ids in starts], **calls}, ROUNDS)
    for name, row in rows.items():
        row |= {"seconds": seconds[name], "ratio": seconds[name] / seconds["dense"]}
        print(name, row, flush=True)
    if not args.tiny:
        shape = {"prompts": len(starts), "prompt": PROMPT, "generated": GENERATED, "proposed": PROPOSED}
        write("speculative", {**shape, "dense_seconds": seconds["dense"], "results": rows}, tasks.SEED)


if __name__ == "__main__":
    main()
