"""How results look in a notebook: tables, plots and texts as HTML that suits a light and a dark page."""

from __future__ import annotations

import base64
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

import jinja2

from gpt2jax.comparison.result import Comparison
from gpt2jax.report.plot_style import Plot
from gpt2jax.report.plots import comparison_plots, training_plots
from gpt2jax.report.save import replace_control_characters
from gpt2jax.report.summary import prompt_groups, prompt_text
from gpt2jax.report.tables import Table, evaluation_table, figures_table, number, paired_table, transpose
from gpt2jax.utils.home_folder import abbreviate_home
from gpt2jax.utils.notices import count_noun

if TYPE_CHECKING:
    from gpt2jax.evaluation.result import Evaluation
    from gpt2jax.generation.outputs import Generation
    from gpt2jax.train.trainer import Run

# for the CSS variables of the plots; legible on white and on black, because a picture does not know the page's theme
COLOURS = {
    "--ink": "#757d8a",
    "--muted": "#757d8a",
    "--line": "#757d8a55",
    "--sans": "sans-serif",
    "--better": "#14958a",
    "--worse": "#cc7a1f",
    "--series-0": "#757d8a",
    "--series-1": "#4a80e8",
    "--series-2": "#d94f8c",
    "--series-3": "#8b5cf6",
    "--series-4": "#6b8e23",
    "--series-5": "#a0714a",
}
Text = tuple[str, str, str]  # a label, a prompt, its continuation


def comparison_html(comparison: Comparison) -> str:
    """Render figures, differences, the plot of the losses, and the generated texts folded up."""
    tables = [
        make(part)
        for part in comparison.parts
        for make in ((figures_table, paired_table) if part.differences else (figures_table,))
    ]
    texts = [
        (f"{model['model']}: {prompt_text(model['prompt'])}", _prompt(model["prompt"]), model["text"])
        for group in prompt_groups(comparison)
        for model in group
    ]
    return _render([transpose(table) for table in tables], comparison_plots(comparison)[:1], texts)


def evaluation_html(evaluation: Evaluation) -> str:
    """Render the figures of an evaluation."""
    return _render([evaluation_table(evaluation)])


def run_html(run: Run) -> str:
    """Render the last figures of a fine-tuning, and its curve."""
    last: dict[str, float] = {}
    for entry in run.history:
        last |= entry
    rows = [
        (label, number(last[name], digits))
        for label, name, digits in (
            ("Steps", "step", 0),
            ("Loss, nats per token", "loss", 4),
            ("Validation loss, nats per token", "validation_loss", 4),
            ("Seconds", "seconds", 1),
            ("Tokens/s", "tokens_per_second", 0),
        )
        if name in last
    ]
    rows += [] if run.output is None else [("Folder", abbreviate_home(str(run.output)))]
    table = Table("The last figures of the training", ("Figure", "Value"), rows)
    return _render([table], training_plots(run.history)[:1])


def generation_html(generation: Generation) -> str:
    """Render a prompt and its continuation."""
    count = len(generation.token_ids)
    label = f"{count_noun(count, 'token')}, finish_reason {generation.finish_reason!r}"
    return _render(texts=[(label, generation.prompt, generation.text)], is_open=True)


def _image_of(plot: Plot) -> str:
    """Return a plot as a data URL: inside the page, its style and the ids of its parts would reach other cells."""
    svg = plot.svg.replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1)
    svg = re.sub(r"var\((--[\w-]+)\)", lambda found: COLOURS[found[1]], svg)
    return "data:image/svg+xml;base64," + base64.b64encode(svg.encode()).decode()


def _prompt(prompt: str | Sequence[int]) -> str:
    """Return a prompt to show in front of its continuation; token ids have a continuation alone."""
    return prompt if isinstance(prompt, str) else ""


def _render(
    tables: Sequence[Table] = (),
    plots: Sequence[Plot] = (),
    texts: Sequence[Text] = (),
    *,
    is_open: bool = False,
) -> str:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("gpt2jax.report"),
        undefined=jinja2.StrictUndefined,
        finalize=replace_control_characters,
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    template = environment.get_template("notebook.html.j2")
    return template.render(
        tables=tables, plots=plots, texts=texts, is_open=is_open, colours=COLOURS, image_of=_image_of
    )
