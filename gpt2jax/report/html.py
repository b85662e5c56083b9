"""The report as one HTML file that needs nothing else: no script, no network, style and pictures inside."""

from __future__ import annotations

import html
import re
from collections.abc import Sequence
from importlib import resources
from typing import Any

from gpt2jax.comparison.compare import Comparison
from gpt2jax.comparison.excerpts import END_MARK, Excerpt
from gpt2jax.report.plots import plots
from gpt2jax.report.summary import (
    DEFINITIONS,
    best,
    evidence,
    excerpt_title,
    generation_note,
    headline,
    prompt_groups,
    prompt_text,
    verdict,
    windows_sentence,
)
from gpt2jax.report.svg import SERIES, Plot
from gpt2jax.report.tables import (
    Table,
    figures_table,
    gains_table,
    number,
    overlap_table,
    paired_table,
    percent,
    repeat_table,
    repetition_table,
    timing_table,
    transposed,
)
from gpt2jax.report.training import training_curves

STRONG = 2.0  # nats: the deepest colour of a token


def html_report(comparison: Comparison) -> str:
    """The whole page."""
    style = resources.files("gpt2jax").joinpath("assets/report.css").read_text(encoding="utf-8")
    title = headline(comparison)
    lies = "difference" if comparison.paired else "loss"
    sections = [
        ("figures", "Figures", _figures(comparison)),
        ("plots", f"Where the {lies} lies", _plots(plots(comparison)) + _gains(comparison)),
        ("training", "Training", _training(comparison)),
        ("overlap", "Overlap with the training texts", _overlap(comparison)),
        ("texts", "Generated text", _generations(comparison) if comparison.generations else ""),
        *(
            (f"documents-{index}", f"Documents with the largest difference: {name}", _excerpts(name, groups))
            for index, (name, groups) in enumerate(comparison.excerpts.items())
        ),
        ("repeat", "To repeat it", _repeat(comparison)),
        ("meaning", "What the figures mean", _definitions()),
    ]
    sections = [section for section in sections if section[2]]
    links = "".join(f'<li><a href="#{name}">{_text(heading)}</a></li>' for name, heading, _ in sections)
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>{_text(title)}</title>
<style>
{style}</style>
</head>
<body>
<header>
<p class="kicker">gpt2jax · comparison of {_count(len(comparison.evaluations), "model")}</p>
<h1>{_text(title)}</h1>
{_summary(comparison)}
<nav aria-label="Sections"><ul>{links}</ul></nav>
</header>
<main>
{"".join(_section(*section) for section in sections)}</main>
</body>
</html>
"""


def _summary(comparison: Comparison) -> str:
    """The sentences and the four figures at a glance."""
    chosen = best(comparison) if comparison.paired else None
    parts = []
    # the headline is of the chosen one, which so comes first
    for name in sorted(comparison.paired, key=lambda name: name != chosen):
        lead = "" if name == chosen else f"<strong>{_text(verdict(name, comparison.paired[name]))}.</strong> "
        parts.append(f'<p class="lead">{lead}{_text(evidence(comparison, name))}</p>')
    if chosen is not None:
        first, second = comparison.evaluations[comparison.baseline], comparison.evaluations[chosen]
        pairs = [
            ("Loss, nats per token", number(first.loss, 3), number(second.loss, 3)),
            ("Perplexity", number(first.perplexity, 1), number(second.perplexity, 1)),
            ("Accuracy", percent(first.accuracy), percent(second.accuracy)),
        ]
        if first.bits_per_byte is not None:
            pairs.append(("Bits per byte", number(first.bits_per_byte, 3), number(second.bits_per_byte, 3)))
        tiles = "".join(
            f"<div><dt>{label}</dt><dd><span>{before}</span> <i>→</i> <b>{after}</b></dd></div>"
            for label, before, after in pairs
        )
        names = f"{_text(comparison.baseline)} → {_text(chosen)}"
        parts.append(f'<dl class="tiles" aria-label="{names}">{tiles}</dl>')
    return "\n".join(parts)


def _figures(comparison: Comparison) -> str:
    made = [figures_table(comparison)] + ([paired_table(comparison)] if comparison.paired else [])
    # figures below each other while the models fit side by side on a phone
    tables = "".join(_table(transposed(table) if len(table.rows) <= 4 else table) for table in made)
    return f'<p>{_text(windows_sentence(comparison))}</p>\n<div class="tables">\n{tables}</div>'


def _plots(made: Sequence[Plot]) -> str:
    figures = []
    for plot in made:
        figures.append(
            f"<figure>\n<figcaption><strong>{_text(plot.title)}</strong> {_text(plot.text)}</figcaption>\n"
            f"{plot.svg}\n</figure>"
        )
    return '<div class="plots">\n' + "\n".join(figures) + "\n</div>"


def _gains(comparison: Comparison) -> str:
    """The numbers behind the plots, folded away."""
    return "".join(
        f"<details><summary>In numbers: {_text(name)}</summary>\n{_table(gains_table(comparison, name))}</details>\n"
        for name in comparison.gains
    )


def _training(comparison: Comparison) -> str:
    made = training_curves(comparison.history) if comparison.history else []
    return _plots(made) if made else ""


def _overlap(comparison: Comparison) -> str:
    return "" if comparison.overlap is None else _table(overlap_table(comparison), numbers=False)


def _generations(comparison: Comparison) -> str:
    colours = {name: index % SERIES for index, name in enumerate(comparison.evaluations)}
    repeated = repetition_table(comparison)
    parts = [f"<p>{_text(_sampling_sentence(comparison))}</p>"]
    parts.append(_table(transposed(repeated) if len(repeated.rows) <= 4 else repeated))
    for group in prompt_groups(comparison):
        prompt = group[0]["prompt"]
        columns = "".join(
            f'<article class="series-{colours[generation["model"]]}">\n'
            f"<h4>{_text(generation['model'])}</h4>\n"
            f'<div class="text">{_text(generation["text"]) or "<em>(nothing)</em>"}</div>\n'
            f'<p class="note">{_note(generation)}</p>\n</article>\n'
            for generation in group
        )
        kind = ' class="empty"' if not prompt else ""
        heading = (
            f'<h3><span class="label">Prompt</span> <span{kind}>{_text(prompt_text(prompt))}</span></h3>'
        )
        parts.append(
            f'<section class="prompt">\n{heading}\n<div class="columns">\n{columns}</div>\n</section>'
        )
    return "\n".join(parts)


def _note(generation: dict[str, Any]) -> str:
    return " ".join(f"<span>{_text(part)}</span>" for part in generation_note(generation))


def _sampling_sentence(comparison: Comparison) -> str:
    settings = comparison.settings
    if not settings["do_sample"] or settings["temperature"] == 0:
        how = "Greedy: always the most likely token"
    else:
        how = f"Sampled with temperature {settings['temperature']:g}"
        how += f", top-k {settings['top_k']}" if settings["top_k"] else ""
        how += f", top-p {settings['top_p']:g}" if settings["top_p"] < 1 else ""
    if "max_length" in settings:
        how += f", up to {settings['max_length']} tokens, prompt included"
    else:
        how += f", up to {settings['max_new_tokens']} new tokens"
    return f"{how}. Prompt number i, from 0, has seed {settings['seed']} + i, the same for every model."


def _excerpts(name: str, groups: dict[str, list[Excerpt]]) -> str:
    parts = []
    for title, excerpts in (("gains", groups["gains"]), ("loses", groups["losses"])):
        if excerpts:
            parts.append(f"<h3>{_text(name)} {title} most</h3>")
        for place, excerpt in enumerate(excerpts):
            parts.append(_excerpt(excerpt, is_open=place == 0))
    if not parts:
        return ""
    legend = (
        '<p class="legend">Each token has the colour of its difference: '
        '<span class="gain" style="--depth: 0.75">better</span> in solid underline, '
        '<span class="loss" style="--depth: 0.75">worse</span> in dotted underline, '
        f"deeper colour for a larger difference (deepest from {STRONG:g} nats). "
        f"{END_MARK} is the end token.</p>"
    )
    return legend + "\n".join(parts)


def _excerpt(excerpt: Excerpt, *, is_open: bool) -> str:
    tokens = "".join(_token(text, difference) for text, difference in excerpt.pieces)
    summary = f"<summary>{_text(excerpt_title(excerpt))}</summary>"
    return f'<details{" open" * is_open}>{summary}\n<div class="text">{tokens}</div></details>'


def _token(text: str, difference: float) -> str:
    depth = round(min(abs(difference) / STRONG, 1.0), 2)
    if depth < 0.1 or difference != difference:
        return _text(text)
    kind, title = "gain" if difference < 0 else "loss", number(difference, 2, signed=True)
    return f'<span class="{kind}" style="--depth: {depth:g}" title="{title}">{_text(text)}</span>'


def _repeat(comparison: Comparison) -> str:
    return _table(repeat_table(comparison), numbers=False) + _table(timing_table(comparison))


def _definitions() -> str:
    return (
        "<dl>"
        + "".join(f"<dt>{_text(term)}</dt><dd>{_text(text)}</dd>" for term, text in DEFINITIONS)
        + "</dl>"
    )


def _section(name: str, title: str, content: str) -> str:
    return f'<section aria-labelledby="{name}">\n<h2 id="{name}">{_text(title)}</h2>\n{content}\n</section>\n'


def _table(table: Table, *, numbers: bool = True) -> str:
    """A table that scrolls by itself where the page is narrow."""
    head = "".join(f'<th scope="col">{_text(column)}</th>' for column in table.columns)
    body = "".join(
        f'<tr><th scope="row">{_text(row[0])}</th>'
        + "".join(f"<td>{_text(cell)}</td>" for cell in row[1:])
        + "</tr>\n"
        for row in table.rows
    )
    kind = "numbers" if numbers else "words"
    label, scroll = _text(table.caption), 'class="scroll" role="region" tabindex="0"'
    return (
        f'<div {scroll} aria-label="{label}">\n<table class="{kind}">\n'
        f"<caption>{label}</caption>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}</tbody>\n</table>\n</div>\n"
    )


def _count(count: int, noun: str) -> str:
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def _text(text: str) -> str:
    """Text that stands for itself, in an element or a quoted attribute; control characters become U+FFFD."""
    return html.escape(re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", "\N{REPLACEMENT CHARACTER}", text))
