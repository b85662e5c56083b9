"""The sentences of a report, and the summary on a terminal."""

from __future__ import annotations

import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from gpt2jax.comparison.excerpts import Excerpt
from gpt2jax.comparison.paired import CONFIDENCE, PairedDifference
from gpt2jax.comparison.result import Comparison, ModelResult
from gpt2jax.report.tables import (
    MINUS,
    Table,
    figures_table,
    number,
    paired_table,
    percent,
    transpose,
    with_error,
)
from gpt2jax.utils.notices import count_noun, printable

if TYPE_CHECKING:
    from rich.console import Console

DEFINITIONS = (
    ("Loss", "mean cross-entropy per scored token in nats. The end token behind each text is scored too."),
    (
        "Perplexity, word perplexity",
        "exp of the loss per token, and per word of the text. Words stand between white space, so that word perplexity "
        "does not depend on the tokenizer.",
    ),
    (
        "Accuracy, top-5 accuracy",
        "fraction of scored tokens that were the model's most likely token, or among its five most likely tokens.",
    ),
    (
        "Bits per byte, bits per character",
        "loss of the scored tokens over ln 2, per byte or character of their text. End tokens are left out.",
    ),
    (
        "Calibration error",
        "how far the probability of the most likely token is from the fraction of times it is correct: the mean over "
        "tokens, in 15 bins of that probability.",
    ),
    (
        "Keras loss, Keras accuracy",
        "what Keras reports for the same model and texts: the first tokens of each text in a row of fixed length, "
        "averaged over all places of all rows, padding included. The loss is 0 on padding; the accuracy counts "
        "predictions of padding as well.",
    ),
    (
        "Standard error, interval",
        "over documents, since the tokens of one text depend on each other. The interval is a bootstrap's.",
    ),
    ("Wins", "fraction of documents on which the model has the lower loss; a tie counts half."),
    ("Repeated 4-grams", "fraction of four-token sequences that occurred before in the same text."),
    (
        "Distinct-n",
        "number of different sequences of n tokens within each text, divided by the number of all; 1 means that no "
        "sequence occurs twice.",
    ),
    (
        "Self-overlap",
        "fraction of a text's four-token sequences that also occur in another text of the model.",
    ),
    (
        "Duplicates, contained",
        "compared by runs of 32 letters and digits. Near duplicates have at least 80 % of all their runs in common "
        "with one training text. A mostly contained text has at least half of its runs in training texts.",
    ),
)


def title(comparison: Comparison) -> str:
    """Return the result in one sentence."""
    if len(comparison.models) > 1:
        return conclusion(best_model(comparison)) + on_texts(comparison)
    model = comparison.baseline
    loss, perplexity = number(model.evaluation.loss, 3), number(model.evaluation.perplexity, 1)
    return f"{model.name}{on_texts(comparison)}: {loss} nats per token, perplexity {perplexity}"


def on_texts(comparison: Comparison) -> str:
    """Return " on" and the name of the texts, if they have one."""
    return f" on {comparison.texts_name}" if comparison.texts_name else ""


def facts(comparison: Comparison) -> list[tuple[str, str]]:
    """Say in a few words which models, texts, documents and steps a report is of, each with its label."""
    found = [("Models", "; ".join(_describe_model(model) for model in comparison.models))]
    found += [(f"Texts{on_texts(part)[3:]}", _describe_texts(part.data)) for part in comparison.parts]
    training, words = comparison.settings.get("training", {}), []
    if comparison.overlap is not None:
        words += [count_noun(comparison.overlap["training_documents"], "document")]
    if comparison.history:
        words += [count_noun(comparison.history[-1]["step"], "step")]
    words += _describe_training(training) if training else []
    found += [("Training", ", ".join(words))] if words else []
    runs = comparison.settings.get("trained", {})
    return found + [(f"Training of {name}", _describe_run(run)) for name, run in runs.items()]


