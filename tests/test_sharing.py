"""Layers with one input and one `down`: chosen where it loses less, first-class, exact after a merge."""

import copy
import json
import pickle

import pytest
import torch
import transformers as tf
from functorch.compile import make_boxed_func
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from torch._dynamo.backends.common import aot_autograd

import hf_reparam
from hf_reparam import (
    AttentionType,
    CheckpointError,
    LayerSpec,
    LowRankLinear,
    Moments,
    PlanError,
    RankPlan,
    TargetError,
    collect_moments,
    convert,
    convert_checkpoint,
    make_plan,
    merge,
    merge_checkpoint,
    refit,
    register_attention,
    summarize,
)
from hf_reparam.calibration import layer_name
from hf_reparam.decomposition import as_decompositions
from hf_reparam.hf.inspection import protected_layers
from hf_reparam.nn.dense import dense_matrix
from hf_reparam.nn.heads import attention_types
from hf_reparam.nn.linear import PivotedLinear, SharedLinear, connect
from hf_reparam.nn.targets import find_targets
from hf_reparam.sharing import same_inputs
from tests import zoo
from tests.hf.test_remote import without_package
from tests.resume import trains_and_resumes
from tests.test_checkpoint import assert_same_folder

FAMILIES = [
    "BertForMaskedLM",
    "AlbertForMaskedLM",
    "LlamaForCausalLM",
    "Qwen2ForCausalLM",
    "T5ForConditionalGeneration",
    "BartForConditionalGeneration",
    "ViTForImageClassification",
]
LAYER = "layers.0.self_attn"


def logits(model, batch):
    with torch.no_grad():
        return model(**batch).logits


def stacks_of(model, moments):
    found = find_targets(model, protected=protected_layers(model)).selected
    return same_inputs({layer_name(model, t.name): t for t in found}, as_decompositions(moments, None))


def shared_plan(model, moments, rank=6, form="pair"):
    """Every group of layers with one input uses one `down`; nothing else is converted."""
    specs = {}
    for first, *others in stacks_of(model, moments):
        specs[first] = LayerSpec(rank, form)
        specs |= {name: LayerSpec(rank, form, first.rpartition(".")[2]) for name in others}
    return RankPlan(specs, model.config.model_type, moments.metric)


def users(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, SharedLinear)}


@pytest.fixture(scope="module", params=FAMILIES)
def family(request):
    case = zoo.BY_BASE[request.param]
    model, batch = case.build(), case.batch()
    return model, batch, collect_moments(model, [batch])


@pytest.fixture
def llama():
    case = zoo.BY_BASE["LlamaForCausalLM"]
    model, batch = case.build(), case.batch()
    moments = collect_moments(model, [batch])
    return model, batch, convert(model, plan=shared_plan(model, moments), calibration=moments)


def test_layers_with_one_input_are_found(family):
    model, _, moments = family
    found = {tuple(name.rpartition(".")[2] for name in names) for names in stacks_of(model, moments)}
    assert (
        found
        == {
            "bert": {("query", "key", "value")},
            "albert": {("query", "key", "value")},
            "llama": {("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")},
            "qwen2": {("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")},
            "t5": {("q", "k", "v"), ("k", "v")},
            "bart": {("k_proj", "v_proj", "q_proj"), ("k_proj", "v_proj")},
            "vit": {("q_proj", "k_proj", "v_proj")},
        }[model.config.model_type]
    )


