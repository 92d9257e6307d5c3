"""Layers with one `down` against layers apart, at equal weights: time of their forward passes, one after the other.

    python -m benchmarks.sharing            about 3 minutes on 2 cores; writes results/sharing.json

Queries, keys and values of BERT-base (768 x 768 each), and the gate and up projection of a Llama of width 1024 (1024 x
2816 each), random weights, float32, no gradients; in rounds in which all took their turn.
"""

import argparse
from functools import partial
from typing import Any

import torch
from torch import nn

import hf_reparam
from benchmarks.machine import write
from benchmarks.timing import medians
from hf_reparam import LayerSpec, RankPlan
from hf_reparam.plan import FORMS

SEED = 0
GROUPS = {"query, key, value": (3, 768, 768), "gate, up": (2, 1024, 2816)}
KEEPS, TOKENS = (0.5, 0.25), (1, 32, 1024)


class Group(nn.Module):
    """Layers with one input."""

    def __init__(self, count: int, n_in: int, n_out: int) -> None:
        super().__init__()
        for i in range(count):
            self.add_module(f"layer{i}", nn.Linear(n_in, n_out, bias=False))

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        """(tokens, in) -> the outputs (tokens, out) of all."""
        return [layer(x) for layer in self.children()]


def rank(n_in: int, n_out: int, keep: float, form: str) -> int:
    """The largest whose weights are at most this share of the dense ones."""
    return max(r for r in range(1, min(n_in, n_out)) if LayerSpec(r, form).weights(n_in, n_out) <= keep * n_in * n_out)


def variants(count: int, n_in: int, n_out: int, keep: float, form: str) -> dict[str, nn.Module]:
    """The group dense, with layers apart, and with one `down`."""
    dense = Group(count, n_in, n_out)
    names = [name for name, _ in dense.named_children()]
    apart = LayerSpec(rank(n_in, n_out, keep, form), form)
    first = LayerSpec(rank(n_in, count * n_out, keep, form), form)
    others = LayerSpec(first.rank, form, down_of=names[0])
    plans = {"apart": dict.fromkeys(names, apart), "shared": dict.fromkeys(names, others) | {names[0]: first}}
    return {"dense": dense} | {name: hf_reparam.convert(dense, plan=RankPlan(plan)) for name, plan in plans.items()}


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=60)
    args = parser.parse_args()
    torch.manual_seed(SEED)
    rows: list[dict[str, Any]] = []
    for name, (count, n_in, n_out) in GROUPS.items():
        for form in FORMS:
            for keep in KEEPS:
                models = variants(count, n_in, n_out, keep, form)
                for tokens in TOKENS:
                    x = torch.randn(tokens, n_in)
                    for compiled in (False, True):
                        calls = {key: torch.compile(m) if compiled else m for key, m in models.items()}
                        times = medians({key: partial(m, x) for key, m in calls.items()}, args.rounds, warmup=5)
                        row = {"group": name, "form": form, "keep": keep, "tokens": tokens, "compiled": compiled}
                        ratios = {key: times[key] / times["dense"] for key in ("apart", "shared")}
                        rows.append(row | {"dense_seconds": times["dense"]} | ratios)
                        shown = "  ".join(f"{key} {value:.2f}" for key, value in ratios.items())
                        print(*row.values(), shown, flush=True)
    write("sharing", {"rows": rows}, SEED)


if __name__ == "__main__":
    main()