def _describe_training(training: Mapping[str, Any]) -> list[str]:
    """Return the settings of a training that say most."""
    words = [f"{stages:,} stages"] if (stages := training.get("stages", 1)) > 1 else []
    words += [count_noun(training["epochs"], "epoch")] if training["steps"] is None else []
    words += [f"{count_noun(training['batch_size'], 'row')} a step"]
    length = training["sequence_length"]
    words += [f"rows of {length:,} tokens"] if length else []
    return [*words, training["optimizer"], training["compute_dtype"]]


def _describe_run(run: Mapping[str, Any]) -> str:
    """Return what a compared run was trained from, on what, and how."""
    data, settings = run["data"], run["settings"]
    words = [f"from {run['base_model']}"] if run["base_model"] else []
    words += [f"on {_describe_texts(data)}"]
    words += [count_noun(settings["steps"], "step")] if settings["steps"] else []
    return ", ".join([*words, *_describe_training(settings)])


def _describe_texts(data: Mapping[str, Any]) -> str:
    """Return the source of texts, their split and how many they are."""
    about = []
    if data.get("source") is not None:
        sources = data["source"] if isinstance(data["source"], list | tuple) else [data["source"]]
        about += [", ".join(map(str, sources))]
    about += [f"split {data['split']}"] if data.get("split") else []
    part = f"{data['documents']:,} of " if "total_documents" in data else ""
    total = data.get("total_documents", data["documents"])
    return ", ".join([*about, part + count_noun(total, "document")])


def _describe_model(model: ModelResult) -> str:
    """Return a model's name with its source, if that has another name, and its size."""
    info = model.info
    source = pathlib.PurePath(info["source"] or "").name
    words = [source] if source not in ("", model.name) else []
    words += [f"{info['parameters']:,} parameters"]
    words += [f"adapters of rank {info['adapter_rank']}"] if info["adapter_rank"] else []
    return f"{model.name} ({', '.join(words)})"


def best_model(comparison: Comparison) -> ModelResult:
    """Return the model with the lowest loss compared with the baseline, which is not among them."""

    def order(model: ModelResult) -> tuple[bool, float]:
        difference = difference_of(model).difference
        return math.isnan(difference), difference

    return min(comparison.models[1:], key=order)


def difference_of(model: ModelResult) -> PairedDifference:
    """Return a model's difference to the baseline."""
    assert model.versus_baseline is not None
    return model.versus_baseline.difference


def conclusion(model: ModelResult) -> str:
    """Say whether a model is better or worse than the baseline; undecided if the interval contains zero."""
    difference = difference_of(model)
    name, baseline, (low, high) = model.name, difference.baseline, difference.interval
    if not math.isfinite(difference.difference):
        return f"{name} has no finite loss to compare with {baseline}"
    if low <= 0.0 <= high or difference.documents < 2:
        return f"No clear difference between {name} and {baseline}"
    word = "better" if difference.difference < 0 else "worse"
    return f"{name} is {number(abs(difference.difference), 3)} {difference.unit} {word} than {baseline}"


def summary(comparison: Comparison, model: ModelResult) -> str:
    """Return the figures behind the conclusion on one model."""
    difference, first, second = difference_of(model), comparison.baseline.evaluation, model.evaluation
    low, high = difference.interval
    documents = count_noun(difference.documents, "document")
    mean = with_error(difference.difference, difference.standard_error, signed=True)
    caution = f" Caution: {difference.warning}." if difference.warning else ""
    return (
        f"Paired difference {mean} {difference.unit} "
        f"({percent(CONFIDENCE, 0)} interval {number(low, signed=True)} to {number(high, signed=True)}). "
        f"Perplexity {number(first.perplexity, 2)} → {number(second.perplexity, 2)}, "
        f"accuracy {percent(first.accuracy)} → {percent(second.accuracy)}. "
        f"Lower loss on {percent(difference.win_rate)} of {documents}.{caution}"
    )


