"""What models are asked for, family by family: a full-rank conversion answers what its dense model answers.

Both are saved, and loaded as people load them: by a pipeline from its folder, or by the class of the saved model.
Weights are float64, and drawn so large that a lower rank gives other answers.
"""

import functools
import json
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import transformers as tf
from tokenizers import Tokenizer, models, pre_tokenizers

from hf_reparam import LowRankConfig, convert, merge
from tests import zoo

CLOSE = {"atol": 1e-5, "rtol": 1e-5}  # Llama and T5 compute their norms in float32, whatever the weights are
PREFIX = {"GPT-2": "GPT2", "Llama": "Llama", "T5": "T5", "BART": "Bart", "Marian": "Marian", "Whisper": "Whisper"}
PREFIX |= {"BERT": "Bert", "ViT": "ViT", "CLIP": "CLIP"}
PIVOTED = {"Llama", "BART", "Whisper", "ViT"}

CAUSAL = {"GPT-2": "LMHeadModel", "Llama": "ForCausalLM"}
SEQ2SEQ = {"T5": "ForConditionalGeneration", "BART": "ForConditionalGeneration", "Marian": "MTModel"}
SPEECH = {"Whisper": "ForConditionalGeneration"}
CLASSIFIES = dict.fromkeys(("BERT", "GPT-2", "Llama", "T5", "BART"), "ForSequenceClassification")
TABLE = {
    "greedy": CAUSAL | SEQ2SEQ | SPEECH,
    "beams": CAUSAL | SEQ2SEQ | SPEECH,
    "sampling": CAUSAL | SEQ2SEQ | SPEECH,
    "assisted": CAUSAL | SEQ2SEQ | SPEECH,
    "static cache": CAUSAL | SEQ2SEQ | SPEECH,
    "no cache": CAUSAL | SEQ2SEQ | SPEECH,
    "left padding": CAUSAL,
    "past_key_values": CAUSAL,
    "text-generation": CAUSAL,
    "fill-mask": {"BERT": "ForMaskedLM"},
    "text-classification": CLASSIFIES,
    "zero-shot-classification": {"BERT": "ForSequenceClassification", "BART": "ForSequenceClassification"},
    "token-classification": {"BERT": "ForTokenClassification", "GPT-2": "ForTokenClassification"},
    "feature-extraction": {"BERT": "Model", "GPT-2": "Model"},
    "image-classification": {"ViT": "ForImageClassification", "CLIP": "ForImageClassification"},
    "image-feature-extraction": {"ViT": "Model"},
    "zero-shot-image-classification": {"CLIP": "Model"},
    "automatic-speech-recognition": SPEECH,
    "Trainer": CLASSIFIES | {"ViT": "ForImageClassification"},
    "predict_with_generate": SEQ2SEQ | SPEECH,
}
"""Task -> family -> the head of the class that does it."""


# models and what stands before them


