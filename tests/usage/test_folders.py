"""Folders that are used twice, by two at once, or that hold more than weights: never another model's numbers."""

import copy
import json
import os
import shlex
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn

import hf_reparam
import hf_reparam_cli
from hf_reparam import Calibration, Entry, LowRankConfig, RankPlan, calibrate, convert, merge
from hf_reparam.errors import CheckpointError, TargetError
from hf_reparam.files.convert import _same_work, inspect_folder
from hf_reparam.files.data import CalibrationData
from hf_reparam.files.folder import model_place
from hf_reparam.layers.processes import alone
from hf_reparam.structures import linear
from tests import zoo

CASE = zoo.BY_BASE["BertForMaskedLM"]
FOREIGN = r"holds layers of another conversion \(model, data or options differ\).*give an empty folder or delete it"


def net(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 12))


def moments_of(model, seed=0, scale=1.0):
    x = torch.randn(40, 12, generator=torch.Generator().manual_seed(seed)) * scale
    return calibrate(model, [{"input": x}], loss_fn=lambda m, b: m(**b).square().sum())


def broken_off(monkeypatch, after, act):
    """Interrupt what `act` does when so many layers are made."""
    made, factor = [], linear.factor

    def counted(*args, **kwargs):
        if len(made) == after:
            raise KeyboardInterrupt
        made.append(args)
        return factor(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(linear, "factor", counted)
        with pytest.raises(KeyboardInterrupt):
            act()


# Layers: workdir of convert and merge


def fine_tuned(model):
    with torch.no_grad():
        model[0].weight[3, 4] += 1e-6


def trained_bias(model):
    with torch.no_grad():
        model[2].bias += 1e-3


CHANGES = {
    "one number of a weight": lambda model: (fine_tuned(model), {})[1],
    "a bias": lambda model: (trained_bias(model), {})[1],
    "dtype": lambda model: (model.bfloat16(), {})[1],
    "rank": lambda model: {"rank": 4},
    "form": lambda model: {"form": "pivoted"},
    "layers": lambda model: {"target_modules": "2"},
    "data": lambda model: {"calibration": moments_of(model, seed=1)},
    "signs of the data": lambda model: {"calibration": moments_of(model, scale=-1.0)},
    "metric": lambda model: {"metric": "activation"},
    "no data": lambda model: {"calibration": None},
    "solver": lambda model: {"solver": "randomized"},
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_layers_of_another_model_data_or_option_are_refused(tmp_path, change):
    model = net()
    calibration = moments_of(model)
    convert(model, rank=3, calibration=calibration, workdir=tmp_path)
    files = sorted(tmp_path.rglob("*"))
    options = {"rank": 3, "calibration": calibration} | change(model)
    calibration = options.pop("calibration")
    with pytest.raises(CheckpointError, match=FOREIGN):
        convert(model, LowRankConfig(**options), calibration=calibration, workdir=tmp_path)
    assert sorted(tmp_path.rglob("*")) == files


def test_another_model_of_the_same_shapes_in_a_broken_run(tmp_path, monkeypatch):
    """Layer 2 of A is not there: it is the first that must not be made beside A's."""
    broken_off(monkeypatch, 1, lambda: convert(net(), rank=3, workdir=tmp_path))
    with pytest.raises(CheckpointError, match=FOREIGN):
        convert(net(seed=1), rank=3, workdir=tmp_path)
    assert sorted(p.name for p in (tmp_path / "pair").iterdir()) == ["0"]


@pytest.mark.slow
@pytest.mark.parametrize("form", zoo.FORMS)
def test_a_broken_run_goes_on_and_gives_what_a_whole_one_gives(tmp_path, monkeypatch, form):
    config, calibration = LowRankConfig(rank=6, form=form), calibrate(CASE.build(), [CASE.batch()])
    expected = convert(CASE.build(), config, calibration=calibration)
    options = {"calibration": calibration, "workdir": tmp_path}
    broken_off(monkeypatch, 5, lambda: convert(CASE.build(), config, **options))
    small = convert(CASE.build(), config, **options)
    assert hf_reparam.report(small).to_dict() == hf_reparam.report(expected).to_dict()
    assert all(map(torch.equal, zoo.outputs(small, CASE.batch()), zoo.outputs(expected, CASE.batch())))


@pytest.mark.slow
def test_data_given_again_are_the_same_data(tmp_path):
    batches = [CASE.batch()]
    for _ in range(2):
        small = convert(CASE.build(), keep=0.5, calibration=batches, workdir=tmp_path)
    expected = convert(CASE.build(), keep=0.5, calibration=batches)
    assert all(map(torch.equal, zoo.outputs(small, CASE.batch()), zoo.outputs(expected, CASE.batch())))
    with pytest.raises(CheckpointError, match=FOREIGN):
        convert(CASE.build(), keep=0.5, calibration=[{"input_ids": torch.arange(3, 9)[None]}], workdir=tmp_path)


def test_dense_layers_of_another_merge_are_refused(tmp_path):
    one, other = (convert(net(seed), rank=3) for seed in (0, 1))
    expected = merge(one)
    x = torch.randn(5, 12)
    for _ in range(2):
        assert torch.equal(merge(one, workdir=tmp_path)(x), expected(x))
    for model in (other, convert(net(), rank=4)):
        with pytest.raises(CheckpointError, match=FOREIGN):
            merge(model, workdir=tmp_path)


def test_merging_into_the_folder_that_the_layers_are_in(tmp_path):
    small = convert(net(), rank=3, workdir=tmp_path)
    with pytest.raises(CheckpointError, match=FOREIGN):
        merge(small, workdir=tmp_path)


@pytest.mark.slow
def test_narrower_heads_of_another_model_are_refused(tmp_path):
    plan = RankPlan({"encoder.layer.0.attention": Entry(4, "heads")}, "bert")
    model = CASE.build()
    for _ in range(2):
        small = convert(model, plan, workdir=tmp_path)
    expected = convert(model, plan)
    assert all(map(torch.equal, zoo.outputs(small, CASE.batch()), zoo.outputs(expected, CASE.batch())))
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.bert.encoder.layer[0].attention.self.key.bias += 1e-3
    seen = calibrate(model, [CASE.batch()], metric="activation")
    for changed, asked, calibration in ((other, plan, None), (model, replace(plan, metric="activation"), seen)):
        with pytest.raises(CheckpointError, match=FOREIGN):
            convert(changed, asked, calibration=calibration, workdir=tmp_path)


def test_a_model_that_is_one_layer(tmp_path):
    for _ in range(2):
        small = convert(net()[0], rank=3, workdir=tmp_path)
    x = torch.randn(5, 12)
    assert torch.equal(small(x), convert(net()[0], rank=3)(x))


def test_files_of_others_in_the_folder_stay(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "scratch").mkdir()
    convert(net(), rank=3, workdir=tmp_path)
    assert (tmp_path / "notes.txt").read_text() == "mine"
    (tmp_path / "pair" / "0" / "layer.json").write_text("{")
    with pytest.raises(CheckpointError, match=FOREIGN):
        convert(net(), rank=3, workdir=tmp_path)


def test_two_runs_at_once_in_one_folder(tmp_path):
    with alone(tmp_path / "pair" / ".lock", "mine"), pytest.raises(CheckpointError, match="another process is filling"):
        convert(net(), rank=3, workdir=tmp_path)
    convert(net(), rank=3, workdir=tmp_path)
    assert sorted(p.name for p in (tmp_path / "pair").iterdir()) == ["0", "2"]


# Calibration: folder= of calibrate


def two_groups(model, folder, seed=0, batches=None):
    x = torch.randn(40, 12, generator=torch.Generator().manual_seed(seed))
    data = [{"input": x}] if batches is None else batches
    return calibrate(model, data, metric="activation", folder=folder, max_memory=16 * 16**2)


def test_finished_moments_are_not_replaced(tmp_path):
    first = two_groups(net(), tmp_path)
    before = first.fingerprint()
    for seed in (0, 1):
        with pytest.raises(CheckpointError, match="holds moments already: give an empty folder or delete it"):
            two_groups(net(seed=1), tmp_path, seed)
    assert first.fingerprint() == before


def test_moments_of_a_broken_run_are_neither_read_nor_kept(tmp_path):
    passes = []

    class Breaking:
        def __iter__(self):
            passes.append(1)
            if len(passes) == 2:
                raise KeyboardInterrupt
            yield {"input": torch.ones(40, 12)}

    with pytest.raises(KeyboardInterrupt):
        two_groups(net(seed=1), tmp_path, batches=Breaking())
    assert len(list(tmp_path.glob("*.safetensors"))) == 1
    with pytest.raises(CheckpointError, match="of a broken run: 1 files are missing"):
        Calibration.load(tmp_path)
    again = two_groups(net(), tmp_path)
    assert again.fingerprint() == two_groups(net(), tmp_path / "fresh").fingerprint()


def test_moments_of_two_runs_in_one_folder_are_refused(tmp_path):
    for name, seed in (("a", 0), ("b", 1)):
        moments_of(net(), seed).save(tmp_path / f"{name}.safetensors")
    with pytest.raises(CheckpointError, match="holds moments of several runs: 0 is in more than one file"):
        Calibration.load(tmp_path)


def test_a_folder_with_weights_is_no_place_for_moments(tmp_path):
    save_file({"weight": torch.ones(3)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="model.safetensors holds no moments"):
        two_groups(net(), tmp_path)
    assert (tmp_path / "model.safetensors").exists()


def test_two_calibrations_at_once_in_one_folder(tmp_path):
    with alone(tmp_path / ".lock", "mine"), pytest.raises(CheckpointError, match="another process is filling"):
        two_groups(net(), tmp_path)


# From folder to folder


@pytest.fixture
def dense(tmp_path):
    CASE.build().save_pretrained(tmp_path / "dense")
    return tmp_path / "dense"


def run(*args):
    return hf_reparam_cli.main([str(a) for a in args])


def converts(source, out, how, rank=6):
    """By the command line or from Python."""
    if how == "cli":
        assert run("convert", source, out, "--rank", rank, "--stream", "--quiet") == 0
    else:
        hf_reparam.convert_folder(source, out, rank=rank, stream=True)


def changed_in_place(folder):
    """Other weights under the same names, sizes and times, as `rsync -t` or `cp -p` leave them."""
    file = folder / "model.safetensors"
    before = file.stat()
    data = bytearray(file.read_bytes())
    data[-4000:] = bytes(4000)
    file.write_bytes(data)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "how"), [("nothing", "cli"), ("nothing", "python"), ("weights", "python"), ("rank", "python")]
)
def test_a_run_after_a_broken_one_mixes_nothing(tmp_path, dense, monkeypatch, how, change):
    if how == "cli":
        factor, made = linear.factor, []

        def fifth(*args, **kwargs):
            made.append(args)
            if len(made) == 5:
                raise KeyboardInterrupt
            return factor(*args, **kwargs)

        with monkeypatch.context() as patch:
            patch.setattr(linear, "factor", fifth)
            assert run("convert", dense, tmp_path / "out", "--rank", 6, "--stream", "--quiet") == 130
    else:
        broken_off(monkeypatch, 4, lambda: hf_reparam.convert_folder(dense, tmp_path / "out", rank=6, stream=True))
    if change == "weights":
        changed_in_place(dense)
    rank = 5 if change == "rank" else 6
    converts(dense, tmp_path / "out", how, rank)
    convert(transformers.AutoModelForMaskedLM.from_pretrained(dense), rank=rank).save_pretrained(tmp_path / "direct")
    a, b = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "direct"))
    assert a.keys() == b.keys()
    assert all(torch.equal(a[key], b[key]) for key in a)


