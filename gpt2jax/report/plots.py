"""The plots of a comparison: how large the difference is, how it is spread, and where it lies."""

from __future__ import annotations

import math

import numpy as np

from gpt2jax.comparison.compare import Comparison
from gpt2jax.comparison.paired import loss_standard_error
from gpt2jax.comparison.statistics import PER_TOKEN
from gpt2jax.report.svg import (
    DASHES,
    GAIN,
    INK,
    LOSS,
    MARKERS,
    MUTED,
    STYLE,
    Plot,
    as_svg,
    locator,
    new_figure,
    nice,
    series_colour,
    short,
)
from gpt2jax.report.tables import number, percent


def plots(comparison: Comparison) -> list[Plot]:
    """All plots of a comparison that its data allow."""
    import matplotlib

    with matplotlib.rc_context(STYLE):
        made = [loss_by_model(comparison)]
        made += [
            paired_distribution(comparison, name)
            for name, pair in comparison.paired.items()
            if pair.unit == PER_TOKEN
        ]
        made += [loss_by_position(comparison)]
        made += [difference_by_class(comparison, name) for name in comparison.gains]
        made += [reliability(comparison)]
    return made


def loss_by_model(comparison: Comparison) -> Plot:
    """Loss of each model with its 95 % interval."""
    names = list(comparison.evaluations)
    figure, axes = new_figure(height=1.3 + 0.42 * len(names))
    said = []
    for index, (name, evaluation) in enumerate(comparison.evaluations.items()):
        error = loss_standard_error(evaluation)
        reach = 1.96 * error if error is not None and math.isfinite(error) else 0.0
        axes.errorbar(
            evaluation.loss,
            index,
            xerr=reach,
            fmt=MARKERS[index % len(MARKERS)],
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
    axes.set_yticks(range(len(names)), [short(name) for name in names])
    axes.set_ylim(len(names) - 0.45, -0.75)
    axes.margins(x=0.18)
    axes.xaxis.set_major_locator(locator(5))
    axes.set_xlabel("loss, nats per token (95 % interval)")
    axes.grid(axis="x")
    return Plot("Loss by model", "Nats per token: " + ", ".join(said) + ".", as_svg(figure, "loss-by-model"))


def paired_distribution(comparison: Comparison, name: str) -> Plot:
    """How the difference to the first model is spread over documents."""
    first, second = comparison.evaluations[comparison.baseline], comparison.evaluations[name]
    differences = (second.document_loss - first.document_loss) / first.document_tokens
    finite = differences[np.isfinite(differences)]
    figure, axes = new_figure()
    if len(finite):
        # a few extreme documents would leave one bar for all the others: they go into the outermost bars
        low, high = np.quantile(finite, [0.005, 0.995])
        low, high = min(low, 0.0), max(high, 0.0)
        pad = 0.04 * (high - low) or 1.0
        step = nice((high - low + 2 * pad) / min(40, max(8, 2 * math.isqrt(len(finite)))))
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
    axes.xaxis.set_major_locator(locator(6))
    axes.set_xlabel("difference per document, nats per token")
    axes.set_ylabel("documents")
    axes.yaxis.set_major_locator(locator(6, integer=True))
    axes.grid(axis="y")
    better = int((differences < 0).sum())
    text = f"{name} has the lower loss on {better:,} of {len(differences):,} documents (left of zero)."
    return Plot(f"{name} against {comparison.baseline}", text, as_svg(figure, f"paired-{name}"))


def loss_by_position(comparison: Comparison) -> Plot:
    """Loss by the place of a token in its row, in bins that grow with the position."""
    figure, axes = new_figure()
    said = []
    for index, (name, evaluation) in enumerate(comparison.evaluations.items()):
        centres, means = binned_by_position(*evaluation.loss_by_position())
        axes.plot(
            centres,
            means,
            color=series_colour(index),
            linestyle=DASHES[index % len(DASHES)],
            marker=MARKERS[index % len(MARKERS)],
            markersize=4,
            label=short(name),
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
        "Loss by position", "Nats per token: " + "; ".join(said) + ".", as_svg(figure, "loss-by-position")
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


def difference_by_class(comparison: Comparison, name: str) -> Plot:
    """Difference to the first model by how often the token occurs in the texts, and by what it is."""
    groups = [comparison.gains[name][kind] for kind in ("frequency", "kind")]
    entries = [entry for group in groups for entry in group if entry["difference"] is not None]
    figure, axes = new_figure(height=1.0 + 0.27 * (len(entries) + 1))
    # an empty line between the two groups
    places = [index + (entry in groups[1]) for index, entry in enumerate(entries)]
    values = [entry["difference"] for entry in entries]
    colours = [GAIN if value < 0 else LOSS for value in values]
    axes.barh(places, values, color=colours, height=0.7, linewidth=0)
    axes.set_yticks(places, [entry["class"] for entry in entries])
    axes.invert_yaxis()
    axes.axvline(0, color=INK, linewidth=1)
    axes.xaxis.set_major_locator(locator(5))
    axes.set_xlabel("difference, nats per token")
    axes.grid(axis="x")
    said = "; ".join(f"{e['class']} {number(e['difference'], 3, signed=True)}" for e in entries)
    text = f"Nats per token, left of zero {name} is better: {said}."
    return Plot(
        f"By kind of token: {name} against {comparison.baseline}", text, as_svg(figure, f"classes-{name}")
    )


def reliability(comparison: Comparison) -> Plot:
    """How often the most likely token is right, by how likely the model takes it to be."""
    figure, axes = new_figure()
    axes.plot([0, 1], [0, 1], color=MUTED, linewidth=1)
    said = []
    for index, (name, evaluation) in enumerate(comparison.evaluations.items()):
        bins = [entry for entry in evaluation.calibration() if entry["tokens"]]
        axes.plot(
            [entry["confidence"] for entry in bins],
            [entry["accuracy"] for entry in bins],
            color=series_colour(index),
            linestyle=DASHES[index % len(DASHES)],
            marker=MARKERS[index % len(MARKERS)],
            markersize=4,
            label=short(name),
        )
        said.append(f"{name} {percent(evaluation.calibration_error)}")
    axes.set_xlabel("probability of the most likely token")
    axes.set_ylabel("share that is right")
    axes.grid()
    axes.legend()
    text = f"On the thin line probabilities are what they say. Calibration error: {', '.join(said)}."
    return Plot("Calibration", text, as_svg(figure, "calibration"))
