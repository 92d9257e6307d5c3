"""From folder to folder: streamed results are those of loading, converting and saving; broken runs go on."""

import itertools
import json
import shutil
import time
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import hf_reparam
import hf_reparam_cli
from hf_reparam import Entry, LowRankConfig, RankPlan
from hf_reparam.files.folder import load, load_tokenizer
from hf_reparam.structures import linear
from tests import zoo
from tests.launch import Started, launch, torchrun
from tests.test_cli import tiny_tokenizer

FAMILIES = [
    ("BertForMaskedLM", "pair"),
    ("GPT2LMHeadModel", "pivoted"),
    ("AlbertForMaskedLM", "pivoted"),
    ("T5ForConditionalGeneration", "pair"),
    ("BartForConditionalGeneration", "pivoted"),
    ("ViTForImageClassification", "pair"),
]


PLAN = RankPlan({"encoder.layer.0.output.dense": Entry(6)}, "bert")


def tensors(folder):
    files = sorted(Path(folder).glob("*.safetensors"))
    assert files
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def assert_same_folder(one, other):
    """Tensor for tensor, and the same configuration."""
    a, b = tensors(one), tensors(other)
    assert a.keys() == b.keys()
    assert [name for name in a if a[name].dtype != b[name].dtype or not torch.equal(a[name], b[name])] == []
    assert (Path(one) / "config.json").read_text() == (Path(other) / "config.json").read_text()


def saved(base, folder, dtype=torch.float32):
    zoo.BY_BASE[base].build().to(dtype).save_pretrained(folder, max_shard_size="20KB")
    return folder


@pytest.fixture
def bert(tmp_path):
    return saved("BertForMaskedLM", tmp_path / "dense")


def hidden(folder):
    return sorted(p.name for p in folder.iterdir() if p.name.startswith("."))


@pytest.mark.slow
@pytest.mark.parametrize(("base", "form"), FAMILIES)
def test_streamed_is_loaded_converted_and_saved(tmp_path, base, form):
    source = saved(base, tmp_path / "dense")
    hf_reparam.convert(load(source)[0], LowRankConfig(rank=6, form=form)).save_pretrained(tmp_path / "direct")
    report = hf_reparam.convert_folder(
        source, tmp_path / "out", LowRankConfig(rank=6, form=form), max_shard_size="20KB", stream=True
    )
    assert_same_folder(tmp_path / "direct", tmp_path / "out")
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1
    assert report.factored_after < report.factored_before
    hf_reparam.merge(load(tmp_path / "out")[0]).save_pretrained(tmp_path / "direct-merged")
    hf_reparam.merge_folder(tmp_path / "out", tmp_path / "merged", stream=True)
    assert_same_folder(tmp_path / "direct-merged", tmp_path / "merged")
    assert hidden(tmp_path) == []


def test_half_precision(tmp_path):
    source = saved("LlamaForCausalLM", tmp_path / "dense", torch.bfloat16)
    hf_reparam.convert(load(source)[0], rank=6).save_pretrained(tmp_path / "direct")
    hf_reparam.convert_folder(source, tmp_path / "out", rank=6, stream=True)
    assert_same_folder(tmp_path / "direct", tmp_path / "out")


@pytest.mark.slow
def test_the_index_lists_every_tensor(tmp_path, bert):
    hf_reparam.convert_folder(bert, tmp_path / "out", rank=6, max_shard_size="20KB", stream=True)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == tensors(tmp_path / "out").keys()
    model = transformers.AutoModelForMaskedLM.from_pretrained(tmp_path / "out")
    direct = hf_reparam.convert(load(bert)[0], rank=6)
    batch = zoo.BY_BASE["BertForMaskedLM"].batch()
    assert all(map(torch.equal, zoo.outputs(model, batch), zoo.outputs(direct, batch)))


@pytest.mark.slow
def test_by_size_with_moments(tmp_path, bert):
    model = load(bert)[0]
    moments = hf_reparam.calibrate(model, [zoo.BY_BASE["BertForMaskedLM"].batch()])
    moments.save(tmp_path / "moments.safetensors")
    direct = hf_reparam.convert(model, keep=0.5, calibration=moments)
    expected = hf_reparam.report(direct)
    direct.save_pretrained(tmp_path / "direct")
    plan = hf_reparam.make_plan(model, calibration=moments, keep=0.5)
    asked = [
        {"keep": 0.5, "calibration": moments},
        {"keep": 0.5, "calibration": tmp_path / "moments.safetensors"},
        {"config": plan, "calibration": moments},
    ]
    for number, (options, stream) in enumerate(itertools.product(asked, [True, False])):
        report = hf_reparam.convert_folder(bert, tmp_path / str(number), **options, stream=stream)
        assert_same_folder(tmp_path / "direct", tmp_path / str(number))
        assert report.to_dict() == expected.to_dict()


