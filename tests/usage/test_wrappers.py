"""A Transformers model inside another object: converted, calibrated, saved and merged as if it stood alone."""

import copy
import json
import sys

import pytest
import torch
import transformers as tf
from torch import nn

import hf_reparam
from hf_reparam import LowRankConfig, calibrate, convert, make_plan, merge, refit
from hf_reparam.errors import TargetError, WeightError
from hf_reparam.layers.linear import LowRankLinear
from hf_reparam.model.host import called, hosts
from tests import zoo


def bert(name="BertModel"):
    return zoo.BY_BASE[name].build(initializer_range=0.15)


def text():
    return zoo.BY_BASE["BertModel"].batch()


class ValueHead(nn.Module):
    """As in reinforcement learning: a policy with one number more for each token."""

    def __init__(self, model, name="pretrained_model"):
        super().__init__()
        self.add_module(name, model)
        self.inner, self.v_head = name, nn.Linear(32, 1)

    def forward(self, **batch):
        outputs = getattr(self, self.inner)(**batch)
        return {"logits": self.v_head(outputs[0])}


class Published(ValueHead):
    """A wrapper with a way of saving of its own."""

    def __init__(self, model):
        super().__init__(model)
        self.projection = nn.Linear(32, 32)

    def save_pretrained(self, folder):
        torch.save(self.state_dict(), folder / "all.pt")


WRAPPERS = {
    "Sequential": (nn.Sequential, lambda w: w[0]),
    "ModuleList": (lambda m: nn.ModuleList([m]), lambda w: w[0]),
    "ModuleDict": (lambda m: nn.ModuleDict({"a": m}), lambda w: w["a"]),
    "DataParallel": (nn.DataParallel, lambda w: w.module),
    "compile": (lambda m: torch.compile(m, backend="eager"), lambda w: w._orig_mod),
    "compiled replicas": (lambda m: nn.DataParallel(torch.compile(m, backend="eager")), lambda w: w.module._orig_mod),
    "value head": (ValueHead, lambda w: w.pretrained_model),
    "policy": (lambda m: ValueHead(m, "policy"), lambda w: w.policy),
    "published": (Published, lambda w: w.pretrained_model),
    "deep": (lambda m: nn.ModuleList([nn.ModuleDict({"x": nn.Sequential(m)})]), lambda w: w[0]["x"][0]),
}
CALLED = [name for name in WRAPPERS if name not in ("value head", "policy", "published")]
# A model is found in every other object by the same walk over its modules.
wrappers = pytest.mark.parametrize("name", ["deep", "compile", "compiled replicas", "value head", "published"])
called_wrappers = pytest.mark.parametrize("name", ["Sequential", "deep", "compiled replicas"])


def equal(model, other, batch=None):
    return all(map(torch.equal, zoo.outputs(model, batch or text()), zoo.outputs(other, batch or text())))


def near(model, other, batch=None):
    for a, b in zip(zoo.outputs(model, batch or text()), zoo.outputs(other, batch or text()), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)
    return True


def low_rank(model):
    return {name for name, module in model.named_modules() if isinstance(module, LowRankLinear)}


@pytest.mark.slow
@pytest.mark.parametrize("inplace", [False, True])
@wrappers
def test_a_model_in_a_wrapper_saves_and_loads(name, inplace, tmp_path):
    wrap, inner = WRAPPERS[name]
    model = wrap(bert())
    before = copy.deepcopy(inner(model))
    wrapped = convert(model, rank=4, inplace=inplace)
    small = inner(wrapped)
    assert (wrapped is model) == inplace
    assert type(wrapped) is type(model)
    assert type(small).__name__ == "ReparamBertModel"
    assert low_rank(small) == set(small.config.reparam["modules"])  # relative to the model itself
    small.save_pretrained(tmp_path / "small")
    again = tf.AutoModel.from_pretrained(tmp_path / "small")
    assert type(again) is type(small)
    assert equal(again, small)
    assert not near_equal(again, before)
    if not inplace:
        assert type(inner(model)) is tf.BertModel
        assert equal(inner(model), before)


