"""Calibration data as people hand it over is read as what it is, or refused with what to write instead."""

import collections
import pathlib
import sys
import warnings
from typing import ClassVar

import datasets
import numpy as np
import pandas
import pytest
import tokenizers
import torch
import transformers as tf
from torch import nn

import hf_reparam
from hf_reparam import calibrate, convert, convert_folder, refit
from hf_reparam.calibrate.batches import prepare
from hf_reparam.calibrate.inputs import positions
from hf_reparam.errors import TargetError
from hf_reparam_cli import main
from tests import zoo
from tests.test_calibration import assert_same

WORDS = "so good very bad what is gold the school has a dome it id one two".split()  # noqa: SIM905
VOCABULARY = {word: i for i, word in enumerate(["<pad>", "<s>", "</s>", "<unk>", *WORDS])}


def make_tokenizer(*, special=True, **options):
    """A tokenizer of a few words; with `special`, <s> and </s> around a text and between two."""
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(VOCABULARY, unk_token="<unk>"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    if special:
        made.post_processor = tokenizers.processors.TemplateProcessing(
            single="<s> $A </s>", pair="<s> $A </s> $B:1 </s>:1", special_tokens=[("<s>", 1), ("</s>", 2)]
        )
    options = {"unk_token": "<unk>", "eos_token": "</s>", "pad_token": "<pad>", **options}
    return tf.PreTrainedTokenizerFast(tokenizer_object=made, **options)


class SlowTokenizer(tf.PythonBackend):
    """A tokenizer in Python, as BERT-like and other models of old have them."""

    vocab_files_names: ClassVar = {}
    model_input_names: ClassVar = ["input_ids", "attention_mask"]

    def get_vocab(self):
        return dict(VOCABULARY)

    @property
    def vocab_size(self):
        return len(VOCABULARY)

    def _tokenize(self, text):
        return text.split()

    def _convert_token_to_id(self, token):
        return VOCABULARY.get(token, 3)

    def _convert_id_to_token(self, index):
        return list(VOCABULARY)[index]

    def build_inputs_with_special_tokens(self, first, second=None):
        return [1, *first, 2] if second is None else [1, *first, 2, *second, 2]


def seen(model, data, tokenizer=None, **options):
    """The rows of tokens that a model is run on, without padding, as texts."""
    rows = []
    for batch, _ in prepare(model, data, tokenizer, **options):
        mask = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()
        rows += [" ".join(list(VOCABULARY)[i] for i in ids[m]) for ids, m in zip(batch["input_ids"], mask, strict=True)]
    return rows


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


@pytest.fixture(scope="module")
def bert():
    return zoo.BY_BASE["BertModel"].build()


@pytest.fixture(scope="module")
def classifier():
    return zoo.BY_BASE["BertForSequenceClassification"].build()


@pytest.fixture(scope="module")
def gpt2():
    return zoo.BY_BASE["GPT2LMHeadModel"].build()


# What is no list


@pytest.mark.parametrize(
    ("data", "instead"),
    [
        ("so good", r"got a str, 'so good': for one text write \[text\]"),
        ("texts.txt", r"Path\(file\)\.read_text\(\)\.splitlines\(\)"),
        (pathlib.Path("texts.txt"), r"Path, 'texts.txt'.*Calibration\.load\(file\)"),
        (b"so good", "got a bytes"),
        ({"input_ids": [[5, 6]], "attention_mask": [[1, 1]]}, r"for one batch write \[batch\]"),
        (tf.BatchEncoding({"input_ids": torch.ones(1, 2)}), r"BatchEncoding of \['input_ids'\].*\[batch\]"),
        (
            {"train": [{"text": "so"}], "test": [{"text": "so"}]},
            r"\['test', 'train'\].*data sets data\[KEY\]",
        ),
        (collections.UserDict(text=["so good"]), "UserDict"),
        (torch.ones(2, 3, dtype=torch.long), r'got a Tensor: write \[{"input_ids": data}\]'),
        (np.ones((2, 3), dtype=int), r'got a ndarray: write \[{"input_ids": data}\]'),
        (np.ones((2, 3, 8, 8)), r'got a ndarray: write \[{"pixel_values": data}\]'),
        (3, "got a int"),
        (nn.Linear(2, 2), "got a Linear"),
    ],
)
def test_data_that_is_no_list_is_refused(bert, tokenizer, data, instead):
    for use in (calibrate, lambda *a, **k: convert(a[0], keep=0.5, calibration=a[1], **k)):
        with pytest.raises(TargetError, match=instead):
            use(bert, data, tokenizer=tokenizer)
    with pytest.raises(TargetError, match=instead):
        convert(bert, keep=0.5, calibration=data, tokenizer=tokenizer)


def test_tables_of_pandas(bert, tokenizer):
    frame = pandas.DataFrame({"text": ["so good", "bad"], "note": [1, 2]})
    with pytest.raises(TargetError, match=r"DataFrame: write data.to_dict\('records'\)"):
        calibrate(bert, frame, tokenizer=tokenizer)
    assert sorted(seen(bert, frame["text"], tokenizer)) == ["<s> bad </s>", "<s> so good </s>"]
    assert sorted(seen(bert, frame.to_dict("records"), tokenizer)) == ["<s> bad </s>", "<s> so good </s>"]


@pytest.mark.parametrize(
    ("item", "named"),
    [
        ([5, 6, 7], "list of int"),
        (torch.ones(2, 3, dtype=torch.long), "Tensor"),
        (("so good", "it is good"), "tuple of str"),
        ([torch.ones(2, 3)], "list of Tensor"),
        (pathlib.Path("texts.txt"), "Path"),
        (b"so", "bytes"),
        ([{"role": "user", "content": "so"}], "list of dict"),
        (None, "NoneType"),
    ],
)
def test_an_item_that_is_neither_text_nor_dict_is_named(bert, tokenizer, item, named):
    with pytest.raises(
        TargetError, match=f"a calibration batch is a dict.*got a .*{named}.*what the model's processor"
    ):
        calibrate(bert, [item], tokenizer=tokenizer)


class ByIndex(torch.utils.data.Dataset):
    def __len__(self):
        return 3

    def __getitem__(self, i):
        return {"text": WORDS[min(i, 5)]}


@pytest.mark.parametrize(
    "data",
    [
        lambda: ["so", "good", "very"],
        lambda: ("so", "good", "very"),
        lambda: (word for word in ["so", "good", "very"]),
        lambda: np.array(["so", "good", "very"]),
        lambda: [{"text": word} for word in ["so", "good", "very"]],
        lambda: [{"text": ["so", "good"]}, {"text": ["very"]}],
        lambda: datasets.Dataset.from_dict({"sentence": ["so", "good", "very"], "id": list("abc")}),
        lambda: datasets.Dataset.from_dict({"text": ["so", "good", "very"]}).to_iterable_dataset(),
        lambda: datasets.Dataset.from_dict({"text": ["so", "good", "very"]})["text"],
        lambda: torch.utils.data.DataLoader(["so", "good", "very"], batch_size=None),
        lambda: torch.utils.data.DataLoader([{"text": w} for w in ["so", "good", "very"]], batch_size=2),
        ByIndex,
    ],
)
def test_collections_of_every_kind(bert, tokenizer, data):
    assert sorted(seen(bert, data(), tokenizer)) == ["<s> good </s>", "<s> so </s>", "<s> very </s>"]


def test_lines_of_an_open_file(bert, tokenizer, tmp_path):
    (tmp_path / "texts.txt").write_text("so good\n\nvery bad\n")
    with open(tmp_path / "texts.txt") as file:
        assert sorted(seen(bert, file, tokenizer)) == ["<s> so good </s>", "<s> very bad </s>"]


# Columns


@pytest.mark.parametrize(
    ("row", "text"),
    [
        ({"sentence1": "so good", "sentence2": "it is good", "label": 1}, "<s> so good </s> it is good </s>"),
        ({"premise": "so", "hypothesis": "bad", "idx": 3, "label": 1}, "<s> so </s> bad </s>"),
        (
            {"id": "5733", "title": "dome", "context": "gold dome", "question": "what is", "answers": {"text": ["a"]}},
            "<s> what is </s> gold dome </s>",
        ),
        ({"question1": "what", "question2": "is", "is_duplicate": False}, "<s> what </s> is </s>"),
        ({"query": "what", "passage": "gold", "query_id": "q1"}, "<s> what </s> gold </s>"),
        ({"text": "so", "text_pair": "bad"}, "<s> so </s> bad </s>"),
        ({"text": "so", "title": "bad"}, "<s> so </s>"),
        ({"title": "bad", "content": "so"}, "<s> so </s>"),
        ({"review": "so bad", "label": 1, "guid": "a"}, "<s> so bad </s>"),
        ({"review_id": "good", "review_body": "so bad", "stars": 5}, "<s> so bad </s>"),
    ],
)
def test_columns_of_texts(bert, tokenizer, row, text):
    assert seen(bert, [row], tokenizer) == [text]
    if not {"review", "review_body"}.intersection(row):  # lists of texts are known by their names alone
        assert seen(bert, [{key: [value] for key, value in row.items()}], tokenizer) == [text]


@pytest.mark.parametrize(
    "row",
    [
        {"id": "5733be28"},
        {"id": "5733be28", "label": 1},
        {"query_id": "so", "idx": 3},
        {"document": "so good", "summary": "good"},
        {"instruction": "so", "input": "good", "output": "bad"},
        {"text": "so", "sentence": "good"},
        {"tokens": ["so", "good"], "ner_tags": [1, 2]},
        {"prompt": [{"role": "user", "content": "so"}], "completion": [{"role": "assistant", "content": "good"}]},
        {"conversations": [{"from": "human", "value": "so"}]},
        {"label": 1},
        {},
    ],
)
def test_rows_without_one_text_are_refused_with_their_columns(bert, tokenizer, row):
    with pytest.raises(TargetError, match="columns") as error:
        calibrate(bert, [row], tokenizer=tokenizer)
    assert str(list(row)) in str(error.value)
    assert "for row in data" in str(error.value)


def test_translations_are_refused(tokenizer):
    model = zoo.BY_BASE["MarianMTModel"].build()
    with pytest.raises(TargetError, match=r"'translation'.*tokenizer\(source, text_target=target\)"):
        calibrate(model, [{"id": "0", "translation": {"en": "so good", "de": "gut"}}], tokenizer=tokenizer)


def test_chats(gpt2):
    template = "{% for m in messages %}<s> {{ m.content }} </s> {% endfor %}"
    chats = [{"messages": [{"role": "user", "content": "so"}, {"role": "assistant", "content": "good"}], "id": "a"}]
    made = make_tokenizer(bos_token="<s>", chat_template=template)
    assert seen(gpt2, chats, made) == ["<s> so </s> <s> good </s>"]
    with pytest.raises(TargetError, match="chats, and the tokenizer has no chat_template"):
        calibrate(gpt2, chats, tokenizer=make_tokenizer())


@pytest.mark.slow
def test_labels_by_every_name_in_rows_and_batches(classifier):
    ids, labels = zoo._ids(4), torch.tensor([0, 2, 1, 1])
    expected = calibrate(classifier, [{"input_ids": ids, "labels": labels}])
    drawn = calibrate(classifier, [{"input_ids": ids}])
    name = "encoder.layer.0.output.dense"
    assert not torch.allclose(expected.layers[name].gradient_products, drawn.layers[name].gradient_products)
    for key in ("label", "label_ids", "labels"):
        batch = {"idx": torch.arange(4), key: labels, "input_ids": ids, "text": ["a", "b", "c", "d"]}
        rows = [{k: v[i] for k, v in batch.items()} for i in range(4)]
        assert_same(calibrate(classifier, [batch]), expected)
        assert_same(calibrate(classifier, rows), expected)
        assert_same(calibrate(classifier, torch.utils.data.DataLoader(rows, batch_size=2)), expected)


def test_columns_that_the_model_does_not_take_change_nothing():
    model, ids = zoo.BY_BASE["DistilBertForSequenceClassification"].build(), zoo._ids(4)
    expected = calibrate(model, [{"input_ids": ids}])
    batch = {"idx": torch.arange(4), "input_ids": ids, "token_type_ids": torch.zeros_like(ids), "name": list("abcd")}
    assert_same(calibrate(model, [batch]), expected)


class Open(nn.Module):
    """A model of the user's own whose forward takes anything."""

    calls: ClassVar[list] = []

    def __init__(self):
        super().__init__()
        self.dense = nn.Linear(4, 4)

    def forward(self, **inputs):
        self.calls.append(inputs)
        return {"logits": self.dense(inputs["x"] * inputs["scale"])}


def test_a_forward_that_takes_any_name_gets_all_of_them():
    model = Open()
    calibrate(model, [{"x": torch.ones(3, 4), "scale": torch.full((3, 1), 2.0), "flag": True, "mode": "fast"}])
    assert sorted(model.calls[0]) == ["flag", "mode", "scale", "x"]


class Wrapper(nn.Module):
    """A wrapper that passes everything on, as DataParallel and compiled models are."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, *args, **kwargs):
        return self.model(*args, **kwargs)


def test_a_wrapper_takes_what_its_model_takes(classifier, tokenizer):
    rows = [{"text": "so good", "label": 1, "note": "bad"}, {"text": "very bad", "label": 0, "note": "so"}]
    expected = calibrate(classifier, rows, tokenizer=tokenizer)
    found = calibrate(Wrapper(classifier), rows, tokenizer=tokenizer)
    assert torch.equal(
        found.layers["model.encoder.layer.0.output.dense"].gradient_products,
        expected.layers["encoder.layer.0.output.dense"].gradient_products,
    )


def test_nothing_that_the_model_takes(tokenizer):
    vit = zoo.BY_BASE["ViTForImageClassification"].build()
    with pytest.raises(TargetError, match=r"takes none of \['text'\].*pixel_values"):
        calibrate(vit, ["so good"], tokenizer=tokenizer)
    with pytest.raises(TargetError, match=r"columns \['labels', 'image'\]"):
        calibrate(vit, [{"labels": torch.tensor([3]), "image": torch.ones(1, 3, 16, 16)}])
    with pytest.raises(TargetError, match=r"columns \['image', 'label'\]"):
        calibrate(vit, [{"image": object(), "label": 3}])


# Values


@pytest.mark.parametrize("as_", [torch.Tensor.tolist, torch.Tensor.numpy, lambda t: t.numpy().astype(np.int32)])
def test_numbers_that_are_no_tensors(classifier, as_):
    batch = {**zoo.BY_BASE["BertForSequenceClassification"].batch(), "labels": torch.tensor([1, 2])}
    expected = calibrate(classifier, [batch])
    assert_same(calibrate(classifier, [{k: as_(v) for k, v in batch.items()}]), expected)
    rows = [{k: as_(v[i]) for k, v in batch.items()} for i in range(2)]
    assert_same(calibrate(classifier, rows), expected)


def test_floats_take_the_dtype_of_the_model():
    vit = zoo.BY_BASE["ViTForImageClassification"].build()
    images = zoo.BY_BASE["ViTForImageClassification"].batch()["pixel_values"]
    expected = calibrate(vit, [{"pixel_values": images}])
    assert_same(calibrate(vit, [{"pixel_values": images.double().numpy()}]), expected)


def test_rows_of_different_lengths_in_one_batch_are_refused(bert, tokenizer):
    with pytest.raises(TargetError, match=r"'input_ids'.*padding=True"):
        calibrate(bert, [dict(tokenizer(["so", "so good"]))])


@pytest.mark.parametrize("key", ["label", "labels"])
def test_labels_that_are_texts_are_refused(classifier, tokenizer, key):
    for data in (
        [{"text": "so good", key: "positive"}],
        [{"input_ids": [5, 6], key: "positive"}],
        [{"input_ids": torch.tensor([[5, 6]]), key: ["positive"]}],
    ):
        with pytest.raises(TargetError, match=rf"'{key}' is a text, 'positive'.*label2id"):
            calibrate(classifier, data, tokenizer=tokenizer)


@pytest.mark.slow
@pytest.mark.parametrize("base", ["GPT2LMHeadModel", "BertForMaskedLM"])
def test_a_language_model_does_not_take_the_class_of_a_text_for_tokens(tokenizer, base):
    model, rows = zoo.BY_BASE[base].build(), [{"text": "so good", "label": 1}, {"text": "very bad", "label": 0}]
    expected = calibrate(model, [row["text"] for row in rows], tokenizer=tokenizer)
    assert_same(calibrate(model, rows, tokenizer=tokenizer), expected)
    batch = {**tokenizer([r["text"] for r in rows], return_tensors="pt"), "label": torch.tensor([1, 0])}
    assert_same(calibrate(model, [batch]), expected)


# Tokenizers


@pytest.mark.slow
@pytest.mark.usefixtures("short_refine")
def test_repeated_examples_are_warned_of(bert, tokenizer):
    batches = [tokenizer(text, return_tensors="pt") for text in WORDS[:5]]
    small = convert(bert, rank=4)
    for repeated in (lambda: calibrate(bert, batches[:1] * 10), lambda: refit(small, bert, batches[:1] * 10)):
        with pytest.warns(UserWarning, match=r"\d+ of \d+ held-out examples are among the others, too"):
            repeated()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        hf_reparam.refine(small, bert, batches, epochs=1)
    with pytest.warns(UserWarning, match="2 of 2 held-out examples are among the others"):
        hf_reparam.refine(small, bert, batches[:4] * 3, epochs=1)


def test_what_is_no_tokenizer_is_refused(bert):
    for wrong in ("bert-base-uncased", str.split, make_tokenizer()._tokenizer, tf.ViTImageProcessor()):
        with pytest.raises(TargetError, match="tokenizer= must be a tokenizer of Transformers, got"):
            calibrate(bert, ["so good"], tokenizer=wrong)


def test_a_processor_has_a_tokenizer(bert, tokenizer):
    processor = tf.CLIPProcessor(tf.CLIPImageProcessor(), tokenizer)
    assert seen(bert, ["so good"], processor) == ["<s> so good </s>"]


def test_tokenized_rows_need_no_tokenizer_and_do_not_mind_one(bert, tokenizer):
    rows = [{"input_ids": [1, 5, 2], "text": "very bad"}]
    assert seen(bert, rows) == seen(bert, rows, tokenizer) == ["<s> good </s>"]


@pytest.mark.parametrize("eos", ["</s>", None])
def test_without_a_padding_token(gpt2, eos):
    texts = ["so good", "very", "what is the gold"]
    expected = calibrate(gpt2, texts, tokenizer=make_tokenizer())
    bare = make_tokenizer(pad_token=None, eos_token=eos)
    before = bare.backend_tokenizer.to_str()
    config = gpt2.config.pad_token_id
    try:
        gpt2.config.pad_token_id = None
        assert_same(calibrate(gpt2, texts, tokenizer=bare), expected)
    finally:
        gpt2.config.pad_token_id = config
    assert bare.pad_token is None
    assert bare.backend_tokenizer.to_str() == before


def test_a_classifier_without_a_padding_token():
    """It finds the last token by the padding token, and takes no batches of several rows without one."""
    model = zoo.BY_BASE["GPT2ForSequenceClassification"].build()
    expected = calibrate(model, ["so good", "very bad", "what"], tokenizer=make_tokenizer(special=False))
    model.config.pad_token_id = None
    bare = make_tokenizer(special=False, pad_token=None)
    assert_same(calibrate(model, ["so good", "very bad", "what"], tokenizer=bare), expected)


def test_a_model_without_a_padding_mask_gets_no_padding():
    config = tf.FNetConfig(vocab_size=99, hidden_size=32, num_hidden_layers=1, intermediate_size=48)
    model = tf.FNetModel(config).eval()
    texts = ["so good", "very", "what is the gold"]
    made = make_tokenizer()
    expected = calibrate(model, [{"input_ids": made(text, return_tensors="pt")["input_ids"]} for text in texts])
    assert_same(calibrate(model, texts, tokenizer=made), expected)


class Plain(nn.Module):
    def __init__(self):
        super().__init__()
        self.words, self.dense = nn.Embedding(99, 8), nn.Linear(8, 5)

    def forward(self, input_ids):
        return {"logits": self.dense(self.words(input_ids))}


def test_a_padding_mask_that_the_model_does_not_take_still_tells_padding():
    batch = zoo.BY_BASE["BertModel"].batch()
    moments = calibrate(Plain(), [batch])
    assert moments.layers["dense"].tokens == int(batch["attention_mask"].sum()) < batch["input_ids"].numel()


# Empty texts


@pytest.mark.slow
@pytest.mark.parametrize("special", [True, False])
def test_empty_texts_are_passed_over(gpt2, special):
    made = make_tokenizer(special=special)
    texts = ["", "so good", "  \n"] * 20
    expected = calibrate(gpt2, ["so good"] * 20, tokenizer=made)
    assert_same(calibrate(gpt2, texts, tokenizer=made), expected)
    assert_same(calibrate(gpt2, [{"text": text} for text in texts], tokenizer=made), expected)
    assert_same(calibrate(gpt2, [{"text": texts}, {"text": None}], tokenizer=made), expected)


@pytest.mark.parametrize(
    "data",
    [[], iter([]), [""], ["", " \n"], [{"text": ""}], [{"input_ids": []}], [{"input_ids": torch.ones(3, 0).long()}]],
)
def test_nothing_but_empty_texts(gpt2, tokenizer, data):
    with pytest.raises(TargetError, match="the calibration data is empty"):
        calibrate(gpt2, data, tokenizer=tokenizer)


def test_rows_and_batches_without_columns_are_passed_over(gpt2):
    expected = calibrate(gpt2, [{"input_ids": torch.tensor([[5, 6]])}])
    data = [{"input_ids": torch.ones(3, 0).long()}, {"input_ids": []}, {"input_ids": [5, 6]}]
    assert_same(calibrate(gpt2, data), expected)


# Long texts

LONG = " ".join(WORDS[i % len(WORDS)] for i in range(150))


def words(rows):
    return [word for row in rows for word in row.split() if not word.startswith("<")]


@pytest.mark.parametrize("made", [make_tokenizer(), SlowTokenizer(unk_token="<unk>", pad_token="<pad>")])
def test_long_texts_fill_several_rows(bert, made):
    rows = seen(bert, [LONG], made, max_length=20)
    assert sorted(len(row.split()) for row in rows) == [8, *[20] * 8]
    assert all(row.startswith("<s> ") and row.endswith(" </s>") for row in rows)
    assert f"<s> {' '.join(LONG.split()[:18])} </s>" in rows
    assert sorted(words(rows)) == sorted(LONG.split())


@pytest.mark.slow
def test_the_default_is_what_the_model_can_take(tokenizer):
    """64 positions here, 512 tokens at most, and what the tokenizer says."""
    for base in ("BertModel", "GPT2LMHeadModel", "OPTForCausalLM", "LlamaForCausalLM"):
        model = zoo.BY_BASE[base].build()
        rows = seen(model, [LONG], tokenizer)
        assert max(len(row.split()) for row in rows) == 64
        assert sorted(words(rows)) == sorted(LONG.split())
        calibrate(model, [LONG], tokenizer=tokenizer, metric="activation")
    short = make_tokenizer(model_max_length=30)
    assert max(len(row.split()) for row in seen(zoo.BY_BASE["BertModel"].build(), [LONG], short)) == 30
    t5 = zoo.BY_BASE["T5EncoderModel"].build()  # relative positions
    assert max(len(row.split()) for row in seen(t5, [LONG * 5], tokenizer)) == 512


@pytest.mark.slow
def test_tables_of_positions_that_start_late(tokenizer):
    """RoBERTa's positions begin behind the padding token's id, 1: two of 64 are no positions of tokens."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 48}
    for kind in ("Roberta", "XLMRoberta", "Camembert", "MPNet", "Esm"):
        config = getattr(tf, f"{kind}Config")(**zoo.TEXT, **sizes, pad_token_id=1, position_embedding_type="absolute")
        model = getattr(tf, f"{kind}Model")(config).eval()
        assert positions(model) == 62
        assert max(len(row.split()) for row in seen(model, [LONG], tokenizer)) == 62
        for batch, _ in prepare(model, [LONG], tokenizer):
            model(**batch)


def test_a_length_out_of_range_is_refused(bert, tokenizer):
    for wrong in (0, 2, 65, 20.0, "20"):
        with pytest.raises(TargetError, match=r"max_length must be an integer from 3 .* to 64"):
            calibrate(bert, ["so good"], tokenizer=tokenizer, max_length=wrong)


def test_pairs_and_labelled_texts_are_cut(classifier, tokenizer):
    rows = seen(classifier, [{"sentence1": LONG, "sentence2": LONG}, {"text": LONG, "label": 1}], tokenizer)
    assert [len(row.split()) for row in rows] == [64, 64]


def test_chats_fill_several_rows(gpt2):
    made = make_tokenizer(bos_token="<s>", chat_template="{% for m in messages %}<s> {{ m.content }} {% endfor %}")
    rows = seen(gpt2, [{"messages": [{"role": "user", "content": LONG}] * 2}], made, max_length=50)
    assert sorted(words(rows)) == sorted(LONG.split() * 2)
    assert sum(row.split().count("<s>") for row in rows) == 2


@pytest.mark.slow
def test_convert_and_refit_read_long_texts(gpt2, tokenizer):
    lengths = []
    handle = gpt2.register_forward_pre_hook(lambda m, a, k: lengths.append(k["input_ids"].shape[1]), with_kwargs=True)
    try:
        texts = [LONG, LONG.replace("so", "bad")]
        small = convert(gpt2, rank=4, calibration=calibrate(gpt2, texts, tokenizer=tokenizer, max_length=20))
        assert max(lengths) == 20
        lengths.clear()
        refit(small, gpt2, texts * 5, tokenizer=tokenizer, max_length=20)
        assert max(lengths) == 20
        lengths.clear()
        convert(gpt2, rank=4, calibration=calibrate(gpt2, texts * 5, tokenizer=tokenizer, max_length=20))
        assert max(lengths) == 20
    finally:
        handle.remove()


# How much


def endless():
    while True:
        yield "so good"


@pytest.mark.slow
def test_max_samples_counts_texts_rows_and_rows_of_batches(gpt2, tokenizer):
    name = "h.0.mlp.c_fc"
    ids = zoo._ids(6, 4)
    for data in (
        [{"input_ids": ids}],
        [{"input_ids": ids[:3]}, {"input_ids": ids[3:]}],
        [{"input_ids": row} for row in ids],
        ({"input_ids": row.tolist()} for row in ids),
        torch.utils.data.DataLoader([{"input_ids": row} for row in ids], batch_size=4),
    ):
        assert calibrate(gpt2, data, max_samples=5).layers[name].tokens == 5 * 4
    assert calibrate(gpt2, endless(), tokenizer=tokenizer, max_samples=5).layers[name].tokens == 5 * 4
    texts = ["", "so good"] * 9
    assert calibrate(gpt2, texts, tokenizer=tokenizer, max_samples=5).layers[name].tokens == 5 * 4
    rows = [{"text": text} for text in texts]
    assert calibrate(gpt2, rows, tokenizer=tokenizer, max_samples=5).layers[name].tokens == 5 * 4
    assert len(seen(gpt2, [LONG, LONG], tokenizer, max_length=50, max_samples=1)) == 4
    for wrong in (0, -1, 2.0):
        with pytest.raises(TargetError, match="max_samples must be an integer of at least 1"):
            calibrate(gpt2, texts, tokenizer=tokenizer, max_samples=wrong)


@pytest.mark.slow
def test_refit_reads_as_many_samples_as_it_may(gpt2, tokenizer):
    moments = calibrate(gpt2, endless(), tokenizer=tokenizer, max_samples=70)
    one, other = (convert(gpt2, rank=4, calibration=moments) for _ in range(2))
    assert one.config.reparam["record"]["calibration_tokens"] == 70 * 4
    report = refit(one, gpt2, endless(), tokenizer=tokenizer, max_samples=70)
    assert report == refit(other, gpt2, ["so good"] * 70, tokenizer=tokenizer)
    assert hf_reparam.report(one).refitted_layers == len(report.layers)
    with pytest.raises(TargetError, match="Calibration"):
        calibrate(gpt2, moments, max_samples=3)


@pytest.mark.parametrize(
    ("data", "options", "total"),
    [
        (lambda: ["so good", "", "bad"] * 20, {}, 60),
        (lambda: [LONG, "bad"], {}, 2),
        (lambda: ["so good"] * 60, {"max_samples": 40}, 40),
        (lambda: [{"input_ids": zoo._ids(6)}] * 3, {}, 18),
        (lambda: [{"input_ids": zoo._ids(6)}] * 3, {"max_samples": 8}, 8),
        (lambda: datasets.Dataset.from_dict({"text": ["so", "bad"] * 9}), {}, 18),
        (lambda: torch.utils.data.DataLoader([{"input_ids": r} for r in zoo._ids(6)], batch_size=2), {}, 6),
        (endless, {"max_samples": 7}, 7),
        (lambda: iter(["so good"]), {}, None),
    ],
)
def test_the_progress_bar_knows_its_end(gpt2, tokenizer, monkeypatch, data, options, total):
    from tqdm import tqdm

    bars = []

    class Bar(tqdm):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **{**kwargs, "disable": False})
            bars.append(self)

    monkeypatch.setattr(sys.modules["hf_reparam.layers.progress"], "tqdm", Bar)
    calibrate(gpt2, data(), tokenizer=tokenizer, metric="activation", **options)
    assert [bar.total for bar in bars] == [total]
    assert bars[0].n == (total or 1)


