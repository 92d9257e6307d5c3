"""Classification with a low-rank BERT: fine-tune, convert, distil.

python -m examples.classification
"""

from typing import Any

import torch
from transformers import (
    AutoModelForSequenceClassification,
    DataCollatorWithPadding,
    pipeline,
)

from examples import flow, tiny

MODEL = None  # for a real one: MODEL = "textattack/bert-base-uncased-SST-2"


def main() -> dict[str, float]:
    auto = AutoModelForSequenceClassification
    # fine-tuned already
    model, tokenizer = flow.load(MODEL, auto, tiny.bert_for_labels)
    data = tiny.reviews()  # yours: texts and labels
    texts, labels = (list(part) for part in zip(*data, strict=True))
    test = tokenizer(texts[:200], return_tensors="pt", padding=True)

    @torch.no_grad()
    def score(candidate: Any) -> float:
        """Accuracy."""
        found = candidate(**test).logits.argmax(-1)
        return (found == torch.tensor(labels[:200])).float().mean().item()

    rows = [
        {**tokenizer(text), "labels": label}
        for text, label in zip(texts, labels, strict=True)
    ]
    collator = DataCollatorWithPadding(tokenizer)
    small, scores = flow.run(
        model, tokenizer, auto, rows, collator, score, keep=0.25, distil=True
    )
    classify = pipeline("text-classification", model=small, tokenizer=tokenizer)
    for text in texts[:3]:
        print(f"{text}  ->  {classify(text)[0]}")
    return scores


if __name__ == "__main__":
    main()
