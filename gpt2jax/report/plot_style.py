"""The look of the plots: SVG that takes its colours and its font from the page around it.

Matplotlib draws with placeholder colours, which become CSS variables afterwards: one picture serves light, dark and
paper. Text stays text. The same data gives the same bytes.
"""

from __future__ import annotations

import dataclasses
import io
import re
import warnings
from typing import Any

NUM_COLOURS = 6  # of models, in the style sheet
# placeholders that no plot uses otherwise, and the CSS variables that they become
INK, MUTED, GRID, BETTER, WORSE = "#010203", "#020304", "#030405", "#040506", "#050607"
_VARIABLES = {INK: "--ink", MUTED: "--muted", GRID: "--line", BETTER: "--better", WORSE: "--worse"}
_VARIABLES |= {f"#0a0b{index:02x}": f"--series-{index}" for index in range(NUM_COLOURS)}
MARKERS = ("o", "s", "^", "D", "v", "P")
DASHES = ("-", (0, (5, 1.5)), (0, (1.5, 1.5)), (0, (6, 1.5, 1.5, 1.5)), (0, (3, 3)), (0, (8, 2)))
STYLE: Any = {
    "svg.fonttype": "none",
    "font.size": 10,
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
    "lines.linewidth": 1.8,
    "legend.frameon": False,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "text.parse_math": False,
    "path.simplify": False,
}


@dataclasses.dataclass(frozen=True)
class Plot:
    """A picture and its message.

    Attributes:
        title: what is drawn.
        text: the same in words, for readers who do not see it.
        svg: the picture, to be put into a page.
    """

    title: str
    text: str
    svg: str


def series_colour(index: int) -> str:
    """Return the placeholder for the colour of model number `index`."""
    return f"#0a0b{index % NUM_COLOURS:02x}"


def short_name(name: str, limit: int = 22) -> str:
    """Return a name that fits on one line of a plot: names of stages differ at their ends."""
    # XML has no control characters
    name = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in " ".join(name.split()))
    half = limit // 2
    return name if len(name) <= limit else f"{name[: limit - half]}…{name[len(name) - half + 1 :]}"


def new_figure(*, height: float = 2.9, rows: int = 1) -> tuple[Any, Any]:
    """Return a figure and its axes (a list for several rows) without matplotlib's global state."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.9, height), layout="constrained")
    axes = figure.subplots(rows, 1, sharex=True, squeeze=False)[:, 0]
    return figure, list(axes) if rows > 1 else axes[0]


def to_svg(figure: Any, name: str) -> str:
    """Return a figure as an `<svg>` element that has no size, and no names that other figures have too."""
    import matplotlib

    target = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": name}), warnings.catch_warnings():
        # names are text of the page, whose fonts have what matplotlib's lacks
        warnings.filterwarnings("ignore", "Glyph .* missing from")
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(target, format="svg", transparent=True, metadata=nothing)
    svg = target.getvalue()
    view = re.search(r'viewBox="[^"]+"', svg)
    assert view is not None
    body = svg[svg.index(">", svg.index("<svg")) + 1 :].strip()
    body = re.sub(r"<metadata>.*?</metadata>", "", body, flags=re.DOTALL)
    body = re.sub(r'(<g) id="[^"]*"', r"\1", body).replace("xlink:href", "href")
    body = re.sub(r"font: ([\d.]+px)[^;\"]*", r"font: \1 var(--sans)", body)
    body = re.sub(r"font-family: [^;\"]*", "font-family: var(--sans)", body)
    for colour, variable in _VARIABLES.items():
        body = body.replace(colour, f"var({variable})")
    return f'<svg {view[0]} aria-hidden="true" focusable="false">{body}'
