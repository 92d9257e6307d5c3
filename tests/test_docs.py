"""The code of README and docs runs, block by block; notebooks run from top to bottom."""

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

import hf_reparam_cli
from examples import tiny
from hf_reparam import report
from notebooks.run import run

ROOT = Path(__file__).parents[1]


def blocks(language, page="README.md"):
    found = re.findall(rf"^```{language}\n(.*?)^```", (ROOT / page).read_text(), re.M | re.S)
    return [re.sub(r"\\\n +", "", block) for block in found]  # lines that go on


SIZES = {"14_500_000": "6_340_000", "12_000_000": "5_000_000"}
"""Parameters that pages ask for, of a larger model, and as many as `shallow` can have."""


def sized(block):
    return re.sub("|".join(SIZES), lambda found: SIZES[found[0]], block)


@pytest.mark.slow
@pytest.mark.usefixtures("short_refine", "quick_clock")
def test_python_blocks_run_in_order(tmp_path, shallow, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(shallow)
    data = [{**tokenizer("so good", padding="max_length", max_length=8), "labels": i % 2} for i in range(8)]
    scope = {"DATA": data, "TEXTS": ["so good", "so bad"] * 20, "FINE_TUNED": shallow}
    scope["ACCURACY"] = lambda candidate: 1.0 - candidate.num_parameters() / 1e10
    assert len(blocks("python")) == 6
    for block in blocks("python"):
        local = block.replace("sentence-transformers/all-MiniLM-L6-v2", shallow)
        local = local.replace("[:160]", "[:12]").replace("[160:200]", "[160:170]")
        exec(compile(sized(local), "README.md", "exec"), scope)
    assert type(scope["again"]).__name__ == "ReparamBertModel"
    assert type(scope["dense"]).__name__ == "BertModel"
    assert {layer.rank for layer in report(scope["by_rank"]).layers} == {32, 48}
    sizes = [scope[name].num_parameters() for name in ("smaller", "small", "model")]
    assert sizes == sorted(sizes)
    assert 6_240_000 < scope["fits"].num_parameters() <= 6_340_000 < sizes[-1]
    assert scope["good"].report.parameters_after < sizes[-1]


def run_command(line, source, capsys):
    """Run a line that begins with `hf-reparam`, and judge what it printed and wrote."""
    words = [source if word == "SRC" else word for word in shlex.split(line)[1:]]
    assert hf_reparam_cli.main([*words, "--quiet"]) == 0, line
    printed = capsys.readouterr().out
    if words[0] == "compare":
        assert "\nparameters" in printed, line
        assert "| parameters |" in Path(words[2], "README.md").read_text()
        return
    if words[0] == "plan":
        assert "keep 0.6" in printed or json.loads(Path(words[-1]).read_text())["modules"], line
        return
    told = {"merge": "a dense model of"}.get(words[0], "low-rank layers")
    told = "dense layers that can be converted" if words[:2] == ["inspect", source] else told
    assert told in printed.splitlines()[0], line
    if words[0] != "inspect":
        loaded = type(AutoModel.from_pretrained(words[2])).__name__
        assert loaded == {"convert": "ReparamBertModel", "merge": "BertModel"}[words[0]], line


@pytest.mark.slow
@pytest.mark.usefixtures("quick_clock")
def test_shell_commands_run(tmp_path, shallow, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "TEXTS.txt").write_text("so good\nso bad\n")
    commands = [line for block in blocks("bash") for line in block.splitlines() if line.startswith("hf-reparam")]
    assert len(commands) == 3
    for command in commands:
        run_command(command, shallow, capsys)


ENGLISH, CHINESE = "docs/quickstart.md", "docs/zh/quickstart.md"
TEXTS = {str(path.relative_to(ROOT)): path.read_text() for path in sorted((ROOT / "docs").rglob("*.md"))}
RUN = {page: text for page, text in TEXTS.items() if page != CHINESE}  # whose code is the English page's
PAGES = [page for page, text in RUN.items() if "```python" in text]
COMMANDED = [page for page, text in RUN.items() if "\nhf-reparam " in text]


def test_sizes_that_pages_ask_for_are_known():
    pages = {"14_500_000": "README.md", "12_000_000": "docs/how-to/choose-a-size.md"}
    assert pages.keys() == SIZES.keys()
    assert all(size in "\n".join(blocks("python", page)) for size, page in pages.items())


def test_pages_with_code_are_found():
    assert {ENGLISH, "docs/big-models.md", "docs/how-to/share.md"} <= set(PAGES)


def test_the_chinese_page_shows_what_others_run():
    """The statements of the English page, in their order, and README's commands."""
    code = [ast.parse("\n".join(blocks("python", page))).body for page in (ENGLISH, CHINESE)]
    english, chinese = ([ast.unparse(statement) for statement in body] for body in code)
    assert chinese == [statement for statement in english if statement != "model.save_pretrained(OUT + '-dense')"]
    readme, chinese = ([line for b in blocks("bash", p) for line in b.splitlines()] for p in ("README.md", CHINESE))
    assert chinese == [line for line in readme if line.startswith("hf-reparam")]


@pytest.mark.slow
@pytest.mark.usefixtures("short_refine", "quick_clock")
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("page", PAGES)
def test_the_code_of_pages_runs(page, tmp_path, shallow, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(shallow)
    data = [{**tokenizer("so good", padding="max_length", max_length=8), "labels": i % 2} for i in range(8)]
    scope = {"__name__": page, "BASE": shallow, "OUT": str(tmp_path / "out"), "DATA": data, "TOKENIZER": tokenizer}
    scope |= {"TEXTS": ["so good", "so bad"] * 20, "HELD_OUT": ["so so", "so good"]}
    scope["ACCURACY"] = lambda model: 1.0 - model.num_parameters() / 1e10
    if page == "docs/big-models.md":
        scope["model"] = AutoModel.from_pretrained(shallow)
    for block in blocks("python", page):
        exec(compile(sized(block), page, "exec"), scope)
    if page == "docs/big-models.md":
        assert len(blocks("python", page)) == 3
        assert scope["report"].factored_after < scope["report"].factored_before
        assert {path.name for path in tmp_path.iterdir()} >= {"out", "out-dense", "out-small", "out-saved"}


def test_commands_are_found():
    how_to = ["docs/how-to/command-line.md", "docs/how-to/compare.md"]
    assert ["docs/big-models.md", *how_to] == COMMANDED
    counts = {
        page: sum(line.startswith("hf-reparam") for b in blocks("bash", page) for line in b.splitlines())
        for page in COMMANDED
    }
    assert list(counts.values()) == [2, 10, 2]


@pytest.mark.slow
@pytest.mark.usefixtures("quick_clock")
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
        assert hf_reparam_cli.parsed(shlex.split(line.partition("-m hf_reparam ")[2])).keep == 0.5


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
    assert others == ["flow.md", "sentence-transformers.md"]
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
    assert "Make a pretrained Transformers model smaller" in front
    assert "<math" in (tmp_path / "site" / "explanation" / "mathematics" / "index.html").read_text()
    reference = (tmp_path / "site" / "reference" / "index.html").read_text()
    assert "distillation_loss" in reference
    assert reference.count('class="gp">&gt;&gt;&gt;') >= 10  # examples of docstrings are code,
    assert "<blockquote>" not in reference  # not quotes within quotes
    assert (tmp_path / "site" / "results" / "quality.png").exists()
    notebooks = tmp_path / "site" / "notebooks"
    for path in (ROOT / "notebooks").glob("*.ipynb"):
        assert (notebooks / path.name).read_bytes() == path.read_bytes()
        assert f'href="../{path.name}"' in (notebooks / path.stem / "index.html").read_text()


def test_notebooks_open_in_colab_once_the_project_has_an_address():
    spec = importlib.util.spec_from_file_location("hooks", ROOT / "docs" / "hooks.py")
    hooks = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(hooks)
    colab = "https://colab.research.google.com/github/owner/name/blob/main/notebooks/1.ipynb"
    assert f"]({colab})" in hooks.links("1.ipynb", "https://github.com/owner/name/")
    for other in (None, "https://gitlab.com/owner/name"):
        assert "Colab" not in hooks.links("1.ipynb", other)


def test_make_targets_exist():
    targets = re.findall(r"^make (\w+)", "\n".join(blocks("bash")), re.M)
    assert targets == ["demo", "test"]
    makefile = (ROOT / "Makefile").read_text()
    assert all(f"\n{target}:" in makefile for target in targets)


GUESSES = r"\b(debugger|formatstrings|string-methods|typesmapping|measured(?=\s+ranks)|predicted(?=\s+ranks))\b"
"""What a trained model takes a sentence for, and which plan is best on held-out data: a smaller model differs."""


def shown(notebook):
    """Words of each cell's output, without numbers, a model's guess and layers that a plan leaves dense."""
    outputs = [(i, o) for i, cell in enumerate(notebook.cells) for o in cell.get("outputs", [])]
    texts = [(i, o.get("text") or o.get("data", {}).get("text/plain", "")) for i, o in outputs]
    texts = [(i, re.sub(GUESSES, "guess", re.sub(".*the plan leaves (it )?dense\n", "", text))) for i, text in texts]
    words = [(i, word) for i, text in texts for word in re.sub(r"\d[\d.,]*(e[+-]\d+)?", "#", text).split()]
    return [(i, re.sub("^--+$", "--", word)) for i, word in words]  # rules are as long as what they part is wide


@pytest.fixture(scope="module")
def kernel(importable, tmp_path_factory):
    """One for all notebooks: what they import is imported once. A part of the model is the package's."""
    path = os.pathsep.join([str(Path(importable).parents[1]), str(ROOT)])
    manager = KernelManager()
    manager.start_kernel(env={**os.environ, "PYTHONPATH": path}, cwd=str(tmp_path_factory.mktemp("notebooks")))
    yield manager
    manager.shutdown_kernel(now=True)


@pytest.mark.slow
@pytest.mark.parametrize("path", sorted((ROOT / "notebooks").glob("*.ipynb")), ids=lambda p: p.stem)
def test_notebooks(path, kernel):
    """They run, and what they show, a process's error message for its output among it, is what they have stored.

    The numbers, the guess and what a plan leaves dense are not compared: the model is a smaller one.
    """
    notebook = nbformat.read(path, as_version=4)
    stored = shown(notebook)
    assert len(stored) > 5, "outputs are stored"
    run(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("%reset -f")]), kernel=kernel)
    run(notebook, kernel=kernel)
    assert shown(notebook) == stored, "`make notebooks` stores what they show now"