def test_work_with_other_data_is_other_work(tmp_path):
    """Wherever the data are stored: here beside the weights."""
    for name in ("weights.safetensors", "one.safetensors", "other.safetensors"):
        (tmp_path / name).write_bytes(b"the same size")
    data = [None, tmp_path / "one.safetensors", tmp_path / "other.safetensors"]
    assert len({_same_work(tmp_path, CalibrationData(known), []) for known in data}) == 3
    with pytest.raises(CheckpointError, match="gone.safetensors cannot be read"):
        _same_work(tmp_path, CalibrationData(tmp_path / "gone.safetensors"), [])


@pytest.mark.parametrize("how", ["gradients", "products"])
def test_moments_with_the_same_means_are_other_moments(how):
    one, other = moments_of(net()), moments_of(net())
    layer = other.layers["0"]
    (layer.gradient_products if how == "gradients" else layer.input_products).mul_(2)
    assert one.fingerprint() != other.fingerprint()
    assert one.fingerprint() == moments_of(net()).fingerprint()


@pytest.mark.slow
@pytest.mark.parametrize("stream", [True, False])
def test_two_conversions_at_once(tmp_path, dense, stream):
    out, lock = tmp_path / "out", tmp_path / ".out.lock"
    with alone(lock, "mine"):
        with pytest.raises(CheckpointError, match="another process is converting into .*out; wait until"):
            hf_reparam.convert_folder(dense, out, rank=6, stream=stream)
        with pytest.raises(CheckpointError, match="another process is converting into"):
            hf_reparam.merge_folder(dense, out, stream=stream)
    lock.touch()  # what a killed process leaves: nobody holds it
    hf_reparam.convert_folder(dense, out, rank=6, stream=stream)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["dense", "out"]


