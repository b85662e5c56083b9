"""Tables of a comparison as text; HTML, Markdown and the terminal show the same ones."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from gpt2jax.comparison.paired import CONFIDENCE, loss_standard_error, ratio_standard_error
from gpt2jax.comparison.result import Comparison, ModelResult
from gpt2jax.evaluation.accumulators import DocumentSums
from gpt2jax.evaluation.result import Evaluation

MINUS = "\N{MINUS SIGN}"
EMPTY = "\N{EN DASH}"


@dataclasses.dataclass(frozen=True)
class Table:
    """A table of text.

    Attributes:
        caption: what it shows.
        columns: headings; the first column names the row.
        rows: cells.
        is_numeric: the cells are numbers, to be aligned on the right.
    """

    caption: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    is_numeric: bool = True


def transpose(table: Table) -> Table:
    """Swap rows and columns: a few models fit a narrow page side by side, many figures do not."""
    cells = list(zip(table.columns, *table.rows, strict=True))
    return dataclasses.replace(table, columns=("Figure", *cells[0][1:]), rows=cells[1:])


# ---- formatting ----


def number(value: float | None, digits: int = 4, *, signed: bool = False) -> str:
    """Format a number with fixed digits and thousands separators, from 1e9 on with a power; a dash for None and nan."""
    if value is None or math.isnan(value):
        return EMPTY
    if math.isinf(value):
        return "∞" if value > 0 else MINUS + "∞"
    text = f"{abs(value):,.{digits}f}" if abs(value) < 1e9 else f"{abs(value):.3g}"
    sign = MINUS if value < 0 else "+" if signed else ""
    return text if float(text.replace(",", "")) == 0 else sign + text


def percent(fraction: float | None, digits: int = 1, *, signed: bool = False) -> str:
    """Format a fraction as a percentage."""
    return (
        EMPTY if fraction is None else number(100 * fraction, digits, signed=signed) + "\N{NO-BREAK SPACE}%"
    )


def with_error(value: float | None, error: float | None, digits: int = 4, *, signed: bool = False) -> str:
    """Format a number with its standard error."""
    text = number(value, digits, signed=signed)
    return text if error is None or not math.isfinite(error) else f"{text} ± {number(error, digits)}"


def percent_with_error(fraction: float | None, error: float | None, *, signed: bool = False) -> str:
    """Format a fraction and its standard error as percentages."""
    text = percent(fraction, 2, signed=signed)
    if error is None or not math.isfinite(error):
        return text
    return f"{number(None if fraction is None else 100 * fraction, 2, signed=signed)} ± {percent(error, 2)}"


# ---- tables ----


def _named(comparison: Comparison) -> str:
    """Return the name of the texts in brackets, if they have one."""
    return f" ({comparison.texts_name})" if comparison.texts_name else ""


def figures_table(comparison: Comparison) -> Table:
    """Make the table of every model's figures; the Keras columns only if they were computed."""
    rows = [
        {"Model": model.name} | _figures(model.evaluation, model.loss_standard_error)
        for model in comparison.models
    ]
    caption = f"Figures on the held-out texts{_named(comparison)}, ± standard error over documents"
    return Table(caption, tuple(rows[0]), [tuple(row.values()) for row in rows])


def evaluation_table(evaluation: Evaluation) -> Table:
    """Make the table of the figures of one evaluation, one a row."""
    rows = list(_figures(evaluation, loss_standard_error(evaluation)).items())
    caption = f"Figures of {evaluation.documents:,} texts, ± standard error over documents"
    return Table(caption, ("Figure", "Value"), rows)


def _figures(result: Evaluation, error: float | None) -> dict[str, str]:
    """Format the figures of an evaluation by their names."""
    sums = result.per_document
    keras = {"Keras loss": number(result.keras_loss), "Keras accuracy": number(result.keras_accuracy)}
    return {
        "Loss, nats per token": with_error(result.loss, error),
        "Perplexity": number(result.perplexity, 2),
        "Word perplexity": number(result.word_perplexity, 1),
        "Accuracy": percent_with_error(result.accuracy, ratio_standard_error(sums.correct, sums.tokens)),
        "Top-5 accuracy": percent_with_error(
            result.accuracy_top5, ratio_standard_error(sums.correct_top5, sums.tokens)
        ),
        "Bits per byte": with_error(result.bits_per_byte, _bits_error(sums, sums.bytes)),
        "Bits per character": with_error(result.bits_per_character, _bits_error(sums, sums.characters)),
        "Calibration error": percent(result.calibration_error, 2),
        **({} if result.keras is None else keras),
        "Tokens": f"{result.tokens:,}",
    }


def _bits_error(sums: DocumentSums, sizes: np.ndarray) -> float | None:
    """Return the standard error, over documents, of the bits per byte or character."""
    error = ratio_standard_error(sums.text_loss, sizes) if sizes.any() else None
    return None if error is None else error / math.log(2)


def paired_table(comparison: Comparison) -> Table:
    """Make the table of the differences between any two models."""
    units = {difference.unit for difference in comparison.pairs.values()}
    rows = []
    for (_, name), difference in comparison.pairs.items():
        low, high = difference.interval
        mean = with_error(difference.difference, difference.standard_error, signed=True)
        accuracy = EMPTY
        if difference.accuracy_difference is not None:
            error = difference.accuracy_standard_error
            accuracy = percent_with_error(difference.accuracy_difference, error, signed=True)
        rows.append(
            (
                f"{name} {MINUS} {difference.baseline}",
                mean if len(units) == 1 else f"{mean} {difference.unit}",
                f"{number(low, signed=True)} to {number(high, signed=True)}",
                accuracy,
                percent(difference.win_rate),
            )
        )
    loss = f"Loss difference, {units.pop()}" if len(units) == 1 else "Loss difference"
    columns = ("Pair", loss, f"{percent(CONFIDENCE, 0)} interval", "Accuracy difference", "Wins")
    over = f"over the same documents{_named(comparison)}"
    caption = f"Paired difference {over}; a negative loss difference is an improvement"
    return Table(caption, columns, rows)


