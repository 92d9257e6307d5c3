"""What must hold on a GPU. Without one the same tests run on the CPU, but those that ask for what only CUDA has."""

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM, StaticCache

import hf_reparam
from hf_reparam import LowRankConfig, calibrate, convert, make_plan, merge, refine, refit
from tests import zoo

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
needs_cuda = pytest.mark.skipif(DEVICE == "cpu", reason="needs CUDA")
pytestmark = [pytest.mark.cuda, pytest.mark.slow]


@pytest.fixture
def llama():
    model = zoo.BY_BASE["LlamaForCausalLM"].build()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2 and "embed" not in name:
                parameter *= 4  # with fresh weights every prediction is almost the same
    return model.to(DEVICE)


def data(count=10, rows=4):
    generator = torch.Generator().manual_seed(0)
    return [{"input_ids": torch.randint(3, 90, (rows, 9), generator=generator)} for _ in range(count)]


def ids():
    return data(1)[0]["input_ids"].to(DEVICE)


CONFIG = LowRankConfig(keep=0.5, min_rank=1)


@torch.no_grad()
def test_a_whole_flow_stays_on_the_device_and_equals_that_of_the_cpu(llama, tmp_path):
    calibration = calibrate(llama, data())
    small = convert(llama, CONFIG, calibration=calibration)
    assert {tensor.device.type for tensor in small.state_dict().values()} == {DEVICE}
    on_cpu = copy.deepcopy(llama).cpu()
    other = calibrate(on_cpu, data())
    name = "layers.1.mlp.down_proj"
    for sums in ("input_products", "gradient_products"):
        mine, theirs = (getattr(known.layers[name], sums) for known in (calibration, other))
        torch.testing.assert_close(mine, theirs, rtol=2e-3, atol=2e-3 * float(theirs.abs().max()))
    same = convert(on_cpu, make_plan(llama, CONFIG, calibration), calibration=calibration)
    torch.testing.assert_close(small(ids()).logits.cpu(), same(ids().cpu()).logits, rtol=1e-3, atol=1e-3)
    small.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, device_map=DEVICE)
    torch.testing.assert_close(again(ids()).logits, small(ids()).logits, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(merge(again)(ids()).logits, small(ids()).logits, rtol=1e-3, atol=1e-3)


@pytest.mark.usefixtures("one_rate")
def test_recovery_stays_on_the_device(llama):
    calibration = calibrate(llama, data())
    small = convert(llama, CONFIG, calibration=calibration)
    fitted = refit(small, llama, data(), calibration=calibration)
    assert fitted.after < fitted.before
    refined = refine(small, llama, data(), epochs=2)
    assert (len(refined.epochs), refined.after <= refined.before) == (2, True)
    assert {tensor.device.type for tensor in small.state_dict().values()} == {DEVICE}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("form", zoo.FORMS)
@torch.no_grad()
def test_every_dtype(llama, dtype, form):
    dense = llama.to(dtype)
    small = convert(dense, LowRankConfig(keep=0.9, min_rank=1, form=form), calibration=data())
    far = (small(ids()).logits.float() - dense(ids()).logits.float()).norm() / dense(ids()).logits.float().norm()
    assert small.dtype == dtype
    assert far < 0.5


@pytest.mark.parametrize("form", zoo.FORMS)
@torch.no_grad()
def test_compiled(llama, form):
    small = convert(llama, LowRankConfig(keep=0.5, min_rank=1, form=form))
    compiled = torch.compile(small, fullgraph=True, backend="inductor" if DEVICE == "cuda" else "aot_eager")
    torch.testing.assert_close(compiled(ids()).logits, small(ids()).logits, rtol=1e-4, atol=1e-4)


@needs_cuda
@pytest.mark.parametrize("rows", [1, 1024])
@torch.no_grad()
def test_a_layer_waits_for_nothing(rows):
    """Whether a pivoted layer puts its input or its weights in order."""
    small = convert(torch.nn.Linear(256, 256, device=DEVICE), LowRankConfig(rank=32, form="pivoted"))
    x = torch.randn(rows, 256, device=DEVICE)
    small(x)
    torch.cuda.set_sync_debug_mode("error")
    try:
        small(x)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@needs_cuda
@pytest.mark.parametrize("form", zoo.FORMS)
@torch.no_grad()
def test_cuda_graphs_with_a_static_cache(llama, form):
    small = convert(llama, LowRankConfig(keep=0.5, min_rank=1, form=form))
    step = torch.compile(small, mode="reduce-overhead", fullgraph=True)
    token, wanted = ids()[:1, :1], small(ids()[:1, :1]).logits
    for _ in range(3):  # the graph is captured, and played
        cache = StaticCache(small.config, max_cache_len=16)
        torch.compiler.cudagraph_mark_step_begin()
        found = step(token, past_key_values=cache, cache_position=torch.zeros(1, dtype=torch.long, device=DEVICE))
    torch.testing.assert_close(found.logits, wanted, rtol=1e-3, atol=1e-3)


@needs_cuda
def test_spread_over_the_gpu_and_the_cpu(llama, tmp_path):
    small = convert(llama, CONFIG, calibration=data())
    small.save_pretrained(tmp_path)
    half = {"model.embed_tokens": 0, "model.layers.0": 0, "model.layers.1": "cpu", "model.norm": 0, "lm_head": 0}
    spread = AutoModelForCausalLM.from_pretrained(tmp_path, device_map=half | {"model.rotary_emb": 0})
    torch.testing.assert_close(spread(ids()).logits, small(ids()).logits, rtol=1e-3, atol=1e-3)


@needs_cuda
def test_no_memory_is_left_behind(llama):
    before = torch.cuda.memory_allocated()
    small = convert(llama, CONFIG, calibration=data())
    held = sum(tensor.nbytes for tensor in {t.data_ptr(): t for t in small.state_dict().values()}.values())
    assert torch.cuda.memory_allocated() - before < 2 * held + (1 << 20)


def test_a_speedup_is_measured_on_the_device(llama, request):
    if DEVICE == "cpu":
        request.getfixturevalue("quick_clock")
    plan = make_plan(llama, LowRankConfig(speedup=1.01, min_rank=1, tokens=4096))
    speed = plan.report.speed
    assert (speed.device, speed.tokens, speed.asked) == (DEVICE, 4096, 1.01)
    assert plan.modules


@needs_cuda
@torch.no_grad()
def test_int8_by_torchao(llama):
    quantization = pytest.importorskip("torchao.quantization")
    small = convert(llama.to(torch.bfloat16), LowRankConfig(rank=16))
    wanted = small(ids()).logits
    quantization.quantize_(small, quantization.Int8WeightOnlyConfig())
    far = (small(ids()).logits - wanted).float().norm() / wanted.float().norm()
    assert far < 0.1
    assert hf_reparam.report(small).layers
