"""What a conversion did: a dict, Markdown or a table for the terminal."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import groupby
from posixpath import commonpath
from typing import Any, TypeVar

from hf_reparam.config import layer_kind
from hf_reparam.plan import Judgement, Speed
from hf_reparam.tables import Part, Readable, as_markdown

LEFT = "the plan leaves it dense"
"""The reason why a layer is left alone that could be factored."""
BARE = "a bare parameter"
"""How the reason begins why a parameter is left alone that is in no layer."""


@dataclass(frozen=True, slots=True)
class LayerReport:
    """One part of the model, a dense layer as a rule.

    Args:
        name: module path in the model.
        kind: class of the dense layer ("Linear", "Conv1D").
        in_features, out_features: the dense shape; of an attention with narrower heads, that of its narrower layer.
        rank: inner width of the factors; None while it is dense.
        parameters_before, parameters_after: of the dense model and now, bias included.
        error: ||W - up @ down|| / ||W|| in the metric's norm; None where nothing was factored in this call, or a layer
            that was low-rank already: how far it is from its dense weight is not known then.
        form: as in a plan, "pair", "pivoted", "table" ...; None while it is dense.
        metric: in which it was factored, "svd" if it saw no data; None where that is not known.
        from_rank: the rank that it had before this call; None if it was dense.
    """

    name: str
    kind: str
    in_features: int
    out_features: int
    rank: int | None
    parameters_before: int
    parameters_after: int
    error: float | None = None
    form: str | None = None
    metric: str | None = None
    from_rank: int | None = None


@dataclass(frozen=True, slots=True)
class SkippedReport:
    """One weight that was left as it was, and why.

    Args:
        name, kind: as in a LayerReport; of a bare parameter, its path and the class of its module.
        parameters: its own, or 0 where it shares those of another.
        reason: a sentence.
    """

    name: str
    kind: str
    parameters: int
    reason: str


@dataclass(frozen=True, slots=True)
class RefitReport:
    """What refitting changed.

    Args:
        layers: names of the layers whose factors were fitted anew; the others kept theirs.
        of: how many low-rank layers there are.
        before, after: divergence of the predictions from the dense model's on the batches that took no part in the
            fits, and chose among them: it looks better there than elsewhere.
        skipped: layers that could not be fitted, with the reason.
        unit: of the divergence, as in a `Judgement`; "per example" of a distance of your own.
    """

    layers: Sequence[str]
    of: int
    before: float
    after: float
    skipped: Mapping[str, str] = field(default_factory=dict)
    unit: str = "per example"

    def __str__(self) -> str:
        change = f"divergence {self.before:.4g} -> {self.after:.4g} {self.unit} on the texts that chose the fits"
        none_better = not self.layers and len(self.skipped) < self.of
        advice = "; no fit was better: more texts may help, and a calibration if none was given" if none_better else ""
        lines = [f"refit:            {len(self.layers)} of {self.of} layers, {change}{advice}"]
        for reason in dict.fromkeys(self.skipped.values()):
            names = [name for name, why in self.skipped.items() if why == reason]
            lines += _some("not refitted:", names, f", {reason}")
        return "\n".join(lines)


@dataclass(frozen=True, slots=True)
class RefineReport:
    """What refining changed.

    Args:
        learning_rate: the one that was chosen, relative to the root mean square of each matrix.
        before: divergence of the predictions from the dense model's on held-out batches.
        epochs: the same after each epoch.
        unit: of the divergence, as in a `Judgement`.
    """

    learning_rate: float
    before: float
    epochs: Sequence[float]
    unit: str = "per example"

    @property
    def after(self) -> float:
        """That of the weights that were kept: never more than before."""
        return min((value for value in (self.before, *self.epochs) if value == value), default=self.before)

    def __str__(self) -> str:
        improved = self.after != self.before
        best = f"epoch {1 + self.epochs.index(self.after)}" if improved else "none"
        change = f"held-out divergence {self.before:.4g} -> {self.after:.4g} {self.unit}"
        if not improved:
            change += "; nothing was better: the model is unchanged, more texts may help"
        return f"refine:           learning rate {self.learning_rate:g}, {best} of {len(self.epochs)} kept, {change}"


@dataclass(frozen=True, slots=True)
class TriedSize:
    """A size that `search_plan` tried.

    Args:
        keep: as in `LowRankConfig`; 1 of the dense model.
        parameters: of the whole model; None where no plan is as small as that.
        score: what `evaluate` gave; None likewise.
        chosen: whether it is the size of the plan that was returned.
    """

    keep: float
    parameters: int | None = None
    score: float | None = None
    chosen: bool = False


@dataclass(frozen=True, repr=False)
class Report(Readable):
    """The state of a model, or what a plan will make of it.

    Args:
        model: class name of the model.
        metric: in which the factors are made.
        layers: the factored layers (for a dense model: the layers that could be factored).
        skipped: every other weight of two or more dimensions, with the reason.
        parameters_before, parameters_after: of the *whole* model, shared parameters counted once.
        refitted_layers: how many layers were fitted once more after they were factored.
        dropped: names of tensors in the source's files for which the model's class has no place; of folders alone.
        judgement: how its plan did on held-out calibration data; None where it was not tried.
        speed: how much faster it became, where that was asked.
        tried: of a plan of `search_plan`, the dense model and the sizes that it tried, in their order.

    >>> row = LayerReport("fc", "Linear", 64, 64, 16, 4160, 2112, 0.1)
    >>> report = Report("Net", "svd", (row,), (), 5000, 2952)
    >>> report
    Report(model='Net', metric='svd', layers=1, parameters='5,000 -> 2,952')
    >>> report.factored_before, report.factored_after
    (4160, 2112)
    """

    model: str
    metric: str
    layers: Sequence[LayerReport]
    skipped: Sequence[SkippedReport]
    parameters_before: int
    parameters_after: int
    refitted_layers: int = 0
    dropped: Sequence[str] = ()
    judgement: Judgement | None = None
    speed: Speed | None = None
    tried: Sequence[TriedSize] = ()

    @property
    def factored_before(self) -> int:
        """Dense parameters of the factored layers."""
        return sum(layer.parameters_before for layer in self.layers)

    @property
    def factored_after(self) -> int:
        """Parameters that the factored layers hold now."""
        return sum(layer.parameters_after for layer in self.layers)

    @property
    def coverage(self) -> float:
        """Share of the whole dense model's parameters that lies in the factored layers."""
        return self.factored_before / self.parameters_before if self.parameters_before else 0.0

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers and strings, ready for JSON."""
        known = {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}
        return known | {name: getattr(self, name) for name in ("factored_before", "factored_after", "coverage")}

    def layer_table(self) -> str:
        """The Markdown table of the layers alone."""
        return as_markdown([self._layers()])

    def parts(self) -> list[Part]:
        """What is printed: what stands out, the tables, and one line that sums up."""
        tables = [(self.layers, self._layers), (self.skipped, self._left_alone), (self.tried, self._sizes)]
        return ["\n".join(self._headline()), *(table() for rows, table in tables if rows), self._summary()]

    def __repr__(self) -> str:
        sizes = dict.fromkeys([f"{self.parameters_before:,}", f"{self.parameters_after:,}"])
        shown = f"model={self.model!r}, metric={self.metric!r}, layers={len(self.layers)}"
        return f"Report({shown}, parameters='{' -> '.join(sizes)}')"

    def _layers(self) -> list[list[str]]:
        groups = _folded(self.layers, lambda x: (x.kind, x.in_features, x.out_features, x.form, x.metric))
        rows = [[name, *_layer_cells(group, self.metric, self._form)] for name, group in groups]
        table = [["layer", "type", "in x out", "rank", "parameters", "error"], *rows]
        plain = {layer.kind for layer in self.layers} == {"Linear"}
        untold = all(layer.error is None for layer in self.layers)
        return [[row[0], *row[1 + plain : 6 - untold]] for row in table]

    @property
    def _form(self) -> str:
        """That of all layers, or else the one that goes without saying."""
        forms = {layer.form for layer in self.layers if layer.form is not None}
        return forms.pop() if len(forms) == 1 else "pair"

    def _left_alone(self) -> list[list[str]]:
        groups = _folded(self.skipped, lambda item: item.reason)
        rows = [[name, f"{sum(x.parameters for x in group):,}", group[0].reason] for name, group in groups]
        return [["left alone", "parameters", "why"], *rows]

    def _headline(self) -> list[str]:
        if count := sum(layer.rank is not None for layer in self.layers):
            lines = [
                f"{self.model}: {count} low-rank layers ({self.metric}){', pivoted' * (self._form == 'pivoted')}",
                f"factored layers:  {_change(self.factored_before, self.factored_after)}",
                *self._with_dense(),
                *_some("no data:", self._others("svd"), ", by plain SVD"),
                *_some("no gradient:", self._others("activation"), ", in the activation metric"),
            ]
            again = [layer.name for layer in self.layers if layer.from_rank is not None]
            lines += _some("converted again:", again, "; how far they are from their dense weights is not known")
            lines += [f"when planned:     {self.judgement}"] if self.judgement else []  # whatever came afterwards
            lines += [f"speed:            {self.speed}"] if self.speed else []
            lines += [f"refitted:         {self.refitted_layers} layers"] if self.refitted_layers else []
        else:
            why = Counter(item.reason for item in self.skipped).most_common(3)
            reasons = ", ".join(f"{reason} (x{number})" for reason, number in why)
            none = f"no dense layer can be converted{reasons and ': '}{reasons}"
            found = f"{len(self.layers)} dense layers that can be converted" if self.layers else none
            lines = [f"{self.model}: {found}"]
        bare = sum(item.parameters for item in self.skipped if item.reason.startswith(BARE))
        if 2 * bare > self.parameters_before:
            share = f"{bare / self.parameters_before:.0%} of the parameters"
            lines.append(f"bare parameters:  {share} are in no layer of their own (fused experts, as a rule) and stay")
        if self.dropped:
            groups = [list(g) for _, g in groupby(sorted(self.dropped), key=lambda name: name.partition(".")[0])]
            same = [
                commonpath([n.replace(".", "/") for n in g]).replace("/", ".") + ".*" * (len(g) > 1) for g in groups
            ]
            lines.append(f"{len(self.dropped)} tensors of the source are not in the result: {', '.join(same)}")
        return lines

    def _with_dense(self) -> list[str]:
        """The size of the layers together with those that could have been factored, and were not."""
        dense = [item.parameters for item in self.skipped if item.reason == LEFT]
        if not dense:
            return []
        change = _change(self.factored_before + sum(dense), self.factored_after + sum(dense))
        return [f"with dense ones:  {change}, {len(dense)} more that the plan leaves dense"]

    def _summary(self) -> str:
        if all(layer.rank is None for layer in self.layers):
            whole = f"{self.parameters_before:,} parameters, {self.coverage:.0%} of them in these layers"
            return f"whole model:      {whole}"
        facts = [_change(self.parameters_before, self.parameters_after)]
        facts += [f"when planned, {self.judgement.brief}"] if self.judgement else []
        facts += [self.speed.brief] if self.speed else []
        return f"whole model:      {'; '.join(facts)}"

    def _sizes(self) -> list[list[str]]:
        table = [["size tried", "parameters", "score"]]
        for size in self.tried:
            name = "dense" if size.keep == 1 else f"keep {size.keep:.4g}"
            count = "cannot be reached" if size.parameters is None else f"{size.parameters:,}"
            score = "-" if size.score is None else f"{size.score:.6g}"
            table.append([name, count, f"{score} (chosen)" if size.chosen else score])
        return table

    def _others(self, metric: str) -> list[str]:
        """Layers that were factored in this metric, which is not the plan's."""
        return [layer.name for layer in self.layers if layer.metric == metric != self.metric]


