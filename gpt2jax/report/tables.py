"""The tables of a report, as text."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

from gpt2jax.comparison.compare import Comparison
from gpt2jax.comparison.paired import loss_standard_error
from gpt2jax.comparison.statistics import CONFIDENCE

MINUS = "\N{MINUS SIGN}"
NOTHING = "\N{EN DASH}"


@dataclasses.dataclass(frozen=True)
class Table:
    """A table of text: the first column names the row."""

    caption: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]


def transposed(table: Table) -> Table:
    """Rows as columns: a few models fit a narrow terminal side by side, all their figures do not."""
    cells = list(zip(table.columns, *table.rows, strict=True))
    return Table(table.caption, ("Figure", *cells[0][1:]), cells[1:])


def number(value: float | None, digits: int = 4, *, signed: bool = False) -> str:
    """A figure for reading: fixed digits, thousands apart, a dash where there is none."""
    if value is None or math.isnan(value):
        return NOTHING
    if math.isinf(value):
        return "∞" if value > 0 else MINUS + "∞"
    text = f"{abs(value):,.{digits}f}"
    sign = MINUS if value < 0 else "+" if signed else ""
    return text if float(text.replace(",", "")) == 0 else sign + text


def percent(share: float | None, digits: int = 1, *, signed: bool = False) -> str:
    """A share as a percentage."""
    return NOTHING if share is None else number(100 * share, digits, signed=signed) + "\N{NO-BREAK SPACE}%"


def with_error(value: float | None, error: float | None, digits: int = 4, *, signed: bool = False) -> str:
    """A figure and its standard error."""
    text = number(value, digits, signed=signed)
    return text if error is None or not math.isfinite(error) else f"{text} ± {number(error, digits)}"


def figures_table(comparison: Comparison) -> Table:
    """The figures of every model."""
    rows = [
        (
            name,
            with_error(evaluation.loss, loss_standard_error(evaluation)),
            number(evaluation.perplexity, 2),
            number(evaluation.word_perplexity, 1),
            percent(evaluation.accuracy, 2),
            percent(evaluation.accuracy_top5, 2),
            number(evaluation.bits_per_byte),
            number(evaluation.bits_per_character),
            percent(evaluation.calibration_error, 2),
            number(evaluation.keras_loss),
            number(evaluation.keras_accuracy),
            f"{evaluation.tokens:,}",
        )
        for name, evaluation in comparison.evaluations.items()
    ]
    columns = (
        "Model",
        "Loss, nats per token",
        "Perplexity",
        "Word perplexity",
        "Accuracy",
        "Top-5 accuracy",
        "Bits per byte",
        "Bits per character",
        "Calibration error",
        "Keras loss",
        "Keras accuracy",
        "Tokens",
    )
    return Table("Figures on the held-out texts, ± standard error over documents", columns, rows)


def paired_table(comparison: Comparison) -> Table:
    """Every model against the first."""
    rows = []
    for name, difference in comparison.paired.items():
        low, high = difference.interval
        mean = with_error(difference.difference, difference.standard_error, signed=True)
        accuracy = NOTHING
        if difference.accuracy_difference is not None:
            error = difference.accuracy_standard_error
            accuracy = percent(difference.accuracy_difference, 2, signed=True)
            accuracy += "" if error is None else f" ± {number(100 * error, 2)} %"
        rows.append(
            (
                f"{name} {MINUS} {difference.baseline}",
                f"{mean} {difference.unit}",
                f"{number(low, signed=True)} to {number(high, signed=True)}",
                accuracy,
                percent(difference.win_rate),
            )
        )
    columns = ("Pair", "Loss difference", f"{percent(CONFIDENCE, 0)} interval", "Accuracy difference", "Wins")
    return Table(
        "Paired difference over the same documents; a negative loss difference is an improvement",
        columns,
        rows,
    )


def repeat_table(comparison: Comparison) -> Table:
    """All that it takes to make the comparison again."""
    evaluation = next(iter(comparison.evaluations.values())).settings
    settings = dataclasses.asdict(evaluation) | comparison.settings
    rows = [(name, str(value)) for name, value in settings.items()]
    data = comparison.data
    rows += [("texts", f"{data['documents']:,}, SHA-256 {data['sha256']}")]
    names = {"source": "texts from", "split": "split", "revision": "revision"}
    rows += [(label, str(data[name])) for name, label in names.items() if data.get(name) is not None]
    for name, about in comparison.models.items():
        source = f"{about['source']}, " if about["source"] else ""
        rows.append(
            (f"model {name}", f"{source}{about['parameters']:,} parameters, SHA-256 {about['fingerprint']}")
        )
    rows += [(name, version) for name, version in comparison.versions.items()]
    rows += [("command", comparison.command)] if comparison.command else []
    return Table("Settings, texts, models and versions of this comparison", ("What", "Value"), rows)


def timing_table(comparison: Comparison) -> Table:
    """Times on this machine; the only figures that another run does not repeat."""
    rows = []
    for name, evaluation in comparison.evaluations.items():
        warm = [g["seconds"] for g in comparison.generations if g["model"] == name]
        rows.append(
            (
                name,
                f"{number(evaluation.seconds, 1)} s",
                f"{number(comparison.first_call_seconds[name], 2)} s" if warm else NOTHING,
                f"{number(min(warm), 2)} to {number(max(warm), 2)} s" if warm else NOTHING,
            )
        )
    columns = ("Model", "Evaluation", "First generation", "Later generations")
    return Table("Time on this machine; evaluation and first generation include compilation", columns, rows)


def gains_table(comparison: Comparison, name: str) -> Table:
    """Where the difference of a model to the first one lies."""
    rows = []
    for kind, label in (("position", "place"), ("frequency", "frequency"), ("kind", "kind")):
        for entry in comparison.gains[name][kind]:
            rows.append(
                (
                    f"{label}: {entry['class']}",
                    f"{entry['tokens']:,}",
                    number(entry["first"], 3),
                    number(entry["second"], 3),
                    number(entry["difference"], 3, signed=True),
                    percent(entry["share"]),
                )
            )
    caption = (
        f"Mean loss in nats by place in the row, by how often the token occurs in the texts, and by what it is; "
        f"difference {name} {MINUS} {comparison.baseline}, and its share of the whole difference"
    )
    return Table(caption, ("Tokens of", "Tokens", comparison.baseline, name, "Difference", "Share"), rows)


def repetition_table(comparison: Comparison) -> Table:
    """How much the models' texts repeat themselves and each other, and how fast they came."""
    rows = [
        (
            name,
            *(number(about[f"distinct_{n}"], 3) for n in (1, 2, 3)),
            percent(about["repeated_4"]),
            percent(about["self_overlap_4"]),
            f"{about['tokens']:,}",
            number(about["tokens_per_second"], 0),
        )
        for name, about in comparison.repetition.items()
    ]
    columns = (
        "Model",
        "Distinct-1",
        "Distinct-2",
        "Distinct-3",
        "Repeated 4-grams",
        "Self-overlap",
        "Tokens",
        "Tokens/s",
    )
    return Table("Repetition in all texts of each model", columns, rows)


def overlap_table(comparison: Comparison) -> Table:
    """What the held-out texts share with the training texts."""
    about = comparison.overlap
    assert about is not None
    rows = [
        ("held-out texts", f"{about['documents']:,}"),
        ("training texts", f"{about['training_documents']:,}"),
        ("exact duplicates", f"{about['exact']:,}"),
        ("exact and near duplicates", f"{about['near']:,}"),
        ("texts that are mostly contained", f"{about['mostly_contained']:,}"),
        ("share of all text that is contained", percent(about["contained"], 2)),
    ]
    rows += [
        (
            f"document {entry['document']}",
            f"{percent(entry['contained'])} contained"
            + (
                f"; nearest: training text {entry['training_document']}, resemblance {number(entry['resemblance'], 2)}"
                if entry["training_document"] >= 0
                else ""
            ),
        )
        for entry in about["listed"][:5]
    ]
    return Table("Held-out texts that also stand in the training texts", ("What", "How much"), rows)
