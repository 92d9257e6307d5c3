"""Figures in README and docs are those that the benchmarks stored: tables by `make figures`, sentences by hand."""

import math
import re
import statistics
from itertools import pairwise
from pathlib import Path

import pytest
from transformers import AutoModel

from benchmarks import figures
from hf_reparam import LowRankConfig, convert, report

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("page", figures.pages(), ids=lambda page: page.name)
def test_tables_are_those_of_make_figures(page):
    text = page.read_text(encoding="utf-8")
    assert figures.updated(text) == text, "run `make figures`"


def test_every_table_has_its_place():
    texts = [page.read_text(encoding="utf-8") for page in figures.pages()]
    named = [name for text in texts for name in re.findall(r"^<!-- figures: ([\w-]+) -->$", text, re.M)]
    assert sorted(named) == sorted(figures.TABLES)
    assert sum(len(list(rows())) for rows in figures.TABLES.values()) > 150


def test_figures_are_the_results():
    data = figures.stored("foundation")
    seconds, loading = data["factoring"]["seconds"], data["loading"]
    said = [
        f"{data['exactness']['full_rank_largest_output_difference']:.1e}",
        f"{max(data['exactness']['relative_excess_error_rank_128_float64'].values()):.1e}",
        f"{seconds['hf_reparam']:.1f} s; a loop",
        f"`torch.linalg.svd` {seconds['torch.linalg.svd, float32, full_matrices=False']:.1f} s in float32",
        f"{seconds['torch.linalg.svd, float64, full_matrices=False']:.1f} s in float64",
        f"| {data['forward']['ratio']:.2f} of dense",
        f"{loading['parameter_ratio']:.2f} of the parameters | {loading['weights read, cold cache']['ratio']:.2f} of",
        f"| {loading['call alone, warm']['ratio']:.2f} of dense: more tensors",
    ]
    page = (ROOT / "docs" / "results.md").read_text()
    assert [figure for figure in said if figure not in page] == []


def test_quality_figures_are_the_results():
    results = figures.stored("quality")["results"]
    page = (ROOT / "docs" / "results.md").read_text()
    better = [results["MiniLM"]["rows"][name] for name in ("+ embeddings", "fisher, global, pivoted")]
    assert all(better[0][keep]["lost"] < better[1][keep]["lost"] for keep in ("0.4", "0.25"))  # at equal whole size
    refitted = results["MiniLM"]["rows"]["fisher, global, pivoted, refit"]
    genres = [f"{refitted['0.4'][f'main-{genre}']:.3f} on {genre}" for genre in ("captions", "news")]
    genres.append(f"{refitted['0.4']['main-forums']:.3f} on forum posts")
    spearman = [refitted[keep]["spearman"] for keep in ("0.8", "0.4")]
    spearman.append(results["MiniLM"]["rows"]["dense"]["1.0"]["spearman"])
    said = [
        f"(dense {results['SST-2']['rows']['dense']['1.0']['accuracy']:.3f})",
        *genres,
        "{:.3f} at keep 0.8 and {:.3f} at keep 0.4 (dense: {:.3f})".format(*spearman),
        f"calibration {results['SST-2']['seconds']['calibration']:.0f} s for the 2,000 sentences",
    ]
    assert [figure for figure in said if figure not in " ".join(page.split())] == []


def test_figures_of_sentence_embeddings_are_the_results():
    rows = figures.stored("quality")["results"]["MiniLM"]["rows"]
    page = (ROOT / "docs" / "tasks" / "sentence-transformers.md").read_text()
    keeps, methods = ("0.8", "0.6", "0.4", "0.25"), ("fisher, global, pivoted", "+ embeddings")
    for method in methods:
        for score in ("spearman", "lost"):
            values = [rows["dense"]["1.0"][score], *(rows[method][keep][score] for keep in keeps)]
            assert f" | {' | '.join(f'{value:.3f}' for value in values)} |" in page
        ratios = [f"{rows[method][keep]['parameter_ratio']:.2f}" for keep in keeps]
        assert f"| 1.00 | {' | '.join(ratios)} |" in page
    readme = " ".join((ROOT / "README.md").read_text().split())
    alone, both = (f"{rows[method]['0.4']['lost']:.3f}" for method in methods)
    said = f"{ratios[2]} of all parameters give sentence embeddings whose 1 - cosine to the dense ones is {both}"
    assert f"{said}, where the layers alone give {alone}" in readme