# Encoder-decoders


@pytest.mark.parametrize("base", ["T5ForConditionalGeneration", "BartForConditionalGeneration", "MarianMTModel"])
def test_texts_for_an_encoder_decoder_are_refused(tokenizer, base):
    model = zoo.BY_BASE[base].build()
    with pytest.raises(TargetError, match="give labels or decoder_input_ids"):
        calibrate(model, ["so good"], tokenizer=tokenizer)
    with pytest.raises(TargetError, match="give labels or decoder_input_ids"):
        calibrate(model, [{"sentence1": "so", "sentence2": "bad"}], tokenizer=tokenizer)
    rows = [{"text": "so good", "labels": [5, 6, 2]}, {"text": "bad", "labels": [7, 2]}]
    assert len(seen(model, rows, tokenizer)) == 2
    calibrate(model, rows, tokenizer=tokenizer)


def test_texts_for_heads_and_parts_that_need_no_more(tokenizer):
    bart = zoo.BY_BASE["BartForSequenceClassification"].build()
    calibrate(bart, ["so good", "very bad"], tokenizer=tokenizer)
    calibrate(bart.model.encoder, ["so good", "very bad"], tokenizer=tokenizer)
    calibrate(zoo.BY_BASE["T5EncoderModel"].build(), ["so good", "very bad"], tokenizer=tokenizer)


