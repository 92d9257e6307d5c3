"""Figures in README and docs are those that the benchmarks stored."""

import json
import re
from pathlib import Path

import pytest
from transformers import AutoModel

from hf_reparam import LowRankConfig, convert, report

ROOT = Path(__file__).parents[1]


def test_figures_are_the_results():
    data = json.loads((ROOT / "benchmarks" / "results" / "foundation.json").read_text())
    seconds, loading = data["factoring"]["seconds"], data["loading"]
    figures = [
        f"{data['exactness']['full_rank_largest_output_difference']:.1e}",
        f"{max(data['exactness']['relative_excess_error_rank_128_float64'].values()):.1e}",
        f"{seconds['hf_reparam']:.1f} s; a loop",
        f"`torch.linalg.svd` {seconds['torch.linalg.svd, float32, full_matrices=False']:.1f} s in float32",
        f"{seconds['torch.linalg.svd, float64, full_matrices=False']:.1f} s in float64",
        f"| {data['forward']['ratio']:.2f} of dense",
        f"{loading['parameter_ratio']:.2f} of the parameters | {loading['weights read, cold cache']['ratio']:.2f} of",
        f"| {loading['call alone, warm']['ratio']:.2f} of dense: more tensors",
    ]
    readme = (ROOT / "README.md").read_text()
    assert [figure for figure in figures if figure not in readme] == []


def test_quality_figures_are_the_results():
    results = json.loads((ROOT / "benchmarks" / "results" / "quality.json").read_text())["results"]
    readme = (ROOT / "README.md").read_text()
    columns = {
        "MiniLM": (("0.8", "0.6", "0.4", "0.25"), "lost", ".3f"),
        "Llama 0.9M": (("0.8", "0.6", "0.4"), "lost", ".4f"),
        "GPT-2 2.2M": (("0.8", "0.6", "0.4"), "lost", ".4f"),
        "SST-2": (("0.5", "0.25"), "accuracy", ".3f"),
    }
    methods = [method for method in results["MiniLM"]["rows"] if method != "dense"]
    assert len(methods) == 11
    for method in methods:
        cells = [
            " / ".join(format(results[model]["rows"][method][keep][score], style) for keep in keeps)
            for model, (keeps, score, style) in columns.items()
        ]
        assert f"| {method} | {' | '.join(cells)} |" in readme
    better = [results["MiniLM"]["rows"][name] for name in ("+ embeddings", "fisher, global, pivoted")]
    assert all(better[0][keep]["lost"] < better[1][keep]["lost"] for keep in ("0.4", "0.25"))  # at equal whole size
    refitted = results["MiniLM"]["rows"]["fisher, global, pivoted, refit"]
    genres = [f"{refitted['0.4'][f'main-{genre}']:.3f} on {genre}" for genre in ("captions", "news")]
    spearman = [
        results["MiniLM"]["rows"]["dense"]["1.0"]["spearman"],
        *(refitted[k]["spearman"] for k in ("0.8", "0.4")),
    ]
    figures = [
        f"(dense {results['SST-2']['rows']['dense']['1.0']['accuracy']:.3f})",
        *genres,
        "{:.3f} dense, {:.3f} at keep 0.8 and {:.3f} at keep 0.4".format(*spearman),
        f"calibration {results['SST-2']['seconds']['calibration']:.0f} s for the 2,000 sentences",
    ]
    assert [figure for figure in figures if figure not in " ".join(readme.split())] == []


def test_figures_of_sentence_embeddings_are_the_results():
    rows = json.loads((ROOT / "benchmarks" / "results" / "quality.json").read_text())["results"]["MiniLM"]["rows"]
    page = (ROOT / "docs" / "tasks" / "sentence-transformers.md").read_text()
    keeps, methods = ("0.8", "0.6", "0.4", "0.25"), ("fisher, global, pivoted", "+ embeddings")
    for method in methods:
        for score in ("spearman", "lost"):
            figures = [rows["dense"]["1.0"][score], *(rows[method][keep][score] for keep in keeps)]
            assert f" | {' | '.join(f'{figure:.3f}' for figure in figures)} |" in page
        ratios = [f"{rows[method][keep]['parameter_ratio']:.2f}" for keep in keeps]
        assert f"| 1.00 | {' | '.join(ratios)} |" in page


