"""The command line: what it writes, what it prints, exit codes, and that a failure leaves nothing behind."""

import inspect
import json
import os
import re
import subprocess
import sys
import time
import tomllib
from dataclasses import fields
from pathlib import Path

import pytest
import torch
import transformers
from huggingface_hub import HfApi, ModelCard, RepoUrl
from tokenizers import Tokenizer, models, pre_tokenizers

import hf_reparam
import hf_reparam_cli
from hf_reparam import LowRankConfig, RankPlan, compare_folders, make_plan
from hf_reparam.config import ALLOCATIONS, FORMS, METRICS, SOLVERS
from hf_reparam.files import convert as checkpoint
from hf_reparam.files import folder
from hf_reparam.files.folder import skeleton
from hf_reparam.model import card
from hf_reparam_cli import COMMANDS
from tests import zoo
from tests.launch import Started, launch

ROOT = Path(hf_reparam_cli.__file__).parent


@pytest.fixture
def dense(tmp_path):
    place = tmp_path / "dense"
    zoo.BY_BASE["BertForMaskedLM"].build().save_pretrained(place)
    (place / "vocab.txt").write_text("a\nb\n")
    (place / "1_Pooling").mkdir()
    (place / "1_Pooling" / "config.json").write_text("{}")
    (place / "README.md").write_text("the dense model's card")
    (place / "pytorch_model.bin").write_bytes(b"old weights")
    return place


def run(*args):
    return hf_reparam_cli.main([str(a) for a in args])


def only_line(capsys):
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    lines = captured.err.strip().splitlines()
    assert len(lines) == 1
    return lines[0]


def test_convert_inspect_merge(tmp_path, dense, capsys):
    small, merged = tmp_path / "made" / "small", tmp_path / "merged"
    assert run("convert", dense, small, "--rank", 6, "--quiet") == 0
    printed = capsys.readouterr().out
    assert "12 low-rank layers" in printed
    assert printed.endswith(f"0.1 MB; next: hf-reparam compare {dense} {small} --texts UNSEEN.txt\n")
    files = ["1_Pooling", "README.md", "config.json", "model.safetensors", "vocab.txt"]
    assert sorted(p.name for p in small.iterdir()) == files
    assert [p.name for p in small.parent.iterdir()] == ["small"]
    assert run("inspect", small, "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert {layer["rank"] for layer in report["layers"]} == {6}
    assert run("merge", small, merged, "--quiet") == 0
    size = sum(p.numel() for p in zoo.BY_BASE["BertForMaskedLM"].build().parameters())
    told = f"saved in {merged}: 0.1 MB; a dense model of {size:,} parameters, which loads without hf_reparam\n"
    assert capsys.readouterr().out == told
    model = transformers.AutoModelForMaskedLM.from_pretrained(merged)
    expected = hf_reparam.merge(hf_reparam.convert(zoo.BY_BASE["BertForMaskedLM"].build(), rank=6))
    assert all(torch.equal(v, expected.state_dict()[k]) for k, v in model.state_dict().items())
    assert (merged / "vocab.txt").read_text() == "a\nb\n"


@pytest.mark.slow
def test_calibrated_conversion(tmp_path, shallow, capsys):
    texts = tmp_path / "texts.txt"
    texts.write_text("\n\n".join(f"the {a} {b} went home" for a in ("old", "young", "tall") for b in GUESTS) + "\n")
    for number, options in enumerate((["--keep", 0.5], ["--rank", 64, "--form", "pivoted"])):
        out = tmp_path / str(number)
        assert (
            run("convert", shallow, out, *options, "--calibration", texts, "--quiet", "--exclude-modules", "pooler.*")
            == 0
        )
        assert "low-rank layers (fisher)" in capsys.readouterr().out
        assert "pivoted" in (out / "config.json").read_text()
    model = transformers.AutoModel.from_pretrained(shallow)
    tokenizer = transformers.AutoTokenizer.from_pretrained(shallow)
    lines = [line for line in texts.read_text().splitlines() if line]
    moments = hf_reparam.calibrate(model, lines, tokenizer=tokenizer)
    moments.save(tmp_path / "moments.safetensors")
    command = ["convert", shallow, tmp_path / "again", "--keep", 0.5, "--calibration", tmp_path / "moments.safetensors"]
    assert run(*command, "--quiet", "--exclude-modules", "pooler.*") == 0
    direct = hf_reparam.convert(
        model, hf_reparam.LowRankConfig(keep=0.5, exclude_modules="pooler.*"), calibration=moments
    )
    for name in ("0", "again"):
        loaded = transformers.AutoModel.from_pretrained(tmp_path / name)
        assert loaded.config.reparam == direct.config.reparam
        for a, b in zip(loaded.state_dict().values(), direct.state_dict().values(), strict=True):
            torch.testing.assert_close(a, b)


GUESTS = ("king", "baker", "teacher", "sailor", "doctor", "friend")


def tiny_tokenizer():
    """Reads the letters a to g; has no padding token."""
    core = Tokenizer(models.WordLevel({w: i for i, w in enumerate(["[UNK]", "[END]", *"abcdefg"])}, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=core, eos_token="[END]", pad_token=None)


@pytest.mark.slow
def test_a_tokenizer_without_padding_token(tmp_path):
    zoo.BY_BASE["GPT2LMHeadModel"].build().save_pretrained(tmp_path / "dense")
    tiny_tokenizer().save_pretrained(tmp_path / "dense")
    (tmp_path / "texts.txt").write_text("a b c\na b\ng f e d c b a\n")
    command = ["convert", tmp_path / "dense", tmp_path / "out", "--keep", 0.5, "--calibration", tmp_path / "texts.txt"]
    assert run(*command, "--quiet") == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--keep", 0.5, "--calibration", "nowhere.txt"], "no such file: nowhere.txt"),
        (["--keep", 0.5, "--calibration", "nowhere.safetensors"], "cannot be read as moments"),
        (["--keep", 2], "keep must be in"),
        (["--keep", 0.5, "--refit"], "refit needs the calibration texts themselves"),
        (["--keep", 0.5, "--refit", "--stream", "--calibration", __file__], "refit needs the model in memory"),
    ],
)
def test_wrong_calibration(tmp_path, dense, capsys, options, message):
    assert run("convert", dense, tmp_path / "out", *options, "--quiet") == 2
    assert message in only_line(capsys)
    assert not (tmp_path / "out").exists()


