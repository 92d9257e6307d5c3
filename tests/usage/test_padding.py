"""Padding, the size of batches and their order do not matter, in every family: what has padding counts what the same
examples count one by one without it."""

import warnings

import pytest
import torch
import transformers as tf
from torch import nn

from hf_reparam import calibrate, compare, convert, refine
from hf_reparam.recover import refine as module
from tests import zoo

SMALL = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 48}
WAVE = {
    **SMALL,
    "conv_dim": (16,),
    "conv_kernel": (10,),
    "conv_stride": (5,),
    "num_feat_extract_layers": 1,
    "num_conv_pos_embeddings": 8,
    "num_conv_pos_embedding_groups": 2,
    "feat_extract_norm": "layer",
    "mask_time_prob": 0.0,
}


def build(kind, config):
    torch.manual_seed(0)
    model = kind(config).eval()
    return model if kind is tf.CanineModel else model.double()  # in float64 it adds up masks to -inf - -inf


def assert_same(a, b):
    assert a.layers.keys() == b.layers.keys()
    assert {n: layer.tokens for n, layer in a.layers.items()} == {n: layer.tokens for n, layer in b.layers.items()}
    for name, layer in a.layers.items():
        torch.testing.assert_close(layer.input_products, b.layers[name].input_products, rtol=1e-5, atol=1e-5, msg=name)
        gradients, others = layer.gradient_products, b.layers[name].gradient_products
        scale = float(others.abs().max()) or 1.0
        torch.testing.assert_close(gradients / scale, others / scale, rtol=1e-4, atol=1e-5, msg=name)


def padded(examples, **fills):
    """Examples of one row each as one batch, padded at the right with zeros or `fills`."""
    batch = {}
    for key in examples[0]:
        rows = [example[key] for example in examples]
        if rows[0].dim() > 1:
            longest = max(row.shape[1] for row in rows)
            sides = [(0, 0) * (row.dim() - 2) + (0, longest - row.shape[1]) for row in rows]
            rows = [nn.functional.pad(r, side, value=fills.get(key, 0)) for r, side in zip(rows, sides, strict=True)]
        batch[key] = torch.cat(rows)
    return batch


def texts(*lengths, **more):
    generator = torch.Generator().manual_seed(1)
    rows = [torch.randint(5, 90, (1, n), generator=generator) for n in lengths]
    return [{"input_ids": ids, "attention_mask": torch.ones_like(ids), **more} for ids in rows]


def waves(*lengths, name="input_values", size=()):
    generator = torch.Generator().manual_seed(1)
    rows = [torch.randn(1, n, *size, generator=generator).double() for n in lengths]
    return [{name: x, "attention_mask": torch.ones(1, x.shape[1], dtype=torch.long)} for x in rows]


def with_labels(examples, *lengths):
    generator = torch.Generator().manual_seed(2)
    labels = [torch.randint(5, 90, (1, n), generator=generator) for n in lengths]
    return [{**example, "labels": label} for example, label in zip(examples, labels, strict=True)]


AUDIO = {
    "Wav2Vec2Model": lambda: tf.Wav2Vec2Config(**WAVE),
    "HubertModel": lambda: tf.HubertConfig(**WAVE),
    "WavLMModel": lambda: tf.WavLMConfig(**WAVE),
    "UniSpeechModel": lambda: tf.UniSpeechConfig(**WAVE),
    "UniSpeechSatModel": lambda: tf.UniSpeechSatConfig(**WAVE),
    "Data2VecAudioModel": lambda: tf.Data2VecAudioConfig(
        **{**WAVE, "num_conv_pos_embeddings": 2, "conv_pos_kernel_size": 3}
    ),
    "Wav2Vec2ConformerModel": lambda: tf.Wav2Vec2ConformerConfig(**WAVE, conv_depthwise_kernel_size=3),
    "SEWModel": lambda: tf.SEWConfig(**{**WAVE, "squeeze_factor": 2}),
}


@pytest.mark.slow
@pytest.mark.parametrize("base", AUDIO)
def test_waves_of_several_lengths(base):
    model, examples = build(getattr(tf, base), AUDIO[base]()), waves(400, 230, 310)
    assert_same(calibrate(model, [padded(examples)]), calibrate(model, examples))


def test_speech_with_transcripts():
    model = build(tf.Wav2Vec2ForCTC, tf.Wav2Vec2Config(**WAVE, vocab_size=99))
    examples = with_labels(waves(400, 230), 5, 3)
    assert_same(calibrate(model, [padded(examples, labels=-100)]), calibrate(model, examples))


@pytest.mark.slow
def test_speech_to_text():
    shape = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48}
    heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "conv_channels": 16}
    config = tf.Speech2TextConfig(**shape, **heads, vocab_size=99, input_feat_per_channel=8, input_channels=1)
    model = build(tf.Speech2TextForConditionalGeneration, config)
    examples = with_labels(waves(40, 28, name="input_features", size=(8,)), 4, 6)
    assert_same(calibrate(model, [padded(examples, labels=-100)]), calibrate(model, examples))