@pytest.mark.slow
def test_why_plain_svd_fails_says_what_was_measured(minilm):
    results = json.loads((ROOT / "benchmarks" / "results" / "quality.json").read_text())["results"]
    page = (ROOT / "docs" / "explanation" / "why-plain-svd-fails.md").read_text()
    lines = {"plain SVD": "plain SVD: ", "SVD-LLM": "SVD-LLM: ", "fisher, uniform": "fisher, uniform: "}
    lines |= {"fisher, global": "fisher, global: ", "fisher, global, pivoted": "fisher, global, pivoted |"}
    for method, start in lines.items():
        cells = [
            " / ".join(f"{results[model]['rows'][method][keep]['lost']:.4f}" for keep in ("0.8", "0.6", "0.4"))
            for model in ("Llama 0.9M", "GPT-2 2.2M")
        ]
        assert re.search(rf"^\| {re.escape(start)}.*{re.escape(' | '.join(cells))} \|$", page, re.M), method
    config = LowRankConfig(keep=0.5, form="pair", allocation="uniform")
    errors = [layer.error for layer in report(convert(AutoModel.from_pretrained(minilm), config)).layers]
    assert f"{min(errors):.0%} to {max(errors):.0%}".replace("%", " %") in " ".join(page.split())


def test_memory_figures_are_the_results():
    results = json.loads((ROOT / "benchmarks" / "results" / "memory.json").read_text())
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
    assert f"{times['convert 8192 x 2048 in place, pair']} for layers of 8192 x 2048" in text
    assert f"use {used['pair']} as a pair and {used['pivoted']} pivoted" in text
    assert f"resident are {in_place['pair']} and {in_place['pivoted']}" in text


def test_speed_figures_are_the_results():
    rows = json.loads((ROOT / "benchmarks" / "results" / "speed.json").read_text())["summary"]
    decision = (ROOT / "docs" / "decisions" / "0005-pivoted-form.md").read_text()
    for kind in speed_kinds(rows):
        assert (
            f"| {named(kind)} | {speed_cells(rows, kind, lambda r: format(r['pivoted / pair'], '.2f'))} |" in decision
        )
    readme = " ".join((ROOT / "README.md").read_text().split())
    compiled, eager = (
        sorted(f"{r['pivoted / pair']:.2f}" for r in rows if (r["dtype"], r["compiled"]) == ("float32", mode))
        for mode in (True, False)
    )
    assert f"{compiled[0]} to {compiled[-1]} of the time of a pair" in readme
    assert f"up to {eager[-1]} in eager mode" in readme


def test_the_decision_on_forms_is_the_results():
    stored = json.loads((ROOT / "benchmarks" / "results" / "frontier.json").read_text())
    page = (ROOT / "docs" / "decisions" / "0026-which-form-by-default.md").read_text()
    assert len(stored["results"]) == 3
    for result in stored["results"].values():
        assert len(result["rows"]) == 11
        for asked, row in result["rows"].items():
            cells = [f"{row['lost']:.4f}", *(f"{row[share]:.2f}" for share in ("parameters", "layers", "whole"))]
            assert f"| {asked} | {' | '.join(cells)} |" in page
        best = [result["rows"][f"keep={keep}, pivoted"]["lost"] for keep in (0.8, 0.6, 0.5, 0.4)]
        pairs = [result["rows"][f"keep={keep}, pair"]["lost"] for keep in (0.8, 0.6, 0.5, 0.4)]
        assert all(one < other for one, other in zip(best, pairs, strict=True))
    for name, calls in ((n, calls) for n, calls in stored["shapes"].items() if n != "machine"):
        for call, reached in calls.items():
            cells = [f"{row['layers']:.2f}, {row['whole']:.2f}" for row in reached.values()]
            assert f"| {name}, {call} | {' | '.join(cells)} |" in page