@pytest.mark.parametrize("form", zoo.FORMS)
def test_it_survives_saving_copying_and_merging(family, form, tmp_path):
    model, batch, moments = family
    plan = shared_plan(model, moments, form=form)
    small = convert(model, plan=plan, calibration=moments)
    expected = logits(small, batch)
    assert not torch.allclose(expected, logits(model, batch), atol=1e-5)
    assert users(small)
    small.save_pretrained(tmp_path / "small")
    loaded = type(small).from_pretrained(tmp_path / "small")
    assert torch.equal(logits(loaded, batch), expected)
    assert loaded.config.reparam == small.config.reparam == plan.to_dict() | {"record": small.config.reparam["record"]}
    assert not any(key.startswith(f"{name}.down") for name in users(small) for key in small.state_dict())
    assert torch.equal(logits(pickle.loads(pickle.dumps(small)), batch), expected)
    twin = copy.deepcopy(small)
    layer = next(iter(users(twin).values()))
    assert layer.lender in set(twin.modules()) - set(small.modules())
    with torch.no_grad():
        layer.lender.down.weight.zero_()
    assert torch.equal(logits(small, batch), expected)
    merged = merge(small)
    assert type(merged) is type(model)
    torch.testing.assert_close(logits(merged, batch), expected, atol=1e-5, rtol=0)
    with pytest.raises(Exception, match="mismatch"):  # the stock class does not go on with random numbers
        type(model).from_pretrained(tmp_path / "small")


def test_parameters_are_those_of_the_plan(family):
    model, _, moments = family
    plan = shared_plan(model, moments, form="pivoted")
    small, report = convert(model, plan=plan, calibration=moments, return_report=True)
    spent = dict.fromkeys(("before", "after"), 0)
    for target in find_targets(model).selected:
        spec = plan.modules.get(layer_name(model, target.name))
        if spec is not None:
            down = 0 if spec.down_of else spec.rank * (target.in_features - spec.rank)
            spent["after"] += down + spec.rank * target.out_features + target.bias_parameters
            spent["before"] += target.dense_parameters
    assert (report.factored_before, report.factored_after) == (spent["before"], spent["after"])
    assert report.parameters_before - report.parameters_after == spent["before"] - spent["after"]
    again = summarize(small)
    assert [row.parameters_after for row in again.layers] == [row.parameters_after for row in report.layers]
    assert (again.parameters_before, again.parameters_after) == (report.parameters_before, report.parameters_after)


@pytest.mark.parametrize("metric", ["svd", "activation", "fisher"])
def test_it_is_the_best_product_of_its_rank(metric):
    """The stack of weights, cut in the coordinates of the input and of all gradients, has the least error there is."""
    case = zoo.BY_BASE["Qwen2ForCausalLM"]
    model = case.build()
    with torch.no_grad():
        for layer in model.modules():
            if isinstance(layer, nn.Linear) and layer.bias is not None:
                layer.bias.normal_()
    moments = collect_moments(model, [case.batch()])
    names = [f"{LAYER}.{part}" for part in ("q_proj", "k_proj", "v_proj")]
    plan = RankPlan({n: LayerSpec(5, "pair", None if n == names[0] else "q_proj") for n in names}, "qwen2", metric)
    small = convert(model, plan=plan, calibration=moments)
    dense = [dense_matrix(model.model.get_submodule(name)).detach().double() for name in names]
    low = [dense_matrix(small.model.get_submodule(name)) for name in names]
    metrics = [moments.layers[name].metric(metric, centred=True) for name in names]
    whitened = torch.cat([m.apply(w) for m, w in zip(metrics, dense, strict=True)])
    sigma = torch.linalg.svdvals(whitened)
    error = torch.cat([m.apply(w - v) for m, w, v in zip(metrics, dense, low, strict=True)]).norm()
    torch.testing.assert_close(error, sigma[5:].norm(), rtol=1e-4, atol=0)
    if metric != "svd":  # outputs are right on average
        mean = moments.layers[names[0]].mean()
        for name, w, v in zip(names, dense, low, strict=True):
            before, after = model.model.get_submodule(name), small.model.get_submodule(name)
            torch.testing.assert_close(w @ mean + before.bias, v @ mean + after.bias, atol=1e-5, rtol=0)


def wide_llama():
    """As many keys and values as queries."""
    torch.manual_seed(0)
    return tf.LlamaForCausalLM(tf.LlamaConfig(**{**zoo.LLAMA_LIKE, "num_key_value_heads": 4})).eval()


