"""What the gradient is taken of: every head's own loss as a sum over what it counts, and something for every model."""

import pytest
import torch
import transformers as tf
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import hf_reparam
from hf_reparam import LowRankConfig, calibrate, convert, refit, report
from hf_reparam.calibrate.objective import objective, uniforms
from hf_reparam.calibrate.predictions import compared, logits_of, problem_of
from hf_reparam.errors import TargetError, WeightError
from tests import zoo
from tests.usage.test_padding import SMALL, WAVE, assert_same, build, padded, texts, waves, with_labels


def classes(examples, *labels, name="labels", dtype=None):
    return [{**e, name: torch.tensor([label], dtype=dtype)} for e, label in zip(examples, labels, strict=True)]


def token_labels(examples, classes, *, skip=()):
    """A class for every token, none for some."""
    labels = [e["input_ids"] % classes for e in examples]
    for label in labels:
        label[:, list(skip)] = -100
    return [{**e, "labels": label} for e, label in zip(examples, labels, strict=True)]


def spans(examples):
    return [{**e, "start_positions": torch.tensor([1]), "end_positions": e["input_ids"].sum(1) % 3} for e in examples]


def two_losses(examples):
    """Masked tokens and pairs of sentences: two losses with different counts."""
    return [
        {**e, "next_sentence_label": torch.tensor([i % 2])} for i, e in enumerate(token_labels(examples, 90, skip=[2]))
    ]


