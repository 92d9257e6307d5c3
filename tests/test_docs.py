"""The code of README and docs runs, block by block; notebooks run from top to bottom; figures are the results."""

import ast
import importlib
import importlib.util
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from jupyter_client import KernelManager
from transformers import AutoModel, AutoTokenizer

from examples import tiny
from hf_reparam import LowRankConfig, cli, convert, report
from notebooks.run import run

ROOT = Path(__file__).parents[1]


def blocks(language, page="README.md"):
    return re.findall(rf"^```{language}\n(.*?)^```", (ROOT / page).read_text(), re.M | re.S)


@pytest.mark.slow
def test_python_blocks_run_in_order(tmp_path, shallow):
    tokenizer = AutoTokenizer.from_pretrained(shallow)
    data = [{**tokenizer("so good", padding="max_length", max_length=8), "labels": i % 2} for i in range(8)]
    scope = {"BASE": shallow, "OUT": str(tmp_path / "out"), "DATA": data, "TEXTS": ["so good", "so bad"] * 40}
    scope["TOKENIZER"] = tokenizer
    scope["ACCURACY"] = lambda candidate: 1.0 - candidate.num_parameters() / 1e10
    assert len(blocks("python")) == 7
    for block in blocks("python"):
        exec(compile(block, "README.md", "exec"), scope)
    assert type(scope["dense"]).__name__ == "BertForSequenceClassification"
    assert {layer.rank for layer in report(scope["by_rank"]).layers} == {32, 96}
    sizes = [scope[name].num_parameters() for name in ("smaller", "small", "model")]
    assert sizes == sorted(sizes)
    assert 14_400_000 < scope["fits"].num_parameters() <= 14_500_000
    assert scope["good"].report.parameters_after < sizes[0]
    assert (tmp_path / "out-dense" / "model.safetensors").exists()


def run_command(line, source, capsys):
    """Run a line that begins with `hf-reparam`, and judge what it printed and wrote."""
    words = [source if word == "SRC" else word for word in shlex.split(line)[1:]]
    assert cli.main([*words, "--quiet"]) == 0, line
    printed = capsys.readouterr().out
    dense = words[:2] == ["inspect", source]
    assert ("dense layers that can be converted" if dense else "low-rank layers") in printed.splitlines()[0], line
    if words[0] != "inspect":
        loaded = type(AutoModel.from_pretrained(words[2])).__name__
        assert loaded == {"convert": "ReparamBertModel", "merge": "BertModel"}[words[0]], line


@pytest.mark.slow
def test_shell_commands_run(tmp_path, shallow, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "TEXTS.txt").write_text("so good\nso bad\n")
    commands = [line for block in blocks("bash") for line in block.splitlines() if line.startswith("hf-reparam")]
    assert len(commands) == 3
    for command in commands:
        run_command(command, shallow, capsys)


PAGES = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "docs").rglob("*.md") if "```python" in path.read_text())


def test_pages_with_code_are_found():
    assert {"docs/quickstart.md", "docs/zh/quickstart.md", "docs/big-models.md", "docs/how-to/share.md"} <= set(PAGES)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("page", PAGES)
def test_the_code_of_pages_runs(page, tmp_path, narrow, shallow, monkeypatch):
    monkeypatch.chdir(tmp_path)
    base = narrow if page == "docs/how-to/choose-a-size.md" else shallow  # of which it names the last layer
    tokenizer = AutoTokenizer.from_pretrained(base)
    data = [{**tokenizer("so good", padding="max_length", max_length=8), "labels": i % 2} for i in range(8)]
    scope = {"__name__": page, "BASE": base, "OUT": str(tmp_path / "out"), "DATA": data, "TOKENIZER": tokenizer}
    scope |= {"TEXTS": ["so good", "so bad"] * 40, "ACCURACY": lambda model: 1.0 - model.num_parameters() / 1e10}
    if page == "docs/big-models.md":
        scope["model"] = AutoModel.from_pretrained(base)
    for block in blocks("python", page):
        exec(compile(block, page, "exec"), scope)
    if page == "docs/big-models.md":
        assert len(blocks("python", page)) == 3
        assert scope["report"].factored_after < scope["report"].factored_before
        assert {path.name for path in tmp_path.iterdir()} >= {"out", "out-dense", "out-small", "out-saved"}


def test_commands_are_found():
    assert COMMANDED == ["docs/big-models.md", "docs/how-to/command-line.md", "docs/zh/quickstart.md"]
    counts = {
        page: sum(line.startswith("hf-reparam") for b in blocks("bash", page) for line in b.splitlines())
        for page in COMMANDED
    }
    assert list(counts.values()) == [2, 7, 3]