@pytest.mark.slow
def test_plans_are_judged_where_the_model_is_in_memory(tmp_path, gpt2):
    """By default; whoever streams is told that ranks are not measured, and what to do."""
    options = {"keep": 0.5, "calibration": tmp_path / "texts.txt"}
    in_memory = hf_reparam.convert_folder(gpt2, tmp_path / "memory", **options)
    assert in_memory.judgement is not None
    with pytest.warns(UserWarning, match="layers are streamed or offloaded, so ranks are predicted, not measured"):
        streamed = hf_reparam.convert_folder(gpt2, tmp_path / "streamed", **options, stream=True)
    assert streamed.judgement is None
    config = hf_reparam.LowRankConfig(speedup=1.5)
    for more in ({"speedup": 1.5}, {"config": config}, {"rank": 4, "device": "cpu"}):
        with pytest.raises(hf_reparam.errors.TargetError, match="needs the model in memory: leave stream=True"):
            hf_reparam.convert_folder(gpt2, tmp_path / "out", **more, stream=True)


@pytest.fixture
def gpt2(tmp_path):
    source = saved("GPT2LMHeadModel", tmp_path / "dense")
    tiny_tokenizer().save_pretrained(source)
    (tmp_path / "texts.txt").write_text("a b c\na b\ng f e d c b a\n" * 30)
    return source


@pytest.mark.slow
@pytest.mark.parametrize("stream", [True, False])
def test_with_texts(tmp_path, gpt2, stream):
    tokenizer = load_tokenizer(gpt2)
    lines = (tmp_path / "texts.txt").read_text().splitlines()
    config = hf_reparam.LowRankConfig(keep=0.5, verify=False)  # not done for a model on disk
    direct = hf_reparam.convert(load(gpt2)[0], config, calibration=lines, tokenizer=tokenizer)
    direct.save_pretrained(tmp_path / "direct")
    options = {"calibration": tmp_path / "texts.txt", "max_memory": "400KB", "stream": stream}
    hf_reparam.convert_folder(gpt2, tmp_path / "out", config, **options)
    assert_same_folder(tmp_path / "direct", tmp_path / "out")
    assert hidden(tmp_path) == []


@pytest.mark.slow
def test_two_processes_give_the_same_tensors(tmp_path, gpt2, capsys):
    options = ["--keep", 0.5, "--calibration", tmp_path / "texts.txt", "--quiet"]
    for name, start, more in (("two", launch, []), ("streamed", torchrun, ["--stream"])):
        alone = ["--no-verify"] if more else []  # nothing is tried with a model on disk
        single = ["convert", gpt2, tmp_path / f"one-{name}", *options, *alone]
        assert hf_reparam_cli.main(list(map(str, single))) == 0
        printed = capsys.readouterr().out.replace(f"one-{name}", name)
        assert start("-m", "hf_reparam", "convert", gpt2, tmp_path / name, *options, *more) == printed != ""
        a, b = tensors(tmp_path / f"one-{name}"), tensors(tmp_path / name)
        assert a.keys() == b.keys()
        for key in a:
            torch.testing.assert_close(a[key], b[key], atol=1e-6, rtol=0)
        assert (tmp_path / name / "config.json").read_text() == (tmp_path / f"one-{name}" / "config.json").read_text()
    assert hidden(tmp_path) == []


def breaking_after(count, monkeypatch, error=KeyboardInterrupt):
    """Let `count` layers be factored, then fail."""
    made = []
    factor = linear.factor

    def counted(*args, **kwargs):
        if len(made) == count:
            raise error
        made.append(args)
        return factor(*args, **kwargs)

    monkeypatch.setattr(linear, "factor", counted)
    return made


def test_a_broken_run_goes_on(tmp_path, bert, monkeypatch):
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        breaking_after(5, patch)
        with pytest.raises(KeyboardInterrupt):
            hf_reparam.convert_folder(bert, out, rank=6, stream=True)
    assert not out.exists()
    assert len(hidden(tmp_path)) == 1
    made = breaking_after(99, monkeypatch)
    report = hf_reparam.convert_folder(bert, out, rank=6, stream=True)
    assert len(made) == len(report.layers) - 5
    direct = hf_reparam.convert(load(bert)[0], rank=6)
    expected = hf_reparam.report(direct)
    direct.save_pretrained(tmp_path / "direct")
    assert_same_folder(tmp_path / "direct", out)
    assert report.to_dict() == expected.to_dict()
    assert hidden(tmp_path) == []