THREE = (4, 12, 7)  # on these the mean over L - 1 tokens times L was up to a third off
HEADS = {
    "GPT2LMHeadModel": lambda: token_labels(texts(*THREE), 90),
    "LlamaForCausalLM": lambda: token_labels(texts(*THREE), 90, skip=[0, 1]),
    "OPTForCausalLM": lambda: token_labels(texts(*THREE), 90),
    "BertLMHeadModel": lambda: token_labels(texts(*THREE), 90),
    "BertForMaskedLM": lambda: token_labels(texts(*THREE), 90, skip=[1, 2]),
    "AlbertForMaskedLM": lambda: token_labels(texts(*THREE), 90, skip=[0]),
    "BertForTokenClassification": lambda: token_labels(texts(*THREE), 5, skip=[0]),
    "BertForPreTraining": lambda: two_losses(texts(*THREE)),
    "BertForNextSentencePrediction": lambda: classes(texts(*THREE), 0, 1, 1),
    "BertForQuestionAnswering": lambda: spans(texts(*THREE)),
    "BertForSequenceClassification": lambda: classes(texts(*THREE), 2, 0, 1),
    "GPT2ForSequenceClassification": lambda: classes(texts(*THREE), 2, 0, 1),
    "T5ForConditionalGeneration": lambda: with_labels(texts(*THREE), 5, 3, 9),
    "BartForConditionalGeneration": lambda: with_labels(texts(*THREE), 5, 3, 9),
    "ViTForImageClassification": lambda: classes(
        [{"pixel_values": torch.randn(1, 3, 16, 16).double()} for _ in range(3)], 2, 0, 1
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("base", HEADS)
def test_labels_count_the_same_in_any_batch(base):
    model, examples = zoo.BY_BASE[base].build().double(), HEADS[base]()
    assert_same(calibrate(model, [padded(examples, labels=-100)]), calibrate(model, examples))


def test_a_causal_loss_is_the_sum_over_the_labels_that_count():
    model = zoo.BY_BASE["GPT2LMHeadModel"].build().double()
    examples = token_labels(texts(4, 12), 90)

    def by_hand(model, batch):
        logits = model(input_ids=batch["input_ids"]).logits[:, :-1]
        return F.cross_entropy(logits.flatten(0, 1), batch["labels"][:, 1:].flatten(), reduction="sum")

    assert_same(calibrate(model, examples), calibrate(model, examples, loss_fn=by_hand))


@pytest.mark.slow
@pytest.mark.parametrize("problem", ["regression", "multi_label_classification"])
def test_numbers_and_yes_or_no_answers(problem):
    model = zoo.BY_BASE["BertForSequenceClassification"].build(problem_type=problem).double()
    examples = classes(texts(*THREE), [0.0, 1, 1], [1.0, 0, 0], [0.0, 0, 1], dtype=torch.float64)
    moments = calibrate(model, [padded(examples)])
    assert_same(moments, calibrate(model, examples))


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_transcripts_of_speech(reduction):
    model = build(tf.Wav2Vec2ForCTC, tf.Wav2Vec2Config(**WAVE, vocab_size=99, ctc_loss_reduction=reduction))
    examples = with_labels(waves(400, 230), 5, 3)
    assert_same(calibrate(model, [padded(examples, labels=-100)]), calibrate(model, examples))


def test_a_loss_of_its_own_is_a_mean_over_examples():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(6, 2)

        def forward(self, x, labels):
            out = self.fc(x)
            return {"loss": (out - labels).abs().mean(0).sum(), "logits": out}

    net, x, labels = Net(), torch.randn(8, 6), torch.randn(8, 2)
    whole = calibrate(net, [{"x": x, "labels": labels}])
    assert_same(whole, calibrate(net, [{"x": x[i : i + 1], "labels": labels[i : i + 1]} for i in range(8)]))


def test_labels_that_are_no_classes():
    model = zoo.BY_BASE["BertForSequenceClassification"].build()
    with pytest.raises(TargetError, match=r"loss takes no such labels .*: leave `labels` out"):
        calibrate(model, [{**zoo._text(), "labels": torch.tensor([-1, -1])}])


def clip(kind=tf.CLIPModel, config=tf.CLIPConfig):
    text = {**SMALL, "vocab_size": 99, "eos_token_id": 2, "max_position_embeddings": 16}
    vision = {**SMALL, "image_size": 16, "patch_size": 8}
    torch.manual_seed(0)
    model = kind(config(text_config=text, vision_config=vision)).eval()
    batch = {"input_ids": zoo._ids(4, 8), "pixel_values": torch.randn(4, 3, 16, 16)}
    return model, batch


def dpr():
    model = build(tf.DPRQuestionEncoder, tf.DPRConfig(**SMALL, vocab_size=99)).float()
    return model, {"input_ids": zoo._ids(4, 8)}


def pixtral():
    config = tf.PixtralVisionConfig(**SMALL, image_size=16, patch_size=8, head_dim=8)
    model = build(tf.PixtralVisionModel, config).float()
    return model, {"pixel_values": torch.randn(4, 3, 16, 16), "image_sizes": torch.tensor([[16, 16]] * 4)}


def patch_tst():
    config = tf.PatchTSTConfig(
        num_input_channels=2, context_length=16, prediction_length=4, patch_length=4, patch_stride=4, d_model=32,
        num_attention_heads=4, num_hidden_layers=1, ffn_dim=48,
    )  # fmt: skip
    model = build(tf.PatchTSTForPrediction, config).float()
    return model, {"past_values": torch.randn(4, 16, 2)}


def depth():
    config = tf.GLPNConfig(
        num_encoder_blocks=1, depths=[1], sr_ratios=[1], hidden_sizes=[16], patch_sizes=[7], strides=[4],
        num_attention_heads=[2], mlp_ratios=[2], decoder_hidden_size=16,
    )  # fmt: skip
    return build(tf.GLPNForDepthEstimation, config).float(), {"pixel_values": torch.randn(2, 3, 32, 32)}


MODELS = {
    "CLIP": clip,
    "SigLIP": lambda: clip(tf.SiglipModel, tf.SiglipConfig),
    "DPR": dpr,
    "Pixtral": pixtral,
    "PatchTST": patch_tst,
    "GLPN": depth,
}


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_models_without_loss_logits_and_hidden_states(name):
    model, batch = MODELS[name]()
    calibration = calibrate(model, [batch] * 2)
    small = convert(model, LowRankConfig(keep=0.6, min_rank=1), calibration=calibration)
    report = hf_reparam.report(small)
    assert report.metric == "fisher"
    assert any(layer.metric == "fisher" for layer in report.layers)
    again = refit(small, model, [batch] * 2, calibration=calibration)
    assert again.after <= again.before


def test_the_loss_that_a_model_gives():
    model, batch = clip()
    asked = calibrate(model, [{**batch, "return_loss": True}]).layers["text_projection"]
    ours = calibrate(model, [batch], loss_fn=lambda m, b: 4 * m(**b, return_loss=True).loss)
    torch.testing.assert_close(asked.gradient_products, ours.layers["text_projection"].gradient_products)


@pytest.mark.slow
def test_a_loss_function_of_ones_own():
    model, batch = clip()
    called, outputs = [], []

    def loss_fn(model, batch):
        called.append(1)
        return model(**batch).image_embeds.sum()

    seen = calibrate(model, [batch], loss_fn=loss_fn)
    assert len(called) == 1
    hook = model.visual_projection.register_forward_hook(lambda layer, args, out: outputs.append(out))
    (gradient,) = torch.autograd.grad(loss_fn(model, batch), outputs)
    hook.remove()
    products = (gradient.T @ gradient).double()
    torch.testing.assert_close(seen.layers["visual_projection"].gradient_products, products, rtol=1e-4, atol=1e-6)
    small, usual = (convert(model, keep=0.6, calibration=found) for found in (seen, calibrate(model, [batch])))
    assert not all(map(torch.equal, small.state_dict().values(), usual.state_dict().values()))


@pytest.mark.slow
def test_a_distance_of_ones_own():
    model, batch = clip()
    small = convert(model, rank=4)
    seen = []

    def distance(outputs, reference):
        seen.append(float((outputs.text_embeds - reference.text_embeds).square().sum()))
        return seen[-1]

    report = refit(small, model, [batch] * 3, distance=distance)
    assert report.before == pytest.approx(seen[0] / 4, rel=1e-6)


def test_a_loss_that_reaches_no_layer():
    net = nn.Sequential(nn.Linear(6, 4))
    with pytest.raises(TargetError, match=r"depends on none of the 1 layers, among them \['0'\]: give a loss_fn"):
        calibrate(net, [{"input": torch.randn(5, 6)}], loss_fn=lambda m, b: m(**b).detach().sum())


def squares(model, batch):
    return model(**batch).square().sum()


def relu(inplace):
    torch.manual_seed(3)
    activation = nn.ReLU(inplace=inplace)
    return nn.Sequential(nn.Linear(6, 8), activation, nn.Linear(8, 8), activation, nn.Linear(8, 4))


def test_layers_whose_output_is_written_into():
    batch = {"input": torch.randn(9, 6)}
    assert_same(*(calibrate(relu(inplace), [batch], loss_fn=squares) for inplace in (True, False)))


def test_a_view_that_is_written_into():
    """Longformer divides its queries in place; the gradient seen is that of the layer's own output."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.query = nn.Linear(6, 6), nn.Linear(6, 4)

        def forward(self, x):
            query = self.query(self.first(x).transpose(0, 1))
            query /= 4.0
            return query

    net, x = Net(), torch.randn(1, 9, 6)
    seen = calibrate(net, [{"x": x}], loss_fn=squares).layers["query"].gradient_products
    gradient = net(x).detach()[:, 0].double() / 2
    torch.testing.assert_close(seen, gradient.T @ gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["input", "x"])
def test_layers_that_are_called_by_keyword(name):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(6, 4) if name == "input" else tf.pytorch_utils.Conv1D(4, 6)

        def forward(self, x):
            return self.fc(**{name: x})

    x = torch.randn(9, 6)
    layer = calibrate(Net(), [{"x": x}], loss_fn=squares).layers["fc"]
    torch.testing.assert_close(layer.input_products, (x.T @ x).double(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("reentrant", [True, False])
def test_what_checkpointing_computes_again_counts_once(reentrant):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.inner = nn.Linear(6, 6), nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 6))

        def forward(self, x, again=True):
            x = self.first(x)
            return checkpoint(self.inner, x, use_reentrant=reentrant) if again else self.inner(x)

    torch.manual_seed(0)
    net, x = Net(), torch.randn(9, 6)
    plain = calibrate(net, [{"x": x, "again": False}], loss_fn=squares)
    assert_same(calibrate(net, [{"x": x}], loss_fn=squares), plain)


@pytest.mark.slow
def test_inside_inference_mode():
    case = zoo.BY_BASE["BertForMaskedLM"]
    model, batch = case.build(), case.batch()
    with torch.inference_mode():
        inside = {key: value.clone() for key, value in batch.items()}
        small = convert(model, keep=0.5, calibration=[inside])
        moments = calibrate(model, [inside])
        refit(small, model, [inside] * 2, calibration=moments)
        assert torch.is_inference_mode_enabled()
        others = [hf_reparam.merge(small), hf_reparam.to_pairs(small)]
    assert not any(p.is_inference() for made in (small, *others) for p in made.parameters())
    layer = moments.layers["encoder.layer.0.output.dense"]
    assert torch.equal(
        layer.gradient_products,
        calibrate(model, [batch]).layers["encoder.layer.0.output.dense"].gradient_products,
    )


def test_weights_made_inside_inference_mode():
    with torch.inference_mode():
        model = zoo.BY_BASE["BertModel"].build().train()
    with pytest.raises(WeightError, match=r"not inside torch.inference_mode\(\)"):
        calibrate(model, [zoo._text()])
    assert model.training
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("problem", "unit", "apart"),
    [
        ("regression", "of the squared outputs", lambda a, b: (a - b).square().sum() / b.square().sum()),
        (
            "multi_label_classification",
            "nats per example",
            lambda a, b: (
                (
                    F.binary_cross_entropy_with_logits(a, b.sigmoid())
                    - F.binary_cross_entropy_with_logits(b, b.sigmoid())
                )
                * b.shape[-1]
            ),
        ),
    ],
)
@torch.no_grad()
def test_several_numbers_and_answers_are_judged_as_such(problem, unit, apart):
    model = zoo.BY_BASE["BertForSequenceClassification"].build(problem_type=problem, initializer_range=0.3)
    batches = [{k: v.roll(i, 1) for k, v in zoo.BY_BASE["BertModel"].batch().items()} for i in range(24)]
    calibration = calibrate(model, batches)
    small = convert(model, LowRankConfig(keep=0.5, min_rank=2), calibration=calibration)
    judged = hf_reparam.report(small).judgement
    assert judged.unit == unit
    held = [batch for batch, _ in calibration.batches]
    low, dense = (torch.cat([m(**batch).logits for batch in held]) for m in (small, model))
    # factors are made anew of all data after plans were judged
    assert judged.measured[judged.chosen] == pytest.approx(float(apart(low, dense)), rel=0.5)


def time_series():
    config = tf.PatchTSTConfig(
        num_input_channels=2, context_length=16, patch_length=4, patch_stride=4, prediction_length=4, d_model=32,
        num_attention_heads=4, num_hidden_layers=2, ffn_dim=48, loss="nll",
    )  # fmt: skip
    return tf.PatchTSTForPrediction(config).eval()


@pytest.mark.slow
@pytest.mark.usefixtures("short_refine")
def test_time_series_are_judged_by_what_is_predicted_and_not_by_the_mean_of_the_past():
    torch.manual_seed(0)
    model = time_series()
    data = [{"past_values": torch.randn(4, 16, 2)} for _ in range(8)]
    small = convert(model, LowRankConfig(keep=0.5, min_rank=2), calibration=data)
    assert hf_reparam.report(small).judgement.measured["uniform ranks (fisher)"] > 1e-8
    shown = hf_reparam.compare(model, small, data, times=False).figures
    assert {name for name in shown if name.startswith("cosine")} == {
        f"cosine of prediction outputs.{i}" for i in range(3)
    }
    coarse = convert(model, rank=1)  # the plan for half of the parameters loses next to nothing
    assert hf_reparam.refine(coarse, model, data, epochs=1).before > 1e-8


def masked_images():
    config = tf.ViTMAEConfig(**SMALL, image_size=16, patch_size=4, decoder_hidden_size=32, decoder_num_hidden_layers=1,
        decoder_num_attention_heads=4, decoder_intermediate_size=48)  # fmt: skip
    return tf.ViTMAEForPreTraining(config).eval()


def test_models_that_draw_numbers_are_judged_by_the_same_draws():
    model, data = masked_images(), [{"pixel_values": torch.randn(2, 3, 16, 16)} for _ in range(3)]
    state = torch.get_rng_state()
    found = hf_reparam.compare(model, model, data, times=False).figures
    assert found["cosine of values"] == (None, pytest.approx(1, abs=1e-6))
    assert torch.equal(torch.get_rng_state(), state)


def test_states_of_the_past_are_not_written_over_while_gradients_are_taken():
    config = tf.RwkvConfig(vocab_size=99, hidden_size=32, attention_hidden_size=32, num_hidden_layers=2,
        intermediate_size=48, context_length=32)  # fmt: skip
    model = tf.RwkvForCausalLM(config).eval()
    batches = [{"input_ids": torch.randint(0, 99, (2, 7))} for _ in range(3)]
    found = calibrate(model, batches)
    assert all(layer.has_gradient() for layer in found.layers.values())


def segmentation():
    config = tf.SegformerConfig(
        num_encoder_blocks=2, depths=[1, 1], sr_ratios=[2, 1], hidden_sizes=[16, 32], patch_sizes=[3, 3],
        strides=[2, 2], num_attention_heads=[1, 2], mlp_ratios=[2, 2], decoder_hidden_size=32, num_labels=5,
        initializer_range=0.3,
    )  # fmt: skip
    return tf.SegformerForSemanticSegmentation(config).eval()


@torch.no_grad()
def test_the_classes_of_segmentation_are_chosen_in_each_pixel():
    torch.manual_seed(0)
    model = segmentation()
    data = [{"pixel_values": torch.randn(4, 3, 16, 24)} for _ in range(8)]
    calibration = calibrate(model, data)
    small = convert(model, LowRankConfig(keep=0.5, min_rank=2), calibration=calibration)
    judged = hf_reparam.report(small).judgement
    assert judged.unit == "nats per pixel"
    held = [batch for batch, _ in calibration.batches]
    low, dense = (torch.cat([m(**batch).logits for batch in held]).log_softmax(1) for m in (small, model))
    apart = (dense.exp() * (dense - low)).sum(1).mean()
    assert judged.measured[judged.chosen] == pytest.approx(float(apart), rel=0.5)
    likeness = hf_reparam.compare(model, small, data[:1]).figures["same first choice"][1]
    first = [m(**data[0]).logits.argmax(1) for m in (model, small)]
    assert likeness == pytest.approx(float((first[0] == first[1]).float().mean()), abs=1e-6)


def test_masks_of_queries_are_yes_or_no_answers():
    outputs = {"class_queries_logits": torch.randn(2, 3, 4), "masks_queries_logits": torch.randn(2, 3, 5, 6)}
    found = logits_of(outputs, "segmentation")
    assert {name: value.shape for name, value in found.items()} == {
        "class_queries_logits": (2, 3, 4),
        "masks_queries_answers": (2, 3, 5, 6),
    }
    assert list(logits_of({"logits": torch.randn(2, 1, 5, 6)}, "segmentation")) == ["answers"]


@pytest.mark.parametrize(
    ("name", "shape", "kind", "judged"),
    [
        ("ElectraForPreTraining", (2, 7), "answers", (2, 7, 1)),
        ("TapasForQuestionAnswering", (2, 7), "answers", (2, 7, 1)),
        ("ConditionalDetrForObjectDetection", (2, 5, 3), "answers", (2, 5, 3)),
        ("ReparamOwlViTForObjectDetection", (2, 5, 3), "answers", (2, 5, 3)),
        ("ReparamDetrForObjectDetection", (2, 5, 4), "logits", (2, 5, 4)),
        ("YolosForObjectDetection", (2, 5, 4), "logits", (2, 5, 4)),
        ("CLIPSegForImageSegmentation", (2, 8, 8), "pixel_answers", (2, 8, 8, 1)),
        ("ViltForQuestionAnswering", (2, 9), "answers", (2, 9)),
        ("PerceiverForOpticalFlow", (2, 8, 8, 2), "values", (2, 8, 8, 2)),
        ("XLMForQuestionAnswering", (2,), "logits", (2, 1)),
        ("BertForSequenceClassification", (2, 7), "logits", (2, 7)),
    ],
)
def test_what_logits_are(name, shape, kind, judged):
    model = type(name, (nn.Module,), {})()
    found = logits_of({"logits": torch.randn(shape)}, problem_of(model))
    assert {key: value.shape for key, value in found.items()} == {kind: judged}


def test_of_detectors_classes_are_judged_alone():
    """Beside them are boxes and masks, and what earlier layers guess."""
    beside = {"enc_outputs_coord_logits": torch.randn(2, 5, 4), "intermediate_logits": torch.randn(2, 3, 5, 3)}
    logits = {"logits": torch.randn(2, 5, 3)}
    assert list(logits_of(logits | beside, "multi_label_classification")) == ["answers"]
    assert list(logits_of(logits | {"pred_masks": torch.randn(2, 5, 8, 8)}, "segmentation")) == ["logits"]


def test_heads_draw_apart():
    """Gradients of two heads do not correlate."""
    start, end = (torch.zeros(2000, 1, 3, requires_grad=True) for _ in range(2))
    for outputs in ({"start_logits": start[:, 0], "end_logits": end[:, 0]}, {"a_embeds": start, "b_embeds": end}):
        start.grad = end.grad = None
        objective(outputs, {}, (), seeds=range(2000)).backward()
        both = start.grad[:, 0].T @ end.grad[:, 0] / 2000
        alone = start.grad[:, 0].T @ start.grad[:, 0] / 2000
        assert both.norm() < 0.15 * alone.norm()


def test_classes_that_are_ruled_out_leave_the_loss_finite():
    logits = torch.tensor([[-torch.inf, 0.0, -torch.inf]]).requires_grad_()
    loss = objective({"logits": logits}, {}, (), seeds=[0])
    loss.backward()
    assert loss.isfinite()
    assert not logits.grad.any()


def test_answers_for_tokens_are_judged_each_and_padding_is_left_out():
    torch.manual_seed(0)
    model = tf.ElectraForPreTraining(tf.ElectraConfig(**SMALL, vocab_size=99, embedding_size=32)).eval()
    small = convert(model, rank=8).eval()
    batch = {"input_ids": torch.randint(3, 90, (4, 9)), "attention_mask": torch.ones(4, 9, dtype=torch.int64)}
    more = {key: F.pad(value, (0, 11)) for key, value in batch.items()}
    plain, wide = (hf_reparam.compare(model, small, [b], times=False).figures for b in (batch, more))
    name = "divergence from dense, nats per token"
    assert wide[name][1] == pytest.approx(plain[name][1], rel=1e-3)
    with torch.no_grad():
        small.discriminator_predictions.dense_prediction.bias += 20
    assert hf_reparam.compare(model, small, [batch], times=False).figures[name][1] > 1  # no softmax sees a shift


@pytest.mark.parametrize(
    ("kind", "config", "batch", "predicted"),
    [
        (
            tf.CLIPTextModelWithProjection,
            tf.CLIPTextConfig(**SMALL, vocab_size=99, projection_dim=16, eos_token_id=98),
            lambda: {"input_ids": torch.randint(3, 90, (4, 9))},
            {"text_embeds"},
        ),
        (
            tf.DecisionTransformerModel,
            tf.DecisionTransformerConfig(state_dim=5, act_dim=3, hidden_size=32, n_head=4, n_layer=1, max_ep_len=20),
            lambda: {
                "states": torch.randn(4, 6, 5),
                "actions": torch.randn(4, 6, 3),
                "rewards": torch.randn(4, 6, 1),
                "returns_to_go": torch.randn(4, 6, 1),
                "timesteps": torch.arange(6).expand(4, 6),
                "attention_mask": torch.ones(4, 6).long(),
            },
            {"state_preds", "action_preds", "return_preds"},
        ),
    ],
)
def test_what_a_head_gives_is_judged_and_not_the_hidden_states_beside_it(kind, config, batch, predicted):
    torch.manual_seed(0)
    model, data = kind(config).eval(), [batch() for _ in range(6)]
    assert set(compared(model(**data[0]), None)) == predicted
    small = convert(model, keep=0.6, calibration=data)
    assert report(small).judgement.unit == "of the squared outputs"


def test_an_example_without_a_batch_dimension_is_told_of():
    with pytest.raises((IndexError, RuntimeError, ValueError)) as error:
        calibrate(time_series(), [{"past_values": torch.randn(16, 2)} for _ in range(3)])
    (note,) = error.value.__notes__
    assert note.startswith("It was called with past_values (16, 2) float32. ")
    assert note.endswith(" If that is one example, make it a batch of one: tensor[None].")


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_where_memory_runs_out_it_says_what_to_do(direction):
    def full(*given):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    if direction == "forward":
        model[1].register_forward_pre_hook(full)
    else:
        model[1].register_forward_hook(lambda layer, inputs, output: output.register_hook(full) and None)
    with pytest.raises(torch.OutOfMemoryError) as error:
        calibrate(model, [{"input": torch.randn(4, 8)} for _ in range(3)])
    (note,) = error.value.__notes__
    assert note == (
        "It was called with input (4, 8) float32. Memory ran out: give smaller batches, or shorter texts by "
        "max_length=."
    )


def test_the_features_of_one_example_are_not_taken_for_examples():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(48, 64), nn.Linear(64, 64))
    small = convert(model, keep=0.6, calibration=[{"input": torch.randn(48)} for _ in range(30)])
    assert report(small).layers


@pytest.mark.parametrize("kind", ["plain", "Transformers"])
def test_a_loss_of_ones_own_sees_labels_that_forward_does_not_take(kind):
    torch.manual_seed(0)
    if kind == "plain":
        model = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 10))
        data = [{"input": torch.randn(8, 32), "y": torch.randint(0, 10, (8,))} for _ in range(12)]
        loss = lambda m, b: F.cross_entropy(m(b["input"]), b["y"], reduction="sum")  # noqa: E731
    else:
        model = zoo.BY_BASE["BertModel"].build()
        data = classes(texts(*range(5, 13)), *[i % 2 for i in range(8)])
        loss = lambda m, b: (m(b["input_ids"]).pooler_output.sum(-1) * b["labels"]).sum()  # noqa: E731
    made = calibrate(model, data, loss_fn=loss)
    assert all(layer.has_gradient() for layer in made.layers.values())
    assert report(convert(model, rank=4, calibration=made)).layers


class Ruled(nn.Module):
    """Rules a class out, as detectors do with words that a text does not have."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(32, 32)

    def forward(self, x):
        scores = self.layer(x)
        return {"logits": scores.masked_fill(torch.arange(32) == 3, -torch.inf)}


@pytest.mark.usefixtures("short_refine")
def test_a_class_that_is_ruled_out_does_not_count():
    torch.manual_seed(0)
    model, data = Ruled(), [{"x": torch.randn(8, 32)} for _ in range(12)]
    plan = hf_reparam.make_plan(model, keep=0.6, calibration=calibrate(model, data))
    assert all(0 < value < 1 for value in plan.report.judgement.measured.values())
    small = convert(model, plan, calibration=calibrate(model, data))
    found = hf_reparam.compare(model, small, data, times=False).figures
    assert 0 < found["divergence from dense, nats per example"][1] < 1
    assert hf_reparam.refine(small, model, data, epochs=1).before < 1


@pytest.mark.usefixtures("short_refine")
def test_padding_of_texts_to_choose_from_is_not_counted():
    """Masks of several texts for an example have a dimension more, and so have the tokens that are predicted."""
    torch.manual_seed(0)
    size = {"n_embd": 32, "n_layer": 1, "n_head": 2, "vocab_size": 99, "n_positions": 64, "num_labels": 1}
    model = tf.GPT2DoubleHeadsModel(tf.GPT2Config(**size, eos_token_id=1)).eval()
    texts = [torch.randint(2, 99, (4, 2, 9)) for _ in range(10)]
    lengths = [torch.randint(3, 10, (4, 2, 1)) for _ in texts]

    def padded_to(width):
        for ids, length in zip(texts, lengths, strict=True):
            mask = (torch.arange(width) < length).long()
            filled = F.pad(ids, (0, width - 9)) * mask
            yield {"input_ids": filled, "attention_mask": mask, "mc_token_ids": mask.sum(-1) - 1}

    found = []
    for width in (9, 30):
        data = list(padded_to(width))
        plan = hf_reparam.make_plan(model, keep=0.4, calibration=calibrate(model, data))
        small = convert(model, rank=4)
        figures = hf_reparam.compare(model, small, data, times=False).figures
        report = hf_reparam.refine(small, model, data, epochs=1, synthetic=0)
        found.append([min(plan.report.judgement.measured.values()), figures[KL][1], report.before])
    assert found[0] == pytest.approx(found[1], rel=1e-3)


KL = "divergence from dense, nats per token"


@pytest.mark.usefixtures("short_refine")
def test_labels_of_models_that_give_tuples_are_seen():
    named, tuples = (zoo.BY_BASE["BertForSequenceClassification"].build() for _ in range(2))
    tuples.config.return_dict = False
    data = classes(texts(*range(5, 13)), *[i % 3 for i in range(8)])
    assert isinstance(tuples(**data[0]), tuple)
    for model in (named, tuples):
        model.load_state_dict(named.state_dict())
    plans = [hf_reparam.make_plan(m, keep=0.5, calibration=calibrate(m, data)) for m in (named, tuples)]
    assert plans[0] == plans[1]
    smalls = [convert(m, rank=4) for m in (named, tuples)]
    found = [hf_reparam.compare(m, s, data, times=False).figures for m, s in zip((named, tuples), smalls, strict=True)]
    assert found[0] == found[1]
    assert "loss" in found[0]
    reports = [hf_reparam.refine(s, m, data, epochs=1) for m, s in zip((named, tuples), smalls, strict=True)]
    assert reports[0] == reports[1]


def test_reconstructed_pixels_are_numbers():
    data = [{"pixel_values": torch.randn(4, 3, 16, 16)} for _ in range(6)]
    small = convert(masked_images(), keep=0.6, calibration=data)
    assert report(small).judgement.unit == "of the squared outputs"


def test_labels_of_another_type_are_told_of():
    model = zoo.BY_BASE["BertForSequenceClassification"].build()
    model.config.problem_type = "multi_label_classification"
    data = [{"input_ids": torch.randint(5, 90, (2, 9)), "labels": torch.ones(2, 3).long()} for _ in range(3)]
    with pytest.raises(TargetError, match="the model's loss takes no such labels"):
        calibrate(model, data)


def test_what_a_loss_of_ones_own_gets_beside_changes_nothing_else(tmp_path):
    """Neither which examples are the same, nor what is kept of those that are held out."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 3))
    rows = [{"input": torch.randn(8, 8)} for _ in range(20)]
    data = [{"y": torch.arange(8) % 3, "name": ["a"] * 8, **row} for row in rows]
    made = calibrate(model, data, loss_fn=lambda m, b: F.cross_entropy(m(b["input"]), b["y"], reduction="sum"))
    made.save(tmp_path / "moments")
    again = hf_reparam.Calibration.load(tmp_path / "moments")
    assert len(again.batches) == len(made.batches) > 0
    assert all(batch.keys() == {"input"} for batch, _ in made.batches)


def test_texts_to_choose_from_draw_numbers_of_their_own():
    mask = torch.ones(2, 5, dtype=torch.bool)
    drawn = uniforms(torch.zeros(1, 2, 5, 7), 1, [3], (mask,))
    assert len(set(drawn.flatten().tolist())) == 10
    shorter = mask.clone()
    shorter[0, 3:] = False
    assert torch.equal(uniforms(torch.zeros(1, 2, 5, 7), 1, [3], (shorter,))[0, 0, :3], drawn[0, 0, :3])