def near_equal(model, other):
    return all(map(torch.allclose, zoo.outputs(model, text()), zoo.outputs(other, text())))


@pytest.mark.slow
@pytest.mark.parametrize("inplace", [False, True])
@wrappers
def test_a_model_in_a_wrapper_is_merged(name, inplace, tmp_path):
    wrap, inner = WRAPPERS[name]
    wrapped = wrap(convert(bert(), rank=4))  # put into the object after it was converted
    small = copy.deepcopy(inner(wrapped))
    dense = inner(merge(wrapped, inplace=inplace))
    assert type(dense) is tf.BertModel
    assert type(dense.config) is tf.BertConfig
    assert not hasattr(dense.config, "reparam")
    dense.save_pretrained(tmp_path)
    again = tf.BertModel.from_pretrained(tmp_path)
    assert equal(again, dense)
    assert near(again, small)


@pytest.mark.slow
@wrappers
def test_converting_again(name, tmp_path):
    wrap, inner = WRAPPERS[name]
    small = inner(convert(convert(wrap(bert()), rank=6), rank=3))
    assert {entry["rank"] for entry in small.config.reparam["modules"].values()} == {3}
    small.save_pretrained(tmp_path)
    assert equal(tf.AutoModel.from_pretrained(tmp_path), small)


def batches():
    return [{"input_ids": zoo._ids(seed=seed)} for seed in range(4)]


@pytest.mark.parametrize("name", WRAPPERS)
def test_what_is_called(name):
    """The model itself in what cannot be called with a batch, and an object with a `forward` of its own."""
    wrap, inner = WRAPPERS[name]
    model = bert()
    wrapped = wrap(model)
    assert inner(wrapped) is model
    assert list(hosts(wrapped).values()) == [model]
    assert called(wrapped) is (model if name in CALLED else wrapped)


@pytest.mark.slow
@called_wrappers
def test_calibration_through_a_wrapper(name):
    wrap, inner = WRAPPERS[name]
    joint = name == "Sequential"
    alone, model = bert("BertForMaskedLM"), wrap(bert("BertForMaskedLM"))
    path = next(n for n, m in model.named_modules() if m is inner(model))
    expected, moments = calibrate(alone, batches()), calibrate(model, batches())
    assert list(moments.layers) == [f"{path}.{layer}" for layer in expected.layers]  # one rule for names
    for layer, known in expected.layers.items():
        torch.testing.assert_close(moments.layers[f"{path}.{layer}"].input_products, known.input_products)
    plan, known = (
        make_plan(m, LowRankConfig(keep=0.6, heads=joint), calibration=c)
        for m, c in ((model, moments), (alone, expected))
    )
    assert {n.removeprefix(f"{path}."): entry for n, entry in plan.modules.items()} == known.modules
    small = inner(convert(model, plan, calibration=moments))
    assert equal(small, convert(alone, known, calibration=expected))
    direct = inner(convert(model, LowRankConfig(keep=0.6, heads=joint), calibration=batches()))
    assert direct.config.reparam == small.config.reparam  # the record with errors and tokens, too
    assert direct.config.reparam["metric"] == "fisher"
    assert direct.config.reparam["record"]["errors"].keys() >= direct.config.reparam["modules"].keys()


@pytest.mark.slow
def test_calibration_of_a_wrapper_that_is_called_itself():
    model = ValueHead(bert())
    small = convert(model, keep=0.5, calibration=batches())
    assert small.pretrained_model.config.reparam["record"]["calibration_tokens"] == 4 * 14
    seen = []
    calibrate(model, batches(), loss_fn=lambda m, b: seen.append(m) or m(**b)["logits"].square().sum())
    assert {type(m) for m in seen} == {ValueHead}  # a loss of one's own gets the object that was given, as a copy
    assert model not in seen


@pytest.mark.slow
@called_wrappers
def test_refit_through_a_wrapper(name):
    wrap, inner = WRAPPERS[name]
    model = wrap(bert())
    small = convert(model, rank=6)
    report = refit(small, model, batches())
    assert report.layers
    assert report.after < report.before
    assert inner(small).config.reparam["record"]["refitted_layers"] == len(report.layers)


