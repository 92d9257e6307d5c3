"""Models built from `torch.nn` alone: their attentions are converted, calibrated, stored and merged like any layer."""

import copy
import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import hf_reparam
from hf_reparam import Entry, LowRankConfig, RankPlan, calibrate, convert, merge
from hf_reparam.errors import CheckpointError, PlanError, TargetError
from hf_reparam.layers.linear import LowRankLinear
from hf_reparam.model.host import opened
from hf_reparam.structures.heads.attention import find_attentions
from hf_reparam.structures.multihead import SplitMultiheadAttention
from tests import zoo

WIDTH = 32
OPTIONS = {"dim_feedforward": 48, "dropout": 0.0, "batch_first": True}


class Textbook(nn.Module):
    """The encoder-decoder of a textbook: embeddings, nn.Transformer, an output layer."""

    def __init__(self, batch_first=True):
        super().__init__()
        self.embed = nn.Embedding(20, WIDTH)
        self.transformer = nn.Transformer(WIDTH, 4, 2, 2, **{**OPTIONS, "batch_first": batch_first})
        self.out = nn.Linear(WIDTH, 20)

    def forward(self, src, tgt):
        mask = nn.Transformer.generate_square_subsequent_mask(tgt.shape[1 if self.transformer.batch_first else 0])
        return self.out(self.transformer(self.embed(src), self.embed(tgt), tgt_mask=mask, tgt_is_causal=True))


def encoder(norm_first=False):
    return nn.TransformerEncoder(nn.TransformerEncoderLayer(WIDTH, 4, norm_first=norm_first, **OPTIONS), 2)


class Decoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.decoder = nn.TransformerDecoder(nn.TransformerDecoderLayer(WIDTH, 4, **OPTIONS), 2)

    def forward(self, src):
        return self.decoder(src, src.flip(1))


def ids():
    return {"src": torch.randint(0, 20, (4, 6)), "tgt": torch.randint(0, 20, (4, 6))}


def states():
    return {"src": torch.randn(4, 6, WIDTH)}


MODELS = {
    "encoder": (encoder, states),
    "encoder, norm first": (lambda: encoder(True), states),
    "decoder": (Decoder, states),
    "textbook": (Textbook, ids),
    "textbook, length first": (lambda: Textbook(False), ids),
}


@pytest.fixture(params=list(MODELS))
def made(request):
    build, data = MODELS[request.param]
    return build().eval(), data()


def attentions(model, kind):
    return [m for m in model.modules() if isinstance(m, kind)]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("made", "form", "inplace"),
    [
        ("encoder, norm first", "pivoted", True),
        ("decoder", "pair", False),
        ("textbook", "pivoted", False),
        ("textbook, length first", "pair", True),
    ],
    indirect=["made"],
)
def test_attentions_are_converted_and_merged_back(made, form, inplace):
    model, batch = made
    keys, before = list(model.state_dict()), model(**batch)
    dense = copy.deepcopy(model)
    wholes = attentions(model, nn.MultiheadAttention)
    small = convert(model, LowRankConfig(rank=6, form=form), inplace=inplace)
    report = hf_reparam.report(small)
    assert (small is model) == inplace
    parts = attentions(small, SplitMultiheadAttention)
    assert len(parts) == len(wholes) > 1
    assert all(isinstance(child, LowRankLinear) for part in parts for child in part.children())
    assert not attentions(small, nn.MultiheadAttention)
    assert not any("MultiheadAttention" in row.reason for row in report.skipped)
    assert report.parameters_after == sum(p.numel() for p in small.parameters()) < report.parameters_before
    if not inplace:
        assert attentions(model, nn.MultiheadAttention) == wholes
        assert torch.equal(model(**batch), before)
    after = small(**batch)
    back = merge(small)
    assert list(back.state_dict()) == keys
    assert len(attentions(back, nn.MultiheadAttention)) == len(wholes)
    torch.testing.assert_close(back(**batch), after, atol=2e-5, rtol=0)
    full = convert(dense, LowRankConfig(rank=1.0, form="pair", allow_larger=True))
    torch.testing.assert_close(full(**batch), before, atol=2e-5, rtol=0)


