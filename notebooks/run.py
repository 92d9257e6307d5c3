"""Run the notebooks and store what they show: `make notebooks`."""

import os
import sys
import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient


def run(notebook, folder=None, kernel=None):
    """Run a notebook in a folder, or in a kernel that runs. Its standard error is of this machine, and is not kept."""
    where = {"metadata": {"path": str(folder)} if folder else {}}
    NotebookClient(notebook, km=kernel, timeout=300, record_timing=False, resources=where).execute()
    for cell in notebook.cells:
        if "outputs" in cell:
            cell["outputs"] = [output for output in cell["outputs"] if output.get("name") != "stderr"]


if __name__ == "__main__":
    os.environ["PYTHONPATH"] = str(Path(__file__).parents[1])
    for path in map(Path, sys.argv[1:]):
        notebook = nbformat.read(path, as_version=4)
        with tempfile.TemporaryDirectory() as folder:
            run(notebook, folder)
        nbformat.write(notebook, path)
        print(path)