def test_the_decision_on_choices_of_calibration_is_the_results():
    results = json.loads((ROOT / "benchmarks" / "results" / "ablations.json").read_text())["results"]
    page = (ROOT / "docs" / "decisions" / "0027-choices-of-calibration.md").read_text()
    assert len(results) == 2
    for name, result in results.items():
        table = page.partition(f"{name}; {result['lost']}:")[2].partition("\n\n")[2].partition("\n\n")[0]
        by_choice = {choice: [scores[choice] for scores in result["keep"].values()] for choice in result["keep"]["0.6"]}
        for choice, lost in by_choice.items():
            assert f"| {choice} | {' | '.join(f'{value:.4f}' for value in lost)} |" in table
            if choice.startswith("input-only"):
                assert all(value > best for value, best in zip(lost, by_choice["default"], strict=True))


def test_the_decision_on_packing_is_the_results():
    rows = json.loads((ROOT / "benchmarks" / "results" / "speed.json").read_text())["packed"]["results"]
    page = (ROOT / "docs" / "decisions" / "0025-no-packing.md").read_text()
    assert len(rows) == 18
    for width, keep in dict.fromkeys((row["width"], row["keep"]) for row in rows):
        cells = [f"{row['ratio']:.2f}" for row in rows if (row["width"], row["keep"]) == (width, keep)]
        assert f"| {width} | {keep} | {' | '.join(cells)} |" in page


def speed_kinds(rows):
    return list(dict.fromkeys((r["family"], r["dtype"], r["compiled"]) for r in rows))


def named(kind):
    return f"{kind[0]}, {kind[1]}, {'compiled' if kind[2] else 'eager'}"


def speed_cells(rows, kind, show):
    columns = [
        [show(r) for r in rows if (*kind, n) == (r["family"], r["dtype"], r["compiled"], r["tokens"])]
        for n in (1, 32, 1024)
    ]
    return " | ".join(" / ".join(column) for column in columns)


def test_the_page_on_speed_is_the_results():
    results = json.loads((ROOT / "benchmarks" / "results" / "speed.json").read_text())
    page = (ROOT / "docs" / "when-faster.md").read_text()
    text, rows = " ".join(page.split()), results["summary"]
    for kind in speed_kinds(rows):
        for form in ("pair", "pivoted"):
            show = lambda r, form=form: f"{r[form]:.2f}"  # noqa: E731
            assert f"| {named(kind)} | {form} | {speed_cells(rows, kind, show)} |" in page
    models = results["models"]["results"]
    for form in ("pair", "pivoted"):
        for tokens in (1, 32, 1024):
            line = " / ".join(f"{r['ratio'][form]:.2f}" for r in models["forward"] if r["tokens"] == tokens)
            assert re.search(rf"\| BERT-base, float32, {tokens} tokens? \| {form} \| {line} \|", page)
        for dtype in ("float32", "bfloat16"):
            line = " / ".join(f"{r['ratio'][form]:.2f}" for r in models["decoding"] if r["dtype"] == dtype)
            assert f"| GPT-2 small, {dtype}, decoding with its cache | {form} | {line} |" in page
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
    results = json.loads((ROOT / "benchmarks" / "results" / "recovery.json").read_text())["results"]
    page = (ROOT / "docs" / "how-to" / "fine-tune.md").read_text()
    mean = lambda scores: sum(scores) / len(scores)  # noqa: E731
    for start, name in (("plain SVD", "plain SVD, uniform ranks"), ("calibrated", "calibration data")):
        row = results[start]
        cells = [row["converted"], mean(row["fine-tuned"]), mean(row["distilled"])]
        assert f"| {name} | {' | '.join(f'{cell:.3f}' for cell in cells)} |" in page
    assert f"dense {results['dense']:.3f}:" in page