def breakdown_table(model: ModelResult) -> Table:
    """Make the table of the tokens that a model's difference to the baseline comes from."""
    assert model.versus_baseline is not None and model.versus_baseline.breakdown is not None
    baseline = model.versus_baseline.difference.baseline
    rows = [
        (
            f"{label}: {entry['class']}",
            f"{entry['tokens']:,}",
            number(entry["first"], 3),
            number(entry["second"], 3),
            number(entry["difference"], 3, signed=True),
            percent(entry["fraction"]),
        )
        for kind, label in (("position", "position"), ("frequency", "frequency"), ("kind", "kind"))
        for entry in model.versus_baseline.breakdown[kind]
    ]
    caption = (
        "Mean loss in nats by the token's position in the row, by its frequency in the texts, and by its kind; the "
        f"difference {model.name} {MINUS} {baseline}, and the class's fraction of the whole difference"
    )
    return Table(caption, ("Class", "Tokens", baseline, model.name, "Difference", "Fraction"), rows)


def repetition_table(comparison: Comparison) -> Table:
    """Make the table of how much the models' texts repeat themselves and each other, and how fast they were written."""
    rows = [
        (
            model.name,
            *(number(about[f"distinct_{n}"], 3) for n in (1, 2, 3)),
            percent(about["repeated_4"]),
            percent(about["self_overlap_4"]),
            f"{about['tokens']:,}",
            number(about["tokens_per_second"], 0),
        )
        for model in comparison.models
        if (about := model.repetition)
    ]
    distinct = ("Distinct-1", "Distinct-2", "Distinct-3")
    columns = ("Model", *distinct, "Repeated 4-grams", "Self-overlap", "Tokens", "Tokens/s")
    return Table("Repetition in all texts of each model", columns, rows)


def overlap_table(comparison: Comparison) -> Table:
    """Make the table of what the held-out texts share with the training texts."""
    about = comparison.overlap
    assert about is not None
    rows = [
        ("held-out texts", f"{about['documents']:,}"),
        ("training texts", f"{about['training_documents']:,}"),
        ("exact duplicates", f"{about['exact']:,}"),
        ("exact and near duplicates", f"{about['near']:,}"),
        ("mostly contained texts", f"{about['mostly_contained']:,}"),
        ("contained fraction of all text", percent(about["contained"], 2)),
    ]
    for entry in about["listed"][:5]:
        found = f"{percent(entry['contained'])} contained"
        if entry["training_document"] >= 0:
            found += f"; most similar: training text {entry['training_document']}, "
            found += f"resemblance {number(entry['resemblance'], 2)}"
        rows.append((f"document {entry['document']}", found))
    caption = f"Held-out texts{_named(comparison)} that are also in the training texts"
    return Table(caption, ("What", "How much"), rows, False)


def settings_table(comparison: Comparison) -> Table:
    """Make the table of everything that is needed to repeat the comparison."""
    settings = dataclasses.asdict(comparison.baseline.evaluation.config) | comparison.settings
    training = settings.pop("training", {})
    settings |= {f"training: {name}": value for name, value in training.items()}
    for name, run in settings.pop("trained", {}).items():
        given = (f"{setting}={value!r}" for setting, value in run["settings"].items() if value is not None)
        settings[f"training of {name}"] = ", ".join(given)
    rows = [(name, str(value)) for name, value in settings.items() if value is not None]
    for part in comparison.parts:
        data, label = part.data, f"texts{_named(part)}"
        of = f" of {data['total_documents']:,}" if "total_documents" in data else ""
        rows += [(label, f"{data['documents']:,}{of}, SHA-256 {data['sha256']}")]
        names = {"source": f"{label} from", "split": "split", "revision": "revision"}
        rows += [(label, str(data[name])) for name, label in names.items() if data.get(name) is not None]
    for model in comparison.models:
        info, source = model.info, f"{model.info['source']}, " if model.info["source"] else ""
        about = f"{source}{info['parameters']:,} parameters, SHA-256 {info['fingerprint']}"
        rows.append((f"model {model.name}", about))
    rows += list(comparison.versions.items())
    rows += [("command", comparison.command)] if comparison.command else []
    caption = "Settings, texts, models and versions of this comparison"
    return Table(caption, ("What", "Value"), rows, False)


def timing_table(comparison: Comparison) -> Table:
    """Make the table of times on this machine, the only figures that another run does not repeat."""
    rows = []
    for model in comparison.models:
        later = [generation["seconds"] for generation in model.generations]
        first, spread = EMPTY, EMPTY
        if later:
            first = f"{number(model.first_call_seconds, 2)} s"
            spread = f"{number(min(later), 2)} to {number(max(later), 2)} s"
        # the time of its evaluation on each list of texts
        evaluations = (number(part[model.name].evaluation.seconds, 1) for part in comparison.parts)
        rows.append((model.name, f"{' + '.join(evaluations)} s", first, spread))
    caption = "Time on this machine; evaluation and first text include compilation"
    return Table(caption, ("Model", "Evaluation", "First text", "Later texts"), rows)
