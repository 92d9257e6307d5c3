"""What people load and save with converted models: parts, heads, dense folders, classes of their own, inner models."""

import copy
import json
import pickle

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import hf_reparam
from hf_reparam import LowRankConfig, convert, merge, merge_folder
from hf_reparam.errors import CheckpointError, TargetError
from hf_reparam.layers.linear import LowRankLinear
from tests import zoo

TOWER = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
TEXT = {**TOWER, "vocab_size": 99, "max_position_embeddings": 32, "bos_token_id": 1, "eos_token_id": 2}
VISION = {**TOWER, "image_size": 16, "patch_size": 8, "projection_dim": 16}
PIXELS = {"pixel_values": torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(3))}
IDS = {"input_ids": torch.tensor([[3, 7, 9, 11, 2], [5, 4, 8, 6, 2]])}


def composite(family):
    config = getattr(tf, f"{family}Config")(text_config=TEXT, vision_config=VISION, projection_dim=16)
    torch.manual_seed(0)
    return getattr(tf, f"{family}Model")(config).eval()


def llava():
    text = tf.LlamaConfig(**{**TEXT, "num_key_value_heads": 2})
    config = tf.LlavaConfig(vision_config=tf.CLIPVisionConfig(**VISION), text_config=text, image_token_index=98)
    torch.manual_seed(0)
    return tf.LlavaForConditionalGeneration(config).eval()


def mixtral():
    torch.manual_seed(0)
    return tf.MixtralForCausalLM(tf.MixtralConfig(**zoo.LLAMA_LIKE, num_local_experts=2, num_experts_per_tok=1)).eval()


def low_rank(model):
    return [name for name, module in model.named_modules() if isinstance(module, LowRankLinear)]


def same(left, right):
    return left.keys() == right.keys() and all(torch.equal(value, right[name]) for name, value in left.items())


# a part of a converted whole


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "part", "where", "batch"),
    [
        ("CLIP", "CLIPVisionModel", "vision_model", PIXELS),
        ("CLIP", "CLIPTextModel", "text_model", IDS),
        ("Siglip", "SiglipVisionModel", "vision_model", PIXELS),
        ("ChineseCLIP", "ChineseCLIPVisionModel", "vision_model", PIXELS),
    ],
)
@pytest.mark.parametrize("form", zoo.FORMS)
def test_a_tower_is_loaded_from_a_folder_of_the_whole(tmp_path, family, part, where, batch, form):
    small = convert(composite(family), LowRankConfig(rank=6, form=form))
    small.save_pretrained(tmp_path / "whole")
    kind = getattr(hf_reparam, f"Reparam{part}")
    tower, info = kind.from_pretrained(tmp_path / "whole", output_loading_info=True)
    assert not info["missing_keys"]
    assert len(low_rank(tower)) == len(low_rank(small.get_submodule(where))) > 0
    assert same(tower.state_dict(), {k: v for k, v in small.get_submodule(where).state_dict().items() if v.numel()})
    expected = zoo.outputs(small.get_submodule(where), batch)
    tower.save_pretrained(tmp_path / "tower")
    for each in (tower, kind.from_pretrained(tmp_path / "tower"), merge(tower)):
        torch.testing.assert_close(zoo.outputs(each, batch)[0], expected[0], atol=1e-5, rtol=1e-4)
    assert set(tower.config.reparam["modules"]) == set(low_rank(tower))  # names as they are here