def model_of_one_subspace(different=()):
    """A Llama whose queries, keys and values read the same 8 directions of their 32 inputs."""
    model = wide_llama()
    generator = torch.Generator().manual_seed(1)
    for i, block in enumerate(model.model.layers):
        rows = torch.linalg.qr(torch.randn(32, 32, generator=generator))[0][:, :8].T
        for name in ("q_proj", "k_proj", "v_proj") if i not in different else ():
            weight = block.self_attn.get_submodule(name).weight
            weight.data = torch.randn(32, 8, generator=generator) @ rows * 0.2
    return model, zoo.BY_BASE["LlamaForCausalLM"].batch()


@pytest.mark.parametrize("form", zoo.FORMS)
def test_it_is_chosen_where_it_loses_less(form):
    model, batch = model_of_one_subspace(different=[1])
    moments = collect_moments(model, [batch])
    kind = {"include": "*self_attn.[qkv]_proj", "keep": 0.4, "form": form}
    plan = make_plan(model, moments, **kind)
    assert {name for name, spec in plan.modules.items() if spec.down_of} == {f"{LAYER}.k_proj", f"{LAYER}.v_proj"}
    separate = make_plan(model, moments, **kind, shared=False)
    assert not any(spec.down_of for spec in separate.modules.values())
    dense = logits(model, batch)
    lost = []
    for each in (plan, separate):
        small, report = convert(model, plan=each, calibration=moments, return_report=True)
        weights = sum(each.modules[layer_name(model, r.name)].weights(32, 32) for r in report.layers if r.rank)
        left = sum(t.dense_parameters for t in find_targets(model, include=kind["include"]).selected)
        left -= sum(row.parameters_before for row in report.layers)
        assert weights + left <= 0.4 * 6 * 32 * 32
        lost.append(float((logits(small, batch) - dense).square().sum()))
    assert lost[0] < 0.9 * lost[1]
    assert json.loads(json.dumps(plan.to_dict()))["format_version"] == 3
    assert RankPlan.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan
    with pytest.raises(TargetError, match="shared=True needs the global allocation"):
        make_plan(model, moments, keep=0.5, allocation="uniform", shared=True)


def test_all_of_a_group_stay_dense_together():
    model, batch = model_of_one_subspace(different=[0, 1])
    moments = collect_moments(model, [batch])
    assert not make_plan(model, moments, keep=1.0, include="*self_attn.[qkv]_proj").modules


def test_narrower_heads_or_one_down():
    """An attention can have either; both are weighed, and the budget holds."""
    case = zoo.BY_BASE["BertForMaskedLM"]
    model, batch = case.build(), case.batch()
    generator = torch.Generator().manual_seed(1)
    attention = model.bert.encoder.layer[0].attention.self
    for name in ("query", "key", "value"):
        weight = attention.get_submodule(name).weight
        left, right = torch.randn(32, 12, generator=generator), torch.eye(32)[:12]
        weight.data = left @ right * 0.5
    moments = collect_moments(model, [batch])
    plan = make_plan(model, moments, keep=0.7)
    name = "encoder.layer.0.attention.self"
    assert plan.modules[f"{name}.key"].down_of == "query"
    assert "encoder.layer.0.attention" not in plan.head_widths
    small, report = convert(model, plan=plan, calibration=moments, return_report=True)
    assert report.factored_after < report.factored_before
    assert torch.isfinite(logits(small, batch)).all()


class Gated(nn.Module):
    """An attention with a gate that gets the same input, and keys without a bias."""

    def __init__(self):
        super().__init__()
        self.inner, self.head_dim = 32, 8
        self.q, self.k, self.v, self.o = (nn.Linear(32, 32, bias=name != "k") for name in "qkvo")
        self.gate = nn.Linear(32, 32)

    def forward(self, x):
        heads = (layer(x).view(*x.shape[:2], -1, self.head_dim).transpose(1, 2) for layer in (self.q, self.k, self.v))
        mixed = nn.functional.scaled_dot_product_attention(*heads, scale=8**-0.5)
        return self.o(mixed.transpose(1, 2).flatten(2)) * self.gate(x).sigmoid()


