"""Random architectures, shapes, dtypes, ranks and patterns: convert -> save -> load -> merge keeps every invariant.

The same examples every time; `HYPOTHESIS_PROFILE=deep` draws fresh ones, twenty times as many.
"""

import json
import os
import tempfile
from collections import Counter

import pytest
import torch
import transformers as tf
from hypothesis import HealthCheck, assume, event, given, settings
from hypothesis import strategies as st
from torch import nn

import hf_reparam
from hf_reparam import LowRankConfig, RankPlan, convert, make_plan, merge
from hf_reparam.config import METRICS
from hf_reparam.errors import RankError, TargetError
from hf_reparam.layers.linear import LowRankLinear
from hf_reparam.model.config import plan_of
from hf_reparam.model.sites import select
from tests import zoo

DEEP = os.environ.get("HYPOTHESIS_PROFILE") == "deep"
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
widths = st.integers(1, 24)
forms = st.sampled_from(zoo.FORMS)
dtypes = st.sampled_from(DTYPES)


def examples(count):
    quiet = [HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large]
    return settings(
        max_examples=20 * count if DEEP else count, deadline=None, derandomize=not DEEP, suppress_health_check=quiet
    )


ENDS = Counter()


@pytest.fixture(autouse=True)
def enough_are_converted():
    """A test whose examples were all refused has tested nothing; of those drawn here it is a bit more than half."""
    ENDS.clear()
    yield
    assert ENDS["converted"] > ENDS.total() / 3, ENDS


def refused(error):
    """Count a refusal, which names what is wrong."""
    event(type(error).__name__)
    ENDS["refused"] += 1


def close(dtype, scale):
    """What a few roundings in a dtype may move outputs of this size."""
    return {"atol": 64 * torch.finfo(dtype).eps * max(scale, 1.0), "rtol": 0.0}


class Plain(nn.Module):
    """A chain of dense layers; one may stand in several places, and weights may be tied."""

    def __init__(self, sizes, biases, repeats, tie):
        super().__init__()
        self.layers = nn.ModuleList()
        for n_in, n_out, bias, again in zip(sizes, sizes[1:], biases, repeats, strict=False):
            layer = nn.Linear(n_in, n_out, bias=bias)
            self.layers.append(layer)
            if again and n_in == n_out:
                self.layers.append(layer)
        if tie and len(sizes) > 1:
            twin = nn.Linear(self.layers[-1].in_features, self.layers[-1].out_features, bias=False)
            twin.weight = self.layers[-1].weight
            self.twin = twin

    def forward(self, x):
        for layer in self.layers:
            before, x = x, layer(x).tanh()
        return x if not hasattr(self, "twin") else x + self.twin(before)


@st.composite
def plain_models(draw):
    sizes = draw(st.lists(widths | st.sampled_from([8, 16]), min_size=2, max_size=5))
    flags = st.lists(st.booleans(), min_size=len(sizes), max_size=len(sizes))
    torch.manual_seed(draw(st.integers(0, 2**31)))
    model = Plain(sizes, draw(flags), draw(flags), draw(st.booleans()))
    for layer in model.layers:
        if draw(st.integers(0, 7)) == 0:
            with torch.no_grad():
                layer.weight.mul_(draw(st.sampled_from([0.0, 1e-3, 1e3])))
    return model.to(draw(dtypes)).train(draw(st.booleans()))


@st.composite
def ranks(draw):
    one = st.integers(1, 24) | st.floats(0.05, 1.0)
    patterns = st.sampled_from(["*", "layers.0", "layers.*", "*.query", r"re:.*(key|fc|wi).*", "*dense*", "*attn*"])
    return draw(one | st.dictionaries(patterns, one, min_size=1, max_size=3))


def parameters(model):
    return sum(p.numel() for p in model.parameters())


def size(entry, n_in, n_out):
    """Counted here once more: r (in + out), and r^2 fewer with pivots."""
    return entry.rank * (n_in + n_out - (entry.rank if entry.form == "pivoted" else 0))


def check_names(model, report):
    """Every low-rank layer is in the report once, under a name that leads to it, and no tensor has two owners."""
    names = [layer.name for layer in report.layers if layer.rank is not None]
    assert len(names) == len(set(names))
    modules = {m for m in model.modules() if isinstance(m, LowRankLinear)}
    assert {model.get_submodule(name) for name in names} == modules
    assert len(modules) == len(names)