@pytest.mark.slow
def test_a_tower_with_its_projection_is_loaded_from_a_folder_of_the_whole(tmp_path):
    small = convert(composite("CLIP"), LowRankConfig(rank=6, target_modules="*"))
    small.save_pretrained(tmp_path)
    tower, info = hf_reparam.ReparamCLIPVisionModelWithProjection.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert isinstance(tower.visual_projection, LowRankLinear)
    with torch.no_grad():
        expected = small.get_image_features(**PIXELS)
        torch.testing.assert_close(tower(**PIXELS).image_embeds, getattr(expected, "pooler_output", expected))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("build", "part"),
    [
        (lambda: composite("Blip"), "BlipVisionModel"),
        (llava, "CLIPVisionModel"),
        (llava, "LlamaForCausalLM"),
        (lambda: tf.LlamaForQuestionAnswering(tf.LlamaConfig(**zoo.LLAMA_LIKE)), "LlamaModel"),
    ],
)
def test_a_part_that_the_stock_class_would_draw_at_random_is_an_error(tmp_path, build, part):
    dense = build()
    dense.save_pretrained(tmp_path / "dense")
    _, info = getattr(tf, part).from_pretrained(tmp_path / "dense", output_loading_info=True)
    assert info["missing_keys"]  # so it is with dense models, with a warning alone
    convert(dense, rank=6).save_pretrained(tmp_path / "small")
    with pytest.raises(CheckpointError, match="would leave random layers"):
        getattr(hf_reparam, f"Reparam{part}").from_pretrained(tmp_path / "small")


@pytest.mark.slow
def test_a_language_model_inside_loads_as_the_base_of_its_head(tmp_path):
    small = convert(llava(), rank=6)
    small.save_pretrained(tmp_path)
    model, info = hf_reparam.ReparamLlavaModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert same(model.state_dict(), {k: v for k, v in small.model.state_dict().items() if v.numel()})


# a dense folder that the stock class wrote