def test_the_other_has_just_finished(tmp_path, dense, monkeypatch):
    """Between the first look and the lock."""
    from hf_reparam.files import convert as checkpoint

    locate = checkpoint.locate

    def slowly(source, **options):
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "precious").touch()
        return locate(source, **options)

    monkeypatch.setattr(checkpoint, "locate", slowly)
    with pytest.raises(CheckpointError, match="exists; choose another place"):
        hf_reparam.convert_folder(dense, tmp_path / "out", rank=6, stream=True)
    assert (tmp_path / "out" / "precious").exists()


def test_out_inside_the_source_is_refused(tmp_path, dense):
    (tmp_path / "link").symlink_to(dense)
    for out in (dense / "out", dense / "a" / "b", tmp_path / "link" / "out"):
        with pytest.raises(CheckpointError, match="is inside the source"):
            hf_reparam.convert_folder(dense, out, rank=6, stream=True)
    assert sorted(p.name for p in dense.iterdir()) == ["config.json", "model.safetensors"]


@pytest.mark.slow
def test_source_and_out_as_text_or_path(tmp_path, dense):
    reports = [
        hf_reparam.convert_folder(
            kind(dense), other(tmp_path / f"{kind.__name__}-{other.__name__}"), rank=6, stream=True
        )
        for kind in (str, Path)
        for other in (str, Path)
    ]
    assert all(report == reports[0] for report in reports)
    assert inspect_folder(str(dense)) == inspect_folder(Path(dense))


