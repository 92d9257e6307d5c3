"""Fused experts of MoE layers: found, made low-rank, run by every implementation, calibrated, loaded and made stock."""

import copy
import math
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import pytest
import torch
import transformers as tf
from accelerate import cpu_offload
from torch import nn
from torch.nn import functional as F
from transformers.conversion_mapping import get_model_conversion_mapping

from hf_reparam import Entry, LowRankConfig, RankPlan, calibrate, convert, make_plan, report, save
from hf_reparam.errors import PlanError, WeightError
from hf_reparam.linalg.moments import LayerSums
from hf_reparam.structures.experts import Experts, dense_experts, expert_moments
from hf_reparam.structures.experts.modules import LowRankExperts
from hf_reparam.structures.experts.watch import ExpertWatch

SIZES = {
    "vocab_size": 99,
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
MOE = {**SIZES, "moe_intermediate_size": 24, "num_experts": 4, "num_experts_per_tok": 2}


def mixtral(**kw):
    return tf.MixtralConfig(**SIZES, num_local_experts=4, **kw)


def qwen2_moe(**kw):
    return tf.Qwen2MoeConfig(**MOE, shared_expert_intermediate_size=24, decoder_sparse_step=1, **kw)


def qwen3_moe(**kw):
    return tf.Qwen3MoeConfig(**MOE, head_dim=8, decoder_sparse_step=1, **kw)


def deepseek_v3(**kw):
    ranks = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8}
    groups = {"n_routed_experts": 4, "n_group": 2, "topk_group": 1, "first_k_dense_replace": 1}
    sizes = {key: value for key, value in MOE.items() if key != "num_experts"}
    return tf.DeepseekV3Config(**{**sizes, "num_key_value_heads": 4}, **ranks, **groups, **kw)


def gpt_oss(**kw):
    return tf.GptOssConfig(**SIZES, num_local_experts=4, head_dim=8, layer_types=["full_attention"] * 2, **kw)


def nemotron_h(**kw):
    layers = {"layers_block_type": ["moe", "attention"], "head_dim": 8, "mamba_num_heads": 4, "mamba_head_dim": 8}
    experts = {"n_routed_experts": 4, "moe_intermediate_size": 24, "moe_shared_expert_intermediate_size": 24}
    sizes = {key: value for key, value in SIZES.items() if key not in ("num_hidden_layers", "max_position_embeddings")}
    return tf.NemotronHConfig(**sizes, **layers, **experts, num_experts_per_tok=2, n_group=1, topk_group=1, **kw)


def llama4(**kw):
    sizes = {"num_local_experts": 4, "head_dim": 8, "intermediate_size_mlp": 24, "attention_chunk_size": 16}
    return tf.Llama4TextConfig(**SIZES, **sizes, **kw)


def jetmoe(**kw):
    sizes = {key: value for key, value in SIZES.items() if key != "num_attention_heads"}
    return tf.JetMoeConfig(**sizes, kv_channels=8, num_local_experts=4, num_experts_per_tok=2, **kw)


ROUTED = [mixtral, qwen2_moe, qwen3_moe, deepseek_v3, gpt_oss, nemotron_h]
FAMILIES = [*ROUTED, llama4, jetmoe]
IMPLEMENTATIONS = ["eager", "batched_mm", "grouped_mm"]


class Source:
    """Moments of experts by name, in a metric."""

    solver = "exact"

    def __init__(self, metric, known=None):
        self.metric, self.known = metric, known or {}

    def moments(self, name):
        return self.known.get(name) if self.metric != "svd" else None


def sites(model):
    return {site.name: site for site in Experts().sites(model) if site.reason is None}


def unserved(model):
    return {site.name: site.reason for site in Experts().sites(model) if site.reason is not None}


def build(name, site, rank, source):
    return Experts().build(name, site, Entry(rank, "experts"), source)


def part(replacement):
    ((_, _, new),) = replacement.attributes
    return new


@dataclass
class Pass:
    """What calibration says of a batch."""

    masks: tuple = ()
    counting: bool = True


