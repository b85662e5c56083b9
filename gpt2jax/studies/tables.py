"""The tables of a study: its figures on both splits, beside those that were published."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from gpt2jax.report.tables import Table, number, percent_with_error, with_error

# loss and accuracy on validation and test: GPT-2 base (124M), sequence_length=128, mixed float16, on the articles of
# scientific_papers/pubmed, evaluated with Keras
PUBLISHED = {
    "generic": (3.9688880443573, 0.33905521035194397, 3.9503707885742188, 0.34061935544013977),
    "1 epoch on all texts": (2.8854, 0.4459, 2.8649, 0.4483),
    "3 epochs on each half": (2.7834, 0.4607, 2.7643, 0.4631),
}


def study_tables(
    results: Sequence[Mapping[str, Any]], gains: Sequence[Mapping[str, Any]] = ()
) -> list[Table]:
    """Make all tables of a study.

    Args:
        results: of the stages, see `Study.results`.
        gains: of the models and methods, see `list_gains`; they get a table if there are several.
    """
    return [
        published_table(results),
        *([gains_table(gains)] if len(gains) > 1 else []),
        *(split_table(results, split) for split in ("validation", "test")),
        training_table(results),
        *([times_table(results)] if results[0]["generations"] else []),
    ]


def published_table(results: Sequence[Mapping[str, Any]]) -> Table:
    """Make the table of the study's published figures and the user's own, in the terms of Keras."""
    rows = [(f"study: {name}", *(number(value, 4) for value in values)) for name, values in PUBLISHED.items()]
    rows += [
        (
            f"yours: {result['name']}",
            *(
                number(result[split][figure], 4)
                for split in ("validation", "test")
                for figure in ("keras_loss", "keras_accuracy")
            ),
        )
        for result in results
    ]
    caption = (
        "Published figures of the study (GPT-2 with 124M parameters on PubMed articles) and yours, as Keras computes "
        "them; they compare only for the same model and texts"
    )
    columns = ("Model", "Validation loss", "Validation accuracy", "Test loss", "Test accuracy")
    return Table(caption, columns, rows)


def split_table(results: Sequence[Mapping[str, Any]], split: str) -> Table:
    """Make the table of every stage's figures on one split."""
    rows = [
        (
            result["name"],
            number(figures["keras_loss"], 6),
            number(figures["keras_accuracy"], 6),
            f"{figures['keras_correct']:,}/{figures['keras_positions']:,}",
            with_error(figures["loss"], figures["loss_standard_error"]),
            percent_with_error(figures["accuracy"], figures["accuracy_standard_error"]),
            number(figures["perplexity"], 2),
            f"{figures['tokens']:,}",
        )
        for result in results
        for figures in [result[split]]
    ]
    columns = (
        "Model",
        "Keras loss",
        "Keras accuracy",
        "Keras counts",
        "Loss per token",
        "Accuracy per token",
        "Perplexity",
        "Tokens",
    )
    documents = f"{results[0][split]['documents']:,} documents"
    return Table(f"Split {split}, {documents}; ± standard error over documents", columns, rows)


def gains_table(gains: Sequence[Mapping[str, Any]]) -> Table:
    """Make the table of what each model and method gained, and what it took."""
    rows = [
        (
            gain["name"],
            number(gain["loss"], 4),
            with_error(gain["gain"], gain["standard_error"], signed=True),
            f"{gain['trained_parameters']:,}",
            number(gain["seconds"], 1),
            _megabytes(gain["planned_bytes"]),
            _megabytes(gain["measured_bytes"]),
        )
        for gain in gains
    ]
    columns = (
        "Model",
        "Test loss per token",
        "Gain",
        "Trained parameters",
        "Seconds of training",
        "Planned memory, MB",
        "Measured memory, MB",
    )
    caption = (
        "Gain (test loss of the generic model minus that of the last stage, nats per token, ± standard error of the "
        "paired difference) against trained parameters, time and memory; memory of one device, planned by XLA for "
        "the training step, and the device's peak if it tells one that an earlier training did not reach"
    )
    return Table(caption, columns, rows)


def _megabytes(size: int | None) -> str:
    return number(None if size is None else size / 1e6, 0)


def training_table(results: Sequence[Mapping[str, Any]]) -> Table:
    """Make the table of what was trained in each stage."""
    rows = [
        (
            result["name"],
            f"{training['documents']:,}",
            f"{training['steps']:,}",
            f"{training['trained_parameters']:,}",
            number(training["seconds"], 1),
        )
        for result in results
        if (training := result["training"]) is not None
    ]
    return Table("Training", ("Model", "Documents", "Steps", "Trained parameters", "Seconds"), rows)


def times_table(results: Sequence[Mapping[str, Any]]) -> Table:
    """Make the table of the seconds that every stage took for each prompt."""
    rows = []
    for index, generation in enumerate(results[0]["generations"]):
        seconds = (number(result["generations"][index]["seconds"], 2) for result in results)
        rows.append((generation["prompt"] or "(empty prompt)", *seconds))
    first = (number(result["first_call_seconds"], 2) for result in results)
    rows.append(("first call, compilation included", *first))
    return Table("Seconds for each prompt", ("Prompt", *(result["name"] for result in results)), rows)