def test_stored_moments_are_not_read_whole(family, tmp_path, monkeypatch):
    model, _, moments = family
    moments.save(tmp_path / "moments.safetensors")
    stored = Moments.load(tmp_path / "moments.safetensors")
    monkeypatch.setattr("hf_reparam.linalg.moments._read", lambda *_: pytest.fail("read"))
    assert stacks_of(model, stored) == stacks_of(model, moments)


def test_layers_with_and_without_a_bias_do_not_share():
    torch.manual_seed(0)
    net, batch = nn.Sequential(Gated()), {"input": torch.randn(4, 5, 32)}
    moments = collect_moments(net, [batch], loss_fn=lambda m, b: m(**b).square().sum())
    assert stacks_of(net, moments) == [("0.q", "0.v", "0.gate")]


def test_a_layer_beside_an_attention_does_not_keep_it_from_narrower_heads(monkeypatch):
    monkeypatch.setattr("hf_reparam.nn.heads._registry", dict(attention_types()))
    register_attention(Gated, AttentionType("q", "k", "v", "o", size="inner"))
    torch.manual_seed(0)
    net, batch = nn.Sequential(Gated()), {"input": torch.randn(16, 5, 32)}
    with torch.no_grad():
        for layer in (net[0].q, net[0].k, net[0].v):  # heads that use 2 of their 8 numbers
            layer.weight.view(4, 8, 32)[:, 2:] *= 0.01
            layer.weight.mul_(2)
    moments = collect_moments(net, [batch], loss_fn=lambda m, b: m(**b).square().sum())
    plan = make_plan(net, moments, keep=0.5)
    assert plan.head_widths


class Narrow(nn.Module):
    """Layers of 16 outputs each, which together read 20 directions of their 64 inputs."""

    def __init__(self):
        super().__init__()
        self.parts = nn.ModuleList(nn.Linear(64, 16) for _ in range(4))
        directions = torch.randn(20, 64)
        for part in self.parts:
            part.weight.data = torch.randn(16, 20) @ directions

    def forward(self, x):
        return torch.cat([part(x) for part in self.parts], -1)


@pytest.mark.parametrize("form", zoo.FORMS)
def test_a_rank_is_never_above_the_outputs_of_the_lender(form):
    torch.manual_seed(0)
    net, batch = Narrow(), {"x": torch.randn(200, 64)}
    moments = collect_moments(net, [batch], loss_fn=lambda m, b: m(**b).square().sum())
    plan = make_plan(net, moments, keep=0.9, form=form)
    assert all(spec.rank <= 16 for spec in plan.modules.values())  # one `down` of rank 20 would lose nothing
    convert(net, plan=plan, calibration=moments)


class Counting(nn.Linear):
    calls = 0

    def forward(self, x):
        self.calls += 1
        return super().forward(x)


def counted(model):
    """Let every `down` count its calls."""
    downs = [m.down for m in model.modules() if isinstance(m, LowRankLinear) and not isinstance(m, SharedLinear)]
    for down in downs:
        down.__class__ = Counting
        down.calls = 0
    return downs


def test_one_down_is_computed_once(llama):
    _, batch, small = llama
    downs = counted(small)
    for times in (1, 2, 3):
        logits(small, batch)
        assert [down.calls for down in downs] == [times] * 4
    assert all(m._memo is None for m in small.modules() if isinstance(m, LowRankLinear))


def pair_of_layers():
    q = LowRankLinear(nn.Linear(8, 3, bias=False), nn.Linear(3, 8))
    net = nn.ModuleDict({"q": q, "k": SharedLinear(nn.Linear(3, 4), 8, down_of="q")})
    connect(net)
    return net