@pytest.mark.slow
@wrappers
def test_summaries_and_protected_layers(name):
    wrap, inner = WRAPPERS[name]
    model = wrap(bert("BertForMaskedLM"))
    alone = hf_reparam.report(bert("BertForMaskedLM"))
    assert not [row.name for row in hf_reparam.report(model).layers if "decoder" in row.name]  # output embeddings
    small = convert(model, rank=4)
    report = hf_reparam.report(small)
    found = hf_reparam.report(small)
    assert len(found.layers) == len(low_rank(small)) == len(report.layers)
    assert sum(row.parameters_before for row in found.layers) <= sum(row.parameters_before for row in alone.layers)
    moments = calibrate(inner(model), batches())
    calibrated = convert(inner(model), rank=4, calibration=moments)
    assert hf_reparam.report(wrap(calibrated)).metric == "fisher"


@pytest.mark.slow
def test_two_models_have_plans_of_their_own(tmp_path):
    pair = nn.ModuleDict({"query": bert(), "image": zoo.BY_BASE["ViTForImageClassification"].build()})
    small = convert(pair, LowRankConfig(rank=4, target_modules="query.*"))
    assert type(small["query"]).__name__ == "ReparamBertModel"
    assert type(small["image"]) is tf.ViTForImageClassification
    both = convert(small, LowRankConfig(rank={"image.*": 5}, allow_larger=True))
    assert type(both["image"]).__name__ == "ReparamViTForImageClassification"
    assert {e["rank"] for e in both["query"].config.reparam["modules"].values()} == {4}
    for name, batch in (("query", text()), ("image", zoo.BY_BASE["ViTForImageClassification"].batch())):
        both[name].save_pretrained(tmp_path / name)
        again = type(both[name]).from_pretrained(tmp_path / name)
        assert equal(again, both[name], batch)
    with pytest.raises(TargetError, match=r"2 Transformers models, \['image', 'query'\]"):
        calibrate(pair, batches())


@pytest.mark.slow
def test_embeddings_in_a_wrapper(tmp_path):
    model = nn.Sequential(bert("BertForMaskedLM"))
    small = convert(model, LowRankConfig(keep=0.5, embeddings=True, allocation="uniform"), calibration=batches())
    assert small[0].config.reparam["modules"]["embeddings.word_embeddings"]["form"] == "table"
    small[0].save_pretrained(tmp_path)
    assert equal(tf.AutoModelForMaskedLM.from_pretrained(tmp_path), small[0])
    assert near(merge(small)[0], small[0])


@pytest.mark.slow
def test_saving_the_wrapper_itself(tmp_path):
    small = convert(ValueHead(bert()), rank=4)
    hf_reparam.save(small, tmp_path / "all")
    again = hf_reparam.load(ValueHead(bert()), tmp_path / "all").eval()
    assert torch.equal(again(**text())["logits"], small(**text())["logits"])
    again.pretrained_model.save_pretrained(tmp_path / "inner")
    assert equal(tf.AutoModel.from_pretrained(tmp_path / "inner"), small.pretrained_model)


@pytest.mark.slow
def test_attentions_of_torch_inside_a_model_stay_whole(tmp_path):
    """The class of the model builds them so again."""
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    model = tf.SiglipVisionModel(tf.SiglipVisionConfig(**shape, image_size=16, patch_size=8)).eval()
    assert any(isinstance(m, nn.MultiheadAttention) for m in model.modules())
    mixed = nn.ModuleList([model, nn.TransformerEncoderLayer(32, 4)])
    small = convert(mixed, rank=4)
    assert any(name.startswith("1.self_attn") for name in low_rank(small))
    small[0].save_pretrained(tmp_path)
    batch = zoo.BY_BASE["ViTForImageClassification"].batch()
    assert equal(tf.AutoModel.from_pretrained(tmp_path), small[0], batch)


@pytest.mark.slow
def test_what_a_wrapper_saves_by_itself_stays_dense():
    small = convert(Published(bert()), rank=4)
    report = hf_reparam.report(small)
    assert type(small.projection) is nn.Linear
    assert {row.reason for row in report.skipped if row.name == "projection"} == {
        "Published saves it by itself, as a dense layer"
    }
    mine = ValueHead(bert())
    mine.projection = nn.Linear(32, 32)
    assert isinstance(convert(mine, rank=4).projection, LowRankLinear)


