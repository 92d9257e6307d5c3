"""Translation with a low-rank Marian or T5.

python -m examples.translation [marian|t5]
"""

import sys
from typing import Any

from transformers import AutoModelForSeq2SeqLM, DataCollatorForSeq2Seq

from examples import flow, tiny

MODEL = None  # for a real one: MODEL = "Helsinki-NLP/opus-mt-en-de"
TINY = {"marian": tiny.marian, "t5": lambda: tiny.t5(tiny.sentences())}


def translate(model: Any, tokenizer: Any, texts: list[str]) -> list[str]:
    batch = tokenizer(texts, return_tensors="pt", padding=True)
    return tokenizer.batch_decode(
        model.generate(**batch, max_new_tokens=40, num_beams=2),
        skip_special_tokens=True,
    )


def main(kind: str = "marian") -> dict[str, float]:
    model, tokenizer = flow.load(MODEL, AutoModelForSeq2SeqLM, TINY[kind])
    pairs = tiny.sentences()  # your data: (text, translation)
    texts, wanted = (list(side) for side in zip(*pairs[:50], strict=True))

    def score(candidate: Any) -> float:
        """Share of the texts that come out exactly."""
        given = translate(candidate, tokenizer, texts)
        return sum(map(str.__eq__, given, wanted)) / len(texts)

    rows = tiny.seq2seq_rows(tokenizer, pairs)
    collator = DataCollatorForSeq2Seq(tokenizer, model=model)
    small, scores = flow.run(
        model, tokenizer, AutoModelForSeq2SeqLM, rows, collator, score, keep=0.3
    )
    for text, translated in zip(
        texts[:3], translate(small, tokenizer, texts[:3]), strict=True
    ):
        print(f"{text}  ->  {translated}")
    return scores


if __name__ == "__main__":
    main(*sys.argv[1:])