@pytest.mark.slow
def test_target_modules_as_a_generator(tmp_path, dense):
    report = hf_reparam.convert_folder(
        dense, tmp_path / "out", LowRankConfig(rank=6, target_modules=(p for p in ["*.query", "*.key"])), stream=True
    )
    assert len(report.layers) == 4


# What is not in OUT is said, and what lies beside the weights arrives


def llama():
    return zoo.BY_BASE["LlamaForCausalLM"].build()


def qwen3_next():
    """Its class ignores `mtp.*` without a word."""
    kw = {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 16, "head_dim": 8}
    kw |= {f"linear_{k}": 2 if "num" in k else 8 for k in ("num_key_heads", "num_value_heads")}
    kw |= {"linear_key_head_dim": 8, "linear_value_head_dim": 8, "shared_expert_intermediate_size": 16}
    return transformers.Qwen3NextForCausalLM(transformers.Qwen3NextConfig(**zoo.LLAMA_LIKE, **kw))


def with_extra(model, folder, extra, binary=False):
    model.save_pretrained(folder)
    state = {**load_file(folder / "model.safetensors"), **extra}
    if binary:
        (folder / "model.safetensors").unlink()
        torch.save(state, folder / "pytorch_model.bin")
    else:
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


MTP = {"mtp.layers.0.up.weight": torch.ones(4, 4), "mtp.norm.weight": torch.ones(4)}


@pytest.mark.slow
@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("binary", [True, False])
@pytest.mark.parametrize("build", [llama, qwen3_next])
def test_tensors_that_the_class_does_not_load_are_named(tmp_path, build, binary, stream):
    with_extra(build(), tmp_path / "dense", MTP, binary)
    report = hf_reparam.convert_folder(tmp_path / "dense", tmp_path / "out", rank=4, stream=stream)
    assert report.to_dict()["dropped"] == sorted(MTP)
    line = "2 tensors of the source are not in the result: mtp.*"
    assert line in str(report)
    assert line in report.to_markdown()
    assert not hf_reparam.merge_folder(tmp_path / "out", tmp_path / "merged", stream=True).dropped