@pytest.mark.parametrize(
    "build",
    [
        lambda: tf.ViTModel(zoo.vit()),
        lambda: tf.GPTNeoXForCausalLM(tf.GPTNeoXConfig(**zoo.BERT_LIKE)),
        lambda: tf.DeiTModel(tf.DeiTConfig(**VISION)),
        mixtral,
        llava,
    ],
)
def test_a_dense_folder_loads_into_the_derived_class(tmp_path, build):
    dense = build()
    dense.save_pretrained(tmp_path)
    model, info = getattr(hf_reparam, f"Reparam{type(dense).__name__}").from_pretrained(
        tmp_path, output_loading_info=True
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert same(model.state_dict(), dense.state_dict())


# a merged folder has the names of the dense one


def names_in(folder):
    return {name for file in folder.glob("*.safetensors") for name in load_file(file)}


@pytest.mark.slow
@pytest.mark.parametrize(
    "build", [mixtral, llava, lambda: composite("CLIP"), lambda: tf.ViTForImageClassification(zoo.vit())]
)
def test_a_merged_folder_has_the_names_that_the_stock_class_saves(tmp_path, build):
    dense = build()
    dense.save_pretrained(tmp_path / "dense")
    small = convert(dense, rank=4)
    small.save_pretrained(tmp_path / "small")
    merge(small).save_pretrained(tmp_path / "memory")
    merge_folder(tmp_path / "small", tmp_path / "streamed", stream=True)
    merge_folder(tmp_path / "small", tmp_path / "loaded", stream=False)
    for place in ("memory", "streamed", "loaded"):
        assert names_in(tmp_path / place) == names_in(tmp_path / "dense"), place
        again, info = type(dense).from_pretrained(tmp_path / place, output_loading_info=True)
        assert not info["missing_keys"]
        assert same(again.state_dict(), merge(small).state_dict())


# the order of pivots


def pivoted():
    torch.manual_seed(0)
    return convert(
        nn.Sequential(nn.Linear(298, 64), nn.ReLU(), nn.Linear(64, 64)), LowRankConfig(rank=8, form="pivoted")
    )


CASTS = {
    "bfloat16": lambda v: v.bfloat16(),
    "float": lambda v: v.float(),
    "through bfloat16": lambda v: v.bfloat16().to(v.dtype),
    "average with another": lambda v: (v + v.roll(1)) // 2 if v.dtype == torch.int64 else v,
    "out of range": lambda v: v + 1 if v.dtype == torch.int64 else v,
}


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("cast", CASTS.values(), ids=CASTS)
def test_a_state_dict_that_was_cast_or_averaged_is_refused(cast, assign):
    state = {name: cast(value) for name, value in pivoted().state_dict().items()}
    with pytest.raises(CheckpointError, match=r"^0\.order .*(int64|permutation)"):
        pivoted().load_state_dict(state, assign=assign)
    spec = pivoted()[0].entry
    with torch.device("meta"):
        empty = hf_reparam.layers.surgery.low_rank_like(nn.Linear(298, 64), spec)
    mine = {name.removeprefix("0."): value for name, value in state.items() if name[0] == "0"}
    with pytest.raises(CheckpointError, match=r"^order "):
        empty.load_state_dict(mine, assign=True)


def test_a_state_dict_as_it_was_saved_is_taken():
    net, state = pivoted(), pivoted().state_dict()
    net.load_state_dict({k: v.bfloat16() if v.is_floating_point() else v for k, v in state.items()})
    assert torch.equal(net[0].order, state["0.order"])
    for cast in (net.to(torch.bfloat16), net.half(), net.float(), net.double()):
        assert cast[0].order.dtype == torch.int64


@pytest.mark.parametrize("average", [None, get_ema_multi_avg_fn(0.999)])
def test_averages_with_buffers_keep_the_order(average):
    net, x = pivoted(), torch.randn(4, 298)
    averaged = AveragedModel(net, multi_avg_fn=average, use_buffers=True)
    for _ in range(3):
        averaged.update_parameters(net)
    assert torch.equal(averaged.module[0].order, net[0].order)
    torch.testing.assert_close(averaged(x), net(x))


# inner models saved alone


@pytest.mark.slow
@pytest.mark.parametrize(
    ("base", "path"),
    [
        ("BertForMaskedLM", "bert"),
        ("GPT2LMHeadModel", "transformer"),
        ("BartForConditionalGeneration", "model"),
        ("BartForConditionalGeneration", "model.encoder"),
        ("BartForConditionalGeneration", "model.decoder"),
        ("T5ForConditionalGeneration", "encoder"),
    ],
)
@pytest.mark.parametrize("loaded", [False, True])
def test_an_inner_model_saved_alone_never_loads_at_random(tmp_path, base, path, loaded):
    small = convert(zoo.BY_BASE[base].build(), rank=6)
    if loaded:
        small.save_pretrained(tmp_path / "whole")
        small = type(small).from_pretrained(tmp_path / "whole")
    inner = small.get_submodule(path)
    inner.save_pretrained(tmp_path / "inner")
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        type(inner).from_pretrained(tmp_path / "inner")
    if path in ("bert", "transformer", "model"):
        again = tf.AutoModel.from_pretrained(tmp_path / "inner")
        numbers = again.state_dict()
        assert all(torch.equal(v, numbers[k]) for k, v in inner.state_dict().items() if v.numel())
        assert low_rank(again) == low_rank(inner)


def test_a_tower_inside_a_converted_whole_saved_alone_is_refused_by_the_stock_class(tmp_path):
    small = convert(composite("CLIP"), rank=6)
    small.vision_model.save_pretrained(tmp_path)
    for kind in (tf.CLIPVisionModel, tf.AutoModel):
        with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
            kind.from_pretrained(tmp_path)


def test_state_dicts_of_the_whole_and_of_merged_parts_have_no_markers():
    small = convert(zoo.BY_BASE["BertForMaskedLM"].build(), rank=6)
    assert all(value.numel() for value in small.state_dict().values())
    for other in (small.bert, nn.Sequential(small)):  # what may know nothing of the plan
        assert not all(value.numel() for value in other.state_dict().values())
    dense = merge(small)
    assert all(value.numel() for value in dense.bert.state_dict().values())
    assert b"hf_reparam" not in pickle.dumps(dense.bert)


# plans of what a class has


@pytest.mark.slow
def test_a_pooler_that_was_not_saved_is_new_and_dense(tmp_path):
    convert(zoo.BY_BASE["BertModel"].build(), LowRankConfig(rank=6, target_modules="*")).save_pretrained(tmp_path / "1")
    tf.AutoModelForMaskedLM.from_pretrained(tmp_path / "1").save_pretrained(tmp_path / "2")
    model, info = tf.AutoModel.from_pretrained(tmp_path / "2", output_loading_info=True)
    assert type(model.pooler.dense) is nn.Linear
    assert info["missing_keys"] == {"pooler.dense.weight", "pooler.dense.bias"}


# classes of one's own


class OwnBert(tf.BertModel):
    """A class of the user on a stock configuration."""


@pytest.mark.slow
def test_a_class_of_ones_own_pickles_copies_and_merges(tmp_path):
    torch.manual_seed(0)
    small = convert(OwnBert(zoo.bert()).eval(), rank=6)
    batch = zoo.BY_BASE["BertModel"].batch()
    torch.save(small, tmp_path / "model.pt")
    others = [pickle.loads(pickle.dumps(small)), copy.deepcopy(small)]
    for other in [*others, torch.load(tmp_path / "model.pt", weights_only=False)]:
        assert type(other) is type(small)
        assert type(other.config) is type(small.config)
        assert torch.equal(zoo.outputs(other, batch)[0], zoo.outputs(small, batch)[0])
    assert hf_reparam.ReparamOwnBert is type(small)
    small.save_pretrained(tmp_path / "small")
    again = hf_reparam.ReparamOwnBert.from_pretrained(tmp_path / "small")
    assert torch.equal(zoo.outputs(again, batch)[0], zoo.outputs(small, batch)[0])
    merge_folder(tmp_path / "small", tmp_path / "merged", stream=True)
    assert torch.equal(
        OwnBert.from_pretrained(tmp_path / "merged").state_dict()["encoder.layer.0.output.dense.weight"],
        merge(small).state_dict()["encoder.layer.0.output.dense.weight"],
    )


def test_a_class_that_was_not_imported_is_named_with_what_to_do(tmp_path):
    small = convert(OwnBert(zoo.bert()), rank=6)
    small.save_pretrained(tmp_path / "small")
    config = json.loads((tmp_path / "small" / "config.json").read_text())
    config["architectures"] = ["ReparamElsewhereBert"]
    (tmp_path / "small" / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="'ReparamElsewhereBert'.*import the module that defines it"):
        merge_folder(tmp_path / "small", tmp_path / "merged", stream=True)


REMOTE = """
import torch
from transformers import PretrainedConfig, PreTrainedModel


class {name}Config(PretrainedConfig):
    model_type = "{type}"


class {name}Model(PreTrainedModel):
    config_class = {name}Config

    def __init__(self, config):
        super().__init__(config)
        self.fc = torch.nn.Linear(32, 32)
        self.post_init()

    def forward(self, x):
        return self.fc(x)
"""


def remote_model(folder, name):
    kind = f"{name.lower()}_type"
    folder.mkdir()
    (folder / f"modeling_{name.lower()}.py").write_text(REMOTE.format(name=name, type=kind))
    module = f"modeling_{name.lower()}"
    auto_map = {"AutoConfig": f"{module}.{name}Config", "AutoModel": f"{module}.{name}Model"}
    (folder / "config.json").write_text(json.dumps({"model_type": kind, "auto_map": auto_map}))
    config = tf.AutoConfig.from_pretrained(folder, trust_remote_code=True)
    return tf.AutoModel.from_config(config, trust_remote_code=True)


def test_code_of_a_repository_is_refused_before_the_work(tmp_path):
    model = remote_model(tmp_path / "source", "Unregistered")
    with pytest.raises(TargetError, match=r"came with trust_remote_code.*AutoConfig\.register\('unregistered_type'"):
        convert(model, rank=4)
    with pytest.raises(TargetError, match=r"^inner is a UnregisteredModel.*trust_remote_code"):
        convert(nn.ModuleDict({"inner": model}), rank=4)
    assert not low_rank(model)


def test_code_of_a_repository_that_was_registered_loads_and_merges(tmp_path):
    model = remote_model(tmp_path / "source", "Registered")
    tf.AutoConfig.register("registered_type", type(model.config), exist_ok=True)
    tf.AutoModel.register(type(model.config), type(model), exist_ok=True)
    small = convert(model, rank=4)
    small.save_pretrained(tmp_path / "small")
    assert "auto_map" not in json.loads((tmp_path / "small" / "config.json").read_text())
    assert not list((tmp_path / "small").glob("*.py"))
    again, x = tf.AutoModel.from_pretrained(tmp_path / "small"), torch.ones(1, 32)
    assert type(again) is type(small)
    assert torch.equal(again(x), small(x))
    with pytest.raises(CheckpointError, match="RegisteredModel is no class of Transformers"):
        small.save_pretrained(tmp_path / "file", remote_code=True)
    merge(again).save_pretrained(tmp_path / "merged")
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    for reference in config.get("auto_map", {}).values():
        assert (tmp_path / "merged" / f"{reference.partition('.')[0]}.py").exists()


@pytest.mark.slow
def test_a_merged_folder_does_not_name_the_file_of_remote_code(tmp_path):
    small = convert(zoo.BY_BASE["BertModel"].build(), rank=6)
    small.save_pretrained(tmp_path / "small", remote_code=True)
    merge(tf.AutoModel.from_pretrained(tmp_path / "small")).save_pretrained(tmp_path / "1")
    merge_folder(tmp_path / "small", tmp_path / "2", stream=True)
    for place in ("1", "2"):
        assert "auto_map" not in json.loads((tmp_path / place / "config.json").read_text())
        assert not (tmp_path / place / "modeling_reparam.py").exists()
        assert type(tf.AutoModel.from_pretrained(tmp_path / place, trust_remote_code=True)) is tf.BertModel


# a plain module with embeddings of low rank


def test_a_plain_module_with_embeddings_of_low_rank_inside_is_refused_when_it_is_saved(tmp_path):
    small = convert(zoo.BY_BASE["GPT2LMHeadModel"].build(), LowRankConfig(keep=0.4, embeddings=True))
    with pytest.raises(TargetError, match=r"^policy\.transformer\.wte is an embedding of low rank.*save_pretrained"):
        hf_reparam.save(nn.ModuleDict({"policy": small}), tmp_path / "small")
    assert not (tmp_path / "small").exists()


# PEFT without targets


@pytest.mark.slow
@pytest.mark.parametrize("base", ["BertForMaskedLM", "LlamaForCausalLM", "T5ForConditionalGeneration"])
def test_a_lora_config_without_targets_adapts_the_factors(base):
    import peft

    case = zoo.BY_BASE[base]
    small = convert(case.build(), rank=6)
    layers, before = low_rank(small), zoo.outputs(small, case.batch())[0]
    adapted = peft.get_peft_model(small, peft.LoraConfig())
    targets = {name for name, module in adapted.named_modules() if hasattr(module, "lora_A")}
    assert targets == {f"base_model.model.{name}.{factor}" for name in layers for factor in ("down", "up")}
    torch.testing.assert_close(zoo.outputs(adapted.merge_and_unload(), case.batch())[0], before)


@pytest.mark.slow
def test_a_head_of_its_own_beside_tied_parts_leaves_them_tied(tmp_path):
    """LUKE declares its decoder of entities tied, and its decoder of words not."""
    shape = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    config = tf.LukeConfig(**shape, vocab_size=99, entity_vocab_size=20, entity_emb_size=16, max_position_embeddings=24)
    small = convert(tf.LukeForMaskedLM(config), rank=4)
    assert small.config.tie_word_embeddings
    small.save_pretrained(tmp_path)
    loaded, info = type(small).from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert loaded.entity_predictions.decoder.weight is loaded.luke.entity_embeddings.entity_embeddings.weight
