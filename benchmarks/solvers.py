"""Seconds to factor one weight: this package's solvers against the SVDs of torch and another package's."""

from typing import Any

import torch

from benchmarks.timing import medians
from hf_reparam.linalg.factorize import decompose

__all__ = ["factoring"]

CASES = ((3072, 768, 192, True), (4096, 11008, 1024, True), (4096, 11008, 128, False))
"""Rows, columns, rank, and whether full SVDs are timed, too: their time does not depend on the rank."""


def factoring() -> list[dict[str, Any]]:
    """One Gaussian weight of each shape, float32: its flat spectrum is the hardest there is for a partial solver.

    Small ones in five rounds, large ones once.
    """
    rows = []
    for n_out, n_in, rank, again in CASES:
        weight, factors = torch.randn(n_out, n_in), dict[str, Any]()
        calls = {
            name: lambda n=name, s=solve, w=weight, f=factors: f.update({n: s(w)})
            for name, solve in (partial(rank) | (full(rank) if again else {})).items()
        }
        calls["hf_reparam, exact"]()  # the first to touch so much memory waits for it
        small = weight.numel() < 1e7
        seconds = medians(calls, 5 if small else 1, warmup=int(small))
        errors = {n: float((weight - up @ down).norm() / weight.norm()) for n, (up, down) in factors.items()}
        rows.append({"shape": [n_out, n_in], "rank": rank, "seconds": seconds, "relative_error": errors})
        for name in calls:
            print(f"{n_out} x {n_in}, rank {rank}: {name:24} {seconds[name]:7.2f} s  {errors[name]:.6f}", flush=True)
    return rows


def partial(rank: int) -> dict[str, Any]:
    """name -> weight -> (up, down), for solvers of the leading singular vectors."""

    def own(weight: torch.Tensor, solver: str) -> tuple[torch.Tensor, torch.Tensor]:
        return decompose(weight, max_rank=rank, solver=solver).cut(rank)

    def lowrank(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        u, s, v = torch.svd_lowrank(weight, q=rank, niter=2)
        return u * s, v.T

    return {
        "hf_reparam, exact": lambda weight: own(weight, "exact"),
        "hf_reparam, randomized": lambda weight: own(weight, "randomized"),
        "torch.svd_lowrank": lowrank,
    }


def full(rank: int) -> dict[str, Any]:
    """name -> weight -> (up, down), for full singular value decompositions."""

    def torch_svd(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        u, s, v = torch.linalg.svd(weight, full_matrices=False)
        return u[:, :rank] * s[:rank], v[:rank]

    try:
        from goldcrest.plugins.compression.svd import SVD
    except ImportError:
        return {"torch.linalg.svd": torch_svd}

    def goldcrest(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        made = SVD(rank=rank).compress(weight)
        return made.u * made.s, made.vt

    return {"torch.linalg.svd": torch_svd, "goldcrest SVD": goldcrest}