@pytest.mark.slow
def test_a_compiled_model_runs_what_it_holds_now():
    model = torch.compile(tf.BertModel(tf.BertConfig(**{**zoo.BERT_LIKE, "num_hidden_layers": 1})), backend="eager")
    model.eval()
    before = model(**text())[0]
    convert(model, rank=2, inplace=True)
    after = model(**text())[0]
    assert torch.equal(after, model._orig_mod(**text())[0])
    assert not torch.allclose(after, before, atol=1e-3)


@pytest.mark.slow
def test_state_dicts_without_a_plan_fail_loudly(tmp_path):
    """Whoever writes the tensors of a low-rank layer without its plan: loading them as dense raises."""
    small = convert(bert("BertForMaskedLM"), rank=4)
    for saved, dense in ((ValueHead(small), ValueHead(bert("BertForMaskedLM"))), (small.bert, bert())):
        with pytest.raises(RuntimeError, match="size mismatch"):
            dense.load_state_dict(saved.state_dict(), strict=False)
    small.bert.save_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match="mismatch"):
        tf.BertModel.from_pretrained(tmp_path)
    again = ValueHead(copy.deepcopy(small))
    with torch.no_grad():
        for parameter in again.parameters():
            parameter.zero_()
    assert not any(again.load_state_dict(ValueHead(small).state_dict(), strict=False)[0])
    assert equal(again.pretrained_model, small)
    assert set(small.state_dict()) == {*dict(small.named_parameters(remove_duplicate=False)), *buffers(small)}


def buffers(model):
    owners = dict(model.named_modules())
    return {
        name
        for name, _ in model.named_buffers()
        if name.rpartition(".")[2] not in owners[name.rpartition(".")[0]]._non_persistent_buffers_set
    }


