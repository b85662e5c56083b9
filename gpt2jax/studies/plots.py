"""The plots of a study of several models or methods: what each gained, against what it took."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from gpt2jax.report.plot_style import MARKERS, STYLE, Plot, new_figure, series_colour, short_name, to_svg
from gpt2jax.report.tables import number

Z95 = 1.96  # standard errors of a 95 % interval


def study_plots(
    gains: Sequence[Mapping[str, Any]],
    histories: Mapping[str, Sequence[Mapping[str, float]]],
    colours: Mapping[str, int],
) -> list[Plot]:
    """Draw gains and validation losses if there are several models or methods.

    Args:
        gains: see `list_gains`.
        histories: logs of the trainings by name.
        colours: number of each name's colour.
    """
    if len(gains) < 2:
        return []
    import matplotlib

    memory = "measured_bytes" if all(gain["measured_bytes"] for gain in gains) else "planned_bytes"
    how = "measured on the device" if memory == "measured_bytes" else "planned by XLA"
    axes = (
        ("trained_parameters", 1e6, "trained parameters", "trained parameters, millions"),
        ("seconds", 1.0, "time", "seconds of training"),
        (memory, 1e9, "memory", f"memory of the training step, GB ({how})"),
    )
    with matplotlib.rc_context(STYLE):
        plots = [
            gain_plot(gains, colours, *axis)
            for axis in axes
            if all(gain[axis[0]] is not None for gain in gains)
        ]
        return [*plots, *validation_plot(histories, colours)]


def gain_plot(
    gains: Sequence[Mapping[str, Any]],
    colours: Mapping[str, int],
    figure_name: str,
    unit: float,
    what: str,
    label: str,
) -> Plot:
    """Draw the gains with their 95 % intervals against one figure."""
    figure, axes = new_figure()
    values = [gain[figure_name] / unit for gain in gains]
    for gain, value in zip(gains, values, strict=True):
        index = colours[gain["name"]]
        axes.errorbar(
            value,
            gain["gain"],
            yerr=Z95 * (gain["standard_error"] or 0.0),
            fmt=MARKERS[index % len(MARKERS)],
            color=series_colour(index),
            label=short_name(gain["name"]),
            capsize=4,
            markersize=7,
        )
    if max(values) > 10 * min(values) > 0:
        axes.set_xscale("log")
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.margins(x=0.15, y=0.15)
    axes.set_xlabel(label)
    axes.set_ylabel("gain, nats per token")
    axes.grid()
    axes.legend()
    listed = "; ".join(
        f"{gain['name']} {number(gain['gain'], 3, signed=True)} for {value:,.4g}"
        for gain, value in zip(gains, values, strict=True)
    )
    return Plot(
        f"Gain against {what}",
        f"Test loss of the generic model minus that of the last stage, 95 % interval; {label}: {listed}.",
        to_svg(figure, f"gain-{what}"),
    )


def validation_plot(
    histories: Mapping[str, Sequence[Mapping[str, float]]], colours: Mapping[str, int]
) -> list[Plot]:
    """Draw the validation loss of each training over its steps; nothing if none has one."""
    curves = {
        name: [(entry["step"], entry["validation_loss"]) for entry in history if entry.get("validation_loss")]
        for name, history in histories.items()
    }
    if not all(curves.values()):
        return []
    figure, axes = new_figure()
    for name, curve in curves.items():
        index = colours[name]
        style = {"marker": MARKERS[index % len(MARKERS)], "color": series_colour(index), "markersize": 5}
        axes.plot(*zip(*curve, strict=True), label=short_name(name), **style)
    axes.set_xlabel("step, all stages")
    axes.set_ylabel("validation loss, nats per token")
    axes.grid()
    axes.legend()
    ends = "; ".join(
        f"{name} from {number(curve[0][1], 3)} to {number(curve[-1][1], 3)}" for name, curve in curves.items()
    )
    return [Plot("Validation loss during the training", f"{ends}.", to_svg(figure, "validation"))]
