"""`python -m census`: every model class there and back; writes docs/census.md and benchmarks/results/census.json."""

import argparse
import hashlib
import json
import os
import re
import sys
import warnings
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"

import transformers
from tqdm import tqdm

from benchmarks.machine import RESULTS, describe
from census.classes import model_classes
from census.page import page, summary
from census.trip import FAILED, RANK, travel
from census.workers import read, run_all

ROOT = Path(__file__).parent.parent


def fingerprint() -> str:
    """Of all code that has a say in a row: rows of another are not taken up."""
    digest = hashlib.sha256(json.dumps(describe(0)["versions"]).encode())
    for path in sorted([*ROOT.glob("hf_reparam/**/*.py"), *ROOT.glob("census/*.py")]):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def run(kinds: list[type[Any]], place: Path, processes: int) -> list[dict[str, Any]]:
    """Rows of all classes: those that the file of a broken run has, and the others, which are added to it."""
    rows = {row["class"]: row for row in read(place)}
    missing = [kind for kind in kinds if kind.__name__ not in rows]
    place.parent.mkdir(exist_ok=True)
    with place.open("w") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows.values())
        for row in tqdm(run_all(missing, travel, processes=processes), total=len(missing), unit="class"):
            file.write(json.dumps(row) + "\n")
            file.flush()
            rows[row["class"]] = row
    return [rows[kind.__name__] for kind in kinds]


def results(rows: list[dict[str, Any]], every: int) -> dict[str, Any]:
    """What is stored."""
    command = "make census" if every == 1 else f"python -m census --every {every}"
    return {
        "machine": {**describe(0), "torch_threads": 1, "command": command},
        "rank": RANK,
        "every": every,
        "cpu_minutes": round(sum(row.get("seconds", 0) for row in rows) / 60),
        "summary": summary(rows),
        "rows": [{name: value for name, value in row.items() if name != "seconds"} for row in rows],
    }


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m census", description=__doc__)
    parser.add_argument("--only", help="regular expression that names of classes match; writes nothing")
    parser.add_argument("--every", type=int, default=1, help="one in so many classes (default: 1)")
    parser.add_argument("--processes", type=int, default=2, help="classes at a time (default: 2)")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    kinds = [kind for kind in model_classes() if re.search(options.only or "", kind.__name__)][:: options.every]
    rows = run(kinds, ROOT / ".census" / f"{fingerprint()}.jsonl", options.processes)
    if options.only is None:
        data = results(rows, options.every)
        (RESULTS / "census.json").write_text(json.dumps(data, indent=1) + "\n")
        (ROOT / "docs" / "census.md").write_text(page(data))
    for row in rows:
        if row["ends"] == FAILED:
            print(f"{row['class']}: {'; '.join(row['why'])}")
    print(json.dumps(summary(rows)))
    return int(any(row["ends"] == FAILED for row in rows))


if __name__ == "__main__":
    sys.exit(main())
