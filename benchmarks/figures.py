"""Write the figures that benchmarks stored into the tables of README and pages.

    python -m benchmarks.figures        (`make figures`)

A table below `<!-- figures: NAME -->` keeps its two lines of head; the rows up to the next empty line are those of
TABLES[NAME]. Figures within sentences are written by hand, and tests/test_figures.py compares them.
"""

import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any

from benchmarks.machine import RESULTS
from hf_reparam.compress.compare import shown
from hf_reparam.structures.heads import attention

ROOT = Path(__file__).parents[1]
Rows = Iterable[Iterable[Any]]
FORMS = ("pair", "pivoted")
SIZES = ("0.8", "0.6", "0.4")
DEFAULT = "fisher, global, pivoted"
MARKED = re.compile(r"(<!-- figures: ([\w-]+) -->\n\n(?:\|.*\n){2})(?:\|.*\n)*")


def stored(name: str) -> dict[str, Any]:
    """What a benchmark wrote last."""
    found: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text())
    return found


def series(values: Iterable[float], style: str = ".2f") -> str:
    """Figures of one cell."""
    return " / ".join(format(value, style) for value in values)


def quality() -> Rows:
    results = stored("quality")["results"]
    columns = {"MiniLM": ((*SIZES, "0.25"), "lost", ".3f"), "Llama 0.9M": (SIZES, "lost", ".4f")}
    columns |= {"GPT-2 2.2M": (SIZES, "lost", ".4f"), "SST-2": (("0.5", "0.25"), "accuracy", ".3f")}
    for method in (method for method in results["MiniLM"]["rows"] if method != "dense"):
        rows = {model: results[model]["rows"][method] for model in columns}
        yield method, *(series((rows[m][keep][s] for keep in keeps), f) for m, (keeps, s, f) in columns.items())


def why() -> Rows:
    """The methods one after the other, each with what it adds."""
    results = stored("quality")["results"]
    lines = {"plain SVD": ": error of the weight", "SVD-LLM": ": error of the output"}
    lines |= {"fisher, uniform": ": predicted loss, equal shares", "fisher, global": ": predicted loss, one budget"}
    for method, adds in {**lines, DEFAULT: ""}.items():
        rows = [results[model]["rows"][method] for model in ("Llama 0.9M", "GPT-2 2.2M")]
        yield method + adds, *(series((row[keep]["lost"] for keep in SIZES), ".4f") for row in rows)


def held_out() -> Rows:
    rows = [DEFAULT, f"{DEFAULT}, not measured", "fisher, uniform, pivoted", "activation, uniform, pivoted"]
    results = stored("quality")["results"]
    for name in sorted((name for name in results if re.search(r"\d+ \w+$", name)), key=_model_and_examples):
        found = results[name]["rows"]
        keeps = [keep for keep in found[DEFAULT] if keep not in ("0.9", *(["0.25"] if "SST" not in name else []))]
        cells = [series((found[row][keep]["lost"] for keep in keeps), ".4f") for row in (*rows, "activation, uniform")]
        yield name, " / ".join(keeps), *cells


def _model_and_examples(name: str) -> tuple[int, int]:
    model, _, count = name.rpartition(", ")
    order = ["Llama 0.9M", "GPT-2 2.2M", "MiniLM", "SentenceTransformer MiniLM", "SST-2", "Whisper 38M"]
    return order.index(model), int(count.split()[0])


def narrower_heads() -> Rows:
    results = stored("quality")["results"]
    scores = {"Llama 0.9M": "loss above dense", "GPT-2 2.2M": "loss above dense", "MiniLM": "1 - cosine"}
    for model, score in {**scores, "SST-2": "accuracy"}.items():
        rows = [results[model]["rows"][name] for name in (DEFAULT, "joint attention")]
        keeps = [keep for keep in rows[0] if keep != "0.9"]
        style, key = (".4f" if "loss" in score else ".3f"), ("accuracy" if model == "SST-2" else "lost")
        cells = (" / ".join(format(row[keep][key], style).lstrip("0") for keep in keeps) for row in rows)
        yield f"{model}, {score}, keep {' / '.join(keeps)}", *cells


