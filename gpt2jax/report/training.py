"""The curves of a training, from what `finetune` logged."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from gpt2jax.report.svg import STYLE, Plot, as_svg, new_figure, series_colour
from gpt2jax.report.tables import number


def training_curves(history: Sequence[dict[str, Any]]) -> list[Plot]:
    """Loss, then learning rate, gradient norm, loss scale and speed, over the steps of the training."""
    import matplotlib

    with matplotlib.rc_context(STYLE):
        return _curves(history)


def _curves(history: Sequence[dict[str, Any]]) -> list[Plot]:
    made = []
    loss, validation = _column(history, "loss"), _column(history, "validation_loss")
    if loss or validation:
        figure, axes = new_figure()
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
        made.append(Plot("Training", f"{'; '.join(said)}.".capitalize(), as_svg(figure, "training")))
    panels = [
        (label, values)
        for label, values in (
            ("learning rate", _column(history, "learning_rate")),
            ("gradient norm", _column(history, "grad_norm")),
            ("loss scale", _column(history, "loss_scale")),
            ("tokens/s", _column(history, "tokens_per_second")),
        )
        if values
    ]
    if panels:
        figure, stacked = new_figure(height=1.0 + 1.1 * len(panels), rows=len(panels))
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
        title = ", ".join(label for label, _ in panels)
        made.append(
            Plot(title.capitalize(), f"{'; '.join(said)}.".capitalize(), as_svg(figure, "training-speed"))
        )
    return made


def _column(history: Sequence[dict[str, Any]], name: str) -> list[tuple[float, float]]:
    found = [
        (entry["step"], entry[name]) for entry in history if entry.get(name) is not None and "step" in entry
    ]
    return [(step, value) for step, value in found if math.isfinite(value)]
