"""Start a script in two processes of torch.distributed, or in one, and insist that it ends well.

`launch` forks them from a process that has imported the package and nothing else, so that imports are paid for once;
`fresh` starts interpreters, where that is what is judged.
"""

import multiprocessing
import os
import runpy
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = str(Path(__file__).parents[1])
LAUNCHER = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["hf_reparam", "hf_reparam.cli", "tests.zoo"])


def fresh(*command, processes=2, settings=None):
    """Run `python [-m torch.distributed.run ...] COMMAND`; returns what it printed."""
    environment = {**os.environ, "PYTHONPATH": ROOT, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    environment |= settings or {}
    arguments = [sys.executable, *(LAUNCHER if processes == 2 else []), *map(str, command)]
    done = subprocess.run(arguments, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def launch(*command, processes=2):
    """The same from the fork server, where COMMAND is a script or `-m MODULE`, and its arguments."""
    with tempfile.TemporaryDirectory() as folder:
        jobs = []
        for rank, environment in enumerate(_environments(processes)):
            arguments = [list(map(str, command)), environment, f"{folder}/{rank}"]
            jobs.append(SERVER.Process(target=_run, args=arguments))
            jobs[-1].start()
        for job in jobs:
            job.join()
        printed, said = ("".join(p.read_text() for p in sorted(Path(folder).glob(f"*.{n}"))) for n in ("out", "err"))
    assert [job.exitcode for job in jobs] == [0] * processes, said[-3000:]
    return printed


def _environments(processes):
    """What torchrun tells each process of the others."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    common = {"ACCELERATE_USE_CPU": "true"}
    if processes == 1:
        return [common]
    common |= {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)}
    common |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return [{**common, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(processes)]


def _run(command, environment, place):
    for number, kind in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{place}.{kind}", os.O_WRONLY | os.O_CREAT), number)
    os.environ.update(environment)
    if command[0] == "-m":
        sys.argv = command[1:]
        runpy.run_module(command[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = command
        runpy.run_path(command[0], run_name="__main__")