COMMANDED = sorted(
    str(path.relative_to(ROOT)) for path in (ROOT / "docs").rglob("*.md") if "\nhf-reparam " in path.read_text()
)


@pytest.mark.slow
@pytest.mark.parametrize("page", COMMANDED)
def test_the_commands_of_pages_run(page, tmp_path, shallow, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "TEXTS.txt").write_text("so good\nso bad\n")
    lines = [line for block in blocks("bash", page) for line in block.splitlines()]
    for line in [line for line in lines if line.startswith("hf-reparam")]:
        run_command(line, shallow, capsys)
    launched = [line for line in lines if "-m hf_reparam" in line]
    assert len(launched) == (2 if page == "docs/big-models.md" else 0)
    for line in launched:  # what follows the launcher is the command line's
        assert cli._parser().parse_args(shlex.split(line.partition("-m hf_reparam ")[2])).keep == 0.5


TASKS = [
    line.split()[2:]
    for path in sorted((ROOT / "docs" / "tasks").glob("*.md"))
    for block in blocks("bash", path)
    for line in block.splitlines()
]
REPEATED = ["examples.summarization", "t5"]
"""The script runs with BART, and T5 in the translation."""
SOON = ["examples.translation marian", "examples.summarization bart", "examples.classification"]
"""Their models have learned the task after half of the steps."""