@pytest.mark.slow
def test_a_broken_run_of_another_form_is_not_taken_up(tmp_path, bert, monkeypatch):
    config = LowRankConfig(rank=6, form="pivoted")
    with monkeypatch.context() as patch:
        breaking_after(5, patch)
        with pytest.raises(KeyboardInterrupt):
            hf_reparam.convert_folder(bert, tmp_path / "out", rank=6, stream=True)
    hf_reparam.convert_folder(bert, tmp_path / "out", config, stream=True)
    hf_reparam.convert(load(bert)[0], config).save_pretrained(tmp_path / "direct")
    assert_same_folder(tmp_path / "direct", tmp_path / "out")


@pytest.mark.slow
def test_kill_and_go_on(tmp_path, bert):
    """SIGKILL at any moment leaves no `out`, and the next run finishes the work."""
    code = (
        "import sys, time, hf_reparam.structures.linear as f, hf_reparam_cli as cli\n"
        "factor = f.factor\n"
        "f.factor = lambda *a, **k: (print('layer', flush=True), time.sleep(0.05), factor(*a, **k))[-1]\n"
        "cli.main(sys.argv[1:])"
    )
    options = ["convert", str(bert), str(tmp_path / "out"), "--rank", "6", "--stream", "--quiet"]
    for layers in (2, 5):
        process = Started("-c", code, *options)
        process.wait_for("layer\n" * layers)
        time.sleep(0.02)
        process.kill()
        assert not (tmp_path / "out").exists()
    left = [p for p in (tmp_path / hidden(tmp_path)[0] / "layers" / "pair").iterdir() if (p / "layer.json").exists()]
    assert len(left) >= 5  # one of the first run at least, four of the second
    launch("-m", "hf_reparam", *options, processes=1)
    hf_reparam.convert(load(bert)[0], rank=6).save_pretrained(tmp_path / "direct")
    assert_same_folder(tmp_path / "direct", tmp_path / "out")
    assert hidden(tmp_path) == []


@pytest.mark.slow
def test_a_failure_while_saving_is_taken_up_again(tmp_path, bert, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(transformers.PreTrainedModel, "save_pretrained", lambda *args, **kwargs: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            hf_reparam.convert_folder(bert, tmp_path / "out", rank=6, stream=True)
    (tmp_path / hidden(tmp_path)[0] / "new").mkdir()
    (tmp_path / hidden(tmp_path)[0] / "new" / "rubbish").touch()
    made = breaking_after(0, monkeypatch)
    hf_reparam.convert_folder(bert, tmp_path / "out", rank=6, stream=True)
    assert made == []
    assert not (tmp_path / "out" / "rubbish").exists()


@pytest.mark.slow
def test_an_unfit_source_is_refused_before_the_long_work(tmp_path, bert, monkeypatch):
    made = breaking_after(99, monkeypatch)
    shards = sorted(bert.glob("*.safetensors"))
    whole = shards[2].read_bytes()
    for damage in (whole[:-10], b"", None):
        shards[2].unlink()
        if damage is not None:
            shards[2].write_bytes(damage)
        with pytest.raises(hf_reparam.errors.CheckpointError):
            hf_reparam.convert_folder(bert, tmp_path / "out", rank=6, stream=True)
    shards[2].write_bytes(whole)
    narrower = transformers.AutoConfig.from_pretrained(bert)
    narrower.intermediate_size = 40
    narrower.save_pretrained(bert)
    with pytest.raises(hf_reparam.errors.CheckpointError, match="mismatch"):
        hf_reparam.convert_folder(bert, tmp_path / "out", rank=6, stream=True)
    assert made == []
    assert [p.name for p in tmp_path.iterdir()] == ["dense"]


def test_missing_weights_are_refused(tmp_path, bert):
    index = bert / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    name = "bert.encoder.layer.0.output.dense.weight"
    shard = bert / content["weight_map"].pop(name)
    index.write_text(json.dumps(content))
    kept = {key: value for key, value in load_file(shard).items() if key != name}
    save_file(kept, shard, {"format": "pt"})
    with pytest.raises(
        hf_reparam.errors.CheckpointError, match=r"1 weights are missing.*layer\.0\.output\.dense\.weight"
    ):
        hf_reparam.convert_folder(bert, tmp_path / "out", rank=6, stream=True)
    assert [p.name for p in tmp_path.iterdir()] == ["dense"]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({}, hf_reparam.errors.TargetError, "exactly one size"),
        ({"rank": 6, "keep": 0.5}, hf_reparam.errors.TargetError, "exactly one size"),
        ({"config": LowRankConfig(rank=6), "keep": 0.5}, hf_reparam.errors.TargetError, "exactly one size"),
        ({"rank": 600}, hf_reparam.errors.RankError, "above min"),
        ({"keep": 7}, hf_reparam.errors.RankError, "keep must be in"),
        ({"config": PLAN, "rank": 6}, hf_reparam.errors.TargetError, "exactly one size"),
        (
            {"config": {"rank": 6}},
            hf_reparam.errors.TargetError,
            "takes a RankPlan\\), got dict",
        ),
        ({"rank": 6, "calibration": "none.safetensors"}, hf_reparam.errors.CheckpointError, "cannot be read"),
        ({"rank": 6, "max_memory": "8GB"}, hf_reparam.errors.TargetError, "max_memory say how texts are read"),
        ({"rank": 6, "calibration": "none.txt"}, hf_reparam.errors.CheckpointError, "no such file: none.txt"),
    ],
)
def test_user_errors_leave_nothing(tmp_path, bert, options, error, message):
    with pytest.raises(error, match=message):
        hf_reparam.convert_folder(bert, tmp_path / "out", **options)
    assert [p.name for p in tmp_path.iterdir()] == ["dense"]