@pytest.mark.slow
def test_why_plain_svd_fails_says_what_was_measured(minilm):
    page = (ROOT / "docs" / "explanation" / "why-plain-svd-fails.md").read_text()
    config = LowRankConfig(keep=0.5, form="pair", allocation="uniform")
    errors = [layer.error for layer in report(convert(AutoModel.from_pretrained(minilm), config)).layers]
    assert f"{min(errors):.0%} to {max(errors):.0%}".replace("%", " %") in " ".join(page.split())


def test_memory_figures_are_the_results():
    results = figures.stored("memory")
    page = (ROOT / "docs" / "big-models.md").read_text()
    runs = results["from_file_to_file"]["results"]["runs"]
    peaks = [run["peak_mb"] for name, run in runs.items() if name != "inspect"]
    assert re.findall(r"\| ([\d]+) MB \|", page) == [f"{peak:.0f}" for peak in peaks]
    assert max(peaks[:3]) < results["from_file_to_file"]["results"]["goal_mb"] < peaks[3]
    times = {
        name: f"{run['peak_above_mb'] / run['largest_layer_float64_mb']:.1f}"
        for name, run in results["in_memory"]["results"].items()
    }
    in_place = {form: times[f"convert in place, {form}"] for form in ("pair", "pivoted")}
    used = {form: times[f"convert in place, {form}, memory in use"] for form in ("pair", "pivoted")}
    text = " ".join(page.split())
    assert f"its peak is {times['convert 8192 x 2048 in place, pair']} times the largest layer in float64" in text
    assert f"{used['pair']} (pair) or {used['pivoted']} (pivoted) times are in use" in text
    assert f"the process keeps {max(in_place.values())}" in text


def test_speed_figures_are_the_results():
    rows = figures.stored("speed")["summary"]
    page = " ".join((ROOT / "docs" / "results.md").read_text().split())
    compiled, eager = (
        sorted(f"{r['pivoted / pair']:.2f}" for r in rows if (r["dtype"], r["compiled"]) == ("float32", mode))
        for mode in (True, False)
    )
    assert f"{compiled[0]} to {compiled[-1]} times as long as a pair" in page
    assert f"up to {eager[-1]} in eager mode" in page


def test_pivoted_layers_lose_less_at_every_size():
    results = figures.stored("frontier")["results"]
    assert len(results) == 3
    for result in results.values():
        best, pairs = (
            [result["rows"][f"keep={keep}, {form}"]["lost"] for keep in (0.8, 0.6, 0.5, 0.4)]
            for form in ("pivoted", "pair")
        )
        assert all(one < other for one, other in zip(best, pairs, strict=True))


def _lost_in(time, rows, share):
    """What is lost in that time, between the nearest sizes by the logarithm; nothing outside of all sizes."""
    points = sorted((row[share], math.log(row["lost"])) for row in rows)
    for (fast, more), (slow, less) in pairwise(points):
        if fast <= time <= slow:
            return math.exp(more + (less - more) * (time - fast) / (slow - fast))
    return math.inf