@pytest.mark.slow
@examples(100)
@given(model=plain_models(), rank=ranks(), form=forms, larger=st.booleans())
def test_any_chain_of_layers(model, rank, form, larger):
    x = torch.randn(3, model.layers[0].in_features, dtype=model.layers[0].weight.dtype)
    model.eval()
    before, dense = model(x), {k: v.clone() for k, v in model.state_dict().items()}
    try:
        small = convert(model, LowRankConfig(rank=rank, form=form, allow_larger=larger))
        report = hf_reparam.report(small)
    except (RankError, TargetError) as error:  # it changes nothing
        refused(error)
        assert all(torch.equal(v, dense[k]) for k, v in model.state_dict().items())
        return
    assert all(torch.equal(v, dense[k]) for k, v in model.state_dict().items())
    ENDS["converted"] += 1
    assert larger or parameters(small) < parameters(model)
    assert report.parameters_before == parameters(model)
    assert report.parameters_after == parameters(small)
    check_names(small, report)
    after = small(x)
    assert after.dtype == before.dtype
    assert bool(torch.isfinite(after).all())
    back = merge(small)
    assert not any(isinstance(m, LowRankLinear) for m in back.modules())
    assert back.state_dict().keys() == dense.keys()
    torch.testing.assert_close(back(x), after, **close(x.dtype, 1e3))
    if all(layer.rank == min(layer.in_features, layer.out_features) for layer in report.layers):
        torch.testing.assert_close(after, before, **close(x.dtype, 1e3))


@pytest.mark.slow
@examples(60)
@given(
    model=plain_models(),
    keep=st.floats(0.2, 1.0) | st.floats(0.6, 1.0),  # many a small size is refused
    form=forms,
    multiple_of=st.sampled_from([1, 2, 8]),
    min_rank=st.sampled_from([1, 2, 4]),
    metric=st.sampled_from(METRICS),
    shares=st.sampled_from(["global", "uniform"]),
)
def test_the_budget_is_kept(model, keep, form, multiple_of, min_rank, metric, shares):
    model.eval()
    moments = None
    inputs = torch.randn(8, model.layers[0].in_features, dtype=model.layers[0].weight.dtype)
    loss = None if metric == "activation" else (lambda m, batch: m(**batch).square().sum())
    options = {"form": form, "multiple_of": multiple_of, "allocation": shares if metric == "fisher" else None}
    options["min_rank"] = min_rank
    try:
        if metric != "svd":
            moments = hf_reparam.calibrate(model, [{"x": inputs}], metric=metric, loss_fn=loss)
        plan = make_plan(model, LowRankConfig(keep=keep, **options), moments)
        small = convert(model, plan, calibration=moments)
        report = hf_reparam.report(small)
    except (RankError, TargetError) as error:
        refused(error)
        return
    ENDS["converted"] += 1
    assert RankPlan.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan
    held = dense = 0
    for item in select(model, LowRankConfig()).selected:
        entry, n_in, n_out = plan.modules.get(item.name), item.site.in_features, item.site.out_features
        dense += n_in * n_out
        held += n_in * n_out if entry is None else size(entry, n_in, n_out)
    assert held <= keep * dense * (1 + 1e-9)
    assert parameters(small) <= parameters(model)
    assert all(spec.rank % multiple_of == 0 and spec.rank >= min_rank for spec in plan.modules.values())
    check_names(small, report)


def _sizes(draw):
    heads = draw(st.sampled_from([1, 2, 4]))
    return heads, heads * draw(st.integers(2, 6)), draw(st.integers(3, 40)), draw(st.integers(1, 3))


