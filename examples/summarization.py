"""Summarization with a low-rank BART or T5.

python -m examples.summarization [bart|t5]
"""

import sys
from typing import Any

from transformers import AutoModelForSeq2SeqLM, DataCollatorForSeq2Seq

from examples import flow, tiny

MODEL = None  # for a real one: MODEL = "facebook/bart-large-cnn"
TINY = {"bart": tiny.bart, "t5": lambda: tiny.t5(tiny.stories())}


def summarize(model: Any, tokenizer: Any, texts: list[str]) -> list[str]:
    batch = tokenizer(texts, return_tensors="pt", padding=True, truncation=True)
    return tokenizer.batch_decode(
        model.generate(**batch, max_new_tokens=60), skip_special_tokens=True
    )


def overlap(text: str, wanted: str) -> float:
    """F1 of the words of two texts (ROUGE-1 without stemming)."""
    left, right = text.split(), wanted.split()
    common = sum(min(left.count(word), right.count(word)) for word in set(left))
    return 2 * common / (len(left) + len(right))


def main(kind: str = "bart") -> dict[str, float]:
    model, tokenizer = flow.load(MODEL, AutoModelForSeq2SeqLM, TINY[kind])
    pairs = tiny.stories()  # your data: (text, summary)
    texts, wanted = (list(side) for side in zip(*pairs[:50], strict=True))

    def score(candidate: Any) -> float:
        """Mean overlap with the summaries."""
        given = summarize(candidate, tokenizer, texts)
        return sum(map(overlap, given, wanted)) / len(texts)

    rows = tiny.seq2seq_rows(tokenizer, pairs)
    collator = DataCollatorForSeq2Seq(tokenizer, model=model)
    small, scores = flow.run(
        model, tokenizer, AutoModelForSeq2SeqLM, rows, collator, score, keep=0.3
    )
    for text, summary in zip(
        texts[:3], summarize(small, tokenizer, texts[:3]), strict=True
    ):
        print(f"{text}  ->  {summary}")
    return scores


if __name__ == "__main__":
    main(*sys.argv[1:])
