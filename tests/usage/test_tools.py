"""A default conversion goes through the tools that work on dense models: torchao, DataParallel, TorchScript, fx."""

import copy
import importlib
import pickle
from dataclasses import replace

import pytest
import torch
import transformers as tf
from torch import nn
from torch.nn import functional as F

from hf_reparam import LowRankConfig, convert
from tests import zoo

parallel = importlib.import_module("torch.nn.parallel.replicate")  # the package has a function of this name
CLOSE = {"atol": 1e-5, "rtol": 1e-5}


@pytest.fixture(params=["pair", "pivoted", "keep"])
def options(request):
    return LowRankConfig(keep=0.5) if request.param == "keep" else LowRankConfig(rank=8, form=request.param)


def classifier():
    return tf.BertForSequenceClassification(zoo.bert(num_labels=2)).eval()


BUILD = {
    "BertForSequenceClassification": classifier,
    "ViTForImageClassification": lambda: tf.ViTForImageClassification(zoo.vit(num_labels=2)).eval(),
    "GPT2LMHeadModel": zoo.BY_BASE["GPT2LMHeadModel"].build,
}


@pytest.mark.slow
@pytest.mark.parametrize("base", BUILD)
def test_torchao_int8(base, options):
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, Int8WeightOnlyConfig, quantize_

    case = zoo.BY_BASE[base]
    for config in (Int8DynamicActivationInt8WeightConfig(), Int8WeightOnlyConfig()):
        small = convert(BUILD[base](), options)
        before = small(**case.batch()).logits
        quantize_(small, config)
        after = small(**case.batch()).logits
        assert float((after - before).norm() / before.norm()) < 0.1


@pytest.fixture
def two_devices(monkeypatch):
    """Two replicas on the CPU: only the copy from device to device is left out."""
    monkeypatch.setattr(parallel, "_broadcast_coalesced_reshape", lambda tensors, devices, detach=False: [tensors] * 2)
    monkeypatch.setattr(parallel, "_get_device_index", lambda device, *_: 0)
    return [torch.device("cpu")] * 2


@pytest.mark.slow
@pytest.mark.parametrize("base", ["BertForSequenceClassification", "GPT2LMHeadModel", "T5ForConditionalGeneration"])
def test_data_parallel_replicas(base, options, two_devices):
    case = zoo.BY_BASE[base]
    small = convert(case.build(), options if options.keep is None else replace(options, embeddings=True))
    batch = case.batch()
    expected = small(**batch).logits
    replicas = parallel.replicate(small, two_devices)
    assert len(replicas) == 2
    for replica in replicas:
        torch.testing.assert_close(replica(**batch).logits, expected, **CLOSE)
    total = sum(replica(**batch).logits.square().sum() for replica in replicas)
    total.backward()
    assert all(p.grad is not None for n, p in small.named_parameters() if n.endswith(("up.weight", "down.weight")))


def test_data_parallel_wrapper(options):
    small, batch = convert(classifier(), options), zoo._text()
    torch.testing.assert_close(nn.DataParallel(small)(**batch).logits, small(**batch).logits, **CLOSE)


@pytest.mark.slow
def test_traced(options):
    model = classifier()
    small = convert(model, options).eval()
    small.config.return_dict = False
    batch = zoo._text()
    traced = torch.jit.trace(small, (batch["input_ids"], batch["attention_mask"]), strict=False)
    other = {"input_ids": batch["input_ids"].flip(0), "attention_mask": batch["attention_mask"].flip(0)}
    torch.testing.assert_close(traced(*other.values())[0], small(**other)[0], **CLOSE)


class Net(nn.Module):
    """Layers called in the usual ways, and a weight that is read."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.third = nn.Linear(32, 48), nn.Linear(48, 32, bias=False), nn.Linear(32, 32)

    def forward(self, x):
        return self.third(F.gelu(self.second(input=F.relu(self.first(x)))))


@pytest.mark.slow
def test_scripted_and_symbolically_traced(options, tmp_path):
    small, x = convert(Net(), options), torch.randn(5, 3, 32)
    scripted = torch.jit.script(copy.deepcopy(small))
    torch.testing.assert_close(scripted(x), small(x), **CLOSE)
    torch.jit.save(scripted, tmp_path / "net.pt")
    torch.testing.assert_close(torch.jit.load(tmp_path / "net.pt")(x), small(x), **CLOSE)
    torch.testing.assert_close(torch.jit.trace(small, x)(x + 1), small(x + 1), **CLOSE)
    graph = torch.fx.symbolic_trace(small)
    torch.testing.assert_close(graph(x), small(x), **CLOSE)
    torch.testing.assert_close(torch.export.export(small, (x,)).module()(x), small(x), **CLOSE)


@pytest.mark.slow
def test_new_models_of_derived_classes_initialise():
    """`_init_weights` of every family must pass the weights of low-rank layers over, and not fail on them."""
    for case in zoo.ALL:
        small = convert(case.build(), LowRankConfig(rank=4, target_modules="*"))
        fresh = type(small)(small.config)
        assert all(p.isfinite().all() for p in fresh.parameters()), case.id
        fresh.init_weights()
        auto = getattr(tf, case.auto or "AutoModel")
        assert type(auto.from_config(small.config)).__name__.startswith("Reparam"), case.id


def test_half_precision_copies_and_pickles(options):
    small, batch = convert(classifier(), options), zoo._text()
    expected = small(**batch).logits
    for other in (copy.deepcopy(small), pickle.loads(pickle.dumps(small))):
        torch.testing.assert_close(other(**batch).logits, expected, **CLOSE)
    assert small.to(torch.bfloat16)(**batch).logits.dtype is torch.bfloat16