def test_what_was_computed_is_never_stale():
    net = pair_of_layers()
    (down,) = counted(net)
    x = torch.randn(2, 8)
    for change, calls in [
        (lambda x: x, 1),
        (lambda x: x.clone(), 2),
        (lambda x: x.add_(1), 2),
    ]:
        down.calls = 0
        with torch.no_grad():
            net.q(x)
            y = change(x)
            torch.testing.assert_close(net.k(y), y @ net.k.weight.T + net.k.bias)
        assert down.calls == calls
        net.q._memo = None
    down.calls = 0
    with torch.no_grad():
        net.q(x)
    net.k(x).sum().backward()  # what was computed without gradients is of no use
    assert down.calls == 2
    assert net.q.down.weight.grad is not None
    net.q(x).sum().backward()
    net.q(x).sum().backward()  # its graph is gone
    with torch.no_grad():
        net.q(x)
        down.weight.mul_(2)
        torch.testing.assert_close(net.k(x), x @ net.k.weight.T + net.k.bias)
        net.q._memo = None
        net.q(x)
        down.weight.data.mul_(2)  # not counted: a layer takes it once
        torch.testing.assert_close(net.q(x), x @ net.q.weight.T + net.q.bias)
    net.q._memo = None
    with torch.inference_mode():  # changes of such tensors are not counted
        y = torch.randn(2, 8)
        net.q(y)
        y.add_(1)
        torch.testing.assert_close(net.k(y), y @ net.k.weight.T + net.k.bias)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        net.q(x)
    with torch.no_grad():
        assert net.k(x).dtype == torch.float32


def test_copies_leave_what_was_computed_behind():
    net = pair_of_layers()
    net.q(torch.randn(2, 8))  # its graph could not be copied
    assert net.q._memo is not None
    for twin in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        assert twin.q._memo is None
        assert twin.k.lender is twin.q


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_are_those_of_the_product(llama, checkpointing):
    _, batch, small = llama
    reference = copy.deepcopy(small).train()
    for module in reference.modules():
        if isinstance(module, LowRankLinear):  # computed from the factors, with no memory of other layers
            module.forward = lambda x, m=module: x @ m.factors()[1].T @ m.up.weight.T
    small.train()
    if checkpointing:
        small.gradient_checkpointing_enable()
    for model in (small, reference):
        model(**batch, labels=batch["input_ids"]).loss.backward()
    for (name, p), q in zip(small.named_parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, atol=1e-6, rtol=1e-4, msg=name)


def test_adapters_train_and_merge(llama):
    _, batch, small = llama
    adapted = get_peft_model(copy.deepcopy(small), LoraConfig(target_modules=["down", "up"], init_lora_weights=False))
    changed = logits(adapted, batch)
    assert not torch.allclose(changed, logits(small, batch), atol=1e-3)
    adapted(**batch, labels=batch["input_ids"]).loss.backward()
    wanted = [p for name, p in adapted.named_parameters() if "lora_" in name]
    assert len(wanted) == 2 * (4 + 10)  # of four `down`s and ten `up`s
    assert all(p.grad is not None for p in wanted)
    merged = adapted.merge_and_unload()
    torch.testing.assert_close(logits(merged, batch), changed, atol=1e-4, rtol=0)
    torch.testing.assert_close(logits(merge(merged), batch), changed, atol=1e-4, rtol=0)


def test_the_trainer_saves_and_resumes(llama, tmp_path):
    _, _, small = llama
    trains_and_resumes(small, tmp_path)


def test_it_generates_what_the_merged_model_does(llama):
    _, batch, small = llama
    options = {"max_new_tokens": 8, "do_sample": False, "num_beams": 2}
    assert torch.equal(small.generate(**batch, **options), merge(small).generate(**batch, **options))


def test_it_compiles_and_exports(llama):
    _, batch, small = llama
    expected = logits(small, batch)
    with torch.no_grad():
        compiled = torch.compile(small, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(**batch, use_cache=False).logits, expected, atol=1e-5, rtol=0)
        program = torch.export.export(small, (), {**batch, "use_cache": False}, strict=False)
        torch.testing.assert_close(program.module()(**batch, use_cache=False).logits, expected, atol=1e-5, rtol=0)


