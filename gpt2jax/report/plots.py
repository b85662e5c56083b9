"""The plots of a report: of a comparison, and of a training."""

from __future__ import annotations

import importlib
import itertools
import math
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from gpt2jax.comparison.paired import PER_TOKEN
from gpt2jax.comparison.result import Comparison, ModelResult
from gpt2jax.report.plot_style import (
    BETTER,
    DASHES,
    INK,
    MARKERS,
    MUTED,
    STYLE,
    WORSE,
    Plot,
    new_figure,
    series_colour,
    short_name,
    to_svg,
)
from gpt2jax.report.tables import number, percent
from gpt2jax.utils.notices import count_noun

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def comparison_plots(comparison: Comparison) -> list[Plot]:
    """Draw all plots of a comparison that its data allow."""
    import matplotlib

    others = [(model, model.versus_baseline) for model in comparison.models if model.versus_baseline]
    with matplotlib.rc_context(STYLE):
        return [
            loss_by_model(comparison),
            *(
                paired_distribution(comparison, m)
                for m, versus in others
                if versus.difference.unit == PER_TOKEN
            ),
            loss_by_position(comparison),
            *(difference_by_class(comparison, m) for m, versus in others if versus.breakdown),
            calibration(comparison),
        ]


def training_plots(history: Sequence[dict[str, Any]]) -> list[Plot]:
    """Draw loss, learning rate, gradient norm, loss scale and speed over the steps of a training."""
    import matplotlib

    with matplotlib.rc_context(STYLE):
        return [plot for plot in (_training_loss(history), _training_metrics(history)) if plot is not None]


# ---- the plots ----


def loss_by_model(comparison: Comparison) -> Plot:
    """Draw the loss of each model with its 95 % interval."""
    figure, axes = new_figure(height=losses_height(comparison))
    draw_losses(axes, comparison, series_colour)
    losses = ", ".join(f"{model.name} {number(model.evaluation.loss, 3)}" for model in comparison.models)
    return Plot("Loss by model", f"Nats per token: {losses}.", to_svg(figure, "loss-by-model"))


def paired_distribution(comparison: Comparison, model: ModelResult) -> Plot:
    """Draw how a model's difference to the baseline is distributed over documents."""
    first, second = comparison.baseline.evaluation.per_document, model.evaluation.per_document
    differences = (second.loss - first.loss) / first.tokens
    finite = differences[np.isfinite(differences)]
    figure, axes = new_figure()
    if len(finite):
        # a few extreme documents would leave one bar for all the others: they go into the outermost bars
        low, high = np.quantile(finite, [0.005, 0.995])
        low, high = min(low, 0.0), max(high, 0.0)
        pad = 0.04 * (high - low) or 1.0
        step = _round_up((high - low + 2 * pad) / min(40, max(8, 2 * math.isqrt(len(finite)))))
        edges = np.arange(math.floor((low - pad) / step), math.ceil((high + pad) / step) + 1) * step
        counts, _ = np.histogram(np.clip(finite, edges[0], edges[-1]), edges)
        worse, _ = np.histogram(np.clip(finite[finite > 0], edges[0], edges[-1]), edges)
        colours = [
            BETTER if edge < -step / 2 else WORSE if count else MUTED  # muted: nothing but ties
            for edge, count in zip(edges[:-1], worse, strict=True)
        ]
        axes.bar(edges[:-1], counts, width=np.diff(edges), align="edge", color=colours, linewidth=0)
    axes.axvline(0, color=INK, linewidth=1)
    assert model.versus_baseline is not None
    mean = model.versus_baseline.difference.difference
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
    better, ties, total = int((differences < 0).sum()), int((differences == 0).sum()), len(differences)
    text = f"{model.name} has the lower loss on {better:,} of {total:,} documents (left of zero)"
    text += f"; {count_noun(ties, 'tie')}." if ties else "."
    title = f"{model.name} compared with {comparison.baseline.name}"
    return Plot(title, text, to_svg(figure, f"paired-{model.name}"))


def loss_by_position(comparison: Comparison) -> Plot:
    """Draw the loss by the position of a token in its row, in bins that grow with the position."""
    figure, axes = new_figure()
    ends = []
    for index, model in enumerate(comparison.models):
        centres, means = bin_by_position(*model.evaluation.loss_by_position())
        _draw_series(axes, index, model.name, centres, means)
        first, last = number(means[0], 2), number(means[-1], 2)
        ends.append(f"{model.name} from {first} at the first token to {last} at the last")
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.set_xlabel("position in the row, tokens")
    axes.set_ylabel("loss, nats per token")
    axes.grid()
    axes.legend()
    text = f"Nats per token: {'; '.join(ends)}."
    return Plot("Loss by position", text, to_svg(figure, "loss-by-position"))