def _layers(cell: Callable[[Any], str]) -> Iterable[tuple[str, list[str]]]:
    """Kind of layers, and a cell of three sizes for 1, 32 and 1,024 tokens."""
    rows = stored("speed")["summary"]
    for kind in dict.fromkeys((row["family"], row["dtype"], row["compiled"]) for row in rows):
        of_kind = [row for row in rows if (row["family"], row["dtype"], row["compiled"]) == kind]
        columns = ([cell(row) for row in of_kind if row["tokens"] == tokens] for tokens in (1, 32, 1024))
        name = f"{kind[0]}, {kind[1]}, {'compiled' if kind[2] else 'eager'}"
        yield name, [" / ".join(column) for column in columns]


def pivoted_over_pair() -> Rows:
    for name, cells in _layers(lambda row: f"{row['pivoted / pair']:.2f}"):
        yield name, *cells


def layers() -> Rows:
    by_form = [list(_layers(lambda row, form=form: f"{row[form]:.2f}")) for form in FORMS]  # type: ignore[misc]
    for rows in zip(*by_form, strict=True):
        yield from ((name, form, *cells) for form, (name, cells) in zip(FORMS, rows, strict=True))


def models() -> Rows:
    results = stored("speed")["models"]["results"]
    for tokens in (1, 32, 1024):
        for form in FORMS:
            ratios = (row["ratio"][form] for row in results["forward"] if row["tokens"] == tokens)
            yield f"BERT-base, float32, {tokens} token{'s' * (tokens > 1)}", form, series(ratios)
    for dtype in ("float32", "bfloat16"):
        for form in FORMS:
            ratios = (row["ratio"][form] for row in results["decoding"] if row["dtype"] == dtype)
            yield f"GPT-2 small, {dtype}, decoding with its cache", form, series(ratios)


def packed() -> Rows:
    rows = stored("speed")["packed"]["results"]
    for width, keep in dict.fromkeys((row["width"], row["keep"]) for row in rows):
        ratios = [row["ratio"] for row in rows if (row["width"], row["keep"]) == (width, keep)]
        yield width, keep, *(f"{ratio:.2f}" for ratio in ratios)


def frontier(model: str) -> Rows:
    for asked, row in stored("frontier")["results"][model]["rows"].items():
        yield asked, f"{row['lost']:.4f}", *(f"{row[share]:.2f}" for share in ("parameters", "layers", "whole"))


def reached() -> Rows:
    shapes = {name: calls for name, calls in stored("frontier")["shapes"].items() if name != "machine"}
    for name, calls in shapes.items():
        for call, rows in calls.items():
            yield f"{name}, {call}", *(f"{row['layers']:.2f}, {row['whole']:.2f}" for row in rows.values())


def ablations(model: str) -> Rows:
    found = stored("ablations")["results"][model]["keep"]
    for choice in next(iter(found.values())):
        yield choice, *(f"{scores[choice]:.4f}" for scores in found.values())


def recovery() -> Rows:
    results = stored("recovery")["results"]
    for start, name in (("plain SVD", "plain SVD, uniform ranks"), ("calibrated", "calibration data")):
        row = results[start]
        cells = (row["converted"], mean(row["fine-tuned"]), mean(row["distilled"]))
        yield name, *(f"{cell:.3f}" for cell in cells)


def first() -> Rows:
    """What the first page shows."""
    results = stored("recovery")["results"]
    yield "dense", f"{results['dense']:.3f}", f"{results['calibrated']['dense MB']:.1f}", 1
    for start, name in (("plain SVD", "plain SVD"), ("calibrated", "`convert(model, keep=0.25, calibration=data)`")):
        row = results[start]
        yield name, f"{row['converted']:.3f}", f"{row['MB']:.1f}", f"{row['time']:.2f}"
    trained = f"{mean(results['calibrated']['fine-tuned']):.3f}"
    yield "the same, one more epoch of training", trained, "as above", "as above"