@pytest.fixture
def process_group(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.slow
@pytest.mark.usefixtures("process_group")
def test_distributed_data_parallel(tmp_path):
    model = nn.parallel.DistributedDataParallel(bert())
    small = convert(model, keep=0.5, calibration=batches())
    small.module.save_pretrained(tmp_path / "small")
    assert equal(tf.AutoModel.from_pretrained(tmp_path / "small"), small.module)
    small(**text())[0].sum().backward()  # the copy has a reducer for its own parameters
    assert all(p.grad is not None for n, p in small.module.named_parameters() if "pooler" not in n)
    with pytest.raises(TargetError, match="model.module in place and wrap it anew"):
        convert(model, rank=4, inplace=True)
    with pytest.raises(TargetError, match="model.module in place and wrap it anew"):
        merge(small, inplace=True)
    assert type(merge(small).module) is tf.BertModel


@pytest.mark.usefixtures("process_group")
def test_flat_tensors_are_refused():
    from torch.distributed.fsdp import FullyShardedDataParallel

    model = FullyShardedDataParallel(bert(), device_id=torch.device("cpu"))
    for work in (lambda: convert(model, rank=4), lambda: calibrate(model, batches()), lambda: merge(model)):
        with pytest.raises(TargetError, match="FullyShardedDataParallel, which holds weights in flat tensors"):
            work()


def test_a_wrapper_inside_a_model_is_refused():
    """Its names would be stored, and no class builds it again."""
    for wrap in (nn.DataParallel, lambda m: torch.compile(m, backend="eager")):
        model = bert()
        model.encoder.layer[1] = wrap(model.encoder.layer[1])
        with pytest.raises(TargetError, match=r"0.encoder.layer.1 is wrapped by .* unwrap it first"):
            convert(nn.Sequential(model), rank=4)


@pytest.mark.slow
def test_what_cannot_be_copied_is_told_before_the_work(monkeypatch):
    class Keeps(tf.BertModel):
        def forward(self, *args, **kwargs):
            self.last = super().forward(*args, **kwargs)
            return self.last

    def never(*args, **kwargs):
        raise AssertionError("work was done")

    model = Keeps(zoo.bert()).eval()
    model(**text())
    monkeypatch.setattr(sys.modules["hf_reparam.compress.convert"], "apply", never)
    for given in (model, nn.Sequential(model)):
        with pytest.raises(TargetError, match="cannot be copied: use inplace=True"):
            convert(given, rank=4)
    monkeypatch.undo()
    assert low_rank(convert(model, rank=4, inplace=True))
    model(**text())
    monkeypatch.setattr(sys.modules["hf_reparam.compress.merge"], "build", never)
    with pytest.raises(TargetError, match="cannot be copied: use inplace=True"):
        merge(model)


def test_a_model_that_is_one_layer():
    layer = nn.Linear(32, 32)
    assert isinstance(convert(layer, rank=4), LowRankLinear)
    with pytest.raises(TargetError, match="itself one dense layer"):
        convert(layer, rank=4, inplace=True)
    assert isinstance(convert(layer, keep=0.75), LowRankLinear)
    with pytest.raises(TargetError, match=r"put it in nn.Sequential\(layer\)"):
        make_plan(layer, keep=0.5)
    with pytest.raises(TargetError, match="itself one low-rank layer"):
        merge(convert(layer, rank=4), inplace=True)


@pytest.mark.slow
@pytest.mark.parametrize(("size", "data"), [({"rank": 4}, None), ({"keep": 0.5}, None), ({"keep": 0.5}, True)])
def test_patterns_from_a_generator(size, data):
    names = ["*.query", "*.key"]
    patterns = {"target_modules": (n for n in names), "exclude_modules": (n for n in ["encoder.layer.1.*"])}
    small = convert(bert(), LowRankConfig(**size, **patterns), calibration=batches() if data else None)
    assert low_rank(small) == {f"encoder.layer.0.attention.self.{part}" for part in ("query", "key")}
    plan = make_plan(bert(), LowRankConfig(keep=0.5, target_modules=iter(names)))
    assert len(plan.modules) == 4
    assert len(calibrate(bert(), batches(), target_modules=iter(names)).layers) == 4


class Held:
    """As a pipeline or a Trainer: the model is one attribute of it."""

    def __init__(self):
        self.model = bert()


GIVEN = [
    ("bert-base-uncased", r"AutoModel.from_pretrained\('bert-base-uncased'\)"),
    (None, "got NoneType: give what AutoModel.from_pretrained"),
    (tf.BertModel, r"BertModel.from_pretrained\(...\)"),
    (Held(), "the `.model` of the Held"),
    ({"a": 1}, "got dict"),
]


@pytest.mark.parametrize(("given", "message"), GIVEN, ids=lambda value: str(value)[:20])
def test_what_is_no_model(given, message, tmp_path):
    works = [
        lambda: convert(given, rank=4),
        lambda: merge(given),
        lambda: calibrate(given, batches()),
        lambda: make_plan(given, keep=0.5),
        lambda: hf_reparam.report(given),
        lambda: hf_reparam.search_plan(given, lambda model: 0.0, 0.1),
        lambda: refit(given, bert(), batches()),
        lambda: refit(convert(bert(), rank=4), given, batches()),
        lambda: hf_reparam.save(given, tmp_path / "x"),
        lambda: hf_reparam.load(given, tmp_path / "x"),
    ]
    for work in works:
        with pytest.raises(TargetError, match=message):
            work()


# adapters


def lora(**options):
    from peft import LoraConfig

    return LoraConfig(r=2, target_modules=["query", "value"], init_lora_weights=False, **options)


def peft_model(config, base="BertForSequenceClassification"):
    from peft import get_peft_model

    return get_peft_model(bert(base), config).eval()


def with_adapter():
    """What `model.add_adapter(config)` of Transformers does."""
    from peft import inject_adapter_in_model

    model = inject_adapter_in_model(lora(), bert("BertForSequenceClassification"))
    model._hf_peft_config_loaded = True
    return model


def other_adapters(kind):
    import peft

    if kind == "prompts":
        return peft_model(peft.PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=2))
    return peft_model(peft.IA3Config(target_modules=["query", "output.dense"], feedforward_modules=["output.dense"]))