@pytest.mark.parametrize("lengths", [(4, 6), (3, 8)])
def test_decoders_without_input_ids(lengths):
    config = tf.WhisperConfig(
        vocab_size=99,
        num_mel_bins=8,
        d_model=32,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=48,
        decoder_ffn_dim=48,
        max_source_positions=10,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
    )
    model = build(tf.WhisperForConditionalGeneration, config)
    generator = torch.Generator().manual_seed(1)
    frames = [{"input_features": torch.randn(1, 8, 20, generator=generator).double()} for _ in lengths]
    examples = with_labels(frames, *lengths)
    assert_same(calibrate(model, [padded(examples, labels=-100)]), calibrate(model, examples))


@pytest.mark.slow
def test_images_with_captions():
    encoder, decoder = tf.ViTConfig(image_size=16, patch_size=8, **SMALL), tf.BertConfig(vocab_size=99, **SMALL)
    config = tf.VisionEncoderDecoderConfig.from_encoder_decoder_configs(encoder, decoder)
    config.decoder_start_token_id, config.pad_token_id = 1, 0
    model = build(tf.VisionEncoderDecoderModel, config)
    generator = torch.Generator().manual_seed(1)
    images = [{"pixel_values": torch.randn(1, 3, 16, 16, generator=generator).double()} for _ in range(3)]
    examples = with_labels(images, 4, 7, 5)
    assert_same(calibrate(model, [padded(examples, labels=-100)]), calibrate(model, examples))


@pytest.mark.slow
@pytest.mark.parametrize("lengths", [((9, 6), (4, 7)), ((9, 6), (7, 9))])  # also as long as each other
@pytest.mark.parametrize("embedded", [True, False])
def test_texts_and_labels_of_an_encoder_decoder(embedded, lengths):
    model = zoo.BY_BASE["T5ForConditionalGeneration"].build().double()
    examples = with_labels(texts(*lengths[0]), *lengths[1])
    if embedded:
        examples = [{"inputs_embeds": model.shared(e.pop("input_ids")).detach(), **e} for e in examples]
    assert_same(calibrate(model, [padded(examples, labels=-100)]), calibrate(model, examples))


OTHERS = {
    "XLNetModel": lambda: tf.XLNetConfig(vocab_size=99, d_model=32, n_layer=1, n_head=4, d_inner=48),
    "FunnelModel": lambda: tf.FunnelConfig(
        vocab_size=99, block_sizes=[1, 1], d_model=32, n_head=4, d_head=8, d_inner=48, num_decoder_layers=1
    ),
    "CanineModel": lambda: tf.CanineConfig(
        **SMALL, local_transformer_stride=8, num_hash_buckets=64, downsampling_rate=4, max_position_embeddings=64
    ),
    "LongformerModel": lambda: tf.LongformerConfig(**SMALL, vocab_size=99, attention_window=8, pad_token_id=1),
    "DebertaV2Model": lambda: tf.DebertaV2Config(
        **SMALL,
        vocab_size=99,
        relative_attention=True,
        pos_att_type=["p2c", "c2p"],
        share_att_key=True,
        position_buckets=8,
        norm_rel_ebd="layer_norm",
    ),
    "MPNetModel": lambda: tf.MPNetConfig(**SMALL, vocab_size=99),
    "RoFormerModel": lambda: tf.RoFormerConfig(**SMALL, vocab_size=99),
    "LlamaModel": lambda: zoo.llama(),
}


@pytest.mark.slow
@pytest.mark.parametrize("lengths", [(9, 6, 8), (10, 10)])
@pytest.mark.parametrize("base", OTHERS)
def test_texts_of_several_lengths(base, lengths):
    model, examples = build(getattr(tf, base), OTHERS[base]()), texts(*lengths)
    together = calibrate(model, [padded(examples, input_ids=model.config.pad_token_id or 0)])
    assert_same(together, calibrate(model, examples))


@pytest.mark.parametrize("base", ["XLNetModel", "RoFormerModel"])
def test_as_many_texts_as_positions(base):
    """XLNet's hidden states are (length, batch, d)."""
    model, first, then = build(getattr(tf, base), OTHERS[base]()), texts(9, 6, 8), texts(4, 2, 3, 4)
    together = calibrate(model, [padded(first), padded(then)])
    assert_same(together, calibrate(model, first + then))


def test_windows_are_filled_by_no_token():
    model = build(tf.LongformerModel, OTHERS["LongformerModel"]())
    layers = calibrate(model, texts(9, 6)).layers
    assert layers["encoder.layer.0.output.dense"].tokens == 15
    labelled = build(tf.LongformerForTokenClassification, OTHERS["LongformerModel"]())
    examples = [{**e, "labels": e["input_ids"] % 2} for e in texts(9, 6)]
    batch = padded(examples, input_ids=1, labels=-100)
    found = calibrate(labelled, [batch], target_modules="*")
    assert_same(found, calibrate(labelled, examples, target_modules="*"))
    assert found.layers["classifier"].tokens == 15