def test_texts_need_a_tokenizer(tmp_path, dense, capsys):
    (dense / "vocab.txt").unlink()
    (tmp_path / "texts.txt").write_text("a b\n")
    assert run("convert", dense, tmp_path / "out", "--keep", 0.5, "--calibration", tmp_path / "texts.txt") == 2
    assert "has no tokenizer to read calibration texts with" in capsys.readouterr().err


def test_inspect_a_dense_folder(dense, capsys):
    assert run("inspect", dense) == 0
    out = capsys.readouterr().out
    assert "BertForMaskedLM: 12 dense layers that can be converted" in out
    assert "output embeddings" in out


@pytest.mark.slow
def test_ranks_by_pattern(tmp_path, dense, capsys):
    assert (
        run("convert", dense, tmp_path / "o", "--rank", "*.query=3", "--rank", "*.key=0.25", "--json", "--quiet") == 0
    )
    report = json.loads(capsys.readouterr().out)
    assert {x["name"].rpartition(".")[2]: x["rank"] for x in report["layers"]} == {"query": 3, "key": 8}


@pytest.mark.slow
def test_dtype_is_kept(tmp_path):
    zoo.BY_BASE["BertForMaskedLM"].build().bfloat16().save_pretrained(tmp_path / "dense")
    assert run("convert", tmp_path / "dense", tmp_path / "o", "--rank", 6, "--quiet") == 0
    assert transformers.AutoModelForMaskedLM.from_pretrained(tmp_path / "o").dtype is torch.bfloat16


