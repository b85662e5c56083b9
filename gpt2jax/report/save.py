"""Renders a comparison and writes it into a folder: one HTML file that needs nothing else, Markdown, and JSON."""

from __future__ import annotations

import dataclasses
import pathlib
import re
from collections.abc import Sequence
from importlib import resources
from typing import Any

from gpt2jax.comparison.excerpts import END_MARK
from gpt2jax.comparison.result import Comparison
from gpt2jax.report import summary, tables
from gpt2jax.report.plot_style import NUM_COLOURS, Plot
from gpt2jax.report.plots import comparison_plots, training_plots
from gpt2jax.report.tables import Table
from gpt2jax.utils.atomic_io import atomic_write
from gpt2jax.utils.home_folder import abbreviate_home
from gpt2jax.utils.validation import check_path

DEEPEST = 2.0  # nats: the difference from which a token has the deepest colour


def save_report(
    comparison: Comparison,
    folder: str | pathlib.Path,
    *,
    tables: Sequence[Table] = (),
    plots: Sequence[Plot] = (),
) -> pathlib.Path:
    """Write `report.html`, `report.md` and `comparison.json` into a folder; all are rendered before one is written.

    See `hide_home` for what they do not tell.

    Args:
        comparison: the result of `compare`.
        folder: where to write.
        tables: of a study, for the first section of the report.
        plots: of a study, for the same section.

    Returns:
        The folder.
    """
    folder = check_path("folder", folder)
    comparison = hide_home(comparison)
    files = {
        "report.html": render_html(comparison, tables, plots),
        "report.md": render_markdown(comparison, tables),
        "comparison.json": comparison.as_json(),
    }
    for name, content in files.items():
        with atomic_write(folder / name) as file:
            # half of a surrogate pair, which a prompt may hold, cannot be written as UTF-8
            file.write(content.encode("utf-16", "surrogatepass").decode("utf-16", "replace"))
    return folder


def hide_home(comparison: Comparison) -> Comparison:
    """Return the comparison with "~" for the user's home folder in names of models and texts and the command line."""
    return dataclasses.replace(
        comparison,
        models=[dataclasses.replace(model, info=abbreviate_home(model.info)) for model in comparison.models],
        data=abbreviate_home(comparison.data),
        command=abbreviate_home(comparison.command),
        by_texts={abbreviate_home(name): hide_home(part) for name, part in comparison.by_texts.items()},
    )


def render_html(
    comparison: Comparison, study_tables: Sequence[Table] = (), study_plots: Sequence[Plot] = ()
) -> str:
    """Return the report as one page: no script, no network, style and pictures inside."""

    style = resources.files("gpt2jax").joinpath("assets/report.css").read_text(encoding="utf-8")
    return _render(
        "report.html.j2",
        comparison,
        study_tables,
        finalize=replace_control_characters,
        autoescape=True,
        style=style,
        study_plots=study_plots,
    )


def replace_control_characters(value: Any) -> Any:
    """Replace the characters that HTML does not allow and that escaping leaves; values of other types stay."""
    is_plain = isinstance(value, str) and not hasattr(value, "__html__")
    pattern = r"[\x00-\x08\x0b-\x1f\x7f-\x9f]"
    return re.sub(pattern, "\N{REPLACEMENT CHARACTER}", value) if is_plain else value


def render_markdown(comparison: Comparison, study_tables: Sequence[Table] = ()) -> str:
    """Return the report as Markdown."""

    def finalize(value: Any) -> Any:
        is_plain = isinstance(value, str) and not hasattr(value, "__html__")
        return re.sub(r"([\\`*_\[\]<>|#~&])", r"\\\1", _without_controls(value)) if is_plain else value

    return _render("report.md.j2", comparison, study_tables, finalize=finalize, autoescape=False)


def _without_controls(text: str) -> str:
    """Return a text without what HTML does not allow, a terminal would obey, or UTF-8 does not have."""
    return re.sub(
        r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]",
        "\N{REPLACEMENT CHARACTER}",
        text,
    )


def _render(
    template: str,
    comparison: Comparison,
    study_tables: Sequence[Table],
    *,
    finalize: Any,
    autoescape: bool,
    **variables: Any,
) -> str:
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("gpt2jax.report"),
        undefined=jinja2.StrictUndefined,
        finalize=finalize,
        autoescape=autoescape,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"fenced": _fenced, "one_line": lambda text: re.sub(r"\s+", " ", text)}
    for module in (tables, summary):
        environment.globals |= {name: value for name, value in vars(module).items() if callable(value)}
    training = training_plots(comparison.history or [])
    return environment.get_template(template).render(
        comparison=comparison,
        sections=({"study": "The study"} if study_tables else {}) | _sections(comparison, bool(training)),
        study_tables=study_tables,
        training=training,
        comparison_plots=comparison_plots,
        definitions=summary.DEFINITIONS,
        colour_depth=_colour_depth,
        deepest=DEEPEST,
        end_mark=END_MARK,
        num_colours=NUM_COLOURS,
        **variables,
    )


def _sections(comparison: Comparison, has_training: bool) -> dict[str, str]:
    """Return headings by id, of the sections that have content."""
    others = [model.versus_baseline for model in comparison.models if model.versus_baseline]
    on = summary.on_texts(comparison)  # plots and documents are those of the first texts
    sections = {"figures": "Figures", "plots": f"Where the {'difference' if others else 'loss'} lies{on}"}
    if has_training:
        sections["training"] = "Training"
    if comparison.overlap is not None:
        sections["overlap"] = "Overlap with the training texts"
    if comparison.baseline.generations:
        sections["texts"] = "Generated text"
    for index, (model, versus) in enumerate(zip(comparison.models[1:], others, strict=True)):
        if versus.excerpts and (versus.excerpts.improved or versus.excerpts.regressed):
            sections[f"documents-{index}"] = f"Documents with the largest difference{on}: {model.name}"
    return sections | {"repeat": "To repeat it", "meaning": "What the figures mean"}


def _colour_depth(difference: float) -> float:
    """Return how deep the colour of a token is, from 0 to 1; 0 for nan."""
    return round(min(abs(difference) / DEEPEST, 1.0), 2) if difference == difference else 0.0


def _fenced(text: str) -> Any:
    """Return text word for word, except control characters, behind a fence longer than any within it."""
    import markupsafe

    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return markupsafe.Markup(f"{fence}text\n{_without_controls(text)}\n{fence}")
