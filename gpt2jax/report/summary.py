"""A comparison in words and tables: what all reports say, the Markdown file, and the table on a terminal."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from gpt2jax.comparison.compare import Comparison
from gpt2jax.comparison.excerpts import Excerpt
from gpt2jax.comparison.statistics import CONFIDENCE, PairedDifference
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
    with_error,
)

if TYPE_CHECKING:
    from rich.console import Console

# ---- what every report says ----


def headline(comparison: Comparison) -> str:
    """The result in one sentence."""
    if not comparison.paired:
        name, evaluation = next(iter(comparison.evaluations.items()))
        loss, perplexity = number(evaluation.loss, 3), number(evaluation.perplexity, 1)
        return f"{name}: {loss} nats per token, perplexity {perplexity}"
    name = best(comparison)
    return verdict(name, comparison.paired[name])


def best(comparison: Comparison) -> str:
    """The model with the lowest loss against the first one, which is not among them."""

    def order(name: str) -> tuple[bool, float]:
        difference = comparison.paired[name].difference
        return math.isnan(difference), difference

    return min(comparison.paired, key=order)


def verdict(name: str, difference: PairedDifference) -> str:
    """Better or worse; neither where the interval of the difference holds zero, or on one text alone."""
    unit, baseline = difference.unit, difference.baseline
    low, high = difference.interval
    if not math.isfinite(difference.difference):
        return f"{name} has no finite loss to hold against {baseline}"
    if low <= 0.0 <= high or difference.documents < 2:
        return f"No clear difference between {name} and {baseline}"
    word = "better" if difference.difference < 0 else "worse"
    return f"{name} is {number(abs(difference.difference), 3)} {unit} {word} than {baseline}"


def evidence(comparison: Comparison, name: str) -> str:
    """What stands behind the verdict on one model."""
    difference = comparison.paired[name]
    first, second = comparison.evaluations[difference.baseline], comparison.evaluations[name]
    low, high = difference.interval
    documents = "document" if difference.documents == 1 else "documents"
    mean = with_error(difference.difference, difference.standard_error, signed=True)
    return (
        f"Paired difference {mean} {difference.unit} "
        f"({percent(CONFIDENCE, 0)} interval {number(low, signed=True)} to {number(high, signed=True)}). "
        f"Perplexity {number(first.perplexity, 2)} → {number(second.perplexity, 2)}, "
        f"accuracy {percent(first.accuracy)} → {percent(second.accuracy)}. "
        f"Lower loss on {percent(difference.win_rate)} of {difference.documents:,} {documents}."
    )


def generation_note(generation: dict[str, Any]) -> list[str]:
    """Length, speed and repetition of a generated text."""
    ended = "ended by itself" if generation["finish_reason"] == "stop" else "cut at the length limit"
    tokens = "token" if generation["tokens"] == 1 else "tokens"
    parts = [f"{generation['tokens']:,} {tokens}, {ended}"]
    parts += [
        f"{number(generation['tokens_per_second'], 0)} tokens/s",
        f"{number(generation['seconds'], 2)} s",
    ]
    if generation["repeated_4"] is not None:
        parts.append(f"repeated 4-grams {percent(generation['repeated_4'])}")
    return parts


def prompt_groups(comparison: Comparison) -> list[list[dict[str, Any]]]:
    """The generations of all models, prompt by prompt in their order."""
    count = len(comparison.generations) // len(comparison.evaluations)
    return [comparison.generations[index::count] for index in range(count)]


def prompt_text(prompt: str | Sequence[int]) -> str:
    """A prompt for reading."""
    if isinstance(prompt, str):
        return prompt or "(empty prompt)"
    return "token ids " + " ".join(map(str, prompt)) if prompt else "(empty prompt)"


DEFINITIONS = (
    ("Loss", "mean cross-entropy per scored token in nats; the end token behind each text is one of them."),
    (
        "Perplexity, word perplexity",
        "exp of the loss per token; of the loss per word of the text, what lies between white space, whatever the "
        "tokenizer.",
    ),
    (
        "Accuracy, top-5 accuracy",
        "share of scored tokens that were the model's most likely token, or among its five most likely ones.",
    ),
    (
        "Bits per byte, bits per character",
        "loss of the scored tokens over ln 2, per byte or character of the text they stand for; without end tokens.",
    ),
    (
        "Calibration error",
        "how far the probability of the most likely token is from how often it is right: the mean over 15 bins of "
        "that probability, each weighing as many tokens as it holds.",
    ),
    (
        "Keras loss, Keras accuracy",
        "what Keras reports for the same model and texts: the first tokens of each text in a row of fixed "
        "length, over all positions of all rows. Padding counts in the denominator of both; in the accuracy "
        "it is a token to be predicted like any other.",
    ),
    (
        "Standard error, interval",
        "over documents, since the tokens of one text depend on each other; the interval by bootstrap.",
    ),
    ("Wins", "share of documents with the lower loss; a tie counts half."),
    ("Repeated 4-grams", "share of four-token sequences that occurred before in the same text."),
    (
        "Distinct-n",
        "different sequences of n tokens within each text over all of them; 1 = none occurs twice.",
    ),
    ("Self-overlap", "share of a text's four-token sequences that also occur in another text of the model."),
    (
        "Duplicates, contained",
        "by runs of 32 letters and digits: near duplicates share at least 80 % of the runs of both with one training "
        "text; of a text that is mostly contained, at least half of the runs stand in training texts.",
    ),
)


def windows_sentence(comparison: Comparison) -> str:
    """Which tokens were scored, and how."""
    evaluation = next(iter(comparison.evaluations.values()))
    said = f"Scored: {evaluation.recipe}."
    if evaluation.documents_cut:
        said += (
            f" {evaluation.documents_cut:,} of {evaluation.documents:,} texts are longer: there the end "
            "token is none of the text's own, and costs a good model more than any other."
        )
    return said


def excerpt_title(excerpt: Excerpt) -> str:
    """Which document, and how large the difference."""
    shown = "" if len(excerpt.pieces) >= excerpt.tokens else " (beginning)"
    mean = number(excerpt.difference, 3, signed=True)
    return f"Document {excerpt.document}: {mean} nats per token over {excerpt.tokens:,} tokens{shown}"


# ---- Markdown ----


def markdown_report(comparison: Comparison) -> str:
    """The report as Markdown."""
    parts = [f"# {_markdown(headline(comparison))}"]
    parts += [_markdown(f"{name}: {evidence(comparison, name)}") for name in comparison.paired]
    parts += [windows_sentence(comparison), "## Figures", _markdown_table(figures_table(comparison))]
    if comparison.paired:
        parts.append(_markdown_table(paired_table(comparison)))
    for name in comparison.gains:
        parts += [
            f"## Where the difference lies: {_markdown(name)}",
            _markdown_table(gains_table(comparison, name)),
        ]
    if comparison.overlap is not None:
        parts += ["## Overlap with the training texts", _markdown_table(overlap_table(comparison))]
    if comparison.generations:
        parts += ["## Generated text", _markdown_table(repetition_table(comparison))]
        for group in prompt_groups(comparison):
            parts += ["### Prompt", _fenced(prompt_text(group[0]["prompt"]))]
            for generation in group:
                parts += [f"**{_markdown(generation['model'])}** ({', '.join(generation_note(generation))})"]
                parts += [_fenced(generation["text"])]
    for name, groups in comparison.excerpts.items():
        for title, excerpts in (("better", groups["gains"]), ("worse", groups["losses"])):
            if excerpts:
                parts.append(f"## Documents on which {_markdown(name)} is {title} by most")
            for excerpt in excerpts:
                text = "".join(piece for piece, _ in excerpt.pieces)
                parts.append(excerpt_title(excerpt))
                parts.append(_fenced(text))
    parts += [
        "## To repeat it",
        _markdown_table(repeat_table(comparison)),
        _markdown_table(timing_table(comparison)),
    ]
    parts += ["## What the figures mean", "\n".join(f"- **{term}**: {text}" for term, text in DEFINITIONS)]
    return "\n\n".join(parts) + "\n"


def _markdown_table(table: Table) -> str:
    lines = [
        "| " + " | ".join(map(_cell, table.columns)) + " |",
        "|---|" + ("---:|" * (len(table.columns) - 1) if len(table.columns) > 2 else "---|"),
        *("| " + " | ".join(map(_cell, row)) + " |" for row in table.rows),
    ]
    return f"{table.caption}:\n\n" + "\n".join(lines)


def _cell(text: str) -> str:
    return re.sub(r"\s+", " ", _markdown(text))


def _markdown(text: str) -> str:
    """Text that stands for itself."""
    return re.sub(r"([\\`*_\[\]<>|#])", r"\\\1", text)


def _fenced(text: str) -> str:
    """Text word for word, behind a fence longer than any within it."""
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}text\n{text}\n{fence}"


# ---- terminal ----


def print_comparison(comparison: Comparison, console: Console | None = None) -> None:
    """Prints the headline, how the texts were scored, and the tables of figures.

    Args:
        comparison: what `compare` gave.
        console: where; default: standard output.
    """
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table as RichTable
    from rich.text import Text

    console = console or Console()
    console.print(Text(headline(comparison), style="bold"))
    for name in comparison.paired:
        console.print(Text(f"{name}: {evidence(comparison, name)}"))
    console.print(Text(windows_sentence(comparison)))
    tables = [transposed(figures_table(comparison))]
    tables += [transposed(paired_table(comparison))] if comparison.paired else []
    for table in tables:
        shown = RichTable(title=Text(table.caption), title_justify="left", title_style="dim", box=SIMPLE_HEAD)
        for index, column in enumerate(table.columns):
            shown.add_column(Text(column), justify="right" if index else "left")
        for row in table.rows:
            shown.add_row(*(Text(cell) for cell in row))
        console.print(shown)
