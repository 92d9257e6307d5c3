"""Layers that wait or stay in files: the same numbers, less memory, and nothing left behind."""

import importlib
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
import transformers
from torch import nn

import hf_reparam
from hf_reparam import LowRankConfig, convert, merge
from hf_reparam.files.folder import load
from hf_reparam.layers.linear import LowRankLinear
from hf_reparam.structures import linear
from tests import zoo
from tests.launch import launch

CASES = [zoo.BY_BASE[name] for name in ("BertForMaskedLM", "GPT2LMHeadModel", "AlbertForMaskedLM")]


@pytest.fixture
def temporary(monkeypatch):
    """The temporary folders that conversions make."""
    made = []
    module = importlib.import_module("hf_reparam.compress.convert")
    monkeypatch.setattr(
        module, "TemporaryDirectory", lambda **options: made.append(TemporaryDirectory(**options)) or made[-1]
    )
    return made


def tensors(model):
    return model.state_dict().values()


@pytest.mark.slow
@pytest.mark.parametrize("form", zoo.FORMS)
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.id)
def test_new_layers_stay_in_a_folder(tmp_path, case, form):
    """Of a model that is on disk itself."""
    case.build().save_pretrained(tmp_path / "dense")
    model, expected = load(tmp_path / "dense", offload_folder=tmp_path / "scratch")[0], load(tmp_path / "dense")[0]
    expected = convert(expected, LowRankConfig(rank=6, form=form))
    small = convert(model, LowRankConfig(rank=6, form=form), inplace=True, workdir=tmp_path / "layers")
    low = {name: m for name, m in small.named_modules() if isinstance(m, LowRankLinear)}
    factors = [t for m in low.values() for key, t in m.state_dict().items() if key != "order"]  # pivots stay in memory
    assert all(t.is_meta for t in factors)
    stored = {record.parent.name for record in (tmp_path / "layers").rglob("layer.json")}
    assert stored == set(small.config.reparam["modules"])
    # the pivots of a layer in memory are put in the order of its inputs, for many rows; of one in a file the inputs are
    same = torch.equal if form == "pair" else partial(torch.allclose, atol=1e-6)
    for _ in range(2):
        assert all(map(same, zoo.outputs(small, case.batch()), zoo.outputs(expected, case.batch())))
    small.save_pretrained(tmp_path / "saved")
    again = type(small).from_pretrained(tmp_path / "saved")
    assert all(map(torch.equal, tensors(again), tensors(expected)))
    dense = merge(small, workdir=tmp_path / "merged")
    assert all(map(torch.equal, zoo.outputs(dense, case.batch()), zoo.outputs(merge(expected), case.batch())))
    dense = merge(small)  # without a folder its new layers are in memory
    assert not any(dense.get_submodule(name).weight.is_meta for name in low)
    assert all(map(torch.equal, zoo.outputs(dense, case.batch()), zoo.outputs(merge(expected), case.batch())))


@pytest.mark.parametrize("form", zoo.FORMS)
def test_a_plain_module(tmp_path, form):
    net, x = nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 16, bias=False)), torch.randn(5, 16)
    expected = convert(net, LowRankConfig(rank=4, form=form))
    small = convert(net, LowRankConfig(rank=4, form=form), workdir=tmp_path)
    assert not any(t.is_meta for t in tensors(small))  # it was in memory, and is again
    assert torch.equal(small(x), expected(x))
    assert torch.equal(merge(small)(x), merge(expected)(x))
    assert net[0].weight.shape == (16, 16)


@pytest.mark.slow
def test_layers_that_are_there_are_not_made_again(tmp_path, monkeypatch):
    case = zoo.BY_BASE["BertForMaskedLM"]
    first = convert(case.build(), rank=6, workdir=tmp_path)
    report = hf_reparam.report(first)
    monkeypatch.setattr(linear, "factor", lambda *args, **kwargs: 1 / 0)
    again = convert(case.build(), rank=6, workdir=tmp_path)
    same = hf_reparam.report(again)
    assert all(map(torch.equal, zoo.outputs(again, case.batch()), zoo.outputs(first, case.batch())))
    assert same.to_dict() == report.to_dict()
    assert all(0 < layer.error < 1 for layer in same.layers)