def scoring_sentence(comparison: Comparison) -> str:
    """Say which tokens were scored, and how."""
    evaluation = comparison.baseline.evaluation
    sentence = f"Scored{on_texts(comparison)}: {evaluation.description}."
    if count := evaluation.num_truncated:
        sentence += (
            f" Truncated: {count:,} of {evaluation.documents:,} texts; their final end-of-text token is artificial "
            "and has a high loss."
        )
    return sentence


def sampling_sentence(comparison: Comparison) -> str:
    """Say how the texts were generated."""
    settings = comparison.settings
    if "num_beams" in settings:
        how = f"Beam search with {settings['num_beams']} beams"
    elif "penalty_alpha" in settings:
        how = (
            f"Contrastive search with penalty_alpha {settings['penalty_alpha']:g}, top-k {settings['top_k']}"
        )
    elif not settings["do_sample"] or settings["temperature"] == 0:
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


def generation_note(generation: dict[str, Any]) -> list[str]:
    """Return length, speed and repetition of a generated text."""
    ended = (
        "ended with the end token" if generation["finish_reason"] == "stop" else "reached the length limit"
    )
    parts = [f"{count_noun(generation['tokens'], 'token')}, {ended}"]
    parts += [
        f"{number(generation['tokens_per_second'], 0)} tokens/s",
        f"{number(generation['seconds'], 2)} s",
    ]
    if generation["repeated_4"] is not None:
        parts.append(f"repeated 4-grams {percent(generation['repeated_4'])}")
    return parts


def prompt_groups(comparison: Comparison) -> list[tuple[dict[str, Any], ...]]:
    """Return the generations of all models, prompt by prompt."""
    return list(zip(*(model.generations for model in comparison.models), strict=True))


def prompt_text(prompt: str | Sequence[int]) -> str:
    """Return a prompt for reading."""
    if not isinstance(prompt, str):
        prompt = "token ids " + " ".join(map(str, prompt)) if prompt else ""
    return prompt or "(empty prompt)"


def excerpt_title(excerpt: Excerpt) -> str:
    """Say which document an excerpt is of, and how large its difference is."""
    shown = "" if len(excerpt.pieces) >= excerpt.tokens else " (beginning)"
    mean = number(excerpt.difference, 3, signed=True)
    return f"Document {excerpt.document}: {mean} nats per token over {excerpt.tokens:,} tokens{shown}"


def print_comparison(comparison: Comparison, console: Console | None = None) -> None:
    """Print the title, how the texts were scored, and the tables of figures.

    Args:
        comparison: the result of `compare`.
        console: where to print; default: standard output.
    """
    from rich.console import Console
    from rich.text import Text

    console = console or Console()
    for part in comparison.parts:
        console.print(Text(printable(title(part)), style="bold"))
        for model in part.models[1:]:
            console.print(Text(printable(f"{model.name}{on_texts(part)}: {summary(part, model)}")))
        console.print(Text(printable(scoring_sentence(part))))
        tables = [figures_table(part)] + ([paired_table(part)] if part.differences else [])
        for table in map(transpose, tables):
            print_table(table, console)


def print_table(table: Table, console: Console) -> None:
    """Print a table."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table as RichTable
    from rich.text import Text

    shown = RichTable(
        title=Text(printable(table.caption)), title_justify="left", title_style="dim", box=SIMPLE_HEAD
    )
    widths = [max(map(len, cells)) for cells in zip(table.columns, *table.rows, strict=True)]
    # a narrow terminal breaks the words above the numbers, rather than the names of the rows
    is_narrow = sum(widths) + 3 * len(widths) + 1 > console.width
    for index, column in enumerate(table.columns):
        header = printable(column)
        if index and is_narrow:
            header = header.replace(" ", "\n").replace(f"{MINUS}\n", f"{MINUS} ")
        shown.add_column(Text(header), justify="right" if index else "left")
    for row in table.rows:
        shown.add_row(*(Text(printable(cell)) for cell in row))
    console.print(shown)