@pytest.mark.slow
def test_the_command_line_names_them_too(tmp_path, capsys):
    extra = {"cls.seq_relationship.weight": torch.ones(2, 32), "cls.seq_relationship.bias": torch.ones(2)}
    with_extra(CASE.build(), tmp_path / "dense", {**extra, "vision.0.weight": torch.ones(2)})
    assert run("convert", tmp_path / "dense", tmp_path / "out", "--rank", 6, "--quiet") == 0
    printed = capsys.readouterr().out
    assert "3 tensors of the source are not in the result: cls.seq_relationship.*, vision.0.weight" in printed


@pytest.mark.slow
def test_old_buffers_are_no_loss(tmp_path):
    model = zoo.BY_BASE["GPT2LMHeadModel"].build()
    with_extra(model, tmp_path / "dense", {"transformer.h.0.attn.bias": torch.ones(1, 1, 4, 4)})
    assert hf_reparam.convert_folder(tmp_path / "dense", tmp_path / "out", rank=6, stream=True).dropped == ()


BESIDE = [
    *("vocab.pt", "spk2info.pt", "speaker_embeddings.pt", "campplus.onnx", "mel_filters.npz", "vocab.index.json"),
    *("2_Dense/pytorch_model.bin", "2_Dense/model.safetensors", "2_Dense/config.json", "2_Dense/README.md"),
    *("voices/a.pt", "assets/x/y.bin", "modules.json", "tokenizer.model", "original_name.txt"),
]
NOT = [
    *(
        "pytorch_model.bin",
        "pytorch_model-00001-of-00002.bin",
        "pytorch_model.bin.index.json",
        "pytorch_model.fp16.bin",
    ),
    *("model.fp16.safetensors", "model.safetensors.index.fp16.json", "tf_model.h5", "flax_model.msgpack"),
    *(
        "rust_model.ot",
        "model.onnx",
        "decoder_model.onnx_data",
        "q4.gguf",
        "onnx/model.onnx",
        "onnx/config.json",
        "openvino/openvino_model.bin",
    ),
    *("coreml/text/w.bin", "original/consolidated.00.pth", "optimizer.pt", "training_args.bin", "rng_state_0.pth"),
    *("checkpoint-500/model.safetensors", ".git/objects/pack.bin", "modeling_reparam.py", "part-1.safetensors"),
]


@pytest.mark.slow
@pytest.mark.parametrize("stream", [True, False])
def test_what_lies_beside_the_weights_arrives(tmp_path, dense, stream):
    for name in BESIDE + NOT:
        (dense / name).parent.mkdir(parents=True, exist_ok=True)
        (dense / name).write_bytes(b"[]")
    (dense / "pytorch_model.bin.index.json").write_text('{"weight_map": {"a": "part-1.safetensors"}}')
    (dense / "model.safetensors.index.fp16.json").write_text('{"weight_map": {}}')
    hf_reparam.convert_folder(dense, tmp_path / "out", rank=6, stream=stream)
    hf_reparam.merge_folder(tmp_path / "out", tmp_path / "merged", stream=stream)
    for folder in (tmp_path / "out", tmp_path / "merged"):
        files = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}
        assert files - {"README.md"} == {"config.json", "model.safetensors", *BESIDE}


@pytest.mark.slow
@pytest.mark.parametrize("stream", [True, False])
def test_a_sentence_transformer_with_its_model_in_a_subfolder(tmp_path, stream):
    source, out = tmp_path / "st", tmp_path / "out"
    zoo.BY_BASE["BertModel"].build().save_pretrained(source / "0_Transformer")
    (source / "0_Transformer" / "vocab.txt").write_text("a")
    for name in ("1_Pooling/config.json", "2_Dense/model.safetensors"):
        (source / name).parent.mkdir()
        (source / name).write_text("{}")
    kinds = [("0_Transformer", "Transformer"), ("1_Pooling", "Pooling"), ("2_Dense", "Dense")]
    modules = [{"idx": i, "path": p, "type": f"sentence_transformers.models.{k}"} for i, (p, k) in enumerate(kinds)]
    (source / "modules.json").write_text(json.dumps(modules))
    assert len(inspect_folder(source).layers) == 12  # a pooler stays dense
    hf_reparam.convert_folder(source, out, rank=6, stream=stream)
    assert type(transformers.AutoModel.from_pretrained(out / "0_Transformer")).__name__ == "ReparamBertModel"
    files = {p.relative_to(out).as_posix() for p in out.rglob("*") if p.is_file()}
    names = {p.relative_to(source).as_posix() for p in source.rglob("*") if p.is_file()}
    assert files == {*names, "README.md"}
    hf_reparam.merge_folder(out, tmp_path / "merged", stream=stream)
    assert type(transformers.AutoModel.from_pretrained(tmp_path / "merged" / "0_Transformer")) is transformers.BertModel


