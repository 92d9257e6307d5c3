"""The page `docs/census.md`, written from the rows."""

from collections import Counter, defaultdict
from typing import Any

from census.trip import FAILED, LEFT_OUT, OUTPUTS, TENSORS

__all__ = ["page", "summary"]

ENDS = (OUTPUTS, TENSORS, LEFT_OUT, FAILED)
START = """# Census

<!-- Written by `make census` from benchmarks/results/census.json; do not edit. -->

{which} that Transformers {transformers} publishes, but for the abstract ones, built tiny from its own
default configuration and taken there and back, in float32, with every layer that can be of rank {rank}, about half of
the classes as a pair and half pivoted:

1. `convert`, `save_pretrained`, loaded by the Auto class that knows it (else by its derived class): the same class, no
   key missing or left over, every parameter and buffer equal bit for bit, equal outputs;
2. `merge` of what was loaded, `save_pretrained`, loaded by the stock class: the same, and the *names and shapes of
   tensors in the file are those that the stock model writes*; outputs are those of the low-rank model up to rounding.

| how it ended | classes | model types |
|---|---|---|
{totals}

*Outputs equal*: all of this. *Tensors equal*: all but outputs, because inputs could not be made by the names of what
`forward` takes, or do not pass through a layer that was converted. *Left out*: no tiny model could be built,
nothing in it can be converted, or the stock class itself does not load what it saved. *Failed*: something differs.
{types_through} of {types} model types have a class that came through, with outputs equal or tensors equal.
`make census` took {minutes} minutes of one core.
"""


def summary(rows: list[dict[str, Any]]) -> dict[str, dict[str, int]]:
    """How it ended -> how many classes and model types."""
    return {
        end: {
            "classes": sum(row["ends"] == end for row in rows),
            "types": len({row["type"] for row in rows if row["ends"] == end}),
        }
        for end in ENDS
    }


def page(data: dict[str, Any]) -> str:
    """Markdown, from stored results: totals, what failed, families, and what was left out with its reason."""
    rows, totals, every = data["rows"], data["summary"], data["every"]
    through = {row["type"] for row in rows if row["ends"] in (OUTPUTS, TENSORS)}
    lines = [f"| {end} | {n['classes']:,} | {n['types']:,} |" for end, n in totals.items()]
    lines.append(f"| all | {len(rows):,} | {len({row['type'] for row in rows}):,} |")
    head = START.format(
        which="Every model class" if every == 1 else f"One in {every} of the model classes",
        transformers=data["machine"]["versions"]["transformers"],
        rank=data["rank"],
        minutes=data["cpu_minutes"],
        totals="\n".join(lines),
        types=f"{len({row['type'] for row in rows}):,}",
        types_through=f"{len(through):,}",
    )
    parts = [head, _failed(rows), _families(rows), _reasons(rows, TENSORS), _reasons(rows, LEFT_OUT)]
    return "\n".join(part for part in parts if part)


def _failed(rows: list[dict[str, Any]]) -> str:
    failed = [row for row in rows if row["ends"] == FAILED]
    if not failed:
        return ""
    lines = [f"| `{row['class']}` | {_cell('; '.join(row['why']))} |" for row in failed]
    return "\n".join(["## What failed", "", "| class | what differs |", "|---|---|", *lines, ""])


def _families(rows: list[dict[str, Any]]) -> str:
    by_type: dict[str, Counter[str]] = defaultdict(Counter)
    for row in rows:
        by_type[row["type"]][row["ends"]] += 1
    lines = [
        f"| {name or '(a part without a type)'} | {' | '.join(str(n[end] or '') for end in ENDS)} |"
        for name, n in sorted(by_type.items())
    ]
    head = f"| model type | {' | '.join(ENDS)} |"
    return "\n".join(["## By model type", "", head, "|---|---|---|---|---|", *lines, ""])


def _reasons(rows: list[dict[str, Any]], end: str) -> str:
    titles = {TENSORS: "Without outputs, and why", LEFT_OUT: "Left out, and why"}
    by_reason: dict[str, list[str]] = defaultdict(list)
    for row in rows:
        if row["ends"] == end:
            by_reason[row["why"]].append(f"`{row['class']}`")
    lines = [f"| {_cell(why)} | {', '.join(names)} |" for why, names in sorted(by_reason.items())]
    return "\n".join([f"## {titles[end]}", "", "| reason | classes |", "|---|---|", *lines, ""]) if lines else ""


def _cell(text: str) -> str:
    """Text that stands in a table as it is: no bars, no markup."""
    for mark, plain in {"|": "/", "<": "(", ">": ")", "[": "(", "]": ")", "*": "x", "`": "'"}.items():
        text = text.replace(mark, plain)
    return text.replace("__", r"\_\_")