def test_nothing_to_merge(tmp_path, bert):
    with pytest.raises(hf_reparam.errors.TargetError, match="no low-rank layer"):
        hf_reparam.merge_folder(bert, tmp_path / "out", stream=True)
    assert [p.name for p in tmp_path.iterdir()] == ["dense"]


@pytest.mark.slow
def test_older_formats_are_read(tmp_path):
    model = zoo.BY_BASE["BertForMaskedLM"].build()
    model.config.architectures = ["BertForMaskedLM"]
    model.config.save_pretrained(tmp_path / "dense")
    torch.save(model.state_dict(), tmp_path / "dense" / "pytorch_model.bin")
    hf_reparam.convert_folder(tmp_path / "dense", tmp_path / "out", rank=6, stream=True)
    hf_reparam.convert(load(tmp_path / "dense")[0], rank=6).save_pretrained(tmp_path / "direct")
    assert_same_folder(tmp_path / "direct", tmp_path / "out")


MEMORY = """
import ctypes, sys, hf_reparam, transformers
from hf_reparam.files.folder import load
ctypes.CDLL(None).mallopt(-3, 2**18)  # glibc keeps no freed block above 256 kB: what is resident is in use
transformers.logging.set_verbosity_error()

def status(key):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(key)) / 1024

source, out, how = sys.argv[1:]
hf_reparam.convert_folder(sys.argv[1] + "-tiny", out + "-tiny", rank=4, stream=how == "stream")
before = status("VmRSS")
open("/proc/self/clear_refs", "w").write("5")
hf_reparam.convert_folder(source, out, rank=32, stream=how == "stream", max_shard_size="20MB")
print(status("VmHWM") - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads peak memory from /proc")
def test_streaming_holds_a_few_layers(tmp_path):
    """A model of 30 layers of 64 x 16384 (126 MB) and small ones: one layer in float64 has 8.4 MB."""
    shape = {"hidden_size": 64, "intermediate_size": 16384, "num_attention_heads": 8, "vocab_size": 99}
    for name, layers in (("dense", 15), ("dense-tiny", 1)):
        config = transformers.BertConfig(**shape, num_hidden_layers=layers)
        transformers.BertModel(config).save_pretrained(tmp_path / name, max_shard_size="20MB")
    peaks = {}
    for run in ("stream", "memory"):
        printed = launch("-c", MEMORY, tmp_path / "dense", tmp_path / run, run, processes=1)
        peaks[run] = float(printed.splitlines()[-1])
    assert peaks["stream"] < 4 * 8.4 + 2 * 20 + 20  # layers, shards, and what else the interpreter takes
    assert peaks["memory"] > 1.5 * peaks["stream"]
    assert_same_folder(tmp_path / "stream", tmp_path / "memory")
    shutil.rmtree(tmp_path / "dense")


@pytest.mark.slow
def test_a_folder_takes_the_solver_and_the_metric_that_were_asked_for(tmp_path):
    torch.manual_seed(0)
    sizes = {"hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 1, "num_attention_heads": 4}
    model = transformers.BertModel(transformers.BertConfig(vocab_size=99, **sizes)).eval()
    model.save_pretrained(tmp_path / "dense")
    data = hf_reparam.calibrate(model, [{"input_ids": torch.randint(3, 99, (4, 8))}])
    for i, asked in enumerate([{"solver": "randomized"}, {"metric": "svd"}]):
        config = LowRankConfig(rank=8, target_modules="intermediate.dense", **asked)
        hf_reparam.convert_folder(tmp_path / "dense", tmp_path / str(i), config, calibration=data, stream=True)
        small = hf_reparam.convert(model, config, calibration=data)
        other = hf_reparam.convert(model, LowRankConfig(rank=8, target_modules="intermediate.dense"), calibration=data)
        stored = type(small).from_pretrained(tmp_path / str(i)).state_dict()
        name = "encoder.layer.0.intermediate.dense.up.weight"
        assert torch.equal(stored[name], small.state_dict()[name])
        assert not torch.equal(stored[name], other.state_dict()[name])