@pytest.mark.slow
@pytest.mark.parametrize("base", ["BartForConditionalGeneration", "MarianMTModel", "T5ForConditionalGeneration"])
@pytest.mark.parametrize("length", [64, 9])
def test_both_sides_of_one_length_also_the_full_one(base, length):
    model = zoo.BY_BASE[base].build()
    ids, labels = zoo._ids(3, length), zoo._ids(3, length, seed=2)
    mask, lengths, ends = torch.zeros_like(ids), [length, length - 3, length - 2], [length - 4, length, length - 1]
    for i in range(3):
        mask[i, : lengths[i]] = 1
        labels[i, ends[i] :] = -100
    moments = calibrate(model, [{"input_ids": ids, "attention_mask": mask, "labels": labels}])
    encoder, decoder = (
        next(n for n in moments.layers if side in n and n.endswith(("fc1", "wi"))) for side in ("encoder", "decoder")
    )
    assert moments.layers[encoder].tokens == sum(lengths)
    assert moments.layers[decoder].tokens == sum(ends)
    whole = {"input_ids": ids, "labels": zoo._ids(3, length, seed=2)}
    assert calibrate(model, [whole]).layers[encoder].tokens == 3 * length


# What stands first in a batch


def refitted(**first):
    dense = zoo.BY_BASE["BertForMaskedLM"].build()
    batches = [{**first, "input_ids": zoo._ids(4, 6, seed=seed)} for seed in range(6)]
    return refit(convert(dense, rank=3, calibration=batches), dense, batches)


