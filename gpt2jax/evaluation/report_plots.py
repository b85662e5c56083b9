"""The plots of the report as SVG that takes its colours and its font from the page around it.

Matplotlib draws with marker colours, which are replaced by CSS variables afterwards: one picture serves
    light, dark and
paper. Text stays text. The same data gives the same bytes.
"""

from __future__ import annotations

import dataclasses
import io
import math
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from gpt2jax.evaluation.compare import Comparison
from gpt2jax.evaluation.gains import loss_standard_error
from gpt2jax.evaluation.report import number
from gpt2jax.evaluation.statistics import PER_TOKEN

SERIES = 6  # colours in the style sheet
# stand-ins that no plot uses by chance, and the CSS variables they become
INK, MUTED, GRID, GAIN, LOSS = "#010203", "#020304", "#030405", "#040506", "#050607"
_VARIABLES = {INK: "--ink", MUTED: "--muted", GRID: "--line", GAIN: "--gain", LOSS: "--loss"}
_VARIABLES |= {f"#0a0b{index:02x}": f"--series-{index}" for index in range(SERIES)}
_MARKERS = ("o", "s", "^", "D", "v", "P")
_DASHES = ("-", (0, (5, 1.5)), (0, (1.5, 1.5)), (0, (6, 1.5, 1.5, 1.5)), (0, (3, 3)), (0, (8, 2)))


@dataclasses.dataclass(frozen=True)
class Plot:
    """A picture and what it says.

    Attributes:
        title: what is drawn.
        text: the same in words, for those who do not see it.
        svg: the picture, for inclusion in a page.
    """

    title: str
    text: str
    svg: str


def series_colour(index: int) -> str:
    """Stand-in for the colour of model number `index`."""
    return f"#0a0b{index % SERIES:02x}"


def plots(comparison: Comparison) -> list[Plot]:
    """All plots of a comparison that its data allow."""
    import matplotlib

    with matplotlib.rc_context(_STYLE):
        made = [loss_by_model(comparison)]
        made += [
            paired_distribution(comparison, name)
            for name, pair in comparison.paired.items()
            if pair.unit == PER_TOKEN
        ]
        made += [loss_by_position(comparison)]
        if comparison.history:
            made += training_curves(comparison.history)
    return made


def loss_by_model(comparison: Comparison) -> Plot:
    """Loss of each model with its 95 % interval."""
    names = list(comparison.evaluations)
    figure, axes = _figure(height=1.3 + 0.42 * len(names))
    said = []
    for index, (name, evaluation) in enumerate(comparison.evaluations.items()):
        error = loss_standard_error(evaluation)
        reach = 1.96 * error if error is not None and math.isfinite(error) else 0.0
        axes.errorbar(
            evaluation.loss,
            index,
            xerr=reach,
            fmt=_MARKERS[index % len(_MARKERS)],
            color=series_colour(index),
            capsize=4,
            markersize=7,
            elinewidth=1.8,
        )
        axes.annotate(
            number(evaluation.loss, 3),
            (evaluation.loss, index),
            (0, 9),
            textcoords="offset points",
            ha="center",
        )
        said.append(f"{name} {number(evaluation.loss, 3)}")
    axes.set_yticks(range(len(names)), [_short(name) for name in names])
    axes.set_ylim(len(names) - 0.45, -0.75)
    axes.margins(x=0.18)
    axes.xaxis.set_major_locator(_locator(5))
    axes.set_xlabel("loss, nats per token (95 % interval)")
    axes.grid(axis="x")
    return Plot("Loss by model", "Nats per token: " + ", ".join(said) + ".", _svg(figure, "loss-by-model"))


