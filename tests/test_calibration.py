"""Calibration sees real tokens only, does not depend on how data is batched, and leaves the model as it was."""

import sys

import pytest
import torch
from torch import nn
from transformers import AutoTokenizer

from hf_reparam import Calibration, LowRankConfig, calibrate, convert
from hf_reparam.calibrate.objective import objective, seeds_of
from hf_reparam.errors import TargetError
from tests import zoo

FLOAT32_SUMS = {"rtol": 1e-4, "atol": 1e-5}


def rows(case, count=6, length=9, seed=0):
    generator = torch.Generator().manual_seed(seed)
    batches = []
    for i in range(count):
        size = length - i % 4
        ids = torch.randint(3, 90, (1, size), generator=generator)
        batches.append({"input_ids": ids, "attention_mask": torch.ones_like(ids)})
    return batches


def pad(batches, width, left=False):
    def one(t):
        gap = width - t.shape[1]
        return nn.functional.pad(t, (gap, 0) if left else (0, gap))

    return {key: torch.cat([one(b[key]) for b in batches]) for key in batches[0]}


def assert_same(a: Calibration, b: Calibration):
    assert a.layers.keys() == b.layers.keys()
    for name, layer in a.layers.items():
        other = b.layers[name]
        assert layer.tokens == other.tokens, name
        torch.testing.assert_close(layer.input_products, other.input_products, **FLOAT32_SUMS)
        if layer.gradient_products is not None:
            scale = float(layer.gradient_products.abs().max()) or 1.0
            torch.testing.assert_close(
                layer.gradient_products / scale, other.gradient_products / scale, rtol=1e-3, atol=1e-4
            )


@pytest.mark.parametrize(
    "base",
    ["BertModel", "BertForMaskedLM", "BertForSequenceClassification", "BertForQuestionAnswering", "GPT2LMHeadModel"],
)
def test_batching_padding_and_order_do_not_matter(base):
    case = zoo.BY_BASE[base]
    model, data = case.build().double(), rows(case)
    one_by_one = calibrate(model, data)
    together = calibrate(model, [pad(data[3:], 12), pad(data[:3], 9)])
    assert_same(one_by_one, together)


@pytest.mark.slow
@pytest.mark.parametrize("base", ["LlamaForCausalLM", "GPT2LMHeadModel"])
def test_nothing_is_read_back_from_a_device_before_all_batches_are_through(base, monkeypatch):
    """The meta device stands for one: a number on it can be neither read nor copied to the CPU."""
    case, read = zoo.BY_BASE[base], []
    model = case.build().to("meta")
    model.set_attn_implementation("eager")  # others ask whether a mask holds padding
    monkeypatch.setattr(sys.modules["hf_reparam.calibrate.collect"], "check_has_data", lambda model: None)

    def batches():
        for i in range(12):
            read.append(i)
            yield pad(rows(case, count=4, seed=i), 9)

    with pytest.raises(NotImplementedError, match="Cannot copy out of meta tensor"):
        calibrate(model, batches(), embeddings=True)
    assert len(read) == 12


def test_tables_are_watched_when_asked_for():
    case = zoo.BY_BASE["GPT2LMHeadModel"]
    plain, more = calibrate(case.build(), rows(case)), calibrate(case.build(), rows(case), embeddings=True)
    assert (len(plain.tables), len(more.tables)) == (0, 1)
    with pytest.raises(TargetError, match=r"wte was not watched: calibrate\(model, data, embeddings=True\)"):
        convert(case.build(), LowRankConfig(keep=0.5, embeddings=True), calibration=plain)


def test_inputs_are_those_of_the_layer():
    net = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4, bias=False))
    x = torch.randn(7, 6)
    moments = calibrate(net, [{"input": x[:3]}, {"input": x[3:]}], metric="activation")
    hidden = net[0](x).detach().double()
    torch.testing.assert_close(moments.layers["1"].input_products, hidden.T @ hidden, **FLOAT32_SUMS)
    assert moments.layers["1"].gradient_products is None