@contextmanager
def watching(site, moments, batch=None):
    watch = ExpertWatch(site.owner, site.parameter, moments, batch or Pass())
    try:
        yield
    finally:
        watch.remove()


def model_of(family, **kw):
    torch.manual_seed(0)
    model = tf.AutoModelForCausalLM.from_config(family(**kw)).eval()
    with torch.no_grad():  # of ordinary size, so that experts matter
        for site in sites(model).values():
            nn.init.normal_(site.held, std=0.2)
    return model


def ids(rows=3, length=9):
    return torch.randint(3, 99, (rows, length), generator=torch.Generator().manual_seed(1))


def converted(model, rank, source=None):
    """A copy of the model with all experts of low rank."""
    small = copy.deepcopy(model)
    for name, site in sites(small).items():
        build(name, site, min(rank, site.full_rank), source or Source("svd")).replacement.install(small)
    return small


def multiplied_out(small):
    """A copy of a low-rank model with dense experts."""
    dense = copy.deepcopy(small)
    for site in sites(dense).values():
        site.replaced(dense_experts(site.held)).install(dense)
    return dense


def moments_of(model, inputs, mask=None, gradients=True):
    """Moments of every expert, by a pass in which the sum of squared logits is the loss."""
    seen = copy.deepcopy(model)
    found = sites(seen)
    moments = {
        name: [LayerSums(site.in_features, site.out_features, gradients=gradients) for _ in site.moments("")]
        for name, site in found.items()
    }
    batch = Pass(() if mask is None else (mask.bool(),))
    with ExitStack() as stack:
        for name, site in found.items():
            stack.enter_context(watching(site, moments[name], batch))
        logits = seen(inputs, attention_mask=mask).logits
        weights = 1.0 if mask is None else mask[..., None]
        (logits * weights).square().sum().backward()
    return {f"{name}.{i}": each.take() for name, many in moments.items() for i, each in enumerate(many)}