@pytest.fixture(scope="module")
def plainly_refitted():
    return refitted()


@pytest.mark.slow
@pytest.mark.parametrize("first", [{"flag": "faster"}, {"scale": torch.tensor(1.0)}])
def test_refit_counts_examples_whatever_stands_first(first, plainly_refitted):
    assert refitted(**first).before == pytest.approx(plainly_refitted.before, rel=1e-5)


# The command line


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("gpt2")
    zoo.BY_BASE["GPT2LMHeadModel"].build().save_pretrained(place)
    make_tokenizer().save_pretrained(place)
    (place / "texts.txt").write_text("\n".join([LONG, "so good", "very bad"]) + "\n")
    return place


@pytest.mark.slow
def test_lengths_and_samples_on_the_command_line(folder, tmp_path):
    options = ["--rank", "4", "--calibration", str(folder / "texts.txt"), "--quiet"]
    for name, more, tokens in (
        ("short", ["--max-length", "50"], 150 + 2 * 4 + 4 + 4),
        ("streamed", ["--max-samples", "2", "--stream"], 150 + 2 * 3 + 4),
    ):
        assert main(["convert", str(folder), str(tmp_path / name), *options, *more]) == 0
        config = tf.AutoConfig.from_pretrained(tmp_path / name)
        assert config.reparam["record"]["calibration_tokens"] == tokens


def test_wrong_lengths_on_the_command_line(folder, tmp_path, capsys):
    options = [str(folder), str(tmp_path / "out"), "--rank", "4"]
    assert main(["convert", *options, "--max-length", "20"]) == 2
    assert "say how texts are read: give calibration=FILE of texts (--calibration FILE)" in capsys.readouterr().err
    assert main(["convert", *options, "--calibration", str(folder / "texts.txt"), "--max-length", "2"]) == 2
    assert "max_length must be an integer from 3" in capsys.readouterr().err


def test_a_broken_run_with_other_lengths_is_not_continued(folder, tmp_path, monkeypatch):
    """The work folder's name tells the arguments apart."""
    names = []

    def stop(*args, resume, **options):
        names.append(resume)
        raise KeyboardInterrupt

    monkeypatch.setattr("hf_reparam.files.convert.new_folder", stop)
    for options in ({}, {"max_length": 20}, {"max_samples": 2}, {"max_samples": 20}):
        with pytest.raises(KeyboardInterrupt):
            convert_folder(folder, tmp_path / "out", keep=0.5, calibration=folder / "texts.txt", stream=True, **options)
    assert len(set(names)) == 4
