"""`python -m tests.golden.make`: write tiny converted models with the outputs they must give for ever.

Once for each format version, from a clean tree; the folders are never written again. See docs/format.md.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file

import hf_reparam
from hf_reparam import Entry, LowRankConfig, RankPlan
from hf_reparam.config import FORMS
from hf_reparam.model.host import layer_name, opened
from hf_reparam.model.sites import select
from hf_reparam.plan import FORMAT_VERSION
from tests import zoo

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
BASES = ("BertForMaskedLM", "GPT2LMHeadModel", "T5ForConditionalGeneration")
RANKS = {"heads": 4, "table": 12}  # of 8 and of 32


def commit(root: Path) -> str:
    """The commit of a clean tree.

    Raises:
        SystemExit: the tree has changes, or there is no repository.
    """
    status = subprocess.run(["git", "status", "--porcelain"], cwd=root, capture_output=True, text=True)
    if status.returncode or status.stdout.strip():
        sys.exit(f"golden checkpoints are made from a clean tree only:\n{status.stdout}{status.stderr}")
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True, check=True)
    return head.stdout.strip()


def converted(model: Any, form: str) -> Any:
    """Narrower heads, embeddings of low rank, and every layer in this form."""
    found = select(opened(model).model, LowRankConfig(heads=True, embeddings=True)).selected
    shaped = {f.name: f.structure.forms[0] for f in found if f.structure.option is not None}
    plan = RankPlan({name: Entry(RANKS[kind], kind) for name, kind in shaped.items()}, model.config.model_type)
    narrow = hf_reparam.convert(model, plan)
    low = [found.site.name for found in select(opened(narrow).model, LowRankConfig(target_modules="*")).selected]
    entries = {layer_name(narrow, name): Entry(6, form) for name in low}
    return hf_reparam.convert(narrow, RankPlan(entries, model.config.model_type))


def make(folder: Path, made_from: str) -> None:
    """Write every base in every form, the inputs and outputs beside them, and what made them."""
    folder.mkdir(parents=True)  # an error if it is there: golden is golden
    for base in BASES:
        case = zoo.BY_BASE[base]
        for form in FORMS:
            place = folder / f"{base}-{form}"
            small = converted(case.build(), form)
            small.save_pretrained(place)
            with torch.no_grad():
                logits = small(**case.batch()).logits
            save_file({**case.batch(), "logits": logits.contiguous()}, place / "expected.safetensors")
    versions = {m.__name__: m.__version__ for m in (hf_reparam, torch, transformers)}
    (folder / "made.json").write_text(json.dumps({"commit": made_from, "versions": versions}, indent=1) + "\n")


if __name__ == "__main__":
    make(HERE / f"format-{FORMAT_VERSION}", commit(ROOT))