@pytest.mark.parametrize("family", FAMILIES)
def test_full_rank_is_the_dense_model(family):
    model = model_of(family)
    small = converted(model, 10**6)
    assert all(isinstance(site.held, LowRankExperts) for site in sites(small).values())
    assert sites(small), "no experts were found"
    torch.testing.assert_close(small(ids()).logits, model(ids()).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ROUTED)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_low_rank_is_the_product_in_every_implementation(family, implementation):
    small = converted(model_of(family), 5)  # no multiple of 16 bytes
    dense = multiplied_out(small)
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in dense.parameters())
    expected = dense(ids()).logits
    small.set_experts_implementation(implementation)
    torch.testing.assert_close(small(ids()).logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", [llama4, jetmoe])
def test_low_rank_is_the_product_in_forwards_of_their_own(family):
    small = converted(model_of(family), 5)
    torch.testing.assert_close(small(ids()).logits, multiplied_out(small)(ids()).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", [mixtral, jetmoe])
def test_experts_are_converted_by_default_whatever_their_parameter_is_called(family):
    dense = model_of(family)
    found = [row.name for row in report(convert(dense, rank=4)).layers if row.form == "experts"]
    assert set(found) == sites(dense).keys()


def test_a_plan_tells_of_experts_that_it_leaves_dense():
    dense = model_of(mixtral)
    plan = make_plan(dense, LowRankConfig(keep=0.9, min_rank=14))  # too much for `down_proj`
    made = [{s.name: s.reason for s in told.skipped} for told in (plan.report, report(convert(dense, plan)))]
    assert made[0] == made[1]
    assert made[0]["model.layers.1.mlp.experts.down_proj"] == "the plan leaves it dense"


@pytest.mark.parametrize(
    ("family", "implementation"),
    [
        *((family, way) for family in (mixtral, gpt_oss) for way in IMPLEMENTATIONS),
        (llama4, "eager"),
        (jetmoe, "eager"),
    ],
)
def test_no_dense_weight_is_formed(family, implementation, monkeypatch):
    small = converted(model_of(family), 5)
    small.set_experts_implementation(implementation)

    def refuse(self):
        raise AssertionError("a dense weight was formed")

    monkeypatch.setattr("hf_reparam.structures.experts.modules.ExpertWeight.formed", refuse)
    small(ids())


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_offloaded_factors_come_in_when_they_are_used(implementation):
    small = converted(model_of(mixtral), 5)
    small.set_experts_implementation(implementation)
    expected = small(ids()).logits
    cpu_offload(small, execution_device="cpu")
    assert all(site.held.up.is_meta for site in sites(small).values())
    torch.testing.assert_close(small(ids()).logits, expected)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_gradients_reach_both_factors(implementation):
    small = converted(model_of(mixtral), 5)
    dense = multiplied_out(small)
    small.set_experts_implementation(implementation)
    dense.set_experts_implementation("eager")
    for model in (small, dense):
        model(ids()).logits.square().sum().backward()
    for name, site in sites(small).items():
        low, gradient = site.held, sites(dense)[name].held.grad
        torch.testing.assert_close(low.up.grad, gradient @ low.down.mT, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(low.down.grad, low.up.mT @ gradient, rtol=1e-3, atol=1e-3)


def test_sites_say_what_is_there():
    found = sites(model_of(mixtral))
    assert list(found) == [f"model.layers.{i}.mlp.experts.{p}" for i in (0, 1) for p in ("gate_up_proj", "down_proj")]
    up, down = list(found.values())[:2]
    assert (len(up.moments("")), up.in_features, up.out_features, up.transposed, up.entry) == (4, 32, 48, False, None)
    assert (down.in_features, down.out_features, down.weights) == (24, 32, 4 * 24 * 32)
    assert (Experts().cost(down, None), Experts().cost(down, Entry(3))) == (4 * 24 * 32, 4 * 3 * (24 + 32))
    model = model_of(gpt_oss)
    across = next(iter(sites(model).values()))
    assert (across.in_features, across.out_features, across.transposed) == (32, 48, True)
    Experts().skeleton(across, Entry(3, "experts")).install(model)
    across = sites(model)[across.name]
    assert (across.entry, across.weights) == (Entry(3, "experts"), 4 * 48 * 32)
    assert across.held.shape == (4, 32, 48)


def test_experts_that_cannot_be_served_have_a_reason():
    model = model_of(mixtral)
    first, second = (layer.mlp.experts for layer in model.model.layers)
    second.down_proj = first.down_proj
    second.gate_up_proj = nn.Parameter(second.gate_up_proj.detach().to(torch.float8_e4m3fn), requires_grad=False)
    reasons = unserved(model)
    start = "model.layers.{}.mlp.experts.{}"
    assert (
        reasons[start.format(0, "down_proj")]
        == reasons[start.format(1, "down_proj")]
        == ("experts that are tied to others")
    )
    assert "quantize or distribute afterwards" in reasons[start.format(1, "gate_up_proj")]
    assert list(sites(model)) == [start.format(0, "gate_up_proj")]


def test_a_plan_that_takes_experts_for_a_layer_is_refused():
    with torch.device("meta"):
        model = tf.AutoModelForCausalLM.from_config(gpt_oss())
    plan = RankPlan({"layers.0.mlp.experts.gate_up_proj": Entry(3, "pair")})
    with pytest.raises(PlanError, match="as 'pair', and it is of type Parameter, not a dense layer"):
        convert(model, plan)


def test_a_skeleton_needs_no_numbers():
    with torch.device("meta"):
        model = tf.AutoModelForCausalLM.from_config(gpt_oss(), dtype=torch.bfloat16)
    site = next(iter(sites(model).values()))
    site.held.requires_grad_(False)
    low = part(Experts().skeleton(site, Entry(3, "experts")))
    assert (low.up.shape, low.down.shape) == ((4, 48, 3), (4, 3, 32))
    assert (low.up.is_meta, low.dtype, low.down.requires_grad) == (True, torch.bfloat16, False)
    assert low.shape == site.held.shape == (4, 32, 48)


@pytest.mark.parametrize("family", [mixtral, gpt_oss])
def test_stock_is_the_dense_parameter(family):
    model = model_of(family)
    back = multiplied_out(converted(model, 10**6))
    assert {k: v.shape for k, v in back.state_dict().items()} == {k: v.shape for k, v in model.state_dict().items()}
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(back.state_dict()[name], tensor, rtol=1e-5, atol=1e-5)
    assert all(p.requires_grad for p in back.parameters())


@pytest.mark.parametrize("family", [mixtral, gpt_oss])
def test_a_converted_model_becomes_smaller(family):
    small = convert(model_of(family), rank=12)
    smaller = convert(small, rank=6)
    assert {site.entry.rank for site in sites(smaller).values()} == {6}
    once = converted(small, 6)
    for name, site in sites(smaller).items():
        torch.testing.assert_close(dense_experts(site.held), dense_experts(sites(once)[name].held))


def test_numbers_of_half_precision():
    model = model_of(mixtral).to(torch.bfloat16)
    small = converted(model, 10**6)
    assert {p.dtype for p in small.parameters()} == {torch.bfloat16}
    torch.testing.assert_close(small(ids()).logits, model(ids()).logits, rtol=0.1, atol=0.1)
    assert {p.dtype for p in multiplied_out(small).parameters()} == {torch.bfloat16}


def by_hand(model, inputs, mask):
    """Rows of the first experts, from what goes into them and where the router sends it; and their outputs."""
    caught = {}
    experts = model.model.layers[0].mlp.experts
    handle = experts.register_forward_pre_hook(lambda _, args: caught.update(x=args[0], chosen=args[1]))
    with torch.no_grad():
        model(inputs, attention_mask=mask)
    handle.remove()
    real = torch.ones(len(caught["x"]), dtype=torch.bool) if mask is None else mask.reshape(-1).bool()
    hit = [(caught["chosen"] == i).any(1) & real for i in range(4)]
    return [caught["x"][rows] for rows in hit]


@pytest.mark.parametrize("family", [mixtral, gpt_oss])
@pytest.mark.parametrize("padded", [False, True])
def test_moments_are_those_of_routed_tokens(family, padded):
    model, mask = model_of(family), None
    if padded:
        mask = torch.ones(3, 9, dtype=torch.int64)
        mask[1, 5:] = 0
    moments = moments_of(model, ids(), mask)
    name = "model.layers.0.mlp.experts.gate_up_proj"
    rows = by_hand(model, ids(), mask)
    assert sum(map(len, rows)) == int(mask.sum() if padded else 27) * model.config.num_experts_per_tok
    for i, x in enumerate(rows):
        own = moments[f"{name}.{i}"]
        assert own.tokens == moments[f"model.layers.0.mlp.experts.down_proj.{i}"].tokens == len(x)
        torch.testing.assert_close(own.input_products, (x.double().T @ x.double()), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", [*ROUTED, llama4, jetmoe])
def test_watching_changes_nothing(family):
    model = model_of(family)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    found = {
        name: [LayerSums(s.in_features, s.out_features, gradients=True) for _ in s.moments("")]
        for name, s in sites(model).items()
    }
    plain = model(ids()).logits
    name, site = next(iter(sites(model).items()))
    config = site.owner.__dict__.get("config")
    with watching(site, found[name]):
        seen = model(ids()).logits
        seen.square().sum().backward()
    torch.testing.assert_close(seen, plain, rtol=1e-4, atol=1e-4)
    taken = [sums.take() for sums in found[name]]
    assert sum(m.tokens for m in taken) > 0
    assert all(m.has_gradient() for m in taken if m.tokens)
    assert site.owner.__dict__.get("config") is config
    assert list(sites(model)) == list(found)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    torch.testing.assert_close(model(ids()).logits, plain, rtol=0, atol=0)
    assert not site.owner._forward_pre_hooks


def test_of_experts_that_get_every_token_the_zeros_do_not_count():
    """Llama 4 hands all tokens to every expert, as zeros where the router did not choose it."""
    mask = torch.ones(3, 9, dtype=torch.int64)
    mask[1, 5:] = 0
    model = model_of(llama4)
    for given, tokens in ((None, 27), (mask, 23)):
        moments = moments_of(model, ids(), given)
        for name in sites(model):
            assert sum(moments[f"{name}.{i}"].tokens for i in range(4)) == tokens


def test_what_checkpointing_computes_again_does_not_count():
    model = model_of(mixtral)
    site = next(iter(sites(model).values()))
    sums = [LayerSums(site.in_features, site.out_features, gradients=True) for _ in range(4)]
    with watching(site, sums, Pass(counting=False)):
        model(ids()).logits.square().sum().backward()
    moments = [own.take() for own in sums]
    assert sum(own.tokens for own in moments) == 0
    assert any(own.has_gradient() for own in moments)


def test_a_configuration_may_hold_anything():
    """What its class would refuse, or cannot write: layers that were dropped, and objects."""
    model = model_of(gpt_oss)
    model.model.layers = model.model.layers[:1]
    model.config.num_hidden_layers, model.config.note = 1, object()
    model.set_experts_implementation("grouped_mm")
    before = model.config
    assert calibrate(model, [{"input_ids": ids()}]).layers["layers.0.mlp.experts.gate_up_proj.0"].tokens
    assert model.config is before
    assert model.config._experts_implementation == "grouped_mm"


@pytest.mark.parametrize(("seen", "there"), [(2, 4), (4, 2)])
def test_calibration_of_another_number_of_experts_is_refused(seen, there):
    config, models = mixtral(), []
    for config.num_local_experts in (seen, there):
        models.append(tf.AutoModelForCausalLM.from_config(config))
    one, other = models
    with pytest.raises(WeightError, match="the calibration does not fit"):
        convert(other, rank=4, calibration=calibrate(one, [{"input_ids": ids()}]))


def test_calibration_refuses_uses_that_it_does_not_know():
    site = next(iter(sites(model_of(mixtral)).values()))
    with watching(site, []), pytest.raises(WeightError, match="einsum"):
        torch.einsum("eoi,ti->teo", site.owner.gate_up_proj, torch.zeros(3, 32))


def test_gradient_moments_are_those_of_the_outputs():
    """Of g and x of one expert, sum g x^T is the gradient of its weight: the moments must agree with it."""
    model = model_of(mixtral, num_experts_per_tok=1)
    moments = moments_of(model, ids(1, 4))
    model.set_experts_implementation("eager")
    model(ids(1, 4)).logits.square().sum().backward()
    for name, site in sites(model).items():
        for i in range(4):
            own = moments[f"{name}.{i}"]
            if own.tokens == 1:  # |g|^2 |x|^2 = |g x^T|^2
                product = own.gradient_products.trace() * own.input_products.trace()
                assert math.isclose(float(product), float(site.held.grad[i].double().square().sum()), rel_tol=1e-3)
    assert any(own.tokens == 1 for own in moments.values())


def test_frozen_experts_are_calibrated():
    model = model_of(mixtral).requires_grad_(False)
    name = "model.layers.0.mlp.experts.gate_up_proj"
    expected = moments_of(model_of(mixtral), ids())
    found = moments_of(model, ids())
    for i in range(4):
        own, wanted = found[f"{name}.{i}"], expected[f"{name}.{i}"]
        torch.testing.assert_close(own.gradient_products, wanted.gradient_products, rtol=1e-3, atol=1e-3)


def skewed(model):
    """Embeddings of uneven directions, so that experts get inputs that calibration can use."""
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(torch.logspace(0, -3, 32))
    return model


@pytest.mark.parametrize("family", [mixtral, gpt_oss])
def test_a_metric_loses_less_than_plain_svd(family):
    model, inputs = skewed(model_of(family)), ids(16, 32)
    moments = moments_of(model, inputs)
    dense = model(inputs).logits

    def error(metric):
        return float((converted(model, 6, Source(metric, moments))(inputs).logits - dense).detach().square().sum())

    plain = error("svd")
    assert error("activation") < 0.7 * plain
    assert error("fisher") < 0.7 * plain


def test_losses_are_what_the_error_adds_up_to():
    model = skewed(model_of(gpt_oss))
    name, site = next(iter(sites(model).items()))
    source = Source("activation", moments_of(model, ids(16, 32)))
    lost = Experts().losses(name, site, source)
    assert (lost.shape, lost.dtype) == ((32,), torch.float64)
    built = build(name, site, 6, source)
    assert math.isclose(built.error**2, float(lost[6:].sum() / lost.sum()), rel_tol=1e-6)
    difference = (site.held - dense_experts(part(built.replacement))).detach().double()
    squares = 0.0
    for i in range(4):
        own = source.known[f"{name}.{i}"]
        squares += float((difference[i].T @ own.input_products @ difference[i]).trace())
    assert math.isclose(squares, float(lost[6:].sum()), rel_tol=0.1)  # shrinkage is the difference


def test_losses_need_gradients_in_the_fisher_metric():
    model = model_of(mixtral)
    name, site = next(iter(sites(model).items()))
    assert Experts().losses(name, site, Source("fisher", moments_of(model, ids(), gradients=False))) is None
    assert Experts().losses(name, site, Source("svd")) is not None


def test_experts_that_saw_little_take_what_all_saw():
    many, few = (LayerSums(4, 3, gradients=False) for _ in range(2))
    many.add_inputs(torch.randn(10, 4))
    few.add_inputs(torch.randn(3, 4))
    many, few = many.take(), few.take()
    first, second, third = expert_moments([many, few, None], 4)
    assert first is many
    assert second.tokens == third.tokens == 13
    torch.testing.assert_close(second.input_products, many.input_products + few.input_products)
    assert expert_moments([None, None], 4) == [None, None]


def test_numbers_that_are_not_finite_are_named():
    model = model_of(mixtral)
    name, site = next(iter(sites(model).items()))
    with torch.no_grad():
        site.held[2, 0, 0] = math.nan
    with pytest.raises(WeightError, match="expert 2"):
        build(name, site, 3, Source("svd"))


@pytest.fixture
def low():
    torch.manual_seed(0)
    return LowRankExperts(nn.Parameter(torch.randn(4, 2, 16)), nn.Parameter(torch.randn(4, 8, 2)))


@pytest.mark.parametrize(
    "write",
    [
        lambda low: low.__setitem__(0, torch.zeros(8, 16)),
        lambda low: low[0].__setitem__(0, 1.0),
        lambda low: low[1].mul_(2),
        lambda low: low[1].data.zero_(),
        lambda low: low.transpose(1, 2).copy_(torch.zeros(4, 16, 8)),
        lambda low: torch.nn.init.normal_(low[0]),
        lambda low: torch.nn.init.normal_(low),
        lambda low: torch.add(torch.zeros(8, 16), 1, out=low[0]),
    ],
)
def test_writing_into_it_raises(low, write):
    with pytest.raises(WeightError, match="would be lost"):
        write(low)


def test_it_answers_as_the_parameter_would(low):
    dense = low.up @ low.down
    x = torch.randn(5, 16)
    pick = torch.tensor([3, 0, 3])
    assert (low.shape, low.size(2), len(low), low.dtype, low.device.type) == ((4, 8, 16), 16, 4, torch.float32, "cpu")
    assert (low[0].shape, low[pick].shape, low.mT.shape) == ((8, 16), (3, 8, 16), (4, 16, 8))
    for given, wanted in [
        (F.linear(x, low[2], torch.ones(8)), F.linear(x, dense[2], torch.ones(8))),
        (x @ low[torch.tensor(1)].mT, x @ dense[1].mT),
        (low[1] @ x.T, dense[1] @ x.T),
        (x @ low.mT, x @ dense.mT),
        (torch.bmm(low[pick], x.T.expand(3, -1, -1)), dense[pick] @ x.T),
        (low[1].float().sum(), dense[1].sum()),
        (low[1][3], dense[1][3]),
        (low[1:3].sum(), dense[1:3].sum()),
        (low.transpose(0, 1)[0], dense[:, 0]),
        (torch.einsum("eoi,ti->teo", low, x), torch.einsum("eoi,ti->teo", dense, x)),
    ]:
        torch.testing.assert_close(given, wanted)


class Chosen(nn.Module):
    """Two experts' products of every row, as "batched_mm" asks for them."""

    def __init__(self, experts):
        super().__init__()
        self.experts = experts

    def forward(self, x, pick):
        return torch.bmm(self.experts[pick], x.mT) + F.linear(x[:1], self.experts[1]).mT


def test_it_is_exported_in_one_graph(low):
    x, pick = torch.randn(2, 5, 16), torch.tensor([3, 0])
    expected = Chosen(low)(x, pick)
    program = torch.export.export(Chosen(low), (x, pick))
    torch.testing.assert_close(program.module()(x, pick), expected)
    shapes = [tuple(node.meta["val"].shape) for node in program.graph.nodes if "val" in node.meta]
    assert not any(shape[-2:] in ((8, 16), (16, 8)) for shape in shapes), "a dense weight is formed"


def test_a_fresh_model_draws_products_of_the_familys_size():
    dense = model_of(mixtral, initializer_range=0.05)
    fresh = tf.AutoModelForCausalLM.from_config(convert(dense, rank=8).config)
    for site in sites(fresh).values():
        assert math.isclose(float(dense_experts(site.held).detach().std()), 0.05, rel_tol=0.2)


def low_rank_class(base):
    """A model class whose experts are of low rank from the start."""

    class LowRank(base):
        def __init__(self, config):
            super().__init__(config)
            for site in sites(self).values():
                Experts().skeleton(site, Entry(5, "experts")).install(self)

        @classmethod
        def is_custom_code(cls):  # Transformers converts checkpoints of its own classes
            return False

    return LowRank


def qwen3_vl_moe(**kw):
    text = {**MOE, "head_dim": 8, "rope_parameters": {"rope_type": "default", "mrope_section": [2, 1, 1]}}
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 32}
    return tf.Qwen3VLMoeConfig(text_config=text, vision_config={**vision, "deepstack_visual_indexes": [0]}, **kw)


@pytest.mark.parametrize(
    ("base", "family"),
    [(tf.MixtralForCausalLM, mixtral), (tf.Qwen3VLMoeForConditionalGeneration, qwen3_vl_moe)],
)
def test_checkpoints_keep_the_names_and_shapes_of_factors(base, family, tmp_path):
    """Families merge, rename and transpose experts of checkpoints while they load: not factors."""
    small_class = low_rank_class(base)
    small = small_class(family()).eval()
    assert any("experts" in str(c.source_patterns) for c in get_model_conversion_mapping(small))
    for site in sites(small).values():
        nn.init.normal_(site.held.down, std=0.2)
        nn.init.normal_(site.held.up)
    small.save_pretrained(tmp_path, save_original_format=False)
    loaded, info = small_class.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[keys] for keys in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    for name, tensor in small.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name


def test_copies_and_pickles_are_their_own(low, tmp_path):
    torch.save(low, tmp_path / "experts.pt")
    for other in (copy.deepcopy(low), torch.load(tmp_path / "experts.pt", weights_only=False)):
        assert torch.equal(other[0].formed(), low[0].formed())
        with torch.no_grad():
            other.up.zero_()
    assert bool(low.up.any())


def test_a_single_expert_is_calibrated_by_its_own_name(tmp_path):
    torch.manual_seed(0)
    config = tf.MixtralConfig(**SIZES, num_local_experts=1, num_experts_per_tok=1)
    model = tf.MixtralForCausalLM(config).eval()
    ids = torch.randint(3, 99, (4, 16))
    small = convert(model, rank=4, calibration=[{"input_ids": ids}])
    assert {row.metric for row in report(small).layers} == {"fisher"}
    whole = nn.ModuleDict({"moe": model.model.layers[0].mlp})
    save(convert(whole, rank=4), tmp_path / "small")