def test_a_compiled_graph_computes_it_once():
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = pair_of_layers()

        def forward(self, x):
            return self.net.q(x).sum() + self.net.k(x).sum()

    attention, products = Attention(), []

    def counting(graph, _):
        products.append(sum("mm" in str(node.target) for node in graph.graph.nodes))
        return make_boxed_func(graph.forward)

    compiled = torch.compile(attention, backend=aot_autograd(fw_compiler=counting), fullgraph=True)
    x = torch.randn(2, 8)
    with torch.no_grad():
        for _ in range(2):
            torch.testing.assert_close(compiled(x), attention(x))
    assert products == [3]  # one `down` and two `up`s
    assert attention.net.q._memo is None


@pytest.mark.parametrize("form", zoo.FORMS)
def test_refit_fits_them_together(form):
    model = wide_llama()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "self_attn" in name:
                p *= 8  # fresh weights are so small that attention hardly matters
    batches = [{"input_ids": ids} for ids in torch.randint(3, 90, (10, 4, 16))]
    moments = collect_moments(model, batches)
    small = convert(model, plan=shared_plan(model, moments, 4, form), calibration=moments)
    before = {key: value.clone() for key, value in small.state_dict().items()}
    report = refit(small, model, batches, moments=moments)
    assert report.after < report.before
    assert any("k_proj" in name for name in report.layers)
    changed = {key for key, value in small.state_dict().items() if not torch.equal(value, before[key])}
    assert any(key.endswith("k_proj.up.weight") for key in changed)


@pytest.mark.parametrize("form", zoo.FORMS)
@pytest.mark.parametrize("base", ["LlamaForCausalLM", "T5ForConditionalGeneration"])
def test_streaming_gives_the_same_tensors(tmp_path, base, form):
    case = zoo.BY_BASE[base]
    model = case.build()
    model.save_pretrained(tmp_path / "dense")
    moments = collect_moments(model, [case.batch()])
    moments.save(tmp_path / "moments.safetensors")
    plan = shared_plan(model, moments, form=form)
    direct = convert(type(model).from_pretrained(tmp_path / "dense"), plan=plan, calibration=moments)
    direct.save_pretrained(tmp_path / "direct")
    convert_checkpoint(tmp_path / "dense", tmp_path / "out", plan=plan, moments=tmp_path / "moments.safetensors")
    assert_same_folder(tmp_path / "direct", tmp_path / "out")
    merge(direct).save_pretrained(tmp_path / "merged")
    merge_checkpoint(tmp_path / "out", tmp_path / "streamed")
    assert_same_folder(tmp_path / "merged", tmp_path / "streamed")


@pytest.mark.parametrize("form", zoo.FORMS)
def test_layers_in_files_compute(tmp_path, form):
    case = zoo.BY_BASE["LlamaForCausalLM"]
    model = case.build()
    moments = collect_moments(model, [case.batch()])
    plan = shared_plan(model, moments, form=form)
    expected = logits(convert(model, plan=plan, calibration=moments), case.batch())
    small = convert(model, plan=plan, calibration=moments, offload_folder=tmp_path)
    assert small.model.layers[0].self_attn.q_proj.down.weight.is_meta
    torch.testing.assert_close(logits(small, case.batch()), expected)


@pytest.mark.parametrize("inplace", [False, True])
def test_a_search_finds_it(inplace):
    model, batch = model_of_one_subspace()
    dense = logits(model, batch)
    small = convert(
        model,
        tolerance=0.05,
        evaluate=lambda m: -float((logits(m, batch) - dense).abs().max()),
        calibration=[batch],
        inplace=inplace,
        include="*self_attn.[qkv]_proj",
    )
    assert users(small)