@pytest.mark.slow
@pytest.mark.parametrize("task", [task for task in TASKS if task != REPEATED], ids=" ".join)
def test_tasks_end_to_end(task, monkeypatch):
    if " ".join(task) in SOON:
        fit = tiny.fit
        monkeypatch.setattr(tiny, "fit", lambda *args, steps, **options: fit(*args, steps=steps // 2, **options))
    scores = importlib.import_module(task[0]).main(*task[1:])
    assert scores["loaded"] == scores["fine-tuned"]
    assert scores["merged"] == pytest.approx(scores["loaded"], abs=0.03)
    solved = -1.3 if "text_generation" in task[0] else 0.9  # minus the perplexity, else a share
    assert scores["dense"] > solved
    assert scores["fine-tuned"] > solved


def test_every_task_has_its_command():
    named = [page.name for page in sorted((ROOT / "docs" / "tasks").glob("*.md")) if blocks("bash", page)]
    others = [page.name for page in sorted((ROOT / "docs" / "tasks").glob("*.md")) if page.name not in named]
    assert others == ["flow.md"]
    assert len(TASKS) == 9
    assert REPEATED in TASKS
    assert {task[0] for task in TASKS} == {
        f"examples.{path.stem}" for path in (ROOT / "examples").glob("*.py") if "__main__" in path.read_text()
    }


@pytest.mark.parametrize("task", sorted({task[0] for task in TASKS}))
def test_tasks_are_run_by_their_command(task):
    """What the tests import as a module a user runs: it has to call `main` then."""
    tree = ast.parse((ROOT / f"{task.replace('.', '/')}.py").read_text())
    assert ast.unparse(tree.body[-1]).startswith("if __name__ == '__main__':")
    assert "main(" in ast.unparse(tree.body[-1].body)


def test_commands_of_texts_exist():
    """Modules behind `python -m` and targets behind `make`, in pages and in the Makefile itself."""
    makefile = (ROOT / "Makefile").read_text()
    pages = [ROOT / "README.md", ROOT / "Makefile", *(ROOT / "docs").rglob("*.md")]
    texts = [page.read_text() for page in pages] + [importlib.import_module("benchmarks.demo").__doc__]
    modules = {
        name for text in texts for name in re.findall(r"-m ((?:benchmarks|conformance|examples|tests)[\w.]*)", text)
    }
    assert len(modules) > 15
    assert [name for name in sorted(modules) if importlib.util.find_spec(name.rstrip(".")) is None] == []
    targets = {name for text in texts for name in re.findall(r"[`\n]make ([\w-]+)[`\n]", text)}
    assert targets >= {"audit", "benchmarks", "conformance", "demo", "test"}
    assert [name for name in sorted(targets) if f"\n{name}:" not in makefile] == []


@pytest.mark.slow
def test_the_site_is_built(tmp_path):
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    settings = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=settings)
    said = (done.stdout + done.stderr)[-3000:]
    assert done.returncode == 0, said
    assert "INFO" in said, "what is said is heard"
    assert not re.findall(r"WARNING|ERROR", said), said
    front = (tmp_path / "site" / "index.html").read_text()
    assert "Low-rank reparameterization of pretrained" in front
    reference = (tmp_path / "site" / "reference" / "index.html").read_text()
    assert "distillation_loss" in reference
    assert reference.count('class="gp">&gt;&gt;&gt;') >= 10  # examples of docstrings are code,
    assert "<blockquote>" not in reference  # not quotes within quotes
    assert (tmp_path / "site" / "results" / "quality.png").exists()


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
    readme = (ROOT / "README.md").read_text()
    columns = {
        "MiniLM": (("0.8", "0.6", "0.4", "0.25"), "lost", ".3f"),
        "Llama 0.9M": (("0.8", "0.6", "0.4"), "lost", ".4f"),
        "GPT-2 2.2M": (("0.8", "0.6", "0.4"), "lost", ".4f"),
        "SST-2": (("0.5", "0.25"), "accuracy", ".3f"),
    }
    methods = [method for method in results["MiniLM"]["rows"] if method != "dense"]
    assert len(methods) == 11
    for method in methods:
        cells = [
            " / ".join(format(results[model]["rows"][method][keep][score], style) for keep in keeps)
            for model, (keeps, score, style) in columns.items()
        ]
        assert f"| {method} | {' | '.join(cells)} |" in readme
    better = [results["MiniLM"]["rows"][name] for name in ("+ embeddings", "fisher, global, pivoted")]
    assert all(better[0][keep]["lost"] < better[1][keep]["lost"] for keep in ("0.4", "0.25"))  # at equal whole size
    refitted = results["MiniLM"]["rows"]["fisher, global, pivoted, refit"]
    genres = [f"{refitted['0.4'][f'main-{genre}']:.3f} on {genre}" for genre in ("captions", "news")]
    spearman = [
        results["MiniLM"]["rows"]["dense"]["1.0"]["spearman"],
        *(refitted[k]["spearman"] for k in ("0.8", "0.4")),
    ]
    figures = [
        f"(dense {results['SST-2']['rows']['dense']['1.0']['accuracy']:.3f})",
        *genres,
        "{:.3f} dense, {:.3f} at keep 0.8 and {:.3f} at keep 0.4".format(*spearman),
        f"calibration {results['SST-2']['seconds']['calibration']:.0f} s for the 2,000 sentences",
    ]
    assert [figure for figure in figures if figure not in " ".join(readme.split())] == []


@pytest.mark.slow
def test_why_plain_svd_fails_says_what_was_measured(minilm):
    results = json.loads((ROOT / "benchmarks" / "results" / "quality.json").read_text())["results"]
    page = (ROOT / "docs" / "explanation" / "why-plain-svd-fails.md").read_text()
    lines = {"plain SVD": "plain SVD: ", "SVD-LLM": "SVD-LLM: ", "fisher, uniform": "fisher, uniform: "}
    lines |= {"fisher, global": "fisher, global: ", "fisher, global, pivoted": "fisher, global, pivoted |"}
    for method, start in lines.items():
        cells = [
            " / ".join(f"{results[model]['rows'][method][keep]['lost']:.4f}" for keep in ("0.8", "0.6", "0.4"))
            for model in ("Llama 0.9M", "GPT-2 2.2M")
        ]
        assert re.search(rf"^\| {re.escape(start)}.*{re.escape(' | '.join(cells))} \|$", page, re.M), method
    config = LowRankConfig(keep=0.5, form="pair", allocation="uniform")
    errors = [layer.error for layer in report(convert(AutoModel.from_pretrained(minilm), config)).layers]
    assert f"{min(errors):.0%} to {max(errors):.0%}".replace("%", " %") in " ".join(page.split())


def test_memory_figures_are_the_results():
    results = json.loads((ROOT / "benchmarks" / "results" / "memory.json").read_text())
    page = (ROOT / "docs" / "big-models.md").read_text()
    runs = results["from_file_to_file"]["results"]["runs"]
    peaks = [run["peak_mb"] for name, run in runs.items() if name != "inspect"]
    assert re.findall(r"\| ([\d]+) MB \|", page) == [f"{peak:.0f}" for peak in peaks]
    assert max(peaks[:3]) < results["from_file_to_file"]["results"]["goal_mb"] < peaks[3]
    times = {
        name: f"{run['peak_above_mb'] / run['largest_layer_float64_mb']:.1f}"
        for name, run in results["in_memory"]["results"].items()
    }
    in_place = {form: times[f"convert in place, {form}"] for form in ("pair", "pivoted")}
    used = {form: times[f"convert in place, {form}, memory in use"] for form in ("pair", "pivoted")}
    text = " ".join(page.split())
    assert f"{times['convert 8192 x 2048 in place, pair']} for layers of 8192 x 2048" in text
    assert f"use {used['pair']} as a pair and {used['pivoted']} pivoted" in text
    assert f"resident are {in_place['pair']} and {in_place['pivoted']}" in text


def test_speed_figures_are_the_results():
    rows = json.loads((ROOT / "benchmarks" / "results" / "speed.json").read_text())["summary"]
    decision = (ROOT / "docs" / "decisions" / "0005-pivoted-form.md").read_text()
    for kind in speed_kinds(rows):
        assert (
            f"| {named(kind)} | {speed_cells(rows, kind, lambda r: format(r['pivoted / pair'], '.2f'))} |" in decision
        )
    readme = " ".join((ROOT / "README.md").read_text().split())
    compiled, eager = (
        sorted(f"{r['pivoted / pair']:.2f}" for r in rows if (r["dtype"], r["compiled"]) == ("float32", mode))
        for mode in (True, False)
    )
    assert f"{compiled[0]} to {compiled[-1]} of the time of a pair" in readme
    assert f"up to {eager[-1]} in eager mode" in readme


def speed_kinds(rows):
    return list(dict.fromkeys((r["family"], r["dtype"], r["compiled"]) for r in rows))


def named(kind):
    return f"{kind[0]}, {kind[1]}, {'compiled' if kind[2] else 'eager'}"


def speed_cells(rows, kind, show):
    columns = [
        [show(r) for r in rows if (*kind, n) == (r["family"], r["dtype"], r["compiled"], r["tokens"])]
        for n in (1, 32, 1024)
    ]
    return " | ".join(" / ".join(column) for column in columns)


def test_the_page_on_speed_is_the_results():
    results = json.loads((ROOT / "benchmarks" / "results" / "speed.json").read_text())
    page = (ROOT / "docs" / "when-faster.md").read_text()
    text, rows = " ".join(page.split()), results["summary"]
    for kind in speed_kinds(rows):
        for form in ("pair", "pivoted"):
            for show in (lambda r: f"{r[form]:.2f}", lambda r: r["within_goal"][form].split()[0]):  # noqa: B023
                assert f"| {named(kind)} | {form} | {speed_cells(rows, kind, show)} |" in page
    models = results["models"]["results"]
    for form in ("pair", "pivoted"):
        for tokens in (1, 32, 1024):
            line = " / ".join(f"{r['ratio'][form]:.2f}" for r in models["forward"] if r["tokens"] == tokens)
            assert re.search(rf"\| BERT-base, float32, {tokens} tokens? \| {form} \| {line} \|", page)
        for dtype in ("float32", "bfloat16"):
            line = " / ".join(f"{r['ratio'][form]:.2f}" for r in models["decoding"] if r["dtype"] == dtype)
            assert f"| GPT-2 small, {dtype}, decoding with its cache | {form} | {line} |" in page
    training = results["training"]["results"]
    for form in ("pair", "pivoted"):
        assert f"{training['ratio'][form]:.2f} of the dense time ({form})" in text
    assert f"{training['optimizer_state_ratio']['pair']:.2f} of the dense one" in text
    for case in results["factoring"]["results"]:
        if case["shape"][0] == 4096:
            assert f"{case['seconds']['hf_reparam, exact']:.1f} s" in text
    full = results["factoring"]["results"][1]["seconds"]
    assert f"{full['hf_reparam, exact'] / full['torch.linalg.svd']:.2f} of the {full['torch.linalg.svd']:.1f} s" in text


def test_recovery_figures_are_the_results():
    results = json.loads((ROOT / "benchmarks" / "results" / "recovery.json").read_text())["results"]
    page = (ROOT / "docs" / "how-to" / "fine-tune.md").read_text()
    mean = lambda scores: sum(scores) / len(scores)  # noqa: E731
    for start, name in (("plain SVD", "plain SVD, uniform ranks"), ("calibrated", "calibration data")):
        row = results[start]
        cells = [row["converted"], mean(row["fine-tuned"]), mean(row["distilled"])]
        assert f"| {name} | {' | '.join(f'{cell:.3f}' for cell in cells)} |" in page
    assert f"dense {results['dense']:.3f}:" in page


def test_textbook_figures_are_the_results():
    page = (ROOT / "docs" / "tasks" / "plain-torch.md").read_text()
    results = json.loads((ROOT / "benchmarks" / "results" / "textbook.json").read_text())["results"]
    for keep, row in results.items():
        scores = " | ".join(f"{row[name]:.3f}" for name in ("plain SVD", "converted", "fine-tuned", "merged"))
        assert f"| {keep} | {row['parameters'][1] / row['parameters'][0]:.2f} | {scores} |" in page
        assert row["loaded"] == row["fine-tuned"]
    assert f"writes {results['0.3']['dense']:.1%}" in page


def test_figures_of_heads_are_the_results():
    data = json.loads((ROOT / "benchmarks" / "results" / "heads.json").read_text())
    page = (ROOT / "docs" / "when-faster.md").read_text()
    assert len(data["decoding"]) == 10
    for row in data["decoding"]:
        cells = [
            row["prompt"],
            row["model"],
            f"{row['cache_bytes']:,}",
            f"{row['cache_ratio']:.2f}",
            f"{row['ratio']:.2f}",
        ]
        assert f"| {' | '.join(map(str, cells))} |" in page
    decision = (ROOT / "docs" / "decisions" / "0013-joint-attention.md").read_text()
    tables = [data["quality"][model]["rows"] for model in ("MiniLM", "GPT-2 2.2M")]
    for method in tables[0]:
        cells = [" / ".join(f"{rows[method][s]['lost']:.4f}" for s in ("0.75", "0.5", "0.25")) for rows in tables]
        assert f"| {method} | {' | '.join(cells)} |" in decision
        assert all(rows["this package"][s]["lost"] <= rows[method][s]["lost"] for rows in tables for s in rows[method])


def test_figures_of_the_decision_on_heads_are_the_results():
    results = json.loads((ROOT / "benchmarks" / "results" / "quality.json").read_text())["results"]
    page = (ROOT / "docs" / "decisions" / "0021-heads-opt-in.md").read_text()
    styles = {"Llama 0.9M": (".4f", "lost"), "GPT-2 2.2M": (".4f", "lost"), "MiniLM": (".3f", "lost")}
    for model, (style, score) in {**styles, "SST-2": (".3f", "accuracy")}.items():
        keeps = re.search(rf"^\| {model}, .*keep ([\d. /]+) \|", page, re.M)[1].split(" / ")
        rows = [results[model]["rows"][name] for name in ("fisher, global, pivoted", "joint attention")]
        cells = [" / ".join(format(row[keep][score], style).lstrip("0") for keep in keeps) for row in rows]
        assert f"| {' | '.join(cells)} |" in page


def test_make_targets_exist():
    targets = re.findall(r"^make (\w+)", "\n".join(blocks("bash")), re.M)
    assert targets == ["demo", "test"]
    makefile = (ROOT / "Makefile").read_text()
    assert all(f"\n{target}:" in makefile for target in targets)


def shown(notebook):
    """Words of each cell's output, without the numbers, and its pictures."""
    outputs = [(i, o) for i, cell in enumerate(notebook.cells) for o in cell.get("outputs", [])]
    texts = [(i, o.get("text") or o.get("data", {}).get("text/plain", "")) for i, o in outputs]
    words = [(i, word) for i, text in texts for word in re.sub(r"\d[\d.,]*(e[+-]\d+)?", "#", text).split()]
    return [(i, re.sub("^--+$", "--", word)) for i, word in words]  # rules are as long as what they part is wide


@pytest.fixture(scope="module")
def kernel(shallow, tmp_path_factory):
    """One for all notebooks: what they import is imported once. A part of the model is the package's."""
    path = os.pathsep.join([str(Path(shallow).parents[1]), str(ROOT)])
    manager = KernelManager()
    manager.start_kernel(env={**os.environ, "PYTHONPATH": path}, cwd=str(tmp_path_factory.mktemp("notebooks")))
    yield manager
    manager.shutdown_kernel(now=True)


@pytest.mark.slow
@pytest.mark.parametrize("path", sorted((ROOT / "notebooks").glob("*.ipynb")), ids=lambda p: p.stem)
def test_notebooks(path, kernel):
    """They run, and what they show, a process's error message for its output among it, is what they have stored.

    The numbers are not compared: the model is a smaller one.
    """
    notebook = nbformat.read(path, as_version=4)
    stored = shown(notebook)
    assert len(stored) > 5, "outputs are stored"
    run(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("%reset -f")]), kernel=kernel)
    run(notebook, kernel=kernel)
    assert shown(notebook) == stored, "`make notebooks` stores what they show now"