ADAPTERS = {
    "LoRA": lambda: peft_model(lora()),
    "LoRA inside": lambda: peft_model(lora()).get_base_model(),
    "modules to save": lambda: peft_model(lora(modules_to_save=["classifier"], task_type="SEQ_CLS")),
    "IA3": lambda: other_adapters("ia3"),
    "prompts": lambda: other_adapters("prompts"),
    "add_adapter": with_adapter,
    "in a wrapper": lambda: nn.ModuleDict({"policy": peft_model(lora())}),
    "in replicas": lambda: nn.DataParallel(peft_model(lora()).get_base_model()),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", ADAPTERS)
def test_adapters_are_refused_by_name(name):
    model = ADAPTERS[name]()
    works = (
        lambda: convert(model, rank=4),
        lambda: convert(model, rank=4, inplace=True),
        lambda: calibrate(model, batches()),
        lambda: make_plan(model, keep=0.5),
        lambda: refit(model, model, batches()),
    )
    for work in works:
        with pytest.raises(TargetError, match=r"adapter that is not merged.*merge_and_unload\(\)"):
            work()


@pytest.mark.slow
def test_merged_adapters_are_welcome(tmp_path):
    model = peft_model(lora()).merge_and_unload()
    small = convert(model, rank=4)
    small.save_pretrained(tmp_path)
    assert equal(tf.AutoModelForSequenceClassification.from_pretrained(tmp_path), small)


# quantized weights


def bits(dtype):
    def quantize(model):
        dense = model.encoder.layer[1].output.dense
        dense.weight = nn.Parameter(dense.weight.detach().to(dtype), requires_grad=False)

    return quantize


def packed(model):
    dense = model.encoder.layer[0].output.dense
    del dense.weight
    dense.register_buffer("qweight", torch.zeros(4, 32, dtype=torch.int32))


def by_torchao(model):
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    quantize_(model, Int8WeightOnlyConfig())


def by_bitsandbytes(model):
    import bitsandbytes

    model.encoder.layer[0].output.dense = bitsandbytes.nn.Linear8bitLt(48, 32, has_fp16_weights=False)


def by_torch(model):
    torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, inplace=True)


def by_quantizer(model):
    model.hf_quantizer = object()