@pytest.mark.slow
def test_existing_out_is_refused_and_replaced_with_force(tmp_path, dense, capsys):
    out = tmp_path / "o"
    out.mkdir()
    (out / "mine.txt").write_text("precious")
    assert run("convert", dense, out, "--rank", 6) == 2
    assert "exists; choose another place, or replace it with force (--force)" in only_line(capsys)
    assert (out / "mine.txt").read_text() == "precious"
    assert run("convert", dense, out, "--rank", 6, "--force", "--quiet") == 0
    assert not (out / "mine.txt").exists()
    assert (out / "model.safetensors").exists()


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["convert", "{dense}", "{out}", "--rank", "0"], "rank must be an int of at least 1"),
        (["convert", "{dense}", "{out}", "--rank", "1.5"], "got 1.5"),
        (["convert", "{dense}", "{out}", "--rank", "nan"], "got nan"),
        (["convert", "{dense}", "{out}", "--rank", "500"], "rank 500 is above min(in, out) of every layer"),
        (["convert", "{dense}", "{out}", "--rank", "6", "--target-modules", "quer"], "did you mean '*.query'"),
        (["convert", "{dense}", "{out}", "--keep", "0.5", "--allow-larger"], "allow_larger goes with rank"),
        (["convert", "{dense}", "{dense}", "--rank", "6", "--force"], "is the source or holds it"),
        (["convert", "{dense}", "{dense}/..", "--rank", "6", "--force"], "is a place, no name"),
        (
            ["convert", "no/such-model", "{out}", "--rank", "6"],
            "there is no folder 'no/such-model', the cache has no no/such-model, and the Hub did not give it",
        ),
        (["convert", "///", "{out}", "--rank", "6"], "cannot be loaded"),
        (["convert", "{dense}/vocab.txt", "{out}", "--rank", "6"], "is a file; give a model folder or a Hub id"),
        (["merge", "{dense}", "{out}"], "BertForMaskedLM has no low-rank layer"),
        (["inspect", "{dense}/1_Pooling"], "cannot be read"),
        (["inspect", "no/such-model"], "there is no folder 'no/such-model', and no model of this name could be read"),
    ],
    ids=lambda value: " ".join(value[:1] + value[3:]) if isinstance(value, list) else "",
)
def test_user_errors_are_one_line_and_exit_code_2(tmp_path, dense, capsys, args, message):
    out = tmp_path / "o"
    filled = [a.format(dense=dense, out=out) for a in args]
    assert run(*filled, "--quiet") == 2
    assert message in only_line(capsys)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["dense"]


@pytest.mark.parametrize(
    "args",
    [
        [],
        ["convert", "a", "b"],
        ["convert", "a", "b", "--rank", "x"],
        ["convert", "a", "b", "--rank", "3", "--rank", "4"],
        ["convert", "a", "b", "--plan", "p.json", "--keep", "0.5"],
        ["convert", "a", "b", "--plan", "p.json", "--metric", "svd"],
        ["plan", "a", "--out", "p.json"],
        ["spin"],
    ],
    ids=" ".join,
)
def test_wrong_arguments_exit_2(args, capsys):
    with pytest.raises(SystemExit) as caught:
        run(*args)
    assert caught.value.code == 2
    assert "usage:" in capsys.readouterr().err


def test_missing_weights_are_an_error(tmp_path, dense, capsys):
    (dense / "model.safetensors").unlink()
    (dense / "pytorch_model.bin").unlink()
    assert run("convert", dense, tmp_path / "o", "--rank", 6, "--quiet") == 2
    assert "cannot be loaded" in only_line(capsys)


@pytest.mark.slow
def test_a_failure_after_the_long_work_leaves_nothing(tmp_path, dense, monkeypatch, capsys):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "copy_companions", full)
    assert run("convert", dense, tmp_path / "o", "--rank", 6, "--quiet") == 2
    assert "No space left on device" in only_line(capsys)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["dense"]


def test_interrupt(tmp_path, dense, monkeypatch, capsys):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, "carry_out", interrupted)
    assert run("convert", dense, tmp_path / "o", "--rank", 6, "--quiet") == 130
    assert sorted(p.name for p in tmp_path.iterdir()) == ["dense"]


@pytest.mark.slow
def test_kill_leaves_no_out(tmp_path, dense):
    out = tmp_path / "o"
    code = (
        "import sys, time, hf_reparam.files.convert as c, hf_reparam_cli as cli\n"
        "c.copy_companions = lambda *a: (print('here', flush=True), time.sleep(60))\n"
        "cli.main(sys.argv[1:])"
    )
    process = Started("-c", code, "convert", dense, out, "--rank", 6, "--quiet")
    process.wait_for("here\n")
    process.kill()
    time.sleep(0.1)
    assert not out.exists()