def refine() -> Rows:
    for name, found in stored("refine")["results"].items():
        after = [found["steps"][step] for step in ("convert", "refit", "refine")]
        lost = (f"{step['lost']:.4f} / {step['elsewhere']:.4f}" for step in after)
        yield f"{name}, {found['lost']}", *lost, series((step["seconds"] for step in found["steps"].values()), ".0f")


def textbook() -> Rows:
    for keep, row in stored("textbook")["results"].items():
        scores = (f"{row[name]:.3f}" for name in ("plain SVD", "converted", "fine-tuned", "merged"))
        yield keep, f"{row['parameters'][1] / row['parameters'][0]:.2f}", *scores


def decoding_with_heads() -> Rows:
    for row in stored("heads")["decoding"]:
        shares = (f"{row[name]:.2f}" for name in ("cache_ratio", "ratio"))
        yield row["prompt"], row["model"], f"{row['cache_bytes']:,}", *shares


def maps_of_heads() -> Rows:
    tables = [stored("heads")["quality"][model]["rows"] for model in ("MiniLM", "GPT-2 2.2M")]
    for method in tables[0]:
        shares = ("0.75", "0.5", "0.25")
        yield method, *(series((rows[method][share]["lost"] for share in shares), ".4f") for rows in tables)


def conformance() -> Rows:
    for family, forms in stored("conformance")["families"].items():
        for form, row in forms.items():
            worse = len(row["worse_than_dense"]) if form != "dense" else "-"
            yield family, form, row["passed"], row["failed"], row["skipped"], worse


def hostile() -> Rows:
    parts = {"configurations": "`config.json`, read by `AutoConfig`"}
    parts |= {"whole_loads": "`config.json`, whole model loaded", "skeletons": "`config.json`, skeleton built"}
    for part, what in {**parts, "weight_files": "`model.safetensors`, whole model loaded"}.items():
        found = stored("hostile")[part]
        ends, cases = found["ends"], found["cases"]
        good = sum(ends.get(end, 0) for end in ("read", "loaded", "built"))
        early = sum(count for end, count in ends.items() if end.endswith("before the plan is read"))
        slowest = f"{found['slowest_seconds']:.2f} s"
        yield what, f"{cases:,}", f"{good:,}", f"{cases - good - early:,}", f"{early:,}", slowest, found["bad"]


def kills() -> Rows:
    for work, found in stored("faults")["killed"].items():
        yield work, *(found[outcome] for outcome in ("kills", "absent", "whole", "broken"))


def by_bytes() -> Rows:
    """Bytes of the layers, megabytes and time of the first model, and what each of them loses."""
    found = {name: result["rows"] for name, result in stored("bytes")["results"].items()}
    first = found["MiniLM, 200 sentences"]
    whole = first["dense, float32"]["MB"]
    for name, row in first.items():
        lost = [f"{rows[name]['lost']:.4f}" if "lost" in rows[name] else "" for rows in found.values()]
        time = f"{row['time']:.2f}" if "time" in row else ""
        yield name, f"{row['MB'] / whole:.2f}", f"{row['whole MB']:.1f}", time, *lost


def served() -> Rows:
    """Time of every form in every runtime over the dense model's in the same, and over dense in eager PyTorch."""
    for row in stored("export")["results"]:
        eager = row["seconds"]["torch"]["dense"]
        for runtime, seconds in row["seconds"].items():
            own = (f"{seconds[form] / seconds['dense']:.2f}" for form in ("pair", "pivoted"))
            yield row["model"], runtime, *own, *(f"{seconds[form] / eager:.2f}" for form in ("dense", "pair"))