def test_gradients_are_those_of_the_loss():
    net = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4))
    x = torch.randn(7, 6)
    moments = calibrate(net, [{"input": x}], loss_fn=lambda model, batch: model(**batch).square().sum() / 2)
    out = net(x).detach()
    torch.testing.assert_close(moments.layers["2"].gradient_products, (out.T @ out).double(), **FLOAT32_SUMS)
    hidden = net[0](x).detach().requires_grad_()
    net[1:](hidden).square().sum().div(2).backward()
    torch.testing.assert_close(
        moments.layers["0"].gradient_products, (hidden.grad.T @ hidden.grad).double(), **FLOAT32_SUMS
    )


def test_labels_use_the_models_loss():
    case = zoo.BY_BASE["BertForSequenceClassification"]
    model = case.build()
    batch = {**case.batch(), "labels": torch.tensor([2, 0])}
    layer = calibrate(model, [batch], target_modules="classifier").layers["classifier"]
    logits = model(**case.batch()).logits.detach()
    gradient = logits.softmax(-1) - nn.functional.one_hot(batch["labels"], 3)
    torch.testing.assert_close(layer.gradient_products, (gradient.T @ gradient).double(), **FLOAT32_SUMS)


@pytest.mark.slow
def test_drawn_answers_of_a_multi_label_head_give_the_fisher_information():
    """Averaged over many draws, E g g^T at independent yes-or-no logits is diag(p (1 - p))."""
    model = zoo.BY_BASE["BertForSequenceClassification"].build(problem_type="multi_label_classification")
    with torch.no_grad():
        model.classifier.bias.copy_(torch.tensor([2.0, 0.0, -2.0]))
    ids = torch.randint(3, 90, (4000, 4), generator=torch.Generator().manual_seed(0))
    batches = [{"input_ids": part} for part in ids.split(500)]
    layer = calibrate(model, batches, target_modules="classifier").layers["classifier"]
    p = model(input_ids=ids[:100]).logits.sigmoid().mean(0).detach().double()
    torch.testing.assert_close(layer.gradient_products / 4000, torch.diag(p * (1 - p)), atol=0.02, rtol=0)


@pytest.mark.parametrize("bias", [(9.0, 0.0, 0.0), (2.0, 0.0, -2.0), (200.0, 0.0, 0.0)])
def test_the_fisher_information_of_sure_predictions_needs_few_examples(bias):
    """Of labels drawn by the predictions themselves, less than one of 3,000 is of another class than the first."""
    logits = torch.tensor(bias).expand(3000, 3).clone().requires_grad_()
    objective({"logits": logits}, {}, (), seeds=range(3000)).backward()
    p = logits[0].detach().softmax(-1)
    expected = torch.diag(p) - torch.outer(p, p)
    torch.testing.assert_close(logits.grad.T @ logits.grad / 3000, expected, atol=0.05 * float(expected.max()), rtol=0)
    assert logits.grad.mean(0).norm() <= 3 * logits.grad.norm() / 3000  # what is drawn at two places is independent


@pytest.mark.slow
def test_drawn_labels_give_the_fisher_information():
    """Averaged over many draws, E g g^T at the logits of a classifier is diag(p) - p p^T."""
    model = zoo.BY_BASE["BertForSequenceClassification"].build()
    with torch.no_grad():
        model.classifier.bias.copy_(torch.tensor([1.0, 0.0, -1.0]))
    ids = torch.randint(3, 90, (4000, 4), generator=torch.Generator().manual_seed(0))
    batches = [{"input_ids": part} for part in ids.split(500)]
    layer = calibrate(model, batches, target_modules="classifier").layers["classifier"]
    p = model(input_ids=ids[:100]).logits.softmax(-1).mean(0).detach().double()
    expected = torch.diag(p) - torch.outer(p, p)
    torch.testing.assert_close(layer.gradient_products / 4000, expected, atol=0.02, rtol=0)


@pytest.mark.parametrize("same_length", [True, False])
def test_encoder_and_decoder_masks_are_told_apart(same_length):
    model = zoo.BY_BASE["T5ForConditionalGeneration"].build()
    width = 7 if same_length else 5
    batch = {**zoo._text(), "decoder_input_ids": zoo._ids(2, width, seed=2)}
    batch["decoder_attention_mask"] = torch.ones(2, width, dtype=torch.long)
    batch["decoder_attention_mask"][0, 3:] = 0
    moments = calibrate(model, [batch])
    encoder, decoder = int(batch["attention_mask"].sum()), int(batch["decoder_attention_mask"].sum())
    for name, layer in moments.layers.items():
        own = name.startswith("decoder") and not name.endswith(("EncDecAttention.k", "EncDecAttention.v"))
        assert layer.tokens == (decoder if own else encoder), name