@pytest.mark.slow
def test_a_hub_id_from_the_cache(tmp_path, dense, monkeypatch, capsys):
    commit = "0" * 40
    repo = tmp_path / "cache" / "models--me--tiny"
    (repo / "snapshots").mkdir(parents=True)
    dense.rename(repo / "snapshots" / commit)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    assert run("convert", "me/tiny", tmp_path / "o", "--rank", 6, "--quiet") == 0
    assert (tmp_path / "o" / "vocab.txt").read_text() == "a\nb\n"


@pytest.mark.slow
def test_module_and_script_are_the_same_command():
    line = [f"hf-reparam {hf_reparam.__version__}"]
    script = Path(sys.executable).parent / "hf-reparam"
    assert launch(script, "--version", processes=1).splitlines() == line
    assert launch("-m", "hf_reparam", "--version", processes=1).splitlines() == line


LAYERS = "target-modules exclude-modules embeddings heads allow-larger"
RANKS = "metric allocation form multiple-of min-rank least-saving verify no-verify tokens compiled solver"
CHOOSING = f"rank keep target-params speedup calibration max-length max-samples {LAYERS} {RANKS}"
LOADING, WRITING, PRINTING = "revision token dtype device", "stream max-shard-size force", "json quiet help"
OPTIONS = {
    "convert": f"{CHOOSING} plan max-memory refit {LOADING} {WRITING} remote-code {PRINTING}",
    "plan": f"{CHOOSING} {LOADING} out force {PRINTING}",
    "merge": f"revision token {WRITING} {PRINTING}",
    "inspect": f"revision token {PRINTING}",
    "compare": f"texts max-length max-samples times no-times card {LOADING} {PRINTING}",
    "push": f"private revision token commit-message create-pr {PRINTING}",
}


def options_of(command):
    return {option.replace("-", "_") for group in COMMANDS[command].groups.values() for option in group}


def help_of(*command):
    with pytest.raises(SystemExit) as caught:
        run(*command, "--help")
    assert caught.value.code == 0


@pytest.mark.parametrize("command", OPTIONS)
def test_help_names_every_option_in_groups_and_ends_with_examples(capsys, command):
    help_of(command)
    text = capsys.readouterr().out
    options, _, examples = text.partition("\nexamples:\n")
    named = re.findall(r"^  (?:-h, )?--([\w-]+)(?:, --([\w-]+))?", options, re.M)
    assert sorted(name for names in named for name in names if name) == sorted(OPTIONS[command].split())
    assert examples.startswith(f"  hf-reparam {command} ")
    assert options.count("\n\n") > 3, "groups"
    assert len(options.split("\n\n")[0].splitlines()) == 1, "usage is one line"
    help_of()
    assert f"\n    {command} " in capsys.readouterr().out


@pytest.mark.parametrize("command", ["convert", "plan"])
def test_every_field_of_the_configuration_has_an_option(command):
    assert {field.name for field in fields(LowRankConfig)} <= options_of(command)


BY_OTHERS = {"source": "SRC", "out": "OUT", "config": "its fields, and --plan", "dense": "SRC", "small": "OUT"}
"""Parameters without an option of their own: what stands for them."""


@pytest.mark.parametrize(
    ("command", "function"),
    [("convert", hf_reparam.convert_folder), ("merge", hf_reparam.merge_folder), ("compare", compare_folders)],
)
def test_every_parameter_has_an_option(command, function):
    assert {*inspect.signature(function).parameters} - BY_OTHERS.keys() <= options_of(command)


def test_choices_are_those_of_the_configuration():
    groups = COMMANDS["convert"].groups.values()
    offered = {name: option["choices"] for group in groups for name, option in group.items() if "choices" in option}
    of_torch = offered.pop("dtype")
    known = {"metric": METRICS, "allocation": ALLOCATIONS, "form": FORMS, "solver": SOLVERS}
    assert offered == known
    assert all(isinstance(getattr(torch, name), torch.dtype) for name in of_torch)