@pytest.mark.slow
def test_experts_get_no_padding():
    config = tf.SwitchTransformersConfig(
        vocab_size=99, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, num_experts=3, expert_capacity=64
    )
    config.decoder_start_token_id = 0
    model, examples = build(tf.SwitchTransformersForConditionalGeneration, config), with_labels(texts(9, 6), 4, 7)
    assert_same(calibrate(model, [padded(examples, labels=-100)]), calibrate(model, examples))


def test_multiple_choice():
    model = zoo.BY_BASE["BertForMultipleChoice"].build().double()
    ids, mask = zoo._ids(4, 9).view(2, 2, 9), torch.ones(2, 2, 9, dtype=torch.long)
    mask[0, 1, 6:], mask[1, 0, 4:], mask[1, 1, 5:] = 0, 0, 0
    batch = {"input_ids": ids, "attention_mask": mask}
    moments = calibrate(model, [batch])
    assert moments.layers["encoder.layer.0.output.dense"].tokens == int(mask.sum())
    assert_same(moments, calibrate(model, [{k: v[i : i + 1] for k, v in batch.items()} for i in range(2)]))


@pytest.mark.parametrize("additive", [True, False])
def test_masks_of_pairs_of_positions(additive):
    model, examples = zoo.BY_BASE["BertModel"].build().double(), texts(9, 6)
    batch = padded(examples)
    square = batch["attention_mask"].bool()[:, None, None, :].expand(2, 1, 9, 9)
    if additive:
        square = torch.zeros(2, 1, 9, 9).double().masked_fill(~square, torch.finfo(torch.float64).min)
    assert_same(calibrate(model, [{**batch, "attention_mask": square}]), calibrate(model, examples))


@pytest.mark.slow
@pytest.mark.parametrize("lengths", [(5, 3, 4), (8, 5, 3)])
def test_an_image_tower_is_not_masked_where_lengths_agree_by_chance(lengths):
    """Images have five positions, as many as the longest of these texts."""
    tower = {**SMALL, "num_attention_heads": 4}
    config = tf.CLIPConfig(
        text_config={**tower, "vocab_size": 99, "eos_token_id": 2},
        vision_config={**tower, "image_size": 16, "patch_size": 8},
    )
    model, examples = build(tf.CLIPModel, config), texts(*lengths)
    generator = torch.Generator().manual_seed(1)
    for example in examples:
        example["pixel_values"] = torch.randn(1, 3, 16, 16, generator=generator).double()
    moments = calibrate(model, [padded(examples)])
    assert moments.layers["vision_model.encoder.layers.0.mlp.fc1"].tokens == 15
    assert moments.layers["text_model.encoder.layers.0.mlp.fc1"].tokens == sum(lengths)
    assert_same(moments, calibrate(model, examples))


def test_left_padding():
    model, examples = zoo.BY_BASE["LlamaForCausalLM"].build().double(), texts(9, 6)
    batch = {
        key: value.flip(1) for key, value in padded([{k: v.flip(1) for k, v in e.items()} for e in examples]).items()
    }
    moments = calibrate(model, [batch])
    assert {layer.tokens for layer in moments.layers.values()} == {15}


class Packed(nn.Module):
    """A model of no Transformers class, which cannot be tried and has rows that no mask fits."""

    def __init__(self):
        super().__init__()
        self.inner, self.pooled = nn.Linear(6, 6), nn.Linear(6, 2)

    def forward(self, x, attention_mask):
        return self.pooled(self.inner(x.unflatten(1, (-1, 2)).flatten(2, 3).unflatten(2, (2, -1))).mean((1, 2)))


def test_padding_that_cannot_be_told_is_warned_of():
    x, mask = torch.randn(2, 8, 6), torch.ones(2, 8, dtype=torch.long)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        calibrate(Packed(), [{"x": x + i, "attention_mask": mask} for i in range(4)], metric="activation")
    mask[1, 4:] = 0
    with pytest.warns(UserWarning, match=r"a mask of shape \(2, 8\) fits no input of 1 layers, among them \['inner'\]"):
        calibrate(Packed(), [{"x": x, "attention_mask": mask}], metric="activation")


@pytest.mark.usefixtures("short_refine")
def test_predictions_of_padded_sound_are_neither_compared_nor_learned(monkeypatch):
    """The masks are of samples and the predictions of frames, so that no shape tells which of them are padding."""
    model = build(tf.Wav2Vec2ForCTC, tf.Wav2Vec2Config(**WAVE, vocab_size=99))
    examples = waves(*(400, 300, 200, 350) * 3)
    small = convert(model, rank=8)
    together = [padded(examples[i : i + 4]) for i in range(0, 12, 4)]
    for found, expected in zip(
        compare(model, small, together, times=False).figures.items(),
        compare(model, small, examples, times=False).figures.items(),
        strict=True,
    ):
        assert found[0] == expected[0]
        assert found[1][1] == pytest.approx(expected[1][1], rel=1e-6)
    seen, parts_of = [], module.parts_of
    monkeypatch.setattr(module, "parts_of", lambda *given: seen.extend(parts_of(*given)) or seen)
    refine(small, model, together, epochs=1)
    assert [part.batch["input_values"].shape[1] for part in seen] == [400, 300, 200, 350] * 3