def paired_distribution(comparison: Comparison, name: str) -> Plot:
    """How the difference to the first model is spread over documents."""
    first, second = comparison.evaluations[comparison.baseline], comparison.evaluations[name]
    differences = (second.document_loss - first.document_loss) / first.document_tokens
    finite = differences[np.isfinite(differences)]
    figure, axes = _figure()
    if len(finite):
        # a few extreme documents would leave one bar for all the others: they go into the outermost bars
        low, high = np.quantile(finite, [0.005, 0.995])
        low, high = min(low, 0.0), max(high, 0.0)
        pad = 0.04 * (high - low) or 1.0
        step = _nice((high - low + 2 * pad) / min(40, max(8, 2 * math.isqrt(len(finite)))))
        edges = np.arange(math.floor((low - pad) / step), math.ceil((high + pad) / step) + 1) * step
        counts, _ = np.histogram(np.clip(finite, edges[0], edges[-1]), edges)
        colours = [GAIN if edge < -step / 2 else LOSS for edge in edges[:-1]]
        axes.bar(edges[:-1], counts, width=np.diff(edges), align="edge", color=colours, linewidth=0)
    axes.axvline(0, color=INK, linewidth=1)
    mean = comparison.paired[name].difference
    if math.isfinite(mean):
        axes.axvline(mean, color=INK, linewidth=1.2, linestyle=(0, (4, 2)))
        axes.annotate(
            f"mean {number(mean, 3, signed=True)}",
            (mean, 1),
            (4 if mean >= 0 else -4, 4),
            xycoords=("data", "axes fraction"),
            textcoords="offset points",
            ha="center",
        )
    axes.xaxis.set_major_locator(_locator(6))
    axes.set_xlabel("difference per document, nats per token")
    axes.set_ylabel("documents")
    axes.yaxis.set_major_locator(_locator(6, integer=True))
    axes.grid(axis="y")
    better = int((differences < 0).sum())
    text = f"{name} has the lower loss on {better:,} of {len(differences):,} documents (left of zero)."
    return Plot(f"{name} against {comparison.baseline}", text, _svg(figure, f"paired-{name}"))


def loss_by_position(comparison: Comparison) -> Plot:
    """Loss by the place of a token in its row, in bins that grow with the position."""
    figure, axes = _figure()
    said = []
    for index, (name, evaluation) in enumerate(comparison.evaluations.items()):
        centres, means = binned_by_position(*evaluation.loss_by_position())
        axes.plot(
            centres,
            means,
            color=series_colour(index),
            linestyle=_DASHES[index % len(_DASHES)],
            marker=_MARKERS[index % len(_MARKERS)],
            markersize=4,
            label=_short(name),
        )
        said.append(
            f"{name} from {number(means[0], 2)} at the first token to {number(means[-1], 2)} at the last"
        )
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.set_xlabel("place in the row, tokens")
    axes.set_ylabel("loss, nats per token")
    axes.grid()
    axes.legend()
    return Plot(
        "Loss by position", "Nats per token: " + "; ".join(said) + ".", _svg(figure, "loss-by-position")
    )


