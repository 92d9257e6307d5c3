"""Stands in for a file that the source distribution lacks: processes on the CPU, for the tests of parallelism."""

import functools
import os
import socket

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def _get_distributed_backend():
    return "gloo"


def _get_distributed_device_type():
    return "cpu"


def _get_rank_device(rank):
    return torch.device("cpu")


def _set_rank_device(rank):
    torch.set_num_threads(1)


def _start_rank_processes(function, args, nprocs):
    mp.spawn(function, args=args, nprocs=nprocs)


def _rank(rank, port, world_size, function, args):
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size)}
    _set_rank_device(rank)
    dist.init_process_group("gloo", rank=rank, world_size=world_size)
    try:
        function(rank, *args)
    finally:
        dist.destroy_process_group()


def run_distributed(world_size):
    """function -> a function that runs it, called with the rank first, in so many processes."""

    def wrap(function):
        @functools.wraps(function)
        def run(*args):
            with socket.socket() as free:
                free.bind(("localhost", 0))
                port = free.getsockname()[1]
            _start_rank_processes(_rank, (port, world_size, function, args), world_size)

        return run

    return wrap