def test_without_the_package(tmp_path):
    case = zoo.BY_BASE["LlamaForCausalLM"]
    model, batch = case.build(), case.batch()
    moments = collect_moments(model, [batch])
    small = convert(model, plan=shared_plan(model, moments, form="pivoted"), calibration=moments)
    small.save_pretrained(tmp_path / "small", remote_code=True)
    torch.save(batch, tmp_path / "small" / "batch.pt")
    done = without_package(tmp_path / "small", "AutoModelForCausalLM", tmp_path / "again")
    assert done.returncode == 0, done.stderr
    assert torch.equal(torch.load(tmp_path / "small" / "outputs.pt")[0], logits(small, batch))


def test_plain_models(tmp_path):
    def build():
        torch.manual_seed(0)
        return nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 4, 48, batch_first=True, dropout=0.0), 2).eval()

    net, batch = build(), {"src": torch.randn(4, 7, 32)}
    with torch.no_grad():
        for layer in net.layers:
            layer.self_attn.in_proj_weight.copy_(torch.randn(96, 4) @ torch.randn(4, 32) * 0.1)
    moments = collect_moments(net, [batch], loss_fn=lambda m, b: m(**b)[..., 0].square().sum())
    small = convert(net, keep=0.5, calibration=moments, joint=False)
    assert {name.rpartition(".")[2] for name in users(small)} == {"k_proj", "v_proj"}
    hf_reparam.save(small, tmp_path / "small")
    loaded = hf_reparam.load(build(), tmp_path / "small")
    assert torch.equal(loaded(**batch), small(**batch))
    torch.testing.assert_close(merge(small)(**batch), small(**batch), atol=1e-5, rtol=0)


def test_converting_again_is_refused_by_name(llama):
    model, _, small = llama
    with pytest.raises(TargetError, match="uses one `down` together with other layers: merge"):
        convert(small, rank=2, include="*self_attn.[qkv]_proj")
    plan = RankPlan({f"{LAYER}.q_proj": LayerSpec(2)}, "llama")
    with pytest.raises(PlanError, match=r"q_proj: uses one `down` together"):
        convert(small, plan=plan)
    assert convert(small, rank=2, include="*o_proj").model.layers[0].self_attn.k_proj.lender is not None
    assert not users(convert(merge(small), rank=2))
    assert model is not small