def test_seq2seq_labels_stand_for_the_decoder_mask():
    model = zoo.BY_BASE["T5ForConditionalGeneration"].build()
    labels = zoo._ids(2, 7, seed=2)
    labels[1, 4:] = -100
    moments = calibrate(model, [{**zoo._text(), "labels": labels}])
    assert moments.layers["decoder.block.0.layer.0.SelfAttention.q"].tokens == 11
    assert moments.layers["encoder.block.0.layer.0.SelfAttention.q"].tokens == 12


@pytest.mark.parametrize("fails", [True, False])
def test_the_model_is_as_it_was(fails):
    case = zoo.BY_BASE["BertForMaskedLM"]
    model = case.build()
    model.train()
    model.bert.encoder.layer[1].eval()
    model.bert.embeddings.requires_grad_(False)
    modes = [m.training for m in model.modules()]
    grads = {n: p.requires_grad for n, p in model.named_parameters()}
    before = {k: v.clone() for k, v in model.state_dict().items()}
    random = torch.get_rng_state()

    def data():
        yield case.batch()
        if fails:
            raise OSError("the iterator broke")

    try:
        calibrate(model, data())
        assert not fails
    except OSError:
        assert fails
    assert [m.training for m in model.modules()] == modes
    assert {n: p.requires_grad for n, p in model.named_parameters()} == grads
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert torch.equal(torch.get_rng_state(), random)


@pytest.mark.slow
def test_texts_with_a_tokenizer(minilm):
    tokenizer = AutoTokenizer.from_pretrained(minilm)
    model = zoo.BY_BASE["BertModel"].build()
    model.resize_token_embeddings(len(tokenizer))
    texts = ["one", "two words", "three words here"] * 15
    moments = calibrate(model, texts, metric="activation", tokenizer=tokenizer)
    tokens = sum(len(ids) for ids in tokenizer(texts)["input_ids"])
    assert moments.layers["encoder.layer.0.output.dense"].tokens == tokens
    with pytest.raises(TargetError, match="need a tokenizer"):
        calibrate(model, texts)


@pytest.mark.parametrize("base", [c.base for c in zoo.ALL if not c.options or c.base != "LlamaForCausalLM"])
def test_every_family(base):
    case = zoo.BY_BASE[base]
    moments = calibrate(case.build(), [case.batch()])
    assert all(layer.tokens > 0 for name, layer in moments.layers.items())
    deep = [layer for name, layer in moments.layers.items() if "layer" in name or ".h." in name or "h." in name]
    assert all(float(layer.gradient_products.diagonal().sum()) > 0 for layer in deep)


@pytest.mark.parametrize(
    ("data", "options", "message"),
    [
        ([], {}, "data is empty"),
        ([[1, 2]], {}, "a calibration batch is a dict"),
        ([{}], {"metric": "svd"}, "metric must be one of"),
        ([{"x": torch.ones(1, 4)}], {}, "no loss and no floating-point tensor"),
    ],
)
def test_wrong_arguments(data, options, message):
    class Net(nn.Sequential):
        def forward(self, x):
            return {"y": super().forward(x) > 0}

    with pytest.raises(TargetError, match=message):
        calibrate(Net(nn.Linear(4, 4)), data, **options)


def net_and_data():
    torch.manual_seed(1)
    net = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 4))
    return net, [{"input": torch.randn(20, 8)} for _ in range(3)]


@pytest.mark.slow
@pytest.mark.parametrize(("max_memory", "files"), [(None, 1), ("1MB", 1), (8192, 3), ("14KB", 2)])
def test_moments_in_a_folder_group_by_group(tmp_path, max_memory, files):
    """Layers of 8 x 16, 16 x 16 and 16 x 4 take 5,120, 8,192 and 4,352 bytes, with a held-out part."""
    net, data = net_and_data()
    whole = calibrate(net, data, loss_fn=squares)
    grouped = calibrate(net, data, loss_fn=squares, folder=tmp_path / "moments", max_memory=max_memory)
    assert len(list((tmp_path / "moments").iterdir())) == files
    assert grouped.metric == whole.metric
    assert set(grouped.layers) == set(whole.layers)
    for name, layer in whole.layers.items():
        assert torch.equal(grouped.layers[name].input_products, layer.input_products)
        assert torch.equal(grouped.layers[name].gradient_products, layer.gradient_products)
    sources = (whole, grouped, Calibration.load(tmp_path / "moments"))
    small = [convert(net, LowRankConfig(keep=0.5, min_rank=1), calibration=source) for source in sources]
    for other in small[1:]:
        assert all(map(torch.equal, small[0].state_dict().values(), other.state_dict().values()))


