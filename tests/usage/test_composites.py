"""Models of several parts: their configurations stay one, and parts that were converted by themselves are not lost."""

import sys
from dataclasses import dataclass
from functools import cache

import pytest
import torch
import transformers as tf
from torch import nn

import hf_reparam
from hf_reparam import LowRankConfig, calibrate, convert, merge
from hf_reparam.errors import TargetError
from hf_reparam.layers.linear import LowRankLinear
from tests import zoo

PART = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
IMAGE = {**PART, "image_size": 16, "patch_size": 8}
WIDE = {"initializer_range": 0.15}
IDS = zoo._ids()
PIXELS = zoo.INPUTS["image"]()["pixel_values"]


def llava():
    vision = {"model_type": "clip_vision_model", **IMAGE}
    text = {"model_type": "llama", **zoo.LLAMA_LIKE, **WIDE}
    return tf.LlavaForConditionalGeneration(
        tf.LlavaConfig(text_config=text, vision_config=vision, image_token_index=98)
    )


def clip():
    text = {**PART, "vocab_size": 99, "eos_token_id": 2, "bos_token_id": 1}
    return tf.CLIPModel(tf.CLIPConfig(text_config=text, vision_config=IMAGE, projection_dim=16))


def encoder_decoder():
    encoder = tf.BertModel(zoo.bert(**WIDE))
    decoder = tf.BertLMHeadModel(zoo.bert(is_decoder=True, add_cross_attention=True, **WIDE))
    return tf.EncoderDecoderModel(encoder=encoder, decoder=decoder)


def vision_encoder_decoder():
    decoder = tf.GPT2LMHeadModel(zoo.gpt2(add_cross_attention=True))
    return tf.VisionEncoderDecoderModel(encoder=tf.ViTModel(zoo.vit()), decoder=decoder)


def t5gemma():
    module = {**PART, "vocab_size": 99, "num_key_value_heads": 2, "head_dim": 8}
    config = tf.T5GemmaConfig(encoder=module, decoder=module, vocab_size=99)
    return tf.T5GemmaForConditionalGeneration(config)


def musicgen():
    text = {"vocab_size": 99, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 1, "num_heads": 4, "model_type": "t5"}
    audio = {"model_type": "encodec", "num_filters": 4, "hidden_size": 8, "codebook_size": 16, "codebook_dim": 8}
    decoder = {"vocab_size": 16, "num_codebooks": 2, "num_attention_heads": 4, "hidden_size": 32, "ffn_dim": 48}
    decoder |= {"num_hidden_layers": 1, "pad_token_id": 16, "bos_token_id": 16}
    return tf.MusicgenForConditionalGeneration(
        tf.MusicgenConfig(text_encoder=text, audio_encoder=audio, decoder=decoder)
    )


@dataclass(frozen=True)
class Composite:
    build: object
    batch: dict
    part: str  # configuration of a part with token embeddings
    module: str  # the part


SEQ2SEQ = {"input_ids": IDS, "decoder_input_ids": IDS[:, :5]}
COMPOSITES = {
    "llava": Composite(llava, {"input_ids": IDS}, "text_config", "model.language_model"),
    "clip": Composite(clip, {"input_ids": IDS, "pixel_values": PIXELS}, "text_config", "text_model"),
    "encoder-decoder": Composite(encoder_decoder, SEQ2SEQ, "encoder", "encoder"),
    "vision-encoder-decoder": Composite(
        vision_encoder_decoder, {"pixel_values": PIXELS, "decoder_input_ids": IDS}, "decoder", "decoder"
    ),
    "t5gemma": Composite(t5gemma, SEQ2SEQ, "encoder", "model.encoder"),
    "musicgen": Composite(musicgen, {}, "text_encoder", "text_encoder"),
}
composites = pytest.mark.parametrize("name", COMPOSITES)


def made(name):
    torch.manual_seed(0)
    return COMPOSITES[name].build().eval()


def equal(model, other, batch):
    return all(map(torch.equal, zoo.outputs(model, batch), zoo.outputs(other, batch)))


def near(model, other, batch):
    for a, b in zip(zoo.outputs(model, batch), zoo.outputs(other, batch), strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-3)


def held(model):
    """Part of the configuration -> attributes of modules that are this very object."""
    parts = {"": model.config, **{name: getattr(model.config, name) for name in model.config.sub_configs}}
    found = {}
    for part, config in parts.items():
        for path, module in model.named_modules():
            found.setdefault(part, []).extend(
                f"{path}:{key}" for key, value in vars(module).items() if config is not None and value is config
            )
    return found


def stages(model):
    small = convert(model, rank=4)
    yield model
    yield small
    yield merge(small)
    yield convert(small, rank=2)


@pytest.mark.slow
@composites
def test_parts_share_their_configuration(name):
    first, *others = map(held, stages(made(name)))
    assert any(first.values())
    assert [first] * 3 == others
    changed = made(name)
    convert(changed, rank=4, inplace=True)
    assert held(changed) == first
    merge(changed, inplace=True)
    assert held(changed) == first


@pytest.mark.slow
@composites
def test_what_is_set_on_a_part_has_an_effect_and_is_saved(name, tmp_path):
    case = COMPOSITES[name]
    seen = []
    for i, model in enumerate(stages(made(name))):
        part = model.get_submodule(case.module)
        model.set_attn_implementation({case.part: "eager"})
        getattr(model.config, case.part).use_cache = False
        part.resize_token_embeddings(120)
        model.save_pretrained(tmp_path / str(i))
        stored = getattr(tf.AutoConfig.from_pretrained(tmp_path / str(i)), case.part)
        if case.batch and case.module == case.part:  # others cannot be loaded when one part alone has more tokens
            near(type(model).from_pretrained(tmp_path / str(i)), model, case.batch)
        cached = getattr(stored, "use_cache", None)
        seen.append((part.config._attn_implementation, part.config.use_cache, stored.vocab_size, cached))
    assert [seen[0]] * 3 == seen[1:]
    assert seen[0][2] == 120


@pytest.mark.slow
def test_a_configuration_of_another_model_stays():
    model = made("clip")
    other = tf.CLIPTextModel(model.config.text_config)
    config, text = model.config, model.config.text_config
    convert(model, rank=4, inplace=True)
    assert other.config is text
    assert type(config) is tf.CLIPConfig
    assert config.text_config is text
    assert model.config is not config
    assert model.config.text_config is not text


@pytest.mark.slow
def test_parts_of_a_merged_model_have_stock_configurations(tmp_path):
    """T5 gives its stacks copies of the configuration: those of a loaded model have its plan."""
    convert(zoo.BY_BASE["T5ForConditionalGeneration"].build(), rank=4).save_pretrained(tmp_path)
    dense = merge(tf.AutoModelForSeq2SeqLM.from_pretrained(tmp_path))
    for module in dense.modules():
        assert type(getattr(module, "config", dense.config)) is tf.T5Config


# a part that was converted by itself


def with_low_rank_part(name, rank=4):
    """The stock model with a part that was converted and put back."""
    model = made(name)
    owner, _, child = COMPOSITES[name].module.rpartition(".")
    part = convert(model.get_submodule(COMPOSITES[name].module), rank=rank)
    setattr(model.get_submodule(owner), child, part)
    return model


PUT_BACK = [name for name in COMPOSITES if name != "musicgen"]
put_back = pytest.mark.parametrize("name", PUT_BACK)


@pytest.mark.slow
@put_back
def test_a_part_that_was_put_back_is_never_lost_silently(name, tmp_path):
    model = with_low_rank_part(name)
    model.save_pretrained(tmp_path)
    try:
        again = type(model).from_pretrained(tmp_path)
    except RuntimeError as error:
        assert "mismatch" in str(error)  # noqa: PT017  # or it loads
    else:
        assert equal(again, model, COMPOSITES[name].batch)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["encoder-decoder", "vision-encoder-decoder"])
def test_encoder_decoders_keep_a_converted_part(name, tmp_path):
    """Their own classes put parts of any type together."""
    model = made(name)
    child = COMPOSITES[name].module
    parts = {**dict(model.named_children()), child: convert(model.get_submodule(child), rank=4)}
    whole = type(model)(encoder=parts["encoder"], decoder=parts["decoder"]).eval()
    whole.save_pretrained(tmp_path)
    assert equal(type(model).from_pretrained(tmp_path), whole, COMPOSITES[name].batch)


@pytest.mark.slow
@put_back
def test_merging_the_whole_with_a_low_rank_part(name, tmp_path):
    model = with_low_rank_part(name)
    dense = merge(model)
    assert not [m for m in dense.modules() if "reparam" in type(m).__name__.lower() or isinstance(m, LowRankLinear)]
    assert "reparam" not in str(dense.config.to_dict())
    dense.save_pretrained(tmp_path)
    again = type(dense).from_pretrained(tmp_path)
    assert equal(again, dense, COMPOSITES[name].batch)
    near(dense, model, COMPOSITES[name].batch)


@pytest.mark.slow
@pytest.mark.parametrize("inplace", [False, True])
@put_back
def test_converting_the_whole_with_a_low_rank_part(name, inplace, tmp_path):
    """The plan of the part becomes a part of the whole's; also where only another part is converted now."""
    model = with_low_rank_part(name)
    part = COMPOSITES[name].module
    small = convert(model, LowRankConfig(rank=3, exclude_modules=f"{part}.*" if inplace else ()), inplace=inplace)
    assert type(small).__name__ == f"Reparam{type(made(name)).__name__}"
    assert not hasattr(small.get_submodule(part), "base_class")
    assert "'reparam'" not in str([getattr(small.config, sub).to_dict() for sub in small.config.sub_configs])
    ranks = {m.rank for m in small.get_submodule(part).modules() if isinstance(m, LowRankLinear)}
    assert ranks == ({4} if inplace else {3})
    small.save_pretrained(tmp_path)
    again = type(small).from_pretrained(tmp_path)
    assert equal(again, small, COMPOSITES[name].batch)


# classes without embeddings, and errors at the end


def flava():
    text, image, part = {**PART, "vocab_size": 99}, dict(IMAGE), dict(PART)
    config = tf.FlavaConfig(
        text_config=text, image_config=image, multimodal_config=part, hidden_size=32, projection_dim=8
    )
    return tf.FlavaModel(config)


def blip():
    text = {**PART, "vocab_size": 99}
    return tf.BlipModel(tf.BlipConfig(text_config=text, vision_config=IMAGE, projection_dim=16))


@pytest.mark.slow
@pytest.mark.parametrize("build", [flava, blip])
@pytest.mark.parametrize("inplace", [False, True])
def test_classes_that_know_no_embeddings(build, inplace, tmp_path):
    torch.manual_seed(0)
    small = convert(build().eval(), rank=4, inplace=inplace)
    small.save_pretrained(tmp_path)
    again = type(small).from_pretrained(tmp_path)
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in small.state_dict().items())
    assert type(merge(small)) is type(small).base_class


LATE = ["register", "model_class", "plan_of", "entries_of", "_new_configs", "_tied", "retie"]


class LateError(Exception):
    pass


def state(model):
    return [
        (path, module, type(module), {k: id(v) for k, v in vars(module).items() if k != "_modules"})
        for path, module in model.named_modules()
    ]


@cache
def planned(wrap):
    """Calibration of a model, a plan with embeddings and one with narrower heads."""
    model = wrap(zoo.BY_BASE["BertForMaskedLM"].build())
    moments = calibrate(model, [zoo.BY_BASE["BertForMaskedLM"].batch()], embeddings=True)
    plan = hf_reparam.make_plan(model, hf_reparam.LowRankConfig(keep=0.5, embeddings=True))
    return (
        moments,
        plan,
        hf_reparam.make_plan(model, hf_reparam.LowRankConfig(keep=0.45, heads=True), calibration=moments),
    )


def itself(model):
    return model


@pytest.mark.slow
@pytest.mark.parametrize(
    ("step", "wrap"),
    [*((step, itself) for step in LATE), ("register", nn.Sequential), ("retie", nn.Sequential)],
)
def test_an_error_at_the_end_leaves_the_model_as_it_was(step, wrap, monkeypatch):
    """Whatever fails after the layers are made: classes, configurations, ties and layers are put back."""

    def fails(*args, **kwargs):
        raise LateError

    batch = zoo.BY_BASE["BertForMaskedLM"].batch()
    model = wrap(zoo.BY_BASE["BertForMaskedLM"].build())
    inner = model[0] if isinstance(model, nn.Sequential) else model
    config = inner.config
    before, shown, outputs = state(model), config.to_dict(), zoo.outputs(inner, batch)
    moments, plan, joint = planned(wrap)
    module = "hf_reparam.model.build" if step == "retie" else "hf_reparam.model.retype"
    monkeypatch.setattr(sys.modules[module], step, fails)
    for chosen in (plan, joint) if step != "retie" else (plan,):
        with pytest.raises(LateError):
            convert(model, chosen, calibration=moments, inplace=True)
        assert state(model) == before
        assert inner.config is config
        assert config.to_dict() == shown
        assert all(map(torch.equal, zoo.outputs(inner, batch), outputs))


@pytest.mark.parametrize("step", ["_new_configs", "stock_class", "retie", "_tied"])
def test_a_merge_that_fails_leaves_the_model_as_it_was(step, monkeypatch):
    def fails(*args, **kwargs):
        raise LateError

    small = convert(zoo.BY_BASE["BertForMaskedLM"].build(), LowRankConfig(keep=0.5, embeddings=True))
    before = state(small)
    module = "hf_reparam.model.build" if step == "retie" else "hf_reparam.model.retype"
    monkeypatch.setattr(sys.modules[module], step, fails)
    with pytest.raises(LateError):
        merge(small, inplace=True)
    assert state(small) == before


@pytest.mark.slow
def test_low_rank_embeddings_that_the_whole_cannot_store(tmp_path):
    """A table that is neither the whole's input nor its output has no place in the whole's plan."""
    decoder = tf.GPT2LMHeadModel(zoo.gpt2(add_cross_attention=True, tie_word_embeddings=False))
    low = convert(decoder, LowRankConfig(keep=0.5, embeddings=True))
    model = tf.EncoderDecoderModel(encoder=tf.BertModel(zoo.bert()), decoder=low).eval()
    with pytest.raises(TargetError, match=r"decoder.transformer.wte is of low rank.*merge this part first"):
        convert(nn.Sequential(model), LowRankConfig(rank=4, target_modules="*encoder.*"))
    dense = merge(model)
    convert(dense, rank=4).save_pretrained(tmp_path)
    assert type(dense.decoder) is tf.GPT2LMHeadModel


@pytest.mark.slow
def test_ranks_are_chosen_where_the_hidden_states_of_a_part_are_recorded():
    """A language model reads hidden states of the images' encoder, which is not computed again while layers behind it
    are tried."""
    model = llava().eval()
    ids = IDS.clone()
    ids[:, 1:5] = 98  # the patches of an image of 16 x 16
    batches = [{"input_ids": ids.roll(i, 0), "pixel_values": PIXELS + i / 10} for i in range(8)]
    calibration = calibrate(model, batches)
    small = convert(model, LowRankConfig(keep=0.8, min_rank=2), calibration=calibration)
    measured = hf_reparam.report(small).judgement.measured
    assert len(measured) == 4
    with torch.no_grad():
        assert not torch.equal(small(**batches[0]).logits, model(**batches[0]).logits)
    assert hf_reparam.refit(small, model, batches, calibration=calibration).before > 0