def test_a_folder_of_two_models_is_refused(tmp_path):
    for name in ("0_Query", "1_Document"):
        (tmp_path / "st" / name).mkdir(parents=True)
        (tmp_path / "st" / name / "config.json").write_text('{"model_type": "bert"}')
    (tmp_path / "st" / "modules.json").write_text('[{"path": "0_Query"}, {"path": "1_Document"}]')
    with pytest.raises(CheckpointError, match=r"holds 2 models, \['0_Query', '1_Document'\]: convert each by its own"):
        hf_reparam.convert_folder(tmp_path / "st", tmp_path / "out", rank=6, stream=True)


@pytest.mark.parametrize("path", ["..", "../other", "/", "0_Transformer/deeper", 7])
def test_a_list_that_leads_out_of_the_folder_is_not_followed(tmp_path, path):
    for folder in (tmp_path, tmp_path / "other", tmp_path / "st" / "0_Transformer" / "deeper"):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text('{"model_type": "bert"}')
    (tmp_path / "st" / "modules.json").write_text(json.dumps([{"path": path}]))
    assert model_place(tmp_path / "st") == tmp_path / "st"


@pytest.mark.slow
@pytest.mark.parametrize("content", ["{}", "[1, 2]", "no json", '{"weight_map": "x"}'])
def test_an_index_of_something_else(tmp_path, dense, content):
    (dense / "corpus.index.json").write_text(content)
    hf_reparam.convert_folder(dense, tmp_path / "out", rank=6, stream=True)
    assert (tmp_path / "out" / "corpus.index.json").read_text() == content
    transformers.AutoModelForMaskedLM.from_pretrained(tmp_path / "out")
    for name in ("model.safetensors.index.json", "model.safetensors.index.fp16.json", "pytorch_model.bin.index.json"):
        (tmp_path / "out" / name).write_text(content)
        with pytest.raises(CheckpointError, match="is no index of weight files|names 'x', which"):
            transformers.AutoModelForMaskedLM.from_pretrained(tmp_path / "out")
        (tmp_path / "out" / name).unlink()


def auto_map(folder):
    return json.loads((folder / "config.json").read_text()).get("auto_map")


@pytest.mark.slow
@pytest.mark.parametrize("stream", [True, False])
def test_a_merged_folder_names_no_code_of_the_low_rank_one(tmp_path, dense, stream):
    hf_reparam.convert_folder(dense, tmp_path / "small", rank=6, stream=stream, remote_code=True)
    assert auto_map(tmp_path / "small")
    hf_reparam.merge_folder(tmp_path / "small", tmp_path / "merged", stream=stream)
    merge(transformers.AutoModelForMaskedLM.from_pretrained(tmp_path / "small")).save_pretrained(tmp_path / "direct")
    hf_reparam.convert_folder(tmp_path / "small", tmp_path / "smaller", rank=3, stream=stream)
    for name in ("merged", "direct", "smaller"):
        assert auto_map(tmp_path / name) is None
        assert not (tmp_path / name / "modeling_reparam.py").exists()
    model = transformers.AutoModelForMaskedLM.from_pretrained(tmp_path / "merged", trust_remote_code=True)
    assert type(model) is transformers.BertForMaskedLM


@pytest.mark.slow
def test_code_for_models_that_came_with_the_source_is_not_named_for_a_low_rank_one(tmp_path, dense):
    config = json.loads((dense / "config.json").read_text())
    mine = {"AutoModelForMaskedLM": "modeling_mine.Mine", "AutoTokenizer": ["tokenization_mine.Mine", None]}
    (dense / "config.json").write_text(json.dumps({**config, "auto_map": mine}))
    (dense / "modeling_mine.py").write_text("import transformers\nclass Mine(transformers.BertForMaskedLM): ...\n")
    hf_reparam.convert_folder(dense, tmp_path / "out", rank=6, stream=True)
    assert auto_map(tmp_path / "out") == {"AutoTokenizer": ["tokenization_mine.Mine", None]}
    assert (tmp_path / "out" / "modeling_mine.py").exists()
    hf_reparam.merge_folder(tmp_path / "out", tmp_path / "merged", stream=True)
    assert transformers.AutoModelForMaskedLM.from_pretrained(tmp_path / "merged", trust_remote_code=True)