def whisper():
    sizes = {f"{side}_{key}": value for side in ("encoder", "decoder")
             for key, value in (("layers", 2), ("attention_heads", 4), ("ffn_dim", 48))}  # fmt: skip
    ids = {"decoder_start_token_id": 1, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    return tf.WhisperConfig(
        **sizes, **ids, vocab_size=99, d_model=32, num_mel_bins=8, max_source_positions=50, max_target_positions=64,
        suppress_tokens=None, begin_suppress_tokens=None, init_std=0.3,
    )  # fmt: skip


def clip():
    size = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    text = {**size, **zoo.TEXT, "eos_token_id": 2, "bos_token_id": 1, "pad_token_id": 0}
    vision = {**size, "image_size": 16, "patch_size": 8}
    return tf.CLIPConfig(text_config=text, vision_config=vision, projection_dim=16, initializer_factor=3.0)


CONFIGS = {
    "GPT-2": lambda: zoo.gpt2(initializer_range=0.3),
    "Llama": lambda: zoo.llama(initializer_range=0.3, pad_token_id=0),
    "T5": lambda: zoo.t5(initializer_factor=2.0, eos_token_id=2),
    "BART": lambda: zoo.bart(init_std=0.3, forced_eos_token_id=None),
    "Marian": lambda: zoo.marian(init_std=0.3),
    "Whisper": whisper,
    "BERT": lambda: zoo.bert(initializer_range=0.3),
    "ViT": lambda: zoo.vit(initializer_range=0.3),
    "CLIP": clip,
}


def words():
    """A tokenizer of as many words as the models have tokens."""
    known = ["<pad>", "<s>", "</s>", "<unk>", "<mask>", *(f"w{i}" for i in range(5, 99))]
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(known)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return tf.PreTrainedTokenizerFast(
        tokenizer_object=core, **special, mask_token="<mask>", sep_token="</s>", model_max_length=60
    )


def prepare(family, folder):
    """Write what turns texts, images or sounds into inputs."""
    if family == "Whisper":
        tf.WhisperFeatureExtractor(feature_size=8, chunk_length=1).save_pretrained(folder)
        letters = [chr(code) for code in range(ord("!"), ord("~") + 1)]
        known = ["<|endoftext|>", "<|startoftranscript|>", "<|startofprev|>", *letters, "<|notimestamps|>"]
        tf.WhisperTokenizer({word: i for i, word in enumerate(known)}, []).save_pretrained(folder)
    elif family != "ViT":
        words().save_pretrained(folder)
    if family in ("ViT", "CLIP"):
        kind = "ViTImageProcessorPil" if hasattr(tf, "ViTImageProcessorPil") else "ViTImageProcessor"  # before 5.3
        processor = {"image_processor_type": kind, "size": {"height": 16, "width": 16}}
        (folder / "preprocessor_config.json").write_text(json.dumps(processor))


class Subject(NamedTuple):
    family: str
    model: Any
    folder: str


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(family, head, rank or None for the dense model) -> the model as it was loaded from its folder."""

    @functools.cache
    def dense(family, head):
        torch.manual_seed(0)
        config = CONFIGS[family]()
        config.label2id = {"contradiction": 0, "entailment": 1}
        config.id2label = {0: "contradiction", 1: "entailment"}
        model = getattr(tf, PREFIX[family] + head)(config).double().eval()
        if model.can_generate():
            model.generation_config.max_new_tokens = 7
        return model

    @functools.cache
    def subject(family, head, rank=None):
        model = dense(family, head)
        if rank is not None:
            form = "pivoted" if family in PIVOTED else "pair"
            model = convert(model, LowRankConfig(rank=rank, form=form, allow_larger=True))
        folder = tmp_path_factory.mktemp("model")
        model.save_pretrained(folder)
        prepare(family, folder)
        return Subject(family, type(model).from_pretrained(folder), str(folder))

    return subject


# tasks


def inputs(family, rows=2):
    if family == "Whisper":
        return {"input_features": torch.randn(rows, 8, 100, generator=torch.Generator().manual_seed(4)).double()}
    if family in CAUSAL:
        ids = zoo._ids(rows)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return {key: value[:rows] for key, value in zoo._text().items()}


def generated(subject, rows=2, **options):
    out = subject.model.generate(
        **inputs(subject.family, rows), **options, output_scores=True, return_dict_in_generate=True
    )
    return out.sequences, out.scores


def sampled(subject):
    torch.manual_seed(5)
    return generated(subject, do_sample=True, temperature=1.5, top_k=20, top_p=0.95)


def left_padded(subject):
    ids, mask = zoo._ids(), torch.ones(2, 7, dtype=torch.long)
    ids[1, :3] = mask[1, :3] = 0
    tokens = subject.model.generate(ids, attention_mask=mask)[1, 7:]
    alone = subject.model.generate(ids[1:, 3:])[0, 4:]
    assert torch.equal(tokens, alone)
    return tokens


def gone_on(subject):
    """A second turn with the cache of the first."""
    first = subject.model.generate(zoo._ids(), return_dict_in_generate=True)
    ids = torch.cat([first.sequences, zoo._ids(2, 3, seed=6)], 1)
    mask = torch.ones_like(ids)
    second = subject.model.generate(ids, attention_mask=mask, past_key_values=first.past_key_values)
    assert torch.equal(second, subject.model.generate(ids, attention_mask=mask))
    return second


def picture():
    from PIL import Image

    return Image.fromarray(np.random.default_rng(0).integers(0, 255, (20, 20, 3), np.uint8))


NAMES = {"candidate_labels": ["w20", "w30"], "hypothesis_template": "w9 {} </s>"}
PIPELINES = {
    "text-generation": lambda ask: ask("w7 w8 w9", max_new_tokens=5, do_sample=False),
    "fill-mask": lambda ask: ask("w7 <mask> w9"),
    "text-classification": lambda ask: ask(["w7 w8 w9 </s>", "w10 w11 w12 </s>"], top_k=None),
    "zero-shot-classification": lambda ask: ask("w7 w8", **NAMES),
    "token-classification": lambda ask: ask("w7 w8 w9"),
    "feature-extraction": lambda ask: ask("w7 w8 w9"),
    "image-classification": lambda ask: ask(picture()),
    "image-feature-extraction": lambda ask: ask(picture()),
    "zero-shot-image-classification": lambda ask: ask(picture(), **NAMES),
    "automatic-speech-recognition": lambda ask: ask(np.sin(np.arange(12_000) ** 1.3)),
}


def trainer(subject, folder, kind=tf.Trainer, **options):
    """One with four rows: classes of texts or pictures, or for a Seq2SeqTrainer five tokens each."""
    arguments = tf.TrainingArguments if kind is tf.Trainer else tf.Seq2SeqTrainingArguments
    quiet = {"use_cpu": True, "report_to": [], "disable_tqdm": True, "dataloader_pin_memory": False}
    draw = torch.Generator().manual_seed(3)
    if subject.family == "ViT":
        asked = {"pixel_values": torch.randn(4, 3, 16, 16, generator=draw).double()}
    elif subject.family == "Whisper":
        asked = inputs("Whisper", rows=4)
    else:
        asked = {"input_ids": torch.cat([zoo._ids(4, 6), torch.full((4, 1), 2)], 1)}
    labels = torch.tensor([0, 1, 1, 0]) if kind is tf.Trainer else zoo._ids(4, 5, seed=7)
    rows = [dict(zip([*asked, "labels"], row, strict=True)) for row in zip(*asked.values(), labels, strict=True)]
    settings = arguments(str(folder), **quiet, per_device_eval_batch_size=2, save_strategy="no", **options)
    return kind(subject.model, settings, train_dataset=rows, eval_dataset=rows)


def predicted(made_trainer):
    answers = made_trainer.predict(made_trainer.eval_dataset)
    return answers.predictions, answers.label_ids, answers.metrics["test_loss"]


def written(subject, folder):
    return predicted(trainer(subject, folder, tf.Seq2SeqTrainer, predict_with_generate=True, generation_max_length=9))


TASKS = {
    "greedy": lambda subject, _: generated(subject),
    "beams": lambda subject, _: generated(subject, num_beams=3, length_penalty=2.0),
    "sampling": lambda subject, _: sampled(subject),
    "static cache": lambda subject, _: generated(subject, cache_implementation="static"),
    "no cache": lambda subject, _: generated(subject, use_cache=False),
    "left padding": lambda subject, _: left_padded(subject),
    "past_key_values": lambda subject, _: gone_on(subject),
    "Trainer": lambda subject, folder: predicted(trainer(subject, folder)),
    "predict_with_generate": written,
}


CASES = [
    pytest.param(task, family, head, marks=pytest.mark.slow if task in PIPELINES or task == "assisted" else ())
    for task, row in TABLE.items()
    for family, head in row.items()
]


def leaves(value):
    """Words, numbers and tensors of a nested answer."""
    if isinstance(value, dict):
        value = list(value.values())
    return [leaf for part in value for leaf in leaves(part)] if isinstance(value, (list, tuple)) else [value]


def assert_same(got, expected):
    """Words and tokens are equal, other numbers close."""
    for mine, theirs in zip(leaves(got), leaves(expected), strict=True):
        if theirs is None or isinstance(theirs, str):
            assert mine == theirs
        else:
            torch.testing.assert_close(mine, theirs, **CLOSE)


@pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated:FutureWarning")
@pytest.mark.parametrize(("task", "family", "head"), CASES, ids=lambda value: value)
def test_full_rank_answers_as_dense(made, task, family, head, tmp_path, caplog):
    dense, full = made(family, head), made(family, head, 1.0)
    assert type(full.model).__name__ == f"Reparam{type(dense.model).__name__}"
    if task in PIPELINES:
        askers = [tf.pipeline(task, model=subject.folder) for subject in (full, dense)]
        assert [type(ask.model) for ask in askers] == [type(full.model), type(dense.model)]
        got, expected = map(PIPELINES[task], askers)
        assert "not supported" not in caplog.text
    elif task == "assisted":
        draft = made(family, head, 6).model
        got, expected = (generated(subject, rows=1, assistant_model=draft) for subject in (full, dense))
    else:
        got, expected = (TASKS[task](subject, tmp_path) for subject in (full, dense))
    assert_same(got, expected)


@pytest.mark.parametrize(("family", "head"), TABLE["greedy"].items())
def test_a_low_rank_answers_otherwise(made, family, head):
    """Else the table could not tell a conversion from its dense model."""
    tokens = [generated(made(family, head, rank))[0] for rank in (None, 6)]
    assert not torch.equal(*tokens)


@pytest.mark.slow
@pytest.mark.parametrize(("family", "head"), TABLE["predict_with_generate"].items())
def test_trained_and_merged_it_answers_the_same(made, family, head, tmp_path):
    options = {"predict_with_generate": True, "generation_max_length": 9, "max_steps": 2, "learning_rate": 1e-2}
    small = made(family, head, 5)
    start = predicted(trainer(small, tmp_path, tf.Seq2SeqTrainer, **options))
    taught = trainer(small, tmp_path, tf.Seq2SeqTrainer, **options)
    taught.train()
    trained = predicted(taught)
    assert trained[-1] < start[-1]
    dense = Subject(family, merge(small.model), "")
    assert_same(predicted(trainer(dense, tmp_path, tf.Seq2SeqTrainer, **options)), trained)
