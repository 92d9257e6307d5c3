"""Start a script in two processes of torch.distributed, or in one, and insist that it ends well."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = str(Path(__file__).parents[1])
LAUNCHER = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


def launch(*command, processes=2, settings=None):
    """Run `python [-m torch.distributed.run ...] COMMAND`; returns what it printed."""
    environment = {**os.environ, "PYTHONPATH": ROOT, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    environment |= settings or {}
    arguments = [sys.executable, *(LAUNCHER if processes == 2 else []), *map(str, command)]
    done = subprocess.run(arguments, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout
