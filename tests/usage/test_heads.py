"""What people do with heads: new labels, new heads, a head's folder in the base class, names that the base has, too."""

import pytest
import torch
import transformers as tf
from torch import nn

import hf_reparam
from hf_reparam import LowRankConfig, convert
from hf_reparam.errors import PlanError
from hf_reparam.layers.linear import LowRankLinear
from hf_reparam.model.config import plan_name
from tests import zoo

TOWER = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
AUDIO = {
    **TOWER,
    "vocab_size": 32,
    "conv_dim": (32, 32),
    "conv_stride": (2, 2),
    "conv_kernel": (3, 3),
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4,
    "tdnn_dim": (32, 32),
    "tdnn_kernel": (3, 3),
    "tdnn_dilation": (1, 1),
    "xvector_output_dim": 32,
}


def low_rank(model):
    return [name for name, module in model.named_modules() if isinstance(module, LowRankLinear)]


# new labels where the old head was converted


@pytest.fixture(scope="module")
def thousand(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vit")
    torch.manual_seed(0)
    convert(
        tf.ViTForImageClassification(zoo.vit(num_labels=100)), LowRankConfig(rank=8, target_modules="*")
    ).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("labels", [2, 5, 60, 300])
def test_other_labels_give_a_new_dense_head(thousand, tmp_path, labels):
    auto = tf.AutoModelForImageClassification
    model = auto.from_pretrained(thousand, num_labels=labels, ignore_mismatched_sizes=True)
    assert type(model.classifier) is nn.Linear
    assert model.classifier.weight.shape == (labels, 32)
    assert 0.01 < model.classifier.weight.std() < 0.04
    assert isinstance(model.vit.layers[0].mlp.fc1, LowRankLinear)
    model.save_pretrained(tmp_path)
    again, info = auto.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert torch.equal(again.classifier.weight, model.classifier.weight)


@pytest.mark.parametrize("labels", [5, 60, 300])
def test_other_labels_without_a_word_are_an_error_as_dense(thousand, labels):
    with pytest.raises((PlanError, RuntimeError), match="ignore_mismatched_sizes"):
        tf.AutoModelForImageClassification.from_pretrained(thousand, num_labels=labels)


def test_the_same_labels_keep_the_converted_head(thousand):
    model = tf.AutoModelForImageClassification.from_pretrained(thousand, ignore_mismatched_sizes=True)
    assert isinstance(model.classifier, LowRankLinear)


def test_hidden_layers_of_a_head_stay_and_its_output_is_new(tmp_path):
    config = zoo.roberta(num_labels=40)
    convert(tf.RobertaForSequenceClassification(config), LowRankConfig(rank=6, target_modules="*")).save_pretrained(
        tmp_path
    )
    auto = tf.AutoModelForSequenceClassification
    model = auto.from_pretrained(tmp_path, num_labels=3, ignore_mismatched_sizes=True)
    assert isinstance(model.classifier.dense, LowRankLinear)
    assert type(model.classifier.out_proj) is nn.Linear
    assert model.classifier.out_proj.out_features == 3


# heads that a folder does not have


def t5():
    size = {"vocab_size": 99, "d_model": 256, "d_kv": 32, "d_ff": 256, "num_layers": 1, "num_heads": 8}
    return tf.T5ForConditionalGeneration(tf.T5Config(**size, decoder_start_token_id=0, num_labels=64))


def clip():
    text = {**TOWER, "vocab_size": 99, "max_position_embeddings": 32, "bos_token_id": 1, "eos_token_id": 2}
    vision = {**TOWER, "image_size": 16, "patch_size": 8}
    model = tf.CLIPModel(tf.CLIPConfig(text_config=text, vision_config=vision, projection_dim=16))
    model.config.num_labels = 64
    return model


@pytest.mark.slow
@pytest.mark.parametrize(
    ("build", "head", "path"),
    [
        (t5, "T5ForSequenceClassification", "classification_head.dense"),
        (t5, "T5ForTokenClassification", "classifier"),
        (t5, "T5ForQuestionAnswering", "qa_outputs"),
        (clip, "CLIPForImageClassification", "classifier"),
    ],
)
def test_new_heads_are_drawn_as_the_stock_class_draws_them(tmp_path, build, head, path):
    dense = build()
    dense.save_pretrained(tmp_path / "dense")
    convert(dense, rank=6).save_pretrained(tmp_path / "small")
    stock = getattr(tf, head).from_pretrained(tmp_path / "dense").get_submodule(path)
    derived = getattr(hf_reparam, f"Reparam{head}").from_pretrained(tmp_path / "small").get_submodule(path)
    assert type(derived) is nn.Linear
    assert derived.weight.std().item() == pytest.approx(stock.weight.std().item(), rel=0.2)


@pytest.mark.slow
@pytest.mark.parametrize("factor", [1.0, 0.05])
def test_random_low_rank_layers_heed_the_initializer_factor(factor):
    vision = clip()
    vision.config.vision_config.initializer_factor = factor
    for dense, path in (
        (tf.T5ForConditionalGeneration(zoo.t5(initializer_factor=factor)), "decoder.block.1.layer.0.SelfAttention.k"),
        (tf.CLIPModel(vision.config), "vision_model.encoder.layers.1.mlp.fc1"),
    ):
        small = convert(dense, rank=6)
        for fresh in (type(small)(small.config), type(small)._from_config(small.config)):
            got = fresh.get_submodule(path).weight.detach().add(0).std().item()
            assert got == pytest.approx(dense.get_submodule(path).weight.std().item(), rel=0.3)


def test_a_head_that_an_inner_model_did_not_save_is_new_and_dense(tmp_path):
    small = convert(zoo.BY_BASE["BertForMaskedLM"].build(), LowRankConfig(rank=6, target_modules="*"))
    small.bert.save_pretrained(tmp_path)
    model = tf.AutoModelForMaskedLM.from_pretrained(tmp_path)
    assert type(model.cls.predictions.transform.dense) is nn.Linear
    assert torch.equal(
        model.bert.encoder.layer[0].output.dense.up.weight, small.bert.encoder.layer[0].output.dense.up.weight
    )


# a head's folder in the base class


def speecht5(kind):
    return getattr(tf, kind)(
        tf.SpeechT5Config(
            vocab_size=99,
            hidden_size=32,
            encoder_layers=1,
            decoder_layers=1,
            encoder_attention_heads=4,
            decoder_attention_heads=4,
            encoder_ffn_dim=48,
            decoder_ffn_dim=48,
            conv_dim=(32, 32),
            conv_stride=(2, 2),
            conv_kernel=(3, 3),
            num_conv_pos_embeddings=16,
            num_conv_pos_embedding_groups=4,
            speech_decoder_prenet_units=32,
            speaker_embedding_dim=16,
        )
    )


def llama4():
    more = {"head_dim": 8, "num_key_value_heads": 2, "intermediate_size_mlp": 48, "num_local_experts": 2}
    return tf.Llama4ForCausalLM(tf.Llama4TextConfig(**TOWER, vocab_size=99, **more))


def projected(kind):
    if kind == "Vision":
        config = tf.CLIPVisionConfig(**TOWER, image_size=16, patch_size=8, projection_dim=16)
        return tf.CLIPVisionModelWithProjection(config)
    more = {"vocab_size": 99, "max_position_embeddings": 32, "bos_token_id": 1, "eos_token_id": 2}
    return tf.CLIPTextModelWithProjection(tf.CLIPTextConfig(**TOWER, **more, projection_dim=16))


@pytest.mark.slow
@pytest.mark.parametrize(
    "build",
    [
        lambda: projected("Vision"),
        lambda: projected("Text"),
        llama4,
        lambda: speecht5("SpeechT5ForSpeechToText"),
        lambda: speecht5("SpeechT5ForTextToSpeech"),
        lambda: tf.LlamaForSequenceClassification(tf.LlamaConfig(**zoo.LLAMA_LIKE)),
    ],
    ids=["clip vision", "clip text", "llama 4", "speech to text", "text to speech", "llama"],
)
def test_a_head_folder_in_the_base_class_is_as_dense(tmp_path, build):
    head = build()
    head.save_pretrained(tmp_path / "dense")
    small = convert(head, rank=4)
    small.save_pretrained(tmp_path / "small")
    dense, expected = tf.AutoModel.from_pretrained(tmp_path / "dense", output_loading_info=True)
    model, info = tf.AutoModel.from_pretrained(tmp_path / "small", output_loading_info=True)
    assert info["missing_keys"] == expected["missing_keys"] == set()
    mine, all_of_it = model.state_dict(), small.state_dict()
    for name, value in mine.items():
        assert any(torch.equal(value, other) for key, other in all_of_it.items() if key.endswith(name))
    assert len(low_rank(model)) == sum(1 for name in low_rank(small) if _has(dense, name))


def _has(model, name):
    """Whether a base model has a layer of its head's model, whatever stands before its name there."""
    modules = dict(model.named_modules())
    while name and name not in modules:
        name = name.partition(".")[2]
    return isinstance(modules.get(name), nn.Linear)


# heads whose layers are named as parts of the base model


@pytest.mark.slow
@pytest.mark.parametrize("family", ["Wav2Vec2", "WavLM", "Data2VecAudio"])
def test_a_head_named_as_a_part_of_the_base_loads_in_every_class(tmp_path, family):
    more = {"conv_pos_kernel_size": 5} if family == "Data2VecAudio" else {}
    torch.manual_seed(0)
    dense = getattr(tf, f"{family}ForXVector")(getattr(tf, f"{family}Config")(**AUDIO, **more)).eval()
    small = convert(dense, LowRankConfig(rank=4, target_modules="*"))
    assert isinstance(small.feature_extractor, LowRankLinear)
    small.save_pretrained(tmp_path / "low")
    again = tf.AutoModelForAudioXVector.from_pretrained(tmp_path / "low")
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in small.state_dict().items())
    base = tf.AutoModel.from_pretrained(tmp_path / "low")
    assert low_rank(base) == [n.removeprefix(small.base_model_prefix + ".") for n in low_rank(small.base_model)]
    hf_reparam.merge_folder(tmp_path / "low", tmp_path / "merged", stream=True)
    assert type(type(dense).from_pretrained(tmp_path / "merged").feature_extractor) is nn.Linear


@pytest.mark.parametrize("case", zoo.ALL, ids=lambda c: c.id)
def test_every_name_leads_to_its_very_layer(case):
    from hf_reparam.model.naming import find_paths

    with torch.device("meta"):
        model = getattr(tf, case.base)(case.config(**dict(case.options)))
    paths = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    names = {plan_name(model, path): path for path in paths}
    assert find_paths(model, names) == names
