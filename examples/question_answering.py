"""Question answering with a low-rank BERT.

python -m examples.question_answering
"""

from typing import Any

import torch
from transformers import AutoModelForQuestionAnswering, DataCollatorWithPadding

from examples import flow, tiny

MODEL = None  # for a real one: MODEL = "deepset/bert-base-cased-squad2"


@torch.no_grad()
def answer(
    model: Any, tokenizer: Any, questions: list[str], contexts: list[str]
) -> list[str]:
    """The span of the highest score; Transformers 5 has no pipeline for it."""
    batch = tokenizer(questions, contexts, return_tensors="pt", padding=True)
    out = model(**batch)
    mask = batch["attention_mask"].bool()
    scores = out.start_logits[:, :, None] + out.end_logits[:, None]
    real = mask[:, :, None] & mask[:, None]
    scores, real = (s.triu().tril(15) for s in (scores, real))  # start <= end
    best = scores.masked_fill(~real, -torch.inf).flatten(1).argmax(1)
    length = out.start_logits.shape[1]
    spans = [(int(i) // length, int(i) % length) for i in best]
    return [
        tokenizer.decode(ids[a : b + 1])
        for ids, (a, b) in zip(batch["input_ids"], spans, strict=True)
    ]


def main() -> dict[str, float]:
    auto = AutoModelForQuestionAnswering
    model, tokenizer = flow.load(MODEL, auto, tiny.bert_for_answers)
    asked = tiny.places()  # your data: (question, context, answer)
    questions, contexts, answers = (
        list(part) for part in zip(*asked[:100], strict=True)
    )

    def score(candidate: Any) -> float:
        """Share of the answers that are right."""
        given = answer(candidate, tokenizer, questions, contexts)
        return sum(map(str.__eq__, given, answers)) / len(answers)

    rows = tiny.answer_rows(tokenizer, asked)
    collator = DataCollatorWithPadding(tokenizer)
    small, scores = flow.run(
        model, tokenizer, auto, rows, collator, score, keep=0.3
    )
    found = answer(small, tokenizer, questions[:3], contexts[:3])
    for question, context, text in zip(
        questions[:3], contexts[:3], found, strict=True
    ):
        print(f"{context} {question}  ->  {text}")
    return scores


if __name__ == "__main__":
    main()