def assisted() -> Rows:
    for keep, row in stored("speculative")["results"].items():
        yield keep, f"{row['accepted']:.2f}", f"{row['tokens_per_call']:.1f}", f"{row['ratio']:.2f}"


def compared() -> Rows:
    """What `compare` said of each model, dense and then converted, without the scores of single genres."""
    found = [result["figures"] for result in stored("compared")["results"].values()]
    for figure in dict.fromkeys(name for figures in found for name in figures if not name.startswith("main-")):
        values = [tuple(shown(value and round(value, 6)) for value in figures.get(figure, ())) for figures in found]
        yield figure, *(" / ".join(filter(None, pair)) for pair in values)


FAMILIES = {
    "text encoders": "bert roberta distilbert albert electra deberta-v2 modernbert mpnet xlm-roberta",
    "text decoders": "gpt2 opt llama mistral qwen2 qwen3 gemma2 gemma3_text phi3 gpt_neox bloom falcon mamba2",
    "mixtures of experts": "mixtral qwen2_moe qwen3_moe deepseek_v3 gpt_oss",
    "encoder-decoders": "t5 bart mbart marian pegasus m2m_100",
    "speech": "whisper wav2vec2 hubert",
    "images, and images with text": "vit deit swin dinov2 clip siglip blip llava",
}
"""Model types of the page on what is supported, by what people look for."""


def families() -> Rows:
    """Of each type, classes that came through the census, and those that were left out; heads that can be narrower."""
    rows = stored("census")["rows"]
    narrower = {kind.partition("modeling_")[2].partition(".")[0] for kind in attention._registry}
    for group, types in FAMILIES.items():
        for name in types.split():
            ends = Counter(row["ends"] for row in rows if row["type"] == name)
            through = ends["outputs equal"] + ends["tensors equal"]
            heads = "yes" if name.replace("-", "_") in narrower else ""
            yield group, name, f"{through} of {ends.total()}", ends["failed"], heads


TABLES: Mapping[str, Callable[[], Rows]] = {
    "quality": quality,
    "why": why,
    "held-out": held_out,
    "narrower-heads": narrower_heads,
    "pivoted-over-pair": pivoted_over_pair,
    "layers": layers,
    "models": models,
    "packed": packed,
    "reached": reached,
    "recovery": recovery,
    "first": first,
    "refine": refine,
    "textbook": textbook,
    "decoding-with-heads": decoding_with_heads,
    "maps-of-heads": maps_of_heads,
    "frontier-llama": partial(frontier, "Llama 0.9M, 200 chunks"),
    "frontier-gpt2": partial(frontier, "GPT-2 2.2M, 200 chunks"),
    "frontier-minilm": partial(frontier, "MiniLM, 200 sentences"),
    "ablations-gpt2": partial(ablations, "GPT-2 2.2M, 200 chunks"),
    "ablations-llama": partial(ablations, "Llama 0.9M, 200 chunks"),
    "ablations-minilm": partial(ablations, "MiniLM, 200 sentences"),
    "ablations-sst2": partial(ablations, "SST-2"),
    "ablations-whisper": partial(ablations, "Whisper 38M, 50 utterances"),
    "conformance": conformance,
    "hostile": hostile,
    "served": served,
    "assisted": assisted,
    "compared": compared,
    "families": families,
    "kills": kills,
    "bytes": by_bytes,
}


def updated(text: str) -> str:
    """A page with the rows of its marked tables as they are stored."""

    def table(found: re.Match[str]) -> str:
        rows = ("| " + " | ".join(map(str, row)) + " |\n" for row in TABLES[found[2]]())
        return found[1] + "".join(rows).replace("|  |", "| |")

    return MARKED.sub(table, text)


def pages() -> list[Path]:
    """Those that have a marked table."""
    texts = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
    return [page for page in texts if MARKED.search(page.read_text(encoding="utf-8"))]


if __name__ == "__main__":
    for page in pages():
        page.write_text(updated(page.read_text(encoding="utf-8")), encoding="utf-8")