def test_the_fused_path_reads_no_stale_weight():
    """PyTorch runs encoders in one kernel in evaluation without gradients; it must not see what was replaced."""
    model, batch = encoder().eval(), states()
    small = convert(model, rank=6)
    with torch.no_grad():
        fused = small(**batch)
        for layer in [m for m in small.modules() if isinstance(m, LowRankLinear)]:
            layer.up.weight.mul_(1.5)
        moved = small(**batch)
    small.train()
    assert not torch.allclose(fused, moved, atol=1e-3)
    torch.testing.assert_close(small(**batch), moved, atol=1e-5, rtol=0)
    with torch.no_grad():
        padded = small.eval()(**batch, src_key_padding_mask=torch.arange(6).expand(4, 6) > 3)
    assert bool(torch.isfinite(padded).all())


@pytest.mark.slow
@pytest.mark.parametrize("made", ["encoder", "decoder", "textbook, length first"], indirect=True)
def test_calibration_and_budget(made):
    model, batch = made
    modules = list(model.modules())
    moments = calibrate(model, [batch], loss_fn=lambda m, b: m(**b).square().sum())
    assert list(map(id, model.modules())) == list(map(id, modules))  # the split form was for the time being
    assert any(name.endswith("self_attn.v_proj") for name in moments.layers)
    plan = hf_reparam.make_plan(model, calibration=moments, keep=0.5)
    small = convert(model, plan, calibration=moments)
    report = hf_reparam.report(small)
    assert any("self_attn" in row.name for row in report.layers)
    assert list(map(id, model.modules())) == list(map(id, modules))
    listed = {row.name for row in hf_reparam.report(model).layers}
    assert {row.name for row in hf_reparam.report(small).layers} <= listed
    fitted = hf_reparam.refit(small, model, [batch] * 5, calibration=moments)
    assert fitted.after <= fitted.before


def test_only_what_is_asked_for():
    model = encoder().eval()
    small = convert(model, rank={"layers.0.self_attn.[qk]_proj": 4})
    (part,) = attentions(small, SplitMultiheadAttention)
    kinds = [type(getattr(part, name)) for name in ("q_proj", "k_proj", "v_proj", "out_proj")]
    assert kinds == [LowRankLinear, LowRankLinear, nn.Linear, nn.Linear]
    assert len(attentions(small, nn.MultiheadAttention)) == 1  # the second layer's
    again = convert(small, rank={"*.v_proj": 4, "*.out_proj": 4})
    assert len(attentions(again, SplitMultiheadAttention)) == 2
    assert isinstance(convert(model, rank={"*linear1": 4}).layers[0].self_attn, nn.MultiheadAttention)


def test_an_attention_that_stays_says_why():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = nn.MultiheadAttention(WIDTH, 4, add_bias_kv=True)
            self.fc = nn.Linear(WIDTH, WIDTH)

    report = hf_reparam.report(convert(Net(), rank=4))
    reasons = {row.name: row.reason for row in report.skipped}
    assert reasons["attention.in_proj_weight"] == (
        "inside nn.MultiheadAttention: add_bias_kv adds a key and a value that no projection makes"
    )
    assert [row.name for row in report.layers] == ["fc"]


def test_an_attention_by_itself_stays():
    """There is no module in which another could take its place."""
    with pytest.raises(TargetError, match="no dense layer that can be factored"):
        convert(nn.MultiheadAttention(WIDTH, 4), rank=4)


