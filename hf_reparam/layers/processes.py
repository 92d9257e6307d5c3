"""Work for several processes of a distributed run: each does its share, and all get all results."""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import PartialState
from filelock import FileLock, Timeout
from torch import Tensor
from transformers.utils.logging import tqdm

from hf_reparam.errors import CheckpointError

__all__ = ["alone", "connected", "distributed", "is_first", "own_share", "spread", "total", "wait_for_all"]

T = TypeVar("T")


def distributed() -> bool:
    """Whether torch.distributed runs, by accelerate, torchrun or otherwise."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


@contextmanager
def connected() -> Iterator[None]:
    """Join the other processes if a launcher (`accelerate launch`, `torchrun`) has started several, and leave again."""
    if int(os.environ.get("WORLD_SIZE", "1")) <= 1 or distributed():
        yield
        return
    state = PartialState(cpu=not torch.accelerator.is_available())
    try:
        yield
    finally:
        state.destroy_process_group()


def is_first() -> bool:
    """Whether this is the process that writes and prints."""
    return not distributed() or torch.distributed.get_rank() == 0


def wait_for_all() -> None:
    """Go on when every process has come here."""
    if distributed():
        torch.distributed.barrier()


def total(tensor: Tensor) -> Tensor:
    """The sum of all processes' tensors, on the CPU."""
    if not distributed():
        return tensor.cpu()
    on_cpu = torch.distributed.get_backend() in ("gloo", "mpi")
    summed = tensor.clone() if on_cpu else tensor.to(torch.accelerator.current_accelerator())
    torch.distributed.all_reduce(summed)
    return summed.cpu()


@contextmanager
def alone(lock: Path, refusal: str) -> Iterator[None]:
    """Keep other runs out while the block lasts; the processes of one distributed run come in together.

    The system frees the lock of a process that was killed.

    Args:
        lock: a file that is locked; its folder is made where it is missing. It is gone afterwards.
        refusal: what to say if another run holds it.

    Raises:
        CheckpointError: another run holds it, or it cannot be written.
    """
    held, failure = FileLock(lock), None
    if is_first():
        try:
            lock.parent.mkdir(parents=True, exist_ok=True)
            held.acquire(timeout=0)
        except OSError as error:  # Timeout is one
            failure = error
    if int(total(torch.tensor(int(failure is not None)))):  # the other processes know nothing more
        taken = failure is None or isinstance(failure, Timeout)
        raise CheckpointError(refusal if taken else f"{lock.parent} cannot be written: {failure.strerror or failure}")  # type: ignore[union-attr]
    try:
        yield
    finally:
        if is_first():
            with suppress(OSError):  # Windows deletes no open file
                lock.unlink()
            held.release()


def own_share(items: Sequence[T]) -> Sequence[T]:
    """Every n-th item, for n processes."""
    return items[torch.distributed.get_rank() :: torch.distributed.get_world_size()] if distributed() else items


def spread(costs: Mapping[str, float], work: Callable[[str], T], *, desc: str) -> dict[str, T]:
    """`work(name)` for every name, done by one process each; shows progress.

    Every process has to call this. The longest tasks are dealt out first, each to the process with the least to do. An
    error in one process is raised in all of them.

    Args:
        costs: name -> cost, in any unit; the same in all processes.
        work: gives what pickles, tensors on the CPU, if there are several processes.
        desc: what the progress bar says.

    Returns:
        name -> result, in the order of `costs`.
    """
    mine = _share(costs)
    results: dict[str, T] = {}
    failure: Exception | None = None
    try:
        for name in tqdm(mine, desc=desc, unit="layer"):
            results[name] = work(name)
    except Exception as error:
        if not distributed():
            raise
        failure = error
    if distributed():
        gathered: list[Any] = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(gathered, (results, failure))
        failure = next((error for _, error in gathered if error is not None), None)
        if failure is not None:
            raise failure
        results = {name: result for part, _ in gathered for name, result in part.items()}
    return {name: results[name] for name in costs}


def _share(costs: Mapping[str, float]) -> list[str]:
    """The names that this process works on."""
    if not distributed():
        return list(costs)
    loads = [0.0] * torch.distributed.get_world_size()
    shares: list[list[str]] = [[] for _ in loads]
    for name in sorted(costs, key=lambda name: -costs[name]):
        least = loads.index(min(loads))
        loads[least] += costs[name]
        shares[least].append(name)
    return shares[torch.distributed.get_rank()]