R = TypeVar("R", LayerReport, SkippedReport)


def _folded(rows: Sequence[R], alike: Callable[[R], object]) -> list[tuple[str, list[R]]]:
    """Rows of layers that repeat in a model and are alike, with the name that they have together."""
    groups: dict[tuple[str, object], list[R]] = {}
    for row in rows:
        groups.setdefault((layer_kind(row.name), alike(row)), []).append(row)
    return [(g[0].name if len(g) == 1 else f"{kind} x{len(g)}", g) for (kind, _), g in groups.items()]


def _layer_cells(group: list[LayerReport], metric: str, form: str) -> list[str]:
    """What a table shows of layers, without the metric and the form that go without saying."""
    first = group[0]
    before, after = sum(x.parameters_before for x in group), sum(x.parameters_after for x in group)
    errors = [x.error for x in group if x.error is not None]
    error = _range(errors, ".2f").replace("0.00", "<0.01") if errors else "-"
    error += f" ({first.metric})" if first.metric not in (None, metric) else ""
    rank = "dense" if first.rank is None else _range([x.rank for x in group if x.rank is not None], "d")
    rank += f" {first.form}" if first.form not in (None, form) else ""
    count = f"{before:,}" if before == after else f"{before:,} -> {after:,}"
    return [first.kind, f"{first.in_features} x {first.out_features}", rank, count, error]


def _range(values: Sequence[float], style: str) -> str:
    low, high = format(min(values), style), format(max(values), style)
    return low if low == high else f"{low}..{high}"


def _change(before: int, after: int) -> str:
    share = f" ({after / before:.1%})" if before else ""
    return f"{before:,} -> {after:,} parameters{share}"


def _some(title: str, names: Sequence[str], text: str) -> list[str]:
    """A line that names three of the layers; none without layers."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return [f"{title:<18}{len(names)} layers{text}: {', '.join(names[:3])}{more}"] if names else []