@pytest.mark.parametrize(("share", "most"), [("layers", 1.11), ("whole", 1.05)])
def test_speedup_loses_hardly_more_than_the_better_form_in_the_same_time(share, most):
    ratios = []
    for result in figures.stored("frontier")["results"].values():
        for asked in (1.25, 1.5, 2.0):
            row = result["rows"][f"speedup={asked}"]
            assert row["layers"] == pytest.approx(1 / asked, rel=0.05)
            forms = [[r for name, r in result["rows"].items() if form in name] for form in ("pair", "pivoted")]
            other = min(_lost_in(row[share], rows, share) for rows in forms)
            ratios += [row["lost"] / other] if other < math.inf else []
    assert len(ratios) == 7
    assert max(ratios) < most
    assert statistics.median(ratios) < 1.005


def test_layers_reach_the_speedup_that_is_asked_for():
    shapes = {name: calls for name, calls in figures.stored("frontier")["shapes"].items() if name != "machine"}
    rows = [(float(asked), row) for calls in shapes.values() for some in calls.values() for asked, row in some.items()]
    assert len(rows) == 12
    # as decision 26 says: measured anew with 256 copies of a layer, where 64 had given 2 %; the goal is 5 %
    assert all(row["layers"] == pytest.approx(asked, rel=0.035) for asked, row in rows)


def test_inputs_alone_lose_more_for_every_kind_of_layer_of_language_models():
    results = figures.stored("ablations")["results"]
    for name in ("GPT-2 2.2M, 200 chunks", "Llama 0.9M, 200 chunks"):
        for lost in results[name]["keep"].values():
            alone = [value for choice, value in lost.items() if choice.startswith("input-only")]
            assert alone
            assert min(alone) > lost["default"]


def test_the_page_on_speed_is_the_results():
    results = figures.stored("speed")
    page = (ROOT / "docs" / "when-faster.md").read_text()
    text = " ".join(page.split())
    training = results["training"]["results"]
    for form in ("pair", "pivoted"):
        assert f"{training['ratio'][form]:.2f} of the dense time ({form})" in text
    assert f"{training['optimizer_state_ratio']['pair']:.2f} of the dense one" in text
    for case in results["factoring"]["results"]:
        if case["shape"][0] == 4096:
            assert f"{case['seconds']['hf_reparam, exact']:.1f} s" in text
    full = results["factoring"]["results"][1]["seconds"]
    assert f"{full['hf_reparam, exact'] / full['torch.linalg.svd']:.2f} of the {full['torch.linalg.svd']:.1f} s" in text


def test_recovery_figures_are_the_results():
    results = figures.stored("recovery")["results"]
    page = (ROOT / "docs" / "how-to" / "fine-tune.md").read_text()
    mean = lambda scores: sum(scores) / len(scores)  # noqa: E731
    assert f"dense {results['dense']:.3f}:" in page
    readme = " ".join((ROOT / "README.md").read_text().split())
    shares = [results["calibrated"]["converted"], results["dense"], mean(results["calibrated"]["fine-tuned"])]
    said = [f"{share:.1%}".replace("%", " %") for share in shares]
    assert f"has {said[0]} accuracy (dense: {said[1]})" in readme
    assert f"it has {said[2]}." in readme
    row = results["calibrated"]
    assert f"{row['MB']:.0f} MB instead of {row['dense MB']:.0f}, in {row['time']:.2f} of the time" in readme
    assert [share in readme for share in (f"{value:.1%}" for value in shares)] == [True] * 3, "in Chinese, too"


def test_textbook_figures_are_the_results():
    page = (ROOT / "docs" / "tasks" / "plain-torch.md").read_text()
    results = figures.stored("textbook")["results"]
    assert all(row["loaded"] == row["fine-tuned"] for row in results.values())
    assert f"writes {results['0.3']['dense']:.1%}" in page


def test_maps_of_heads_in_this_metric_lose_the_least():
    quality = figures.stored("heads")["quality"]
    for rows in (quality[model]["rows"] for model in ("MiniLM", "GPT-2 2.2M")):
        assert all(rows["this package"][s]["lost"] <= row[s]["lost"] for row in rows.values() for s in row)