QUANTIZERS = {
    "int8": bits(torch.int8),
    "uint8": bits(torch.uint8),
    "float8": bits(torch.float8_e4m3fn),
    "packed": packed,
    "torchao": by_torchao,
    "bitsandbytes": by_bitsandbytes,
    "torch": by_torch,
    "quantizer": by_quantizer,
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("wrap", [lambda m: m, nn.Sequential, ValueHead], ids=["itself", "Sequential", "value head"])
@pytest.mark.parametrize("name", QUANTIZERS)
def test_quantized_weights_are_refused(name, wrap):
    model = bert()
    QUANTIZERS[name](model)
    with pytest.raises(WeightError, match="BertModel is quantized"):
        convert(wrap(model), rank=4)


@pytest.mark.slow
@pytest.mark.parametrize("inplace", [False, True])
def test_an_entry_that_is_left_over_is_dropped(tmp_path, inplace):
    """The weights decide: a model that was dequantized, or read without its quantizer, is a dense one."""
    model = bert().to(torch.bfloat16)
    model.config.quantization_config = {"quant_method": "fp8"}
    small = convert(model, rank=4, inplace=inplace)
    small.save_pretrained(tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    assert equal(tf.AutoModel.from_pretrained(tmp_path), small)
    assert not hasattr(merge(small).config, "quantization_config")
    assert hasattr(model.config, "quantization_config") != inplace


# sentence-transformers


@pytest.fixture(scope="module")
def sentences(tmp_path_factory):
    """A folder of a tiny BERT with a tokenizer."""
    pytest.importorskip("sentence_transformers")
    from tokenizers import Tokenizer, models, pre_tokenizers

    folder = tmp_path_factory.mktemp("bert")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghijklmnopqrstuvwxyz"]
    core = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    tf.PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="[PAD]", unk_token="[UNK]", model_max_length=32
    ).save_pretrained(folder)
    one = zoo.BY_BASE["BertForSequenceClassification"]
    tf.BertForSequenceClassification(one.config(num_labels=1)).save_pretrained(folder / "classifier")
    for file in folder.glob("*.json"):
        (folder / "classifier" / file.name).write_bytes(file.read_bytes())
    bert().save_pretrained(folder)
    return folder


TEXTS = ["a b c", "x y z z z", "q", "m n o p q r s t"] * 3


def embedder(folder, *, dense=False):
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.base.modules import Dense
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer

    first = Transformer(str(folder))
    modules = [first, Pooling(32, "mean"), *([Dense(32, 32)] if dense else [])]
    return SentenceTransformer(modules=modules, device="cpu")


@pytest.mark.slow
@pytest.mark.parametrize("size", [{"rank": 4}, {"keep": 0.5, "calibration": TEXTS}], ids=["rank", "calibrated"])
@pytest.mark.parametrize("inplace", [False, True])
def test_sentence_transformer(sentences, tmp_path, size, inplace):
    from sentence_transformers import SentenceTransformer

    st = embedder(sentences, dense=True)
    before = st.encode(TEXTS)
    small = convert(st, **size, inplace=inplace)
    report = hf_reparam.report(small)
    assert type(small) is SentenceTransformer
    assert type(small[0].auto_model).__name__ == "ReparamBertModel"
    assert type(small[2].linear) is nn.Linear  # it is saved by sentence-transformers, which knows no factors
    assert all(row.name.startswith("0.") for row in report.layers)
    assert not (small.encode(TEXTS) == before).all()
    small.save(str(tmp_path / "small"))
    again = SentenceTransformer(str(tmp_path / "small"), device="cpu")
    assert (again.encode(TEXTS) == small.encode(TEXTS)).all()
    alone = tf.AutoModel.from_pretrained(tmp_path / "small")
    assert equal(alone, small[0].auto_model)
    if not inplace:
        assert (st.encode(TEXTS) == before).all()
    dense = merge(again)
    dense.save(str(tmp_path / "dense"))
    plain = SentenceTransformer(str(tmp_path / "dense"), device="cpu")
    assert type(plain[0].auto_model) is tf.BertModel
    assert plain.encode(TEXTS) == pytest.approx(small.encode(TEXTS), abs=1e-5)


@pytest.mark.slow
def test_cross_encoder(sentences, tmp_path):
    from sentence_transformers import CrossEncoder

    ranker = CrossEncoder(str(sentences / "classifier"), num_labels=1, device="cpu")
    pairs = [("a b", "c d"), ("x", "y z")]
    for size in ({"rank": 4}, {"keep": 0.5, "calibration": TEXTS}):
        small = convert(ranker, **size)
        assert type(small) is CrossEncoder
        small.save_pretrained(str(tmp_path / "small"))
        again = CrossEncoder(str(tmp_path / "small"), device="cpu")
        assert (again.predict(pairs) == small.predict(pairs)).all()
        assert (small.predict(pairs) != ranker.predict(pairs)).any()
    merged = merge(again)
    assert merged.predict(pairs) == pytest.approx(small.predict(pairs), abs=1e-5)


@pytest.mark.slow
def test_sentence_transformer_with_an_adapter(sentences):
    from peft import inject_adapter_in_model

    st = embedder(sentences)
    inject_adapter_in_model(lora(), st[0].auto_model)
    with pytest.raises(TargetError, match="adapter that is not merged"):
        convert(st, rank=4)


@pytest.mark.slow
def test_a_model_compiled_in_place_is_watched():
    model = bert("BertForSequenceClassification")
    batches = [{"input_ids": text()["input_ids"].roll(i, 1)} for i in range(6)]
    expected = calibrate(model, batches)
    model.compile(backend="eager")
    dense = model(**batches[0]).logits
    found = calibrate(model, batches)
    assert found.tokens == expected.tokens > 0
    small = convert(model, LowRankConfig(keep=0.5, min_rank=2), calibration=found)
    low = small(**batches[0]).logits
    assert not torch.equal(low, dense)
    torch.testing.assert_close(merge(small)(**batches[0]).logits, low, rtol=0, atol=1e-5)
