"""Tiny models that learn a toy task in seconds, so that the examples run offline. Real ones come from the Hub."""

import random
import tempfile
from collections.abc import Callable, Iterable
from typing import Any

import transformers as tf
from tokenizers import Tokenizer, models, pre_tokenizers, processors

NUMBERS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"]
DICTIONARY = dict(
    zip(
        ["the", "a", "red", "blue", "old", "small", "house", "dog", "cat", "tree", "sees", "finds", "likes"],
        ["das", "ein", "rote", "blaue", "alte", "kleine", "haus", "hund", "katze", "baum", "sieht", "findet", "mag"],
        strict=True,
    )
)
NAMES = ["anna", "bob", "carla", "dan", "eva", "finn"]
CITIES = ["rome", "oslo", "lima", "cairo", "delhi", "quito"]
ANIMALS = ["cat", "fox", "owl", "horse", "bear", "mouse"]
GOOD, BAD = ["wonderful", "charming", "clever", "moving"], ["dull", "tedious", "clumsy", "hollow"]


def tokenizer(texts: Iterable[str], *, begin: bool = False) -> tf.PreTrainedTokenizerFast:
    """One token for each word of the texts, `text </s>`; with `begin` as BERT has it, `<s> text </s> second </s>`."""
    names = dict.fromkeys(["<pad>", "<unk>", "<s>", "</s>", *(word for text in texts for word in text.split())])
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(names)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    first = "<s> $A </s>" if begin else "$A </s>"
    core.post_processor = processors.TemplateProcessing(
        single=first, pair=f"{first} $B:1 </s>:1", special_tokens=[("<s>", 2), ("</s>", 3)]
    )
    special = {"pad_token": "<pad>", "unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    return tf.PreTrainedTokenizerFast(tokenizer_object=core, **special, cls_token="<s>", sep_token="</s>")


def fit(
    model: Any, rows: Any, collator: Any, *, steps: int, rate: float = 2e-3, loss: Callable[..., Any] | None = None
) -> None:
    """Some steps with the Trainer as it is."""
    args = tf.TrainingArguments(
        tempfile.mkdtemp(), max_steps=steps, per_device_train_batch_size=32, learning_rate=rate, warmup_steps=10,
        report_to=[], save_strategy="no", logging_strategy="no", disable_tqdm=True, use_cpu=True,
    )  # fmt: skip
    tf.Trainer(model, args, train_dataset=rows, data_collator=collator, compute_loss_func=loss).train()
    model.eval()


def counting() -> list[str]:
    """Counting up and down, in steps of one and two."""
    runs = [NUMBERS[i : i + 7 * step : step] for step in (1, 2) for i in range(13)]
    return [" ".join(run) for up in runs if len(up) > 4 for run in (up, up[::-1])] * 8


def sentences(count: int = 600) -> list[tuple[str, str]]:
    """English sentences, and word by word what a dictionary says."""
    random.seed(0)
    the, adjective, noun, verb = (list(DICTIONARY)[a:b] for a, b in ((0, 2), (2, 6), (6, 10), (10, 13)))
    phrase = lambda: " ".join(map(random.choice, (the, adjective, noun)))  # noqa: E731
    english = [f"{phrase()} {random.choice(verb)} {phrase()}" for _ in range(count)]
    return [(text, " ".join(DICTIONARY[word] for word in text.split())) for text in english]


def stories(count: int = 600) -> list[tuple[str, str]]:
    """Three sentences, and what happened in them."""
    random.seed(0)
    rows = []
    for _ in range(count):
        name, city, animal, other = map(random.choice, (NAMES, CITIES, ANIMALS, NAMES))
        text = f"{name} went to {city} . there was a {animal} . {other} stayed at home ."
        rows.append((text, f"{name} saw a {animal}"))
    return rows


def places(count: int = 600) -> list[tuple[str, str, str]]:
    """Question, context, answer."""
    random.seed(0)
    rows = []
    for _ in range(count):
        name, city, animal, other = map(random.choice, (NAMES, CITIES, ANIMALS, ANIMALS))
        contexts = (f"{name} lives in {city} with a {animal} .", f"in {city} a {animal} belongs to {name} .")
        asked = {"who": name, "where": city, "which animal": animal}
        question = random.choice(list(asked))
        rows.append((f"{question} is it ?", f"there is no {other} . {random.choice(contexts)}", asked[question]))
    return rows


def reviews(count: int = 600) -> list[tuple[str, int]]:
    """Text, and whether it is friendly; "not" turns it over."""
    random.seed(0)
    rows = []
    for _ in range(count):
        good, turned = random.random() < 0.5, random.random() < 0.3
        word, noun = random.choice(GOOD if good else BAD), random.choice(["film", "book", "play"])
        rows.append((f"the {noun} is {'not ' if turned else ''}{word} .", int(good != turned)))
    return rows


def _shape(words: tf.PreTrainedTokenizerFast) -> dict[str, Any]:
    special = {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3}
    return {"vocab_size": len(words), "max_position_embeddings": 64, **special}


def _decoder(kind: type, config: Any, words: Any) -> tuple[Any, Any]:
    tf.set_seed(0)
    model = kind(config)
    collator = tf.DataCollatorForLanguageModeling(words, mlm=False)
    fit(model, [words(text) for text in counting()], collator, steps=200)
    return model, words


def gpt2() -> tuple[Any, Any]:
    """A GPT-2 that can count."""
    words = tokenizer(counting())
    shape = {**_shape(words), "n_positions": 64, "n_embd": 64, "n_layer": 1, "n_head": 4}
    return _decoder(tf.GPT2LMHeadModel, tf.GPT2Config(**shape), words)


def llama() -> tuple[Any, Any]:
    """A Llama that can count."""
    words = tokenizer(counting())
    shape = {**_shape(words), "hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    config = tf.LlamaConfig(**shape, num_key_value_heads=2, intermediate_size=128)
    return _decoder(tf.LlamaForCausalLM, config, words)


def seq2seq_rows(words: Any, pairs: list[tuple[str, str]]) -> list[dict[str, Any]]:
    """Pairs of texts as a seq2seq model takes them."""
    return [{**words(text), "labels": words(target)["input_ids"]} for text, target in pairs]


def _seq2seq(model: Any, words: Any, pairs: list[tuple[str, str]]) -> tuple[Any, Any]:
    fit(model, seq2seq_rows(words, pairs), tf.DataCollatorForSeq2Seq(words, model=model), steps=400, rate=3e-3)
    return model, words


def _bart_shape(words: Any) -> dict[str, Any]:
    sides = {f"{side}_{key}": value for side in ("encoder", "decoder") for key, value in
             (("layers", 2), ("attention_heads", 4), ("ffn_dim", 128))}  # fmt: skip
    return {**_shape(words), **sides, "d_model": 64, "forced_eos_token_id": None, "dropout": 0.0}


def marian() -> tuple[Any, Any]:
    """A Marian model that can translate the sentences."""
    words = tokenizer(text for pair in sentences() for text in pair)
    tf.set_seed(0)
    return _seq2seq(
        tf.MarianMTModel(tf.MarianConfig(**_bart_shape(words), decoder_start_token_id=0, scale_embedding=True)),
        words,
        sentences(),
    )


def bart() -> tuple[Any, Any]:
    """A BART that can sum the stories up."""
    words = tokenizer(text for pair in stories() for text in pair)
    tf.set_seed(0)
    config = tf.BartConfig(**_bart_shape(words), decoder_start_token_id=3)
    return _seq2seq(tf.BartForConditionalGeneration(config), words, stories())


def t5(pairs: list[tuple[str, str]]) -> tuple[Any, Any]:
    """A T5 that has learned pairs of texts."""
    words = tokenizer(text for pair in pairs for text in pair)
    tf.set_seed(0)
    shape = {"d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 2, "num_heads": 4, "dropout_rate": 0.0}
    config = tf.T5Config(vocab_size=len(words), **shape, pad_token_id=0, eos_token_id=3, decoder_start_token_id=0)
    return _seq2seq(tf.T5ForConditionalGeneration(config), words, pairs)


def _bert_config(words: Any) -> Any:
    shape = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 128}
    return tf.BertConfig(**_shape(words), **shape, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)


def answer_rows(words: Any, asked: list[tuple[str, str, str]]) -> list[dict[str, Any]]:
    """Questions as a BERT takes them, with the place of the answer's one token."""
    rows = []
    for question, context, answer in asked:
        row = dict(words(question, context))
        place = max(i for i, token in enumerate(row["input_ids"]) if token == words.convert_tokens_to_ids(answer))
        rows.append({**row, "start_positions": place, "end_positions": place})
    return rows


def bert_for_answers() -> tuple[Any, Any]:
    """A BERT that can say who has which animal where."""
    words = tokenizer((text for row in places() for text in row), begin=True)
    tf.set_seed(0)
    model = tf.BertForQuestionAnswering(_bert_config(words))
    fit(model, answer_rows(words, places()), tf.DataCollatorWithPadding(words), steps=250)
    return model, words


def bert_for_labels() -> tuple[Any, Any]:
    """A BERT that can tell friendly from unfriendly."""
    words = tokenizer((text for text, _ in reviews()), begin=True)
    tf.set_seed(0)
    model = tf.BertForSequenceClassification(_bert_config(words))
    fit(model, [{**words(t), "labels": y} for t, y in reviews()], tf.DataCollatorWithPadding(words), steps=150)
    return model, words