@pytest.mark.slow
def test_it_learns():
    torch.manual_seed(0)
    model, batch = Textbook(), ids()
    small = convert(model, rank=8)
    optimizer = torch.optim.Adam(small.parameters(), lr=3e-3)
    losses = []
    for _ in range(60):
        loss = nn.functional.cross_entropy(small(**batch).flatten(0, 1), batch["tgt"].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    assert losses[-1] < 0.1 * losses[0]
    torch.testing.assert_close(merge(small)(**batch), small(**batch), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("made", "form"), [("decoder", "pivoted"), ("textbook", "pair")], indirect=["made"])
def test_save_and_load(made, form, tmp_path):
    model, batch = made
    small = convert(model, LowRankConfig(keep=0.5, form=form))
    hf_reparam.save(small, tmp_path / "small")
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["model.safetensors", "plan.json", "small"]
    fresh = copy.deepcopy(model)
    for parameter in fresh.parameters():
        nn.init.zeros_(parameter)
    loaded = hf_reparam.load(fresh, tmp_path / "small")
    assert loaded is fresh
    assert loaded.state_dict().keys() == small.state_dict().keys()
    assert all(torch.equal(v, small.state_dict()[k]) for k, v in loaded.state_dict().items())
    torch.testing.assert_close(loaded.eval()(**batch), small(**batch), atol=1e-6, rtol=0)


def test_shared_layers_are_stored_once(tmp_path):
    layer = nn.Linear(24, 24)
    model = nn.Sequential(layer, nn.Tanh(), layer)
    hf_reparam.save(convert(model, rank=4), tmp_path / "small")
    assert sum(t.numel() > 0 for t in load_file(tmp_path / "small" / "model.safetensors").values()) == 3
    fresh_layer = nn.Linear(24, 24)
    loaded = hf_reparam.load(nn.Sequential(fresh_layer, nn.Tanh(), fresh_layer), tmp_path / "small")
    assert loaded[0] is loaded[2]


@pytest.fixture
def stored(tmp_path):
    hf_reparam.save(convert(encoder(), rank=4), tmp_path / "small")
    return tmp_path / "small"


def retensor(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def replan(folder, change):
    plan = json.loads((folder / "plan.json").read_text())
    change(plan)
    (folder / "plan.json").write_text(json.dumps(plan))


LAYER = "layers.1.self_attn.q_proj"


@pytest.mark.parametrize(
    ("act", "error", "message"),
    [
        (lambda f: retensor(f, lambda t: t.pop(f"{LAYER}.up.weight")), CheckpointError, f"{LAYER}.up.weight"),
        (lambda f: retensor(f, lambda t: t.update(stray=torch.zeros(1))), CheckpointError, "stray"),
        (lambda f: retensor(f, lambda t: t.update({f"{LAYER}.up.weight": torch.zeros(2, 2)})), CheckpointError, "size"),
        (lambda f: (f / "model.safetensors").write_bytes(b"x" * 99), CheckpointError, "does not fit"),
        (lambda f: (f / "model.safetensors").unlink(), CheckpointError, "No such file"),
        (lambda f: (f / "plan.json").unlink(), CheckpointError, "holds no model that `save` wrote"),
        (lambda f: (f / "plan.json").write_text("{"), CheckpointError, "cannot be read as a plan"),
        (
            lambda f: replan(f, lambda p: p["modules"].update(a={"rank": 1, "form": "pair"})),
            PlanError,
            "a: the plan names it, and TransformerEncoder has no such module",
        ),
        (lambda f: replan(f, lambda p: p["modules"][LAYER].update(rank=33)), PlanError, "rank 33, above min.* = 32"),
        (lambda f: replan(f, lambda p: p["modules"][LAYER].update(rank=5)), CheckpointError, "size"),
        (lambda f: replan(f, lambda p: p.update(format_version=9)), PlanError, "version 9"),
    ],
)
def test_folders_that_do_not_fit(stored, act, error, message):
    act(stored)
    model = encoder()
    modules = list(model.modules())
    with pytest.raises(error, match=message):
        hf_reparam.load(model, stored)
    assert list(map(id, model.modules())) == list(map(id, modules))


@pytest.mark.slow
def test_wrong_arguments(stored, tmp_path):
    small = convert(encoder(), rank=5)
    with pytest.raises(CheckpointError, match="exists"):
        hf_reparam.save(small, stored)
    hf_reparam.save(small, stored, force=True)
    assert hf_reparam.load(encoder(), stored).layers[0].linear1.rank == 5
    with pytest.raises(TargetError, match="has nothing of low rank"):
        hf_reparam.save(encoder(), tmp_path / "x")
    bert = zoo.BY_BASE["BertModel"].build()
    with pytest.raises(TargetError, match="use its save_pretrained"):
        hf_reparam.save(bert, tmp_path / "x")
    with pytest.raises(TargetError, match="use from_pretrained"):
        hf_reparam.load(bert, stored)


def narrow_plan(model, width, **layers):
    heads = {a.name: Entry(width, "heads") for a in find_attentions(opened(model).model)}
    return RankPlan(heads | layers)


def head_rows(report):
    return [row for row in report.layers if row.form == "heads"]


def test_heads_at_full_width_are_the_dense_ones(made):
    model, batch = made
    full = convert(model, narrow_plan(model, 8))
    torch.testing.assert_close(full(**batch), model(**batch), atol=1e-5, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("made", "inplace"), [("decoder", True), ("textbook", False), ("textbook, length first", True)], indirect=["made"]
)
def test_narrower_heads_are_stored_and_merged_back(made, inplace, tmp_path):
    model, batch = made
    build = copy.deepcopy(model)
    keys, wholes = list(model.state_dict()), attentions(model, nn.MultiheadAttention)
    small = convert(model, narrow_plan(model, 4), inplace=inplace)
    report = hf_reparam.report(small)
    assert len(head_rows(report)) == len(wholes) == len(attentions(small, SplitMultiheadAttention))
    assert attentions(model, nn.MultiheadAttention) == ([] if inplace else wholes)
    low = convert(small, LowRankConfig(rank=3, target_modules="*out_proj"))
    expected = low(**batch)
    assert not torch.allclose(expected, build(**batch), atol=1e-3)
    hf_reparam.save(low, tmp_path / "low")
    again = hf_reparam.load(copy.deepcopy(build), tmp_path / "low")
    assert torch.equal(again(**batch), expected)
    dense = merge(again)
    assert list(dense.state_dict()) == keys
    assert {k: v.shape for k, v in dense.state_dict().items()} == {k: v.shape for k, v in build.state_dict().items()}
    torch.testing.assert_close(dense(**batch), expected, atol=1e-5, rtol=0)


def test_weights_can_be_asked_for_with_narrower_heads():
    net = nn.ModuleList([nn.MultiheadAttention(WIDTH, 4, batch_first=True)]).eval()
    small = convert(net, narrow_plan(net, 3))
    x = torch.randn(2, 5, WIDTH)
    plain, _ = small[0](x, x, x, need_weights=False)
    out, weights = small[0](x, x, x, need_weights=True)
    torch.testing.assert_close(out, plain, atol=1e-6, rtol=0)
    assert weights.shape == (2, 5, 5)


@pytest.mark.slow
def test_a_budget_makes_heads_of_plain_models_narrower():
    model = Textbook().eval()
    with torch.no_grad():  # two of eight directions of every head are used
        for attention in attentions(model, nn.MultiheadAttention):
            for part in attention.in_proj_weight.view(3, 4, 8, WIDTH):
                part[:, 2:] *= 1e-4
    data = [ids() for _ in range(4)]

    def loss(net, batch):
        return nn.functional.cross_entropy(net(**batch).flatten(0, 1), batch["tgt"].flatten(), reduction="sum")

    moments = calibrate(model, data, loss_fn=loss)
    small = convert(model, LowRankConfig(keep=0.4, min_rank=1, heads=True), calibration=moments)
    report = hf_reparam.report(small)
    assert head_rows(report)
    assert all(row.rank < 8 for row in head_rows(report))
    separate = convert(model, LowRankConfig(keep=0.4, min_rank=1), calibration=moments)
    lost = {name: (net(**data[0]) - model(**data[0])).norm() for name, net in (("joint", small), ("apart", separate))}
    assert lost["joint"] < lost["apart"]


@pytest.mark.parametrize("kdim", [None, 16])
@pytest.mark.parametrize("frozen", ["in_proj", "out_proj"])
def test_an_attention_that_stays_trains_what_it_trained(frozen, kdim):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = nn.MultiheadAttention(32, 4, kdim=kdim, vdim=kdim)
            self.layer = nn.Linear(32, 32)

    net = Net()
    for name, parameter in net.attention.named_parameters():
        parameter.requires_grad_(name != "in_proj_bias" and (frozen == "in_proj") == name.startswith("out_proj"))
    wanted = {name: p.requires_grad for name, p in net.attention.named_parameters()}
    small = convert(net, LowRankConfig(rank=4, target_modules="layer"))
    for model in (small, merge(small)):
        assert {name: p.requires_grad for name, p in model.attention.named_parameters()} == wanted