def test_textbook_figures_are_the_results():
    page = (ROOT / "docs" / "tasks" / "plain-torch.md").read_text()
    results = json.loads((ROOT / "benchmarks" / "results" / "textbook.json").read_text())["results"]
    for keep, row in results.items():
        scores = " | ".join(f"{row[name]:.3f}" for name in ("plain SVD", "converted", "fine-tuned", "merged"))
        assert f"| {keep} | {row['parameters'][1] / row['parameters'][0]:.2f} | {scores} |" in page
        assert row["loaded"] == row["fine-tuned"]
    assert f"writes {results['0.3']['dense']:.1%}" in page


def test_figures_of_heads_are_the_results():
    data = json.loads((ROOT / "benchmarks" / "results" / "heads.json").read_text())
    page = (ROOT / "docs" / "when-faster.md").read_text()
    assert len(data["decoding"]) == 10
    for row in data["decoding"]:
        cells = [
            row["prompt"],
            row["model"],
            f"{row['cache_bytes']:,}",
            f"{row['cache_ratio']:.2f}",
            f"{row['ratio']:.2f}",
        ]
        assert f"| {' | '.join(map(str, cells))} |" in page
    decision = (ROOT / "docs" / "decisions" / "0013-joint-attention.md").read_text()
    tables = [data["quality"][model]["rows"] for model in ("MiniLM", "GPT-2 2.2M")]
    for method in tables[0]:
        cells = [" / ".join(f"{rows[method][s]['lost']:.4f}" for s in ("0.75", "0.5", "0.25")) for rows in tables]
        assert f"| {method} | {' | '.join(cells)} |" in decision
        assert all(rows["this package"][s]["lost"] <= rows[method][s]["lost"] for rows in tables for s in rows[method])


def test_figures_of_the_decision_on_heads_are_the_results():
    results = json.loads((ROOT / "benchmarks" / "results" / "quality.json").read_text())["results"]
    page = (ROOT / "docs" / "decisions" / "0021-heads-opt-in.md").read_text()
    styles = {"Llama 0.9M": (".4f", "lost"), "GPT-2 2.2M": (".4f", "lost"), "MiniLM": (".3f", "lost")}
    for model, (style, score) in {**styles, "SST-2": (".3f", "accuracy")}.items():
        keeps = re.search(rf"^\| {model}, .*keep ([\d. /]+) \|", page, re.M)[1].split(" / ")
        rows = [results[model]["rows"][name] for name in ("fisher, global, pivoted", "joint attention")]
        cells = [" / ".join(format(row[keep][score], style).lstrip("0") for keep in keeps) for row in rows]
        assert f"| {' | '.join(cells)} |" in page


def test_figures_of_the_decision_on_held_out_plans_are_the_results():
    results = json.loads((ROOT / "benchmarks" / "results" / "quality.json").read_text())["results"]
    page = (ROOT / "docs" / "decisions" / "0023-held-out-plans.md").read_text()
    rows = ["fisher, global, pivoted", "fisher, global, pivoted, not measured", "fisher, uniform, pivoted"]
    rows += ["activation, uniform, pivoted", "activation, uniform"]
    lines = re.findall(r"^\| (.+, \d+ \w+) \| ([\d. /]+) \| (.+) \|$", page, re.M)
    assert len(lines) == 10
    for name, keeps, cells in lines:
        scores = [[f"{results[name]['rows'][row][keep]['lost']:.4f}" for keep in keeps.split(" / ")] for row in rows]
        assert cells == " | ".join(" / ".join(some) for some in scores)


def test_figures_of_refine_are_the_results():
    results = json.loads((ROOT / "benchmarks" / "results" / "refine.json").read_text())["results"]
    page = (ROOT / "docs" / "how-to" / "calibrate.md").read_text()
    assert len(results) == 3
    for name, found in results.items():
        steps = found["steps"]
        lost = [f"{steps[step]['lost']:.4f}" for step in ("convert", "refit", "refine")]
        seconds = " / ".join(f"{step['seconds']:.0f}" for step in steps.values())
        assert f"| {name}, {found['lost']} | {' | '.join(lost)} | {seconds} |" in page
