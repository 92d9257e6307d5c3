"""The encoder-decoder Transformer of a textbook, from `torch.nn` alone:
trained, converted, fine-tuned, stored, merged.

    python -m examples.textbook

It learns to write a row of digits backwards, which takes attention and nothing
else. Runs offline, in about a minute.
"""

import tempfile
from typing import Any

import torch
from torch import Tensor, nn

import hf_reparam

DIGITS, START, LENGTH, WIDTH = 10, 10, 8, 64
BATCH, LONGEST, ENOUGH = 64, 3000, 0.995


class Transformer(nn.Module):
    """Token and position embeddings, `nn.Transformer`, and an output layer."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(DIGITS + 1, WIDTH)
        self.positions = nn.Embedding(LENGTH, WIDTH)
        self.transformer = nn.Transformer(
            WIDTH, 4, 2, 2, dim_feedforward=128, dropout=0.0, batch_first=True
        )
        self.output = nn.Linear(WIDTH, DIGITS)

    def embed(self, ids: Tensor) -> Tensor:
        """(batch, length) -> (batch, length, width)."""
        return self.tokens(ids) + self.positions(torch.arange(ids.shape[1]))

    def forward(self, src: Tensor, tgt: Tensor) -> Tensor:
        """Digits and the answer so far, (batch, length) each -> logits
        (batch, length, digits)."""
        mask = nn.Transformer.generate_square_subsequent_mask(tgt.shape[1])
        states = self.transformer(
            self.embed(src), self.embed(tgt), tgt_mask=mask, tgt_is_causal=True
        )
        return self.output(states)


def draw(
    rows: int, generator: torch.Generator
) -> tuple[dict[str, Tensor], Tensor]:
    """Inputs of the model, and the answers (rows, length)."""
    digits = torch.randint(0, DIGITS, (rows, LENGTH), generator=generator)
    answer = digits.flip(1)
    shifted = torch.cat([torch.full((rows, 1), START), answer[:, :-1]], 1)
    return {"src": digits, "tgt": shifted}, answer


def summed_loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Cross-entropy of a batch, summed, as calibration wants it."""
    logits = model(**batch)
    return nn.functional.cross_entropy(
        logits.flatten(0, 1), batch["src"].flip(1).flatten(), reduction="sum"
    )


def train(model: nn.Module, steps: int, rate: float, seed: int) -> int:
    """Train until the last batches were right; the number of steps it took."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=rate)
    model.train()
    for step in range(1, steps + 1):
        batch, _ = draw(BATCH, generator)
        loss = summed_loss(model, batch) / (BATCH * LENGTH)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 50 == 0 and score(model) >= ENOUGH:
            return step
    return steps


@torch.no_grad()
def score(model: nn.Module) -> float:
    """Share of rows written backwards without a mistake, greedily, of 500 rows
    that training does not see."""
    training = model.training
    model.eval()
    batch, answer = draw(500, torch.Generator().manual_seed(10**6))
    written = torch.full((500, 1), START)
    for _ in range(LENGTH):
        written = torch.cat(
            [written, model(batch["src"], written)[:, -1:].argmax(-1)], 1
        )
    model.train(training)
    return float((written[:, 1:] == answer).all(1).float().mean())


def main(keep: float = 0.3) -> dict[str, Any]:
    """Every step, with what it did to the score and to the size."""
    torch.manual_seed(0)
    model = Transformer()
    steps = train(model, LONGEST, 1e-3, seed=1)
    scores: dict[str, Any] = {"steps": steps, "dense": score(model)}
    generator = torch.Generator().manual_seed(2)
    data = [draw(BATCH, generator)[0] for _ in range(8)]
    svd = hf_reparam.LowRankConfig(keep=keep, metric="svd")
    plain = hf_reparam.convert(model, svd)
    calibration = hf_reparam.calibrate(model, data, loss_fn=summed_loss)
    small = hf_reparam.convert(model, keep=keep, calibration=calibration)
    report = hf_reparam.report(small)
    scores |= {"plain SVD": score(plain), "converted": score(small)}
    scores |= {
        "parameters": (report.parameters_before, report.parameters_after)
    }
    scores["fine-tuning steps"] = train(small, LONGEST // 4, 5e-4, seed=3)
    scores["fine-tuned"] = score(small)
    with tempfile.TemporaryDirectory() as folder:
        hf_reparam.save(small, f"{folder}/small")
        loaded = hf_reparam.load(Transformer(), f"{folder}/small")
        scores["loaded"] = score(loaded)
    merged = hf_reparam.merge(small)
    scores["merged"] = score(merged)
    assert isinstance(
        merged.transformer.encoder.layers[0].self_attn, nn.MultiheadAttention
    )
    return scores


if __name__ == "__main__":
    for name, value in main().items():
        print(f"{name:18} {value}")
