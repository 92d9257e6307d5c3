"""Start code in a new process, or in two of torch.distributed, and insist that it ends well.

The processes are forked from one that has imported Transformers and nothing of this project: that is nearly all of what
an interpreter takes to start. `torchrun` starts interpreters, where that is what is judged.
"""

import multiprocessing
import os
import runpy
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = str(Path(__file__).parents[1])
SERVER = multiprocessing.get_context("forkserver")
TRANSFORMERS = ["modeling_utils", "generation.utils", "processing_utils", "models.auto.modeling_auto"]
SERVER.set_forkserver_preload(["pytest", *(f"transformers.{name}" for name in TRANSFORMERS)])


class Started:
    """Processes that run a command, of `python`: a script, `-m MODULE` or `-c CODE`, and its arguments."""

    def __init__(self, *command, processes=1):
        self.folder = tempfile.TemporaryDirectory()
        self.jobs = []
        for rank, environment in enumerate(_environments(processes)):
            arguments = [list(map(str, command)), environment, f"{self.folder.name}/{rank}"]
            self.jobs.append(SERVER.Process(target=_run, args=arguments))
            self.jobs[-1].start()

    def printed(self, kind="out"):
        """What they wrote until now to standard output, or to standard error (`err`)."""
        return "".join(path.read_text() for path in sorted(Path(self.folder.name).glob(f"*.{kind}")))

    def wait_for(self, text):
        while text not in self.printed():
            assert any(job.is_alive() for job in self.jobs), self.printed("err")[-3000:]
            time.sleep(0.002)

    def kill(self):
        for job in self.jobs:
            job.kill()
            job.join()

    def end(self):
        """Wait until they end well."""
        for job in self.jobs:
            job.join()
        assert [job.exitcode for job in self.jobs] == [0] * len(self.jobs), self.printed("err")[-3000:]
        return self


def launch(*command, processes=2):
    """Run a command to its end; returns what it printed."""
    return Started(*command, processes=processes).end().printed()


def torchrun(*command):
    """Run a command in two interpreters that `torchrun` starts; returns what it printed."""
    environment = {**os.environ, "PYTHONPATH": ROOT, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run([*launcher, *map(str, command)], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def _environments(processes):
    """What torchrun tells each process of the others."""
    common = {"ACCELERATE_USE_CPU": "true"}
    if processes == 1:
        return [common]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    common |= {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)}
    common |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return [{**common, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(processes)]


def _run(command, environment, place):
    for number, kind in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{place}.{kind}", os.O_WRONLY | os.O_CREAT), number)
    os.environ.update(environment)
    what, *rest = command
    if what == "-m":
        sys.argv = rest
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    elif what == "-c":
        sys.argv = [what, *rest[1:]]
        exec(compile(rest[0], "<string>", "exec"), {"__name__": "__main__"})
    else:
        sys.argv = command
        runpy.run_path(what, run_name="__main__")