@pytest.mark.slow
def test_a_group_that_the_loss_does_not_depend_on(tmp_path):
    """The last hidden states know nothing of the pooler, which is in a group of its own."""
    case = zoo.BY_BASE["BertModel"]
    whole = calibrate(case.build(), [case.batch()], target_modules="*")
    grouped = calibrate(case.build(), [case.batch()], folder=tmp_path, max_memory="54KB", target_modules="*")
    assert len(list(tmp_path.iterdir())) == len(whole.layers)
    assert not grouped.layers["pooler.dense"].has_gradient()
    assert_same(grouped, whole)


def squares(model, batch):
    return model(**batch).square().sum()


def test_limits_that_cannot_be_kept(tmp_path):
    net, data = net_and_data()
    with pytest.raises(TargetError, match="needs folder="):
        calibrate(net, data, loss_fn=squares, max_memory="1MB")
    with pytest.raises(TargetError, match=r"0: its moments take 5,120 bytes, and max_memory allows 1,000"):
        calibrate(net, data, loss_fn=squares, folder=tmp_path, max_memory=1000)
    with pytest.raises(TargetError, match="takes 3 passes over the data: give a list, no iterator"):
        calibrate(net, iter(data), loss_fn=squares, folder=tmp_path, max_memory=8192)
    assert list(tmp_path.iterdir()) == []
    calibrate(net, iter(data), loss_fn=squares, folder=tmp_path, max_memory="1MB")


def test_a_sum_keeps_what_one_of_two_held_out():
    case = zoo.BY_BASE["BertModel"]
    many, few = (calibrate(case.build(), rows(case, count=count, seed=count)) for count in (20, 2))
    assert len(few.batches) == 0
    for total in (many + few, few + many):
        name = next(iter(total.layers))
        assert total.layers[name].held.tokens == many.layers[name].held.tokens
        assert total.layers[name].fitting().tokens == (many + few).layers[name].tokens - many.layers[name].held.tokens


def test_a_batch_with_none_for_an_input_is_held_out_and_stored(tmp_path):
    case = zoo.BY_BASE["BertModel"]
    data = [{**row, "token_type_ids": None} for row in rows(case, count=20)]
    made = calibrate(case.build(), data)
    made.save(tmp_path / "moments.safetensors")
    again = Calibration.load(tmp_path / "moments.safetensors")
    assert len(again.batches) == len(made.batches) > 0
    assert again.fingerprint() == made.fingerprint()


def test_examples_that_differ_in_one_input_are_different_examples():
    """Many images with one prompt are not the same example over and over."""
    same = torch.ones(4, 5).long()
    data = [{"input_ids": same, "pixel_values": torch.randn(4, 3, 2, 2)} for _ in range(2)]
    seeds = [seeds_of(batch, ()) for batch in data]
    assert len({*seeds[0], *seeds[1]}) == 8
    assert seeds[0] == seeds_of(dict(reversed(data[0].items())), ())  # in any order
    others = {**data[0], "token_type_ids": same, "attention_mask": same}
    assert seeds_of(others, ()) == seeds[0]


def test_of_one_large_batch_some_is_held_out():
    case = zoo.BY_BASE["BertModel"]
    ids = torch.randint(3, 90, (40, 9), generator=torch.Generator().manual_seed(0))
    mask = (torch.arange(9) < torch.arange(40)[:, None] % 5 + 5).long()
    model, batch = case.build(), {"input_ids": ids * mask, "attention_mask": mask}
    whole = calibrate(model, [batch])
    assert sum(len(held["input_ids"]) for held, _ in whole.batches) == 4
    halves = [{key: value[:20] for key, value in batch.items()}, {key: value[20:] for key, value in batch.items()}]
    assert_same(whole, calibrate(model, halves))
    assert not calibrate(model, [{key: value[:4] for key, value in batch.items()}]).batches