def binned_by_position(sums: np.ndarray, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean loss in bins of positions, three a doubling: (geometric centres counted from 1, means)."""
    last = int(np.flatnonzero(counts)[-1]) + 1
    edges = sorted(
        {round(2 ** (step / 3)) for step in range(3 * math.ceil(math.log2(last + 1)) + 1)} | {last + 1}
    )
    edges = [edge for edge in edges if edge <= last + 1]
    centres, means = [], []
    for begin, end in zip(edges[:-1], edges[1:], strict=True):
        count = counts[begin - 1 : end - 1].sum()
        if count:
            centres.append(math.sqrt(begin * (end - 1)))
            means.append(sums[begin - 1 : end - 1].sum() / count)
    return np.array(centres), np.array(means)


def training_curves(history: Sequence[dict[str, Any]]) -> list[Plot]:
    """Loss, and learning rate and speed, over the steps of the training."""
    made = []
    loss, validation = _column(history, "loss"), _column(history, "validation_loss")
    if loss or validation:
        figure, axes = _figure()
        if loss:
            axes.plot(*zip(*loss, strict=True), color=series_colour(0), linewidth=1.4, label="training")
        if validation:
            axes.plot(
                *zip(*validation, strict=True),
                color=series_colour(1),
                marker="o",
                markersize=4.5,
                label="validation",
            )
        axes.set_xlabel("step")
        axes.set_ylabel("loss, nats per token")
        axes.grid()
        axes.legend()
        said = [
            f"{label} loss from {number(values[0][1], 3)} to {number(values[-1][1], 3)}"
            for label, values in (("training", loss), ("validation", validation))
            if values
        ]
        made.append(Plot("Training", f"{'; '.join(said)}.".capitalize(), _svg(figure, "training")))
    panels = [
        (label, values)
        for label, values in (
            ("learning rate", _column(history, "learning_rate")),
            ("tokens/s", _column(history, "tokens_per_second")),
        )
        if values
    ]
    if panels:
        figure, stacked = _figure(rows=len(panels))
        for axes, (label, values) in zip(stacked, panels, strict=True):
            axes.plot(*zip(*values, strict=True), color=series_colour(0), linewidth=1.4)
            axes.set_ylabel(label)
            axes.set_ylim(bottom=0)
            axes.grid()
            if label == "tokens/s":
                axes.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
        stacked[-1].set_xlabel("step")
        highest = {label: max(value for _, value in values) for label, values in panels}
        said = [f"{label} up to {value:,.4g}" for label, value in highest.items()]
        title = " and ".join(label for label, _ in panels)
        made.append(
            Plot(title.capitalize(), f"{'; '.join(said)}.".capitalize(), _svg(figure, "training-speed"))
        )
    return made


def _column(history: Sequence[dict[str, Any]], name: str) -> list[tuple[float, float]]:
    found = [
        (entry["step"], entry[name]) for entry in history if entry.get(name) is not None and "step" in entry
    ]
    return [(step, value) for step, value in found if math.isfinite(value)]


def _nice(value: float) -> float:
    """The round number (1, 2 or 5 times a power of ten) at or above `value`."""
    power = 10.0 ** math.floor(math.log10(value))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= value * 0.999)


def _locator(most: int, *, integer: bool = False) -> Any:
    """At most so many ticks at round numbers."""
    from matplotlib.ticker import MaxNLocator

    return MaxNLocator(most, integer=integer, steps=[1, 2, 5, 10] if integer else [1, 2, 2.5, 5, 10])


def _short(name: str, limit: int = 22) -> str:
    return name if len(name) <= limit else name[: limit - 1] + "…"


_STYLE: Any = {
    "svg.fonttype": "none",
    "font.size": 10,
    "axes.labelsize": 10,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": MUTED,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.unicode_minus": True,
    "lines.linewidth": 1.8,
    "legend.frameon": False,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "text.parse_math": False,
    "path.simplify": False,
}


def _figure(*, height: float = 2.9, rows: int = 1) -> tuple[Any, Any]:
    """A figure and its axes (a list of them for several rows), without touching matplotlib's global state."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.9, height), layout="constrained")
    axes = figure.subplots(rows, 1, sharex=True)
    return figure, axes if rows == 1 else list(axes)


def _svg(figure: Any, name: str) -> str:
    """A figure as an `<svg>` element without size, names or references of its own."""
    import matplotlib

    target = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": name}):
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(target, format="svg", transparent=True, metadata=nothing)
    svg = target.getvalue()
    svg = svg[svg.index("<svg") :].strip()
    view = re.search(r'viewBox="([^"]+)"', svg)
    assert view is not None
    svg = re.sub(
        r"<svg[^>]*>", f'<svg viewBox="{view[1]}" aria-hidden="true" focusable="false">', svg, count=1
    )
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'(<g) id="[^"]*"', r"\1", svg).replace("xlink:href", "href")
    svg = re.sub(r"font: ([\d.]+px)[^;\"]*", r"font: \1 var(--sans)", svg)
    svg = re.sub(r"font-family: [^;\"]*", "font-family: var(--sans)", svg)
    for colour, variable in _VARIABLES.items():
        svg = svg.replace(colour, f"var({variable})")
    return svg