def rewritten(folder, change):
    """A copy of a folder's config.json in which the plan's layers are changed."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    change(config["reparam"]["modules"], config)
    path.write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m, c: m[f"{LAYER}.k_proj"].update(down_of="o_proj"), "the plan gives that layer none"),
        (lambda m, c: m[f"{LAYER}.k_proj"].update(down_of="v_proj"), "the plan gives that layer none"),
        (lambda m, c: m[f"{LAYER}.k_proj"].update(rank=5), "their ranks or forms differ"),
        (lambda m, c: m[f"{LAYER}.k_proj"].update(form="pivoted"), "their ranks or forms differ"),
        (lambda m, c: m[f"{LAYER}.k_proj"].update(down_of="a.b"), "must be the name of a layer beside it"),
        (lambda m, c: m[f"{LAYER}.k_proj"].update(down_of=["q_proj"]), "must be the name of a layer beside it"),
        (lambda m, c: c["reparam"].update(format_version=2), "belongs to format version 3"),
        (lambda m, c: m.pop(f"{LAYER}.q_proj"), "the plan gives that layer none"),
        (lambda m, c: m.update({f"{LAYER}.o_proj": {"rank": 6, "form": "pair", "down_of": "q_proj"}}), None),
    ],
)
def test_tampered_plans_are_refused(llama, tmp_path, change, message):
    _, _, small = llama
    small.save_pretrained(tmp_path)
    rewritten(tmp_path, change)
    with pytest.raises((PlanError, CheckpointError), match=message):
        type(small).from_pretrained(tmp_path)


def test_a_down_that_would_not_be_used_is_an_error(llama, tmp_path):
    _, _, small = llama
    small.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors[f"model.{LAYER}.k_proj.down.weight"] = torch.zeros(6, 32)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"k_proj\.weight"):
        type(small).from_pretrained(tmp_path)


def test_widths_have_to_agree():
    net = nn.ModuleDict({"q": nn.Linear(8, 8), "k": nn.Linear(16, 8)})
    with pytest.raises(PlanError, match="another width of inputs"):
        convert(net, plan=RankPlan({"q": LayerSpec(2), "k": LayerSpec(2, down_of="q")}))


@pytest.mark.parametrize(
    ("user", "message"),
    [
        (SharedLinear(nn.Linear(4, 4), 8, down_of="q"), "another rank or width"),
        (SharedLinear(nn.Linear(3, 4), 9, down_of="q"), "another rank or width"),
        (SharedLinear(nn.Linear(3, 4), 8, down_of="q", form="pivoted"), "another rank or width"),
        (SharedLinear(nn.Linear(3, 4), 8, down_of="v"), "no layer beside it has one"),
        (SharedLinear(nn.Linear(3, 4), 8, down_of="k"), "no layer beside it has one"),
        (SharedLinear(nn.Linear(3, 4), 8, down_of="dense"), "no layer beside it has one"),
    ],
)
def test_only_a_fitting_layer_beside_it_is_connected(user, message):
    net = pair_of_layers()
    net["dense"], net["user"] = nn.Linear(8, 4), user
    with pytest.raises(PlanError, match=f"user: it uses the `down` of '{user.down_of}', .*{message}"):
        connect(net)


def test_a_layer_on_its_own_says_what_it_misses():
    with pytest.raises(RuntimeError, match="which it was not connected with"):
        SharedLinear(nn.Linear(3, 4), 8, down_of="q")(torch.zeros(1, 8))


def test_ranks_above_the_outputs_of_some(tmp_path):
    """Of grouped queries: the keys' projection has 16 outputs, and rank 20 of its stack."""
    case = zoo.BY_BASE["LlamaForCausalLM"]
    model, batch = case.build(), case.batch()
    moments = collect_moments(model, [batch])
    for form in zoo.FORMS:
        plan = shared_plan(model, moments, 20, form)
        small, report = convert(model, plan=plan, calibration=moments, return_report=True)
        assert f"20{' pivoted' if form == 'pivoted' else ''}, down of q_proj" in str(report)
        small.save_pretrained(tmp_path / form, remote_code=True)
        assert torch.equal(logits(type(small).from_pretrained(tmp_path / form), batch), logits(small, batch))
        torch.save(batch, tmp_path / form / "batch.pt")
        done = without_package(tmp_path / form, "AutoModelForCausalLM", tmp_path / f"{form}-again")
        assert done.returncode == 0, done.stderr
    with pytest.raises(PlanError, match="rank 33, above"):
        convert(model, plan=shared_plan(model, moments, 33), calibration=moments)


def test_data_parallel_is_refused(llama):
    _, _, small = llama
    layer = next(iter(users(small).values()))
    with pytest.raises(RuntimeError, match="DistributedDataParallel"):
        layer._replicate_for_data_parallel()


@pytest.mark.parametrize("form", zoo.FORMS)
def test_drawn_at_random_it_has_the_familys_size(form):
    case = zoo.BY_BASE["BertModel"]
    model = case.build(initializer_range=0.05)
    names = [f"encoder.layer.{i}.attention.self.{part}" for i in (0, 1) for part in ("query", "key", "value")]
    specs = {n: LayerSpec(8, form, None if n.endswith("query") else "query") for n in names}
    small = convert(model, plan=RankPlan(specs, "bert"))
    drawn = type(small)._from_config(small.config)
    products = torch.cat([m.weight.flatten() for m in users(drawn).values()])
    assert 0.04 < products.detach().std() < 0.06
    assert all(isinstance(m.lender, PivotedLinear) == (form == "pivoted") for m in users(drawn).values())