HELP = """
import sys, hf_reparam_cli
for command in [[], *([name] for name in hf_reparam_cli.COMMANDS)]:
    for more in (["--help"], ["--wrong"], ["--quiet"]):
        try:
            hf_reparam_cli.main([*command, *more])
        except SystemExit:
            continue
        raise AssertionError(command)
print(sorted({"torch", "transformers", "huggingface_hub", "numpy", "hf_reparam"}.intersection(sys.modules)))
"""


@pytest.mark.slow
def test_help_and_usage_errors_import_nothing_that_takes_long(tmp_path):
    settings = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", HELP], capture_output=True, text=True, cwd=tmp_path, env=settings)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[]"
    assert "hf-reparam convert: error: the following arguments are required: SRC, OUT" in done.stderr
    assert "push has no option --wrong" in done.stderr


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["convert", "a", "b", "--keeep", "0.5"], "convert has no option --keeep: did you mean --keep?"),
        (["compare", "a", "b", "--text=c"], None),  # the start of a name will do
        (["plan", "a", "--no-verify"], None),
        (["push", "a", "b/c", "--commit-message", "--no longer large"], None),
        (["inspect", "--quiet", "--", "--weird"], None),
        (["plan", "a", "--no-heads"], "plan has no option --no-heads"),
    ],
)
def test_an_option_that_is_none_is_named_first(words, said, capsys):
    if said is None:
        assert hf_reparam_cli.parsed(words).command == words[0]
        return
    with pytest.raises(SystemExit):
        hf_reparam_cli.parsed(words)
    assert said in capsys.readouterr().err


def test_the_script_is_the_module_outside_of_the_package():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert project["project"]["scripts"] == {"hf-reparam": "hf_reparam_cli:main"}
    assert hf_reparam_cli.main.__doc__


# Plans


@pytest.mark.slow
def test_plan_sets_sizes_beside_each_other_and_reads_no_weights(dense, capsys):
    for file in ("model.safetensors", "pytorch_model.bin"):
        (dense / file).unlink()
    assert run("plan", dense, "--min-rank", 1, "--quiet", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    expected = [make_plan(skeleton(str(dense)), LowRankConfig(keep=k, min_rank=1)).report for k in (0.8, 0.6, 0.4)]
    assert [size["parameters"] for size in found["sizes"]] == [report.parameters_after for report in expected]
    assert found["parameters"] == expected[0].parameters_before
    assert found["megabytes"] == pytest.approx(found["parameters"] * 4 / 1e6)
    assert run("plan", dense, "--min-rank", 1, "--quiet", "--dtype", "bfloat16", "--json") == 0
    assert json.loads(capsys.readouterr().out)["megabytes"] == pytest.approx(found["parameters"] * 2 / 1e6)
    assert run("plan", dense, "--quiet") == 0  # with the least rank that is usual
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines[5:8]] == [["keep", size] for size in ("0.8", "0.6", "0.4")]
    assert lines[7].endswith("cannot be reached")
    assert "--calibration" in lines[-1]


