"""The command line: what it writes, what it prints, exit codes, and that a failure leaves nothing behind."""

import json
import re
import sys
import time
from pathlib import Path

import pytest
import torch
import transformers
from huggingface_hub import ModelCard
from tokenizers import Tokenizer, models, pre_tokenizers

import hf_reparam
from hf_reparam import __main__ as cli
from hf_reparam.files import convert as checkpoint
from tests import zoo
from tests.launch import Started, launch


@pytest.fixture
def dense(tmp_path):
    folder = tmp_path / "dense"
    zoo.BY_BASE["BertForMaskedLM"].build().save_pretrained(folder)
    (folder / "vocab.txt").write_text("a\nb\n")
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text("{}")
    (folder / "README.md").write_text("the dense model's card")
    (folder / "pytorch_model.bin").write_bytes(b"old weights")
    return folder


def run(*args):
    return cli.main([str(a) for a in args])


def only_line(capsys):
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    lines = captured.err.strip().splitlines()
    assert len(lines) == 1
    return lines[0]


def test_convert_inspect_merge(tmp_path, dense, capsys):
    small, merged = tmp_path / "made" / "small", tmp_path / "merged"
    assert run("convert", dense, small, "--rank", 6, "--quiet") == 0
    assert "12 low-rank layers" in capsys.readouterr().out
    files = ["1_Pooling", "README.md", "config.json", "model.safetensors", "vocab.txt"]
    assert sorted(p.name for p in small.iterdir()) == files
    assert [p.name for p in small.parent.iterdir()] == ["small"]
    assert run("inspect", small, "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert {layer["rank"] for layer in report["layers"]} == {6}
    assert run("merge", small, merged, "--quiet") == 0
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
        (["--keep", 0.5, "--calibration", "nowhere.txt"], "nowhere.txt cannot be read as text"),
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
    assert "exists; choose another place, or replace it with --force" in only_line(capsys)
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
        (["convert", "no/such-model", "{out}", "--rank", "6"], "no/such-model is neither a folder nor a model"),
        (["convert", "///", "{out}", "--rank", "6"], "cannot be loaded"),
        (["convert", "{dense}/vocab.txt", "{out}", "--rank", "6"], "is a file; give a model folder or a Hub id"),
        (["merge", "{dense}", "{out}"], "BertForMaskedLM has no low-rank layer"),
        (["inspect", "{dense}/1_Pooling"], "cannot be read"),
        (["inspect", "no/such-model"], "cannot be read"),
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

    monkeypatch.setattr(checkpoint, "convert", interrupted)
    assert run("convert", dense, tmp_path / "o", "--rank", 6, "--quiet") == 130
    assert sorted(p.name for p in tmp_path.iterdir()) == ["dense"]


@pytest.mark.slow
def test_kill_leaves_no_out(tmp_path, dense):
    out = tmp_path / "o"
    code = (
        "import sys, time, hf_reparam.files.convert as c, hf_reparam.__main__ as cli\n"
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


OPTIONS = {
    "convert": "rank keep target-params speedup calibration max-length max-samples embeddings heads verify "
    "allow-larger form metric allocation solver multiple-of min-rank least-saving tokens compiled target-modules "
    "exclude-modules refit max-memory remote-code json quiet stream max-shard-size force help",
    "merge": "json quiet stream max-shard-size force help",
    "inspect": "json quiet help",
}


@pytest.mark.parametrize("command", OPTIONS)
def test_help_names_every_option(capsys, command):
    with pytest.raises(SystemExit) as caught:
        run(command, "--help")
    assert caught.value.code == 0
    text = capsys.readouterr().out
    assert "SRC" in text
    assert sorted(set(re.findall(r"^  (?:-h, )?--([\w-]+)", text, re.M))) == sorted(OPTIONS[command].split())


@pytest.mark.slow
def test_card_takes_the_licence_of_the_source_and_remote_code_its_file(tmp_path, dense, capsys):
    (Path(dense) / "README.md").write_text("---\nlicense: mit\nlanguage: en\n---\n# Dense, true of it alone\n")
    assert run("convert", dense, tmp_path / "small", "--rank", 6, "--quiet", "--remote-code") == 0
    card = ModelCard.load(tmp_path / "small" / "README.md")
    assert (card.data.license, card.data.language, card.data.get("base_model")) == ("mit", "en", None)
    assert "true of it alone" not in card.text
    assert (tmp_path / "small" / "modeling_reparam.py").exists()
    (Path(dense) / "README.md").write_text("---\nlicense: [broken\n---\n")
    assert run("convert", dense, tmp_path / "other", "--rank", 6, "--quiet") == 0
    assert "license" not in ModelCard.load(tmp_path / "other" / "README.md").data.to_dict()