@st.composite
def transformers_models(draw):
    heads, width, inner, layers = _sizes(draw)
    tied = draw(st.booleans())
    vocabulary = draw(st.integers(91, 120))
    common = {"vocab_size": vocabulary, "num_hidden_layers": layers, "num_attention_heads": heads}
    bert_like = {**common, "hidden_size": width, "intermediate_size": inner, "max_position_embeddings": 16}
    bert_like["tie_word_embeddings"] = tied
    norms = {"layer_norm_eps": 1e-3}  # of six numbers that are nearly equal, 1e-12 would magnify every rounding
    kind = draw(st.sampled_from(["bert", "gpt2", "llama", "t5", "albert", "vit"]))
    torch.manual_seed(draw(st.integers(0, 2**31)))
    if kind == "bert":
        model = tf.BertForMaskedLM(tf.BertConfig(**bert_like, **norms))
    elif kind == "albert":
        model = tf.AlbertForMaskedLM(tf.AlbertConfig(**bert_like, **norms, embedding_size=width))
    elif kind == "llama":
        assume(width // heads % 2 == 0)
        model = tf.LlamaForCausalLM(tf.LlamaConfig(**bert_like, num_key_value_heads=1, pad_token_id=0))
    elif kind == "gpt2":
        sizes = {"n_embd": width, "n_layer": layers, "n_head": heads, "n_inner": inner, "n_positions": 16}
        model = tf.GPT2LMHeadModel(tf.GPT2Config(vocab_size=vocabulary, **sizes, tie_word_embeddings=tied))
    elif kind == "t5":
        sizes = {"d_model": width, "d_kv": width // heads, "d_ff": inner, "num_layers": layers, "num_heads": heads}
        ids = {"decoder_start_token_id": 0, "tie_word_embeddings": tied}
        model = tf.T5ForConditionalGeneration(tf.T5Config(vocab_size=vocabulary, **sizes, **ids))
    else:
        sizes = {k: bert_like[k] for k in ("hidden_size", "intermediate_size", "num_hidden_layers")}
        config = tf.ViTConfig(image_size=16, patch_size=8, num_attention_heads=heads, num_labels=3, **sizes, **norms)
        model = tf.ViTForImageClassification(config)
    event(kind)
    return model.eval().to(draw(st.sampled_from([torch.float32, torch.float64, torch.bfloat16])))


def batch_of(model):
    if model.main_input_name == "pixel_values":
        return {"pixel_values": torch.rand(2, 3, 16, 16, dtype=model.dtype)}
    ids = torch.randint(3, 90, (2, 7))
    return {"input_ids": ids, "decoder_input_ids": ids} if model.config.is_encoder_decoder else {"input_ids": ids}


def tied_groups(model):
    """Names of parameters that are one tensor, under the names of the dense model."""
    groups = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        groups.setdefault(id(parameter), set()).add(name)
    return sorted(
        sorted(names) for names in groups.values() if len(names) > 1 and not any(".down." in n for n in names)
    )


@pytest.mark.slow
@examples(30)
@given(
    model=transformers_models(), rank=ranks(), form=forms, inplace=st.booleans(), shard=st.sampled_from(["2KB", "1GB"])
)
def test_any_transformer(model, rank, form, inplace, shard):
    batch, size = batch_of(model), parameters(model)
    stock, keys = type(model), list(model.state_dict())
    ties = [g for g in tied_groups(model) if not any("layer" in n for n in g)]
    before = {key: value.clone() for key, value in model.state_dict().items()}
    try:
        small = convert(model, LowRankConfig(rank=rank, form=form), inplace=inplace)
        report = hf_reparam.report(small)
    except (RankError, TargetError) as error:
        refused(error)
        assert type(model) is stock
        assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
        return
    ENDS["converted"] += 1
    assert isinstance(small, stock)
    assert (small is model) == inplace
    assert parameters(small) < size
    check_names(small, report)
    plan = plan_of(small.config)
    assert RankPlan.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan
    expected = zoo.outputs(small, batch)
    with tempfile.TemporaryDirectory() as folder:
        small.save_pretrained(folder, max_shard_size=shard)
        loaded = type(small).from_pretrained(folder)
        assert loaded.dtype == small.dtype
    got, kept = loaded.state_dict(), small.state_dict()
    assert got.keys() == kept.keys()
    assert all(torch.equal(got[key], kept[key]) for key in kept)
    scale = max(float(t.abs().max()) for t in expected)
    for a, b in zip(zoo.outputs(loaded, batch), expected, strict=True):  # equal tensors may lie differently in memory
        torch.testing.assert_close(a, b, **close(model.dtype, scale))
    assert [g for g in tied_groups(loaded) if not any("layer" in n for n in g)] == ties
    dense = merge(loaded)
    assert type(dense) is stock
    assert list(dense.state_dict()) == keys
    assert parameters(dense) == size
    for a, b in zip(zoo.outputs(dense, batch), expected, strict=True):
        torch.testing.assert_close(a, b, **close(model.dtype, 16 * scale))