@pytest.mark.slow
def test_plan_predicts_what_is_lost_where_there_is_data(tmp_path, shallow, capsys):
    (tmp_path / "texts.txt").write_text("\n".join(f"the {a} {b} went" for a in ("old", "tall") for b in GUESTS))
    assert run("plan", shallow, "--calibration", tmp_path / "texts.txt", "--quiet", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    losses = [size["measured"] for size in found["sizes"]]
    assert 0 < losses[0] < losses[1] < losses[2]
    assert all(size["predicted"] is None or size["predicted"] > 0 for size in found["sizes"])
    assert found["unit"] == "of the squared hidden states"


@pytest.mark.slow
def test_a_plan_is_written_read_and_carried_out(tmp_path, dense, capsys):
    place = tmp_path / "plan.json"
    assert run("plan", dense, "--keep", 0.5, "--min-rank", 1, "--out", place, "--quiet") == 0
    printed = capsys.readouterr().out
    assert "12 low-rank layers" in printed
    assert printed.endswith(f"written to {place}; next: hf-reparam convert {dense} OUT --plan {place}\n")
    assert run("plan", dense, "--keep", 0.4, "--out", place, "--quiet") == 2
    assert "plan.json exists; choose another place, or replace it with force (--force)" in only_line(capsys)
    assert run("convert", dense, tmp_path / "planned", "--plan", place, "--quiet") == 0
    capsys.readouterr()
    assert run("convert", dense, tmp_path / "direct", "--keep", 0.5, "--min-rank", 1, "--quiet") == 0
    assert only_line(capsys).startswith("hf-reparam: warning: a size without calibration data cuts the weights")
    one, other = (transformers.AutoModelForMaskedLM.from_pretrained(tmp_path / n) for n in ("planned", "direct"))
    assert one.config.reparam["modules"] == other.config.reparam["modules"]
    assert all(torch.equal(v, other.state_dict()[k]) for k, v in one.state_dict().items())
    assert run("plan", dense, "--keep", 0.6, "--min-rank", 1, "--out", place, "--force", "--quiet") == 0
    assert RankPlan.from_dict(json.loads(place.read_text())).modules != one.config.reparam["modules"]


@pytest.mark.parametrize(
    ("text", "message"),
    [(None, "cannot be read as a plan"), ("{", "cannot be read as a plan"), ("[]", "'reparam' must be an object")],
)
def test_what_is_no_plan(tmp_path, dense, capsys, text, message):
    if text is not None:
        (tmp_path / "plan.json").write_text(text)
    assert run("convert", dense, tmp_path / "out", "--plan", tmp_path / "plan.json", "--quiet") == 2
    assert message in only_line(capsys)
    assert not (tmp_path / "out").exists()


# Where a model comes from, and goes


@pytest.mark.parametrize("source", ["/no/such/folder", "./none", "../none", "~/none", "models/mine/none", "none/"])
def test_a_path_that_is_not_there_is_no_folder_and_not_asked_for_on_the_hub(tmp_path, capsys, monkeypatch, source):
    monkeypatch.setattr(folder, "snapshot_download", None)
    monkeypatch.setattr(folder, "AutoConfig", None)
    out = tmp_path / "out"
    for command in (
        ["convert", source, out, "--rank", 6],
        ["inspect", source],
        ["plan", source],
        ["push", source, "a/b"],
    ):
        assert run(*command, "--quiet") == 2
        assert only_line(capsys) == f"hf-reparam: error: no such folder: {source}"


@pytest.mark.slow
def test_revision_and_token_reach_the_hub(tmp_path, dense, monkeypatch):
    asked = []
    monkeypatch.setattr(
        folder, "snapshot_download", lambda name, **options: asked.append((name, options)) or str(dense)
    )
    options = ["--revision", "v2", "--token", "hf_mine", "--quiet"]
    assert run("convert", "me/tiny", tmp_path / "o", "--rank", 6, *options) == 0
    assert run("merge", "me/tiny", tmp_path / "merged", *options) == 2  # it is dense
    (tmp_path / "texts.txt").write_text("a b\n")
    assert run("compare", "me/tiny", "me/other", "--texts", tmp_path / "texts.txt", *options, "--no-times") == 0
    assert [name for name, _ in asked] == ["me/tiny", "me/tiny", "me/tiny", "me/other"]
    assert [given["revision"] for _, given in asked] == ["v2", "v2", "v2", None]
    assert {given["token"] for _, given in asked} == {"hf_mine"}


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--revision", "main"], "is a folder, which has no revision 'main'"),
        (["--device", "nowhere"], "there is no device 'nowhere' here"),
        (["--device", "cpu", "--stream"], "device needs the model in memory"),
    ],
)
def test_options_that_cannot_be(tmp_path, dense, capsys, more, message):
    assert run("convert", dense, tmp_path / "out", "--rank", 6, "--quiet", *more) == 2
    assert message in only_line(capsys)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.parametrize("more", [["--stream"], ["--device", "cpu"]])
def test_dtype_is_the_one_that_is_asked_for(tmp_path, dense, more):
    assert run("convert", dense, tmp_path / "out", "--rank", 6, "--quiet", "--dtype", "bfloat16", *more) == 0
    loaded = transformers.AutoModelForMaskedLM.from_pretrained(tmp_path / "out")
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.bfloat16}