def bin_by_position(sums: np.ndarray, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return geometric centres (from 1) and means of bins of positions, three bins a doubling."""
    last = int(np.flatnonzero(counts)[-1]) + 1
    powers = range(3 * math.ceil(math.log2(last + 1)) + 1)
    edges = sorted({round(2 ** (step / 3)) for step in powers} | {last + 1})
    edges = [edge for edge in edges if edge <= last + 1]
    centres, means = [], []
    for begin, end in itertools.pairwise(edges):
        count = counts[begin - 1 : end - 1].sum()
        if count:
            centres.append(math.sqrt(begin * (end - 1)))
            means.append(sums[begin - 1 : end - 1].sum() / count)
    return np.array(centres), np.array(means)


def difference_by_class(comparison: Comparison, model: ModelResult) -> Plot:
    """Draw the difference to the baseline by frequency and kind of token."""
    assert model.versus_baseline is not None and model.versus_baseline.breakdown is not None
    groups = [model.versus_baseline.breakdown[kind] for kind in ("frequency", "kind")]
    entries = [entry for group in groups for entry in group if entry["difference"] is not None]
    figure, axes = new_figure(height=1.0 + 0.27 * (len(entries) + 1))
    # an empty line between the two groups
    places = [index + (entry in groups[1]) for index, entry in enumerate(entries)]
    values = [entry["difference"] for entry in entries]
    colours = [BETTER if value < 0 else WORSE for value in values]
    axes.barh(places, values, color=colours, height=0.7, linewidth=0)
    axes.set_yticks(places, [entry["class"] for entry in entries])
    axes.invert_yaxis()
    axes.axvline(0, color=INK, linewidth=1)
    axes.xaxis.set_major_locator(_locator(5))
    axes.set_xlabel("difference, nats per token")
    axes.grid(axis="x")
    listed = "; ".join(f"{e['class']} {number(e['difference'], 3, signed=True)}" for e in entries)
    text = f"Nats per token; left of zero {model.name} is better: {listed}."
    title = f"By class of token: {model.name} compared with {comparison.baseline.name}"
    return Plot(title, text, to_svg(figure, f"classes-{model.name}"))


def calibration(comparison: Comparison) -> Plot:
    """Draw how often the most likely token is correct, by its probability."""
    figure, axes = new_figure()
    axes.plot([0, 1], [0, 1], color=MUTED, linewidth=1)
    for index, model in enumerate(comparison.models):
        bins = [entry for entry in model.evaluation.calibration() if entry["tokens"]]
        columns = ([entry[key] for entry in bins] for key in ("confidence", "accuracy"))
        _draw_series(axes, index, model.name, *columns)
    axes.set_xlabel("probability of the most likely token")
    axes.set_ylabel("fraction that is correct")
    axes.grid()
    axes.legend()
    errors = ", ".join(f"{m.name} {percent(m.evaluation.calibration_error)}" for m in comparison.models)
    text = f"The thin line is perfect calibration. Calibration error: {errors}."
    return Plot("Calibration", text, to_svg(figure, "calibration"))


def _training_loss(history: Sequence[dict[str, Any]]) -> Plot | None:
    curves = {"training": _column(history, "loss"), "validation": _column(history, "validation_loss")}
    curves = {label: values for label, values in curves.items() if values}
    if not curves:
        return None
    figure, axes = new_figure()
    styles = {  # not in the colours of models
        "training": {"color": MUTED, "linewidth": 1.4},
        "validation": {"color": INK, "marker": "o", "markersize": 4.5},
    }
    for label, values in curves.items():
        axes.plot(*zip(*values, strict=True), label=label, **styles[label])
    axes.xaxis.set_major_locator(_locator(8, integer=True))
    axes.set_xlabel("step")
    axes.set_ylabel("loss, nats per token")
    axes.grid()
    axes.legend()
    ends = [f"{name} loss from {number(v[0][1], 3)} to {number(v[-1][1], 3)}" for name, v in curves.items()]
    return Plot("Training", f"{'; '.join(ends)}.".capitalize(), to_svg(figure, "training"))


def _training_metrics(history: Sequence[dict[str, Any]]) -> Plot | None:
    names = {
        "learning rate": "learning_rate",
        "gradient norm": "grad_norm",
        "loss scale": "loss_scale",
        "tokens/s": "tokens_per_second",
    }
    panels = {label: _column(history, name) for label, name in names.items()}
    panels = {label: values for label, values in panels.items() if values}
    if not panels:
        return None
    figure, stacked = new_figure(height=1.0 + 1.1 * len(panels), rows=len(panels))
    for axes, (label, values) in zip(stacked, panels.items(), strict=True):
        axes.plot(*zip(*values, strict=True), color=INK, linewidth=1.4)
        axes.set_ylabel(label)
        axes.set_ylim(bottom=0)
        axes.grid()
        if label == "tokens/s":
            axes.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    stacked[-1].xaxis.set_major_locator(_locator(8, integer=True))
    stacked[-1].set_xlabel("step")
    highest = [f"{label} up to {max(value for _, value in v):,.4g}" for label, v in panels.items()]
    text = f"{'; '.join(highest)}.".capitalize()
    return Plot(", ".join(panels).capitalize(), text, to_svg(figure, "training-speed"))


def _column(history: Sequence[dict[str, Any]], name: str) -> list[tuple[float, float]]:
    """Return step and value of the entries that have a finite value."""
    found = [(e["step"], e[name]) for e in history if e.get(name) is not None and "step" in e]
    return [(step, value) for step, value in found if math.isfinite(value)]


# ---- figures of matplotlib ----


def losses_figure(comparison: Comparison) -> Figure:
    """Draw the loss of each model with its 95 % interval, a panel for each list of texts, in the style of the user."""
    parts = comparison.parts
    figure, rows = new_figure(height=len(parts) * losses_height(comparison), rows=len(parts))
    for axes, part in zip(rows if len(parts) > 1 else [rows], parts, strict=True):
        draw_losses(axes, part, "C{}".format)
        axes.set_title(part.texts_name, fontsize="medium")
    return _shown(figure)


def training_figure(history: Sequence[dict[str, Any]]) -> Figure:
    """Draw the loss over the steps of a training, in the style of the user."""
    figure, axes = new_figure()
    for label, name, style in (("training", "loss", ".-"), ("validation", "validation_loss", "o-")):
        if values := _column(history, name):
            axes.plot(*zip(*values, strict=True), style, label=label)
    axes.xaxis.set_major_locator(_locator(8, integer=True))
    axes.set_xlabel("step")
    axes.set_ylabel("loss, nats per token")
    axes.grid(alpha=0.3)
    if axes.lines:
        axes.legend()
    return _shown(figure)


def _shown(figure: Figure) -> Figure:
    """Return a figure that a notebook shows, which it does once it has seen pyplot."""
    if "IPython" in sys.modules:
        importlib.import_module("matplotlib.pyplot")
    return figure


# ---- drawing ----


def losses_height(comparison: Comparison) -> float:
    """Return the height of a plot of the losses, in inches."""
    return 1.3 + 0.42 * len(comparison.models)


def draw_losses(axes: Any, comparison: Comparison, colour_of: Callable[[int], str]) -> None:
    """Draw the loss of each model with its 95 % interval."""
    for index, model in enumerate(comparison.models):
        loss, error = model.evaluation.loss, model.loss_standard_error
        reach = 1.96 * error if error is not None and math.isfinite(error) else 0.0
        style = {"capsize": 4, "markersize": 7, "elinewidth": 1.8, "color": colour_of(index)}
        axes.errorbar(loss, index, xerr=reach, fmt=MARKERS[index % len(MARKERS)], **style)
        axes.annotate(number(loss, 3), (loss, index), (0, 9), textcoords="offset points", ha="center")
    names = [short_name(model.name) for model in comparison.models]
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.45, -0.75)
    axes.margins(x=0.18)
    axes.xaxis.set_major_locator(_locator(5))
    axes.set_xlabel("loss, nats per token (95 % interval)")
    axes.grid(axis="x")


def _draw_series(axes: Any, index: int, name: str, x: Any, y: Any) -> None:
    style = {
        "linestyle": DASHES[index % len(DASHES)],
        "marker": MARKERS[index % len(MARKERS)],
        "markersize": 4,
    }
    axes.plot(x, y, color=series_colour(index), label=short_name(name), **style)


def _round_up(value: float) -> float:
    """Return the next 1, 2 or 5 times a power of ten."""
    power = 10.0 ** math.floor(math.log10(value))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= value * 0.999)


def _locator(most: int, *, integer: bool = False) -> Any:
    """Place at most `most` ticks at round numbers."""
    from matplotlib.ticker import MaxNLocator

    return MaxNLocator(most, integer=integer, steps=[1, 2, 5, 10] if integer else [1, 2, 2.5, 5, 10])