@pytest.mark.slow
@pytest.mark.parametrize("form", zoo.FORMS)
@pytest.mark.parametrize("frozen", [True, False])
def test_in_place_gives_what_a_copy_gives(form, frozen, temporary):
    case = zoo.BY_BASE["T5ForConditionalGeneration"]
    model = case.build().train().requires_grad_(not frozen)
    expected = convert(model, LowRankConfig(rank=6, form=form))
    assert temporary == []
    convert(model, LowRankConfig(rank=6, form=form), inplace=True)
    assert len(temporary) == 1
    assert not Path(temporary[0].name).exists()
    state, other = model.state_dict(), expected.state_dict()
    assert state.keys() == other.keys()
    assert all(torch.equal(state[key], other[key]) for key in state)
    for (name, a), b in zip(model.named_parameters(), expected.parameters(), strict=True):
        assert (a.requires_grad, a.dtype, a.device) == (b.requires_grad, b.dtype, b.device), name
    assert not any(hasattr(m, "_hf_hook") for m in model.modules())
    assert all(m.training for m in model.modules())
    if not frozen:
        model.eval()(**case.batch()).logits.sum().backward()
        low = [module for module in model.modules() if isinstance(module, LowRankLinear)]
        assert len(low) > 20
        assert all(parameter.grad is not None for module in low for parameter in module.parameters())


def test_failure_leaves_neither_folders_nor_changes(temporary, monkeypatch):
    model = zoo.BY_BASE["BertForMaskedLM"].build()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    factor, made = linear.factor, []

    def full(*args, **kwargs):
        made.append(args)
        if len(made) == 4:
            raise MemoryError
        return factor(*args, **kwargs)

    monkeypatch.setattr(linear, "factor", full)
    with pytest.raises(MemoryError):
        convert(model, rank=6, inplace=True)
    assert type(model) is transformers.BertForMaskedLM
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not Path(temporary[0].name).exists()


@pytest.mark.slow
@pytest.mark.parametrize("base", ["GPT2LMHeadModel", "T5ForConditionalGeneration", "BartForConditionalGeneration"])
def test_calibrating_on_disk_keeps_ties_and_counts(tmp_path, base):
    case = zoo.BY_BASE[base]
    case.build().save_pretrained(tmp_path / "dense")
    model, in_memory = load(tmp_path / "dense", offload_folder=tmp_path / "scratch")[0], load(tmp_path / "dense")[0]
    assert hf_reparam.report(model).to_dict() == hf_reparam.report(in_memory).to_dict()
    moments = hf_reparam.calibrate(model, [case.batch()])
    assert hf_reparam.report(model).to_dict() == hf_reparam.report(in_memory).to_dict()
    small = convert(model, keep=0.5, calibration=moments, inplace=True, workdir=tmp_path / "layers")
    expected = convert(in_memory, keep=0.5, calibration=moments)
    small.save_pretrained(tmp_path / "streamed")
    expected.save_pretrained(tmp_path / "direct")
    sizes = [(tmp_path / name / "model.safetensors").stat().st_size for name in ("streamed", "direct")]
    assert sizes[0] == sizes[1]


MEMORY = """
import ctypes, gc, sys, torch, hf_reparam
from torch import nn

ctypes.CDLL(None).mallopt(-3, 2**18)  # glibc keeps no freed block above 256 kB: what is resident is in use

def status(key):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(key)) / 1024

hf_reparam.convert(nn.Sequential(nn.Linear(8192, 128)), rank=100, inplace=True)
net = nn.Sequential(*[nn.Linear(8192, 128) for _ in range(16)])
before = status("VmRSS")
open("/proc/self/clear_refs", "w").write("5")
net = hf_reparam.convert(net, rank=100, inplace=sys.argv[1] == "inplace")
gc.collect()
print(status("VmHWM") - before, status("VmRSS") - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads peak memory from /proc")
def test_in_place_needs_a_few_layers_more_than_the_model():
    """16 layers of 8192 x 128 (67 MB) become pairs of rank 100 (53 MB); one layer in float64 has 8.4 MB."""
    peaks = {}
    for how in ("inplace", "copy"):
        printed = launch("-c", MEMORY, how, processes=1)
        peaks[how], after = (float(x) for x in printed.split())
        assert after < 0
    assert peaks["inplace"] < 4 * 8.4
    assert peaks["copy"] > 52


@pytest.mark.slow
@pytest.mark.parametrize("form", zoo.FORMS)
def test_layers_that_waited_in_a_folder_are_like_others(form):
    model = zoo.BY_BASE["BertForMaskedLM"].build()
    small = hf_reparam.convert(model, hf_reparam.LowRankConfig(rank=6, form=form), inplace=True)
    copied = hf_reparam.convert(zoo.BY_BASE["BertForMaskedLM"].build(), hf_reparam.LowRankConfig(rank=6, form=form))
    assert hf_reparam.report(small) == hf_reparam.report(copied)
    for mine, theirs in zip(small.modules(), copied.modules(), strict=True):
        assert vars(mine).keys() == vars(theirs).keys()
    again = hf_reparam.convert(small, hf_reparam.LowRankConfig(rank=2, target_modules="*.intermediate.dense"))
    assert again.bert.encoder.layer[0].intermediate.dense.rank == 2
