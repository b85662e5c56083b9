"""Drawing for the report: SVG that takes its colours and its font from the page around it.

Matplotlib draws with marker colours, which are replaced by CSS variables afterwards: one picture serves light, dark
and paper. Text stays text. The same data gives the same bytes.
"""

from __future__ import annotations

import dataclasses
import io
import math
import re
from typing import Any

SERIES = 6  # colours in the style sheet
# stand-ins that no plot uses by chance, and the CSS variables they become
INK, MUTED, GRID, GAIN, LOSS = "#010203", "#020304", "#030405", "#040506", "#050607"
_VARIABLES = {INK: "--ink", MUTED: "--muted", GRID: "--line", GAIN: "--gain", LOSS: "--loss"}
_VARIABLES |= {f"#0a0b{index:02x}": f"--series-{index}" for index in range(SERIES)}
MARKERS = ("o", "s", "^", "D", "v", "P")
DASHES = ("-", (0, (5, 1.5)), (0, (1.5, 1.5)), (0, (6, 1.5, 1.5, 1.5)), (0, (3, 3)), (0, (8, 2)))


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


def nice(value: float) -> float:
    """The round number (1, 2 or 5 times a power of ten) at or above `value`."""
    power = 10.0 ** math.floor(math.log10(value))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= value * 0.999)


def locator(most: int, *, integer: bool = False) -> Any:
    """At most so many ticks at round numbers."""
    from matplotlib.ticker import MaxNLocator

    return MaxNLocator(most, integer=integer, steps=[1, 2, 5, 10] if integer else [1, 2, 2.5, 5, 10])


def short(name: str, limit: int = 22) -> str:
    """A name on one line of a plot."""
    name = " ".join(name.split())
    return name if len(name) <= limit else name[: limit - 1] + "…"


STYLE: Any = {
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


def new_figure(*, height: float = 2.9, rows: int = 1) -> tuple[Any, Any]:
    """A figure and its axes (a list of them for several rows), without touching matplotlib's global state."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.9, height), layout="constrained")
    axes = figure.subplots(rows, 1, sharex=True)
    return figure, axes if rows == 1 else list(axes)


def as_svg(figure: Any, name: str) -> str:
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