# The command line


@pytest.fixture
def broken_pipe():
    read, write = os.pipe()
    os.close(read)
    with open(write, "w") as stream:
        yield stream


@pytest.mark.slow
@pytest.mark.parametrize("args", [["inspect", "{dense}"], ["convert", "{dense}", "{out}", "--rank", "6"]])
def test_a_reader_that_has_gone(tmp_path, dense, monkeypatch, capfd, broken_pipe, args):
    monkeypatch.setattr(sys, "stdout", broken_pipe)
    filled = [a.format(dense=dense, out=tmp_path / "out") for a in args]
    assert run(*filled, "--quiet") == 0
    assert "Traceback" not in capfd.readouterr().err
    assert (tmp_path / "out").exists() == (args[0] == "convert")


@pytest.mark.slow
@pytest.mark.parametrize("stream", [[], ["--stream"]])
def test_a_reader_of_the_progress_bars_that_has_gone(tmp_path, dense, monkeypatch, broken_pipe, stream):
    monkeypatch.setattr(sys, "stderr", broken_pipe)
    transformers.logging.enable_progress_bar()
    try:
        assert run("convert", dense, tmp_path / "out", "--rank", "6", *stream) == 141
    finally:
        transformers.logging.disable_progress_bar()
    assert not (tmp_path / "out").exists()
    monkeypatch.undo()
    assert run("convert", dense, tmp_path / "out", "--rank", "6", *stream, "--quiet") == 0


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--max-shard-size", "lots"], "max_shard_size must be a number of bytes or a text such as '8GB', got 'lots'"),
        (["--max-shard-size", "lots", "--stream"], "max_shard_size must be a number of bytes"),
        (["--max-memory", "many"], "max_memory must be a number of bytes"),
    ],
)
def test_sizes_that_are_none(tmp_path, dense, capsys, monkeypatch, more, message):
    monkeypatch.setattr(linear, "factor", lambda *args, **kwargs: 1 / 0)
    assert run("convert", dense, tmp_path / "out", "--rank", "6", "--quiet", *more) == 2
    assert message in capsys.readouterr().err


def test_sizes_that_are_none_from_python(tmp_path):
    with pytest.raises(TargetError, match="max_memory must be a number of bytes"):
        calibrate(net(), [{"input": torch.ones(3, 12)}], folder=tmp_path, max_memory="much")


@pytest.mark.parametrize("source", ["/no/such/folder", "./no-such-folder", "", "a/b/c"])
def test_a_source_that_is_not_there(tmp_path, capsys, source):
    for command in (["inspect", source], ["convert", source, tmp_path / "out", "--rank", "6"]):
        assert run(*command, "--quiet") == 2
        message = capsys.readouterr().err
        assert (f"no such folder: {source}\n" if source else "'' is neither a folder nor a Hub id such as") in message


@pytest.mark.parametrize("out", [".", "..", "a/.."])
def test_out_must_have_a_name(dense, capsys, out):
    assert run("convert", dense, out, "--rank", "6", "--force", "--quiet") == 2
    assert "is a place, no name: give the folder to make" in capsys.readouterr().err


def test_inspect_says_why_nothing_can_be_converted(tmp_path, capsys):
    shape = {"embedding_size": 8, "hidden_sizes": [8, 8], "depths": [1, 1], "layer_type": "basic"}
    transformers.ResNetModel(transformers.ResNetConfig(**shape)).save_pretrained(tmp_path / "cnn")
    assert run("inspect", tmp_path / "cnn") == 0
    assert "ResNetModel: no dense layer can be converted: Conv2d is not a dense layer (x6)" in capsys.readouterr().out


def test_the_examples_of_the_help_are_commands(capsys):
    for command in hf_reparam_cli.COMMANDS:
        with pytest.raises(SystemExit):
            run(command, "--help")
        lines = [shlex.split(line) for line in capsys.readouterr().out.splitlines() if line.startswith("  hf-reparam")]
        assert len(lines) >= 2
        for line in lines:
            assert hf_reparam_cli.parsed(line[1:]).command == command
