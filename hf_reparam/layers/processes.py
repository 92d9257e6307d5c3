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

from hf_reparam.errors import CheckpointError
from hf_reparam.layers.progress import each, one_bar

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

    The file `lock` is locked, which the system undoes for a process that was killed, and its folder made. Raises
    CheckpointError with `refusal` if another run holds it, and if it cannot be written.
    """
    held, message = FileLock(lock), ""
    if is_first():
        try:
            lock.parent.mkdir(parents=True, exist_ok=True)
            held.acquire(timeout=0)
        except Timeout:
            message = refusal
        except OSError as error:
            message = f"{lock.parent} cannot be written: {error.strerror or error}"
    if int(total(torch.tensor(len(message)))):
        raise CheckpointError(message or refusal)  # the other processes know nothing more
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
    """name -> `work(name)`, in the order of `costs`, done by one process each; shows progress as a stage named `desc`.

    Every process has to call this. The costliest tasks are dealt out first, each to the process with the least to do.
    Results have to pickle, tensors on the CPU. An error in one process is raised in all of them.
    """
    if not distributed():
        with one_bar():
            return {name: work(name) for name in each(costs, desc, "layer")}
    loads = [0.0] * torch.distributed.get_world_size()
    shares: list[list[str]] = [[] for _ in loads]
    for name in sorted(costs, key=lambda name: -costs[name]):
        least = loads.index(min(loads))
        loads[least] += costs[name]
        shares[least].append(name)
    results: dict[str, T] = {}
    failure: Exception | None = None
    try:
        with one_bar():
            results = {name: work(name) for name in each(shares[torch.distributed.get_rank()], desc, "layer")}
    except Exception as error:
        failure = error
    gathered: list[Any] = [None] * len(loads)
    torch.distributed.all_gather_object(gathered, (results, failure))
    for _, failure in gathered:
        if failure is not None:
            raise failure
    return {name: next(part[name] for part, _ in gathered if name in part) for name in costs}
