"""Pictures of spectra, ranks and sizes, with matplotlib, an optional package."""

import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from hf_reparam.config import LowRankConfig, layer_kind
from hf_reparam.errors import PlanError, TargetError
from hf_reparam.linalg.calibration import Calibration
from hf_reparam.model.host import opened
from hf_reparam.model.sites import Found, select
from hf_reparam.plan import RankPlan
from hf_reparam.structures import STRUCTURES
from hf_reparam.structures.source import Source

__all__ = ["frontier", "ranks", "spectrum"]


def spectrum(
    model: nn.Module,
    calibration: Calibration | None = None,
    names: Iterable[str] | None = None,
    *,
    plan: RankPlan | None = None,
    ax: Any = None,
) -> Any:
    """What each rank of a layer leaves out: sqrt(sum of the discarded squared singular values / sum of all).

    With a calibration that held some data out it is the error on these, of factors that were made without them.

    Args:
        model: a dense model.
        calibration: what `calibrate` returned; None for the weights alone.
        names: layers to draw, as in a plan, each in its colour; None for all, with one colour for layers of one kind.
        plan: marks the ranks that it gives them.
        ax: matplotlib Axes to draw into, and returned; None for a new figure.

    Raises:
        TargetError: there is no such layer.
        ImportError: matplotlib is not installed.

    >>> len(spectrum(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4))).lines)
    2
    """
    source = Source.of(calibration, None)
    found = {f.name: f for f in select(opened(model).model, LowRankConfig()).selected}
    chosen = list(found) if names is None else list(names)
    missing = sorted(set(chosen) - set(found))
    if missing or not chosen:
        raise TargetError(f"no such layers among the {len(found)} of the model: {missing[:3]}")
    ax = _axes(ax, (6.4, 4.2))
    labels = {name: layer_kind(name) if names is None else name for name in chosen}
    distinct = list(dict.fromkeys(labels.values()))
    for name, label in labels.items():
        left = _left_out(found[name], source)
        color = f"C{distinct.index(label) % 10}"
        known = any(line.get_label() == label for line in ax.lines)
        ax.plot(range(len(left)), left, color=color, linewidth=1, label=None if known else label)
        if plan is not None and name in plan.modules:
            rank = plan.modules[name].rank
            ax.scatter([rank], [left[min(rank, len(left) - 1)]], color=color, s=18, zorder=3)
    ax.set_xlabel("rank")
    ax.set_ylabel(f"relative error, {source.metric} metric")
    ax.set_ylim(0, 1)
    ax.legend(fontsize=7)
    return ax


def ranks(plan: RankPlan, *, ax: Any = None) -> Any:
    """A heat map of a plan: a row for each layer of the model, a column for each kind of dense layer, the rank inside.

    Args:
        plan: from `make_plan`; the layers that it leaves dense are marked. Its embeddings and heads are not drawn.
        ax: matplotlib Axes to draw into, and returned; None for a new figure.

    Raises:
        PlanError: no plan, or one that names no layer.
        ImportError: matplotlib is not installed.

    >>> from hf_reparam.plan import Entry
    >>> ranks(RankPlan({"h.0.fc": Entry(4), "h.1.fc": Entry(8)})).get_title()
    'ranks: 4 to 8'
    """
    if not isinstance(plan, RankPlan):
        raise PlanError(f"give a plan, such as make_plan(model, ...), got {type(plan).__name__}")
    layers = plan.of(tuple(form for structure in STRUCTURES if structure.option is None for form in structure.forms))
    if not layers:
        raise PlanError("the plan makes no layer low-rank: there is nothing to draw")
    kinds = list(dict.fromkeys(map(layer_kind, layers)))
    dense = [] if plan.report is None else [s.name for s in plan.report.skipped if layer_kind(s.name) in kinds]
    where = {name: ".".join(re.findall(r"(?:^|(?<=\.))\d+(?=\.|$)", name)) or "-" for name in (*layers, *dense)}
    rows = sorted(set(where.values()), key=lambda row: [int(part) for part in row.split(".") if part != "-"])
    every = [entry.rank for entry in layers.values()]
    table = [[math.nan] * len(kinds) for _ in rows]
    ax = _axes(ax, (1.5 + 0.75 * len(kinds), 2.2 + 0.3 * len(rows)))
    for name, entry in layers.items():
        i, j = rows.index(where[name]), kinds.index(layer_kind(name))
        table[i][j] = entry.rank
        color = "white" if entry.rank < 0.6 * max(every) else "black"
        ax.text(j, i, str(entry.rank), ha="center", va="center", fontsize=8, color=color)
    for name in dense:
        at = {"x": kinds.index(layer_kind(name)), "y": rows.index(where[name])}
        ax.text(**at, s="dense", ha="center", va="center", fontsize=7, color="gray")
    image = ax.imshow(table, aspect="auto", cmap="viridis", vmin=0)
    short = [kind.rpartition("*.")[2] for kind in kinds]  # what follows the layer's number
    ax.set_xticks(range(len(kinds)), short, rotation=40, ha="right", fontsize=8)
    ax.set_yticks(range(len(rows)), rows, fontsize=8)
    ax.set_ylabel("layer")
    ax.set_title(f"ranks: {min(every)} to {max(every)}", fontsize=10)
    ax.figure.colorbar(image, ax=ax, label="rank")
    return ax


def frontier(
    results: Mapping[str, Mapping[float, float]],
    *,
    score: str = "score",
    size: str = "share of the parameters kept",
    ax: Any = None,
) -> Any:
    """Quality against size or time, a line for each method.

    Args:
        results: method -> {size: score}, such as {"svd": {0.8: 0.70, 0.4: 0.55}}.
        score, size: what the scores and the sizes are, for the axes: `size="MB"`, or "ms a batch".
        ax: matplotlib Axes to draw into, and returned; None for a new figure.

    Raises:
        TargetError: there is nothing to draw.
        ImportError: matplotlib is not installed.

    >>> ax = frontier({"svd": {0.4: 0.55, 0.8: 0.70}}, score="accuracy")
    >>> ax.get_ylabel(), len(ax.lines)
    ('accuracy', 1)
    """
    if not results or not all(results.values()):
        raise TargetError("give results as method -> {size: score}, with a score at least for each method")
    ax = _axes(ax, (6.4, 4.2))
    for method, scores in results.items():
        sizes = sorted(scores)
        ax.plot(sizes, [scores[one] for one in sizes], marker="o", label=method)
    ax.set_xlabel(size)
    ax.set_ylabel(score)
    ax.grid(alpha=0.3)
    ax.legend(fontsize=8)
    return ax


def _axes(ax: Any, size: tuple[float, float]) -> Any:
    if ax is not None:
        return ax
    try:
        from matplotlib import pyplot
    except ImportError:
        raise ImportError("hf_reparam.plot needs matplotlib: pip install matplotlib") from None
    return pyplot.subplots(figsize=size, layout="constrained")[1]


def _left_out(found: Found, source: Source) -> list[float]:
    """Relative error of rank 0, 1, 2 ... in the metric; of a layer without data that of its weight."""
    squares: Any = found.structure.losses(found.name, found.site, source)
    if squares is None:
        squares = found.structure.losses(found.name, found.site, Source("svd"))
    tail = squares.sum() - squares.cumsum(0)
    return [1.0, *((tail.clamp_min(0) / squares.sum()) ** 0.5).tolist()]
