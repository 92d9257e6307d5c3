"""The part that is the same for every task: convert, fine-tune, save, load,
merge, with a score after each step."""

import tempfile
from collections.abc import Callable, Collection
from typing import Any

from torch.utils.data import DataLoader
from transformers import AutoTokenizer

import hf_reparam
from examples.tiny import fit

__all__ = ["load", "run"]


def load(
    name: str | None, auto: Any, tiny: Callable[[], tuple[Any, Any]]
) -> tuple[Any, Any]:
    """Model and tokenizer of a name on the Hub, or the tiny ones."""
    if name is None:
        return tiny()
    tokenizer = AutoTokenizer.from_pretrained(name)
    if tokenizer.pad_token is None:  # as of GPT-2
        tokenizer.pad_token = tokenizer.eos_token
    return auto.from_pretrained(name), tokenizer


def run(
    model: Any,
    tokenizer: Any,
    auto: Any,
    rows: list[dict[str, Any]],
    collator: Any,
    score: Callable[[Any], float],
    *,
    keep: float,
    steps: int = 60,
    distil: bool = False,
    lora: Collection[str] = (),
) -> tuple[Any, dict[str, float]]:
    """Take a dense model through it all.

    Args:
        model, tokenizer: the dense model.
        auto: Auto class to load the result with.
        rows, collator: training data, as for the Trainer; the first 128 rows
            are the calibration data, too.
        score: model -> number, higher is better.
        keep: share of the layers' weights that the low-rank model may hold.
        steps: of fine-tuning.
        distil: fine-tune towards the dense model's predictions and hidden
            states, without labels.
        lora: names of dense layers; fine-tune with adapters of these, merged
            afterwards.

    Returns:
        The model as loaded from disk, and the scores.
    """
    batches = list(DataLoader(rows[:128], batch_size=32, collate_fn=collator))
    small = hf_reparam.convert(model, keep=keep, calibration=batches)
    print(hf_reparam.report(small), "\n")
    scores = {"dense": score(model), "converted": score(small)}

    if distil:
        with hf_reparam.distillation_loss(
            model, small, alpha=1.0, hidden=1.0
        ) as loss:
            fit(small, rows, collator, steps=steps, loss=loss)
    elif lora:
        from peft import LoraConfig, get_peft_model

        config = LoraConfig(
            target_modules=hf_reparam.lora_targets(small, lora),
            r=8,
            lora_alpha=32,
        )
        adapted = get_peft_model(small, config)
        fit(adapted, rows, collator, steps=steps)
        small = adapted.merge_and_unload()
    else:
        fit(small, rows, collator, steps=steps)  # a Trainer
    scores["fine-tuned"] = score(small)

    with tempfile.TemporaryDirectory() as out:
        small.save_pretrained(out)
        tokenizer.save_pretrained(out)
        loaded = auto.from_pretrained(out)
    scores["loaded"] = score(loaded)
    merged = hf_reparam.merge(loaded)  # a plain model of Transformers again
    scores["merged"] = score(merged)
    print("  ".join(f"{name} {value:.3f}" for name, value in scores.items()))
    return loaded, scores
