"""Text generation with a low-rank GPT-2 or Llama.

python -m examples.text_generation [gpt2|llama] [lora]
"""

import math
import sys
from typing import Any

import torch
from transformers import AutoModelForCausalLM, DataCollatorForLanguageModeling

from examples import flow, tiny

MODEL = None  # for a real one: MODEL = "openai-community/gpt2"
TINY = {"gpt2": tiny.gpt2, "llama": tiny.llama}
LAYERS = {
    "gpt2": ["c_attn", "c_fc", "c_proj"],
    "llama": ["q_proj", "v_proj", "up_proj", "down_proj"],
}


def go_on(model: Any, tokenizer: Any, prompt: str) -> str:
    batch = tokenizer(prompt, return_tensors="pt", add_special_tokens=False)
    return tokenizer.decode(
        model.generate(**batch, max_new_tokens=5, do_sample=False)[0],
        skip_special_tokens=True,
    )


def main(kind: str = "gpt2", how: str = "") -> dict[str, float]:
    model, tokenizer = flow.load(MODEL, AutoModelForCausalLM, TINY[kind])
    rows = [tokenizer(text) for text in tiny.counting()]  # your data: texts
    collator = DataCollatorForLanguageModeling(tokenizer, mlm=False)
    test = collator(rows[:64])

    @torch.no_grad()
    def score(candidate: Any) -> float:
        """Minus the perplexity."""
        return -math.exp(candidate(**test).loss)

    lora = LAYERS[kind] if how == "lora" else ()
    auto = AutoModelForCausalLM
    small, scores = flow.run(
        model, tokenizer, auto, rows, collator, score, keep=0.3, lora=lora
    )
    for prompt in ("two three four", "nine eight seven", "two four six"):
        print(go_on(small, tokenizer, prompt))
    return scores


if __name__ == "__main__":
    main(*sys.argv[1:])
