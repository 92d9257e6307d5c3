"""The README's code runs, block by block, as a reader would run it; notebooks run from top to bottom."""

import json
import re
import shlex
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from transformers import AutoTokenizer

from hf_reparam import cli

ROOT = Path(__file__).parents[1]


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```", (ROOT / "README.md").read_text(), re.M | re.S)


def test_python_blocks_run_in_order(tmp_path, minilm):
    tokenizer = AutoTokenizer.from_pretrained(minilm)
    data = [{**tokenizer("so good", padding="max_length", max_length=8), "labels": i % 2} for i in range(8)]
    scope = {"BASE": minilm, "OUT": str(tmp_path / "out"), "DATA": data, "TEXTS": ["so good", "so bad"] * 40}
    scope["TOKENIZER"] = tokenizer
    scope["ACCURACY"] = lambda candidate: 1.0 - candidate.num_parameters() / 1e10
    assert len(blocks("python")) == 6
    for block in blocks("python"):
        exec(compile(block, "README.md", "exec"), scope)
    assert type(scope["dense"]).__name__ == "BertForSequenceClassification"
    assert {layer.rank for layer in scope["report"].layers} == {32, 96}
    sizes = [scope[name].num_parameters() for name in ("smaller", "better", "small", "model")]
    assert sizes == sorted(sizes)
    assert 14_400_000 < scope["fits"].num_parameters() <= 14_500_000
    assert scope["good"].num_parameters() < sizes[0]
    assert (tmp_path / "out-dense" / "model.safetensors").exists()


def test_shell_commands_run(tmp_path, minilm, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "TEXTS.txt").write_text("so good\nso bad\n")
    commands = [line for block in blocks("bash") for line in block.splitlines() if line.startswith("hf-reparam")]
    assert len(commands) == 3
    for command in commands:
        words = [minilm if word == "SRC" else word for word in shlex.split(command)[1:]]
        assert cli.main([*words, "--quiet"]) == 0


def test_figures_are_the_results():
    data = json.loads((ROOT / "benchmarks" / "results" / "foundation.json").read_text())
    seconds, loading = data["factoring"]["seconds"], data["loading"]
    figures = [
        f"{data['exactness']['full_rank_largest_output_difference']:.1e}",
        f"{max(data['exactness']['relative_excess_error_rank_128_float64'].values()):.1e}",
        f"{seconds['hf_reparam']:.1f} s; a loop",
        f"`torch.linalg.svd` {seconds['torch.linalg.svd, float32, full_matrices=False']:.1f} s in float32",
        f"{seconds['torch.linalg.svd, float64, full_matrices=False']:.1f} s in float64",
        f"| {data['forward']['ratio']:.2f} of dense",
        f"{loading['parameter_ratio']:.2f} of the parameters | {loading['weights read, cold cache']['ratio']:.2f} of",
        f"| {loading['call alone, warm']['ratio']:.2f} of dense: more tensors",
    ]
    readme = (ROOT / "README.md").read_text()
    assert [figure for figure in figures if figure not in readme] == []


def test_quality_figures_are_the_results():
    results = json.loads((ROOT / "benchmarks" / "results" / "quality.json").read_text())["results"]
    rows = [
        row for row in (ROOT / "README.md").read_text().splitlines() if row.startswith(("| plain", "| whit", "| fish"))
    ]
    for method, row in zip(
        ("plain SVD, uniform", "whitening, uniform", "fisher, uniform", "fisher, global"), rows, strict=True
    ):
        scores = [results[model]["rows"][method] for model in ("MiniLM-L6", "babyllama105", "gpt2-novels")]
        expected = " / ".join(f"{scores[0][k]:.3f}" for k in ("0.8", "0.6", "0.4"))
        for score in scores[1:]:
            expected += " | " + " / ".join(f"{score[k]:.4f}" for k in ("0.8", "0.6", "0.4"))
        assert row == f"| {method} | {expected} |"


def test_make_targets_exist():
    targets = re.findall(r"^make (\w+)", "\n".join(blocks("bash")), re.M)
    assert targets == ["demo", "test"]
    makefile = (ROOT / "Makefile").read_text()
    assert all(f"\n{target}:" in makefile for target in targets)


@pytest.mark.parametrize("path", sorted((ROOT / "notebooks").glob("*.ipynb")), ids=lambda p: p.stem)
def test_notebooks(path, tmp_path):
    notebook = nbformat.read(path, as_version=4)
    assert any(cell.get("outputs") for cell in notebook.cells), "outputs are stored"
    NotebookClient(notebook, timeout=120, resources={"metadata": {"path": str(tmp_path)}}).execute()