@pytest.fixture
def commits(monkeypatch):
    """A stand-in for the Hub that remembers what was committed: names, and their texts or sizes."""
    found = []

    def create_commit(self, repo_id, operations, **options):
        read = {}
        for operation in operations:
            with operation.as_file() as file:
                read[operation.path_in_repo] = file.read()
        found.append((repo_id, self.token, options, read))
        return f"https://huggingface.co/{repo_id}/commit/1"

    monkeypatch.setattr(HfApi, "create_commit", create_commit)
    monkeypatch.setattr(HfApi, "create_repo", lambda self, repo_id, **_: RepoUrl(f"https://huggingface.co/{repo_id}"))
    return found


@pytest.mark.slow
def test_push_sends_the_folder_with_its_card(tmp_path, dense, capsys, commits):
    small = tmp_path / "small"
    assert run("convert", dense, small, "--rank", 6, "--quiet") == 0
    mine = (small / "README.md").read_text().replace("# ", "# Mine: ", 1).replace("## Low-rank", "## Old", 1)
    (small / "README.md").write_text(mine)
    (small / ".cache").mkdir()
    (small / ".cache" / "lock").write_text("mine alone")
    before = {path: path.read_bytes() for path in small.rglob("*") if path.is_file()}
    capsys.readouterr()
    assert run("push", small, "me/small", "--token", "hf_mine", "--commit-message", "First", "--quiet") == 0
    assert capsys.readouterr().out == "5 files pushed to me/small: https://huggingface.co/me/small/commit/1\n"
    ((repo, token, options, files),) = commits
    assert (repo, token, options["commit_message"]) == ("me/small", "hf_mine", "First")
    assert sorted(files) == ["1_Pooling/config.json", "README.md", "config.json", "model.safetensors", "vocab.txt"]
    assert files["model.safetensors"] == before[small / "model.safetensors"]
    assert "# Mine: " in files["README.md"].decode()
    assert "## Low-rank layers" in files["README.md"].decode()
    assert {path: path.read_bytes() for path in small.rglob("*") if path.is_file()} == before


@pytest.mark.slow
def test_push_writes_a_card_where_there_is_none(tmp_path, dense, commits, monkeypatch):
    assert run("convert", dense, tmp_path / "small", "--rank", 6, "--quiet") == 0
    (tmp_path / "small" / "README.md").unlink()
    monkeypatch.setattr(card, "_published_card", lambda repo, token: None)
    assert run("push", tmp_path / "small", "me/small", "--quiet") == 0
    assert "## Low-rank layers" in commits[0][3]["README.md"].decode()


@pytest.mark.slow
def test_push_refuses_a_dense_model_and_says_that_the_hub_is_out_of_reach(tmp_path, dense, capsys):
    assert run("push", dense, "me/small", "--quiet") == 2
    assert "holds a BertForMaskedLM, which is not converted" in only_line(capsys)
    hf_reparam.convert(zoo.BY_BASE["BertForMaskedLM"].build(), rank=6).save_pretrained(tmp_path / "small")
    assert run("push", tmp_path / "small", "me/small", "--quiet") == 2
    assert "small cannot be pushed to me/small: " in only_line(capsys)


@pytest.mark.slow
def test_card_takes_the_licence_of_the_source_and_remote_code_its_file(tmp_path, dense, capsys):
    (Path(dense) / "README.md").write_text("---\nlicense: mit\nlanguage: en\n---\n# Dense, true of it alone\n")
    assert run("convert", dense, tmp_path / "small", "--rank", 6, "--quiet", "--remote-code") == 0
    made = ModelCard.load(tmp_path / "small" / "README.md")
    assert (made.data.license, made.data.language, made.data.get("base_model")) == ("mit", "en", None)
    assert "true of it alone" not in made.text
    assert (tmp_path / "small" / "modeling_reparam.py").exists()
    (Path(dense) / "README.md").write_text("---\nlicense: [broken\n---\n")
    assert run("convert", dense, tmp_path / "other", "--rank", 6, "--quiet") == 0
    assert "license" not in ModelCard.load(tmp_path / "other" / "README.md").data.to_dict()
