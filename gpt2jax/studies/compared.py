"""The comparison of a study's stages, from what their folders hold."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from gpt2jax.comparison.compare import describe_generation
from gpt2jax.comparison.excerpts import Excerpt, Excerpts, make_excerpts
from gpt2jax.comparison.generations import repetition_by_model
from gpt2jax.comparison.overlap import text_overlap
from gpt2jax.comparison.paired import difference_breakdown, largest_differences, paired_difference
from gpt2jax.comparison.provenance import describe_training, versions
from gpt2jax.comparison.result import Comparison, ModelResult, VersusBaseline
from gpt2jax.evaluation.evaluate import evaluate
from gpt2jax.evaluation.result import Evaluation
from gpt2jax.language_model import LanguageModel
from gpt2jax.studies.folder import OVERLAP_FILE, write_json
from gpt2jax.studies.stages import Stage
from gpt2jax.train.optimizer import resolve_learning_rate
from gpt2jax.utils.json_files import read_json
from gpt2jax.utils.notices import notice

RESAMPLES = 2000  # of the bootstrap
EXCERPTS = 3  # of documents that improve most, and of those that regress most


def compare_stages(
    stages: Sequence[Stage],
    texts: Mapping[str, Sequence[Any]],
    folder: pathlib.Path,
    template: LanguageModel,
    *,
    source: Mapping[str, Any],
    command: str | None,
) -> Comparison:
    """Compare stages on the test texts, the others with the first, as `compare` does.

    Args:
        stages: finished ones; their models are loaded one after the other, for the excerpts.
        texts: of the splits.
        folder: of the study, which keeps the overlap of the splits until the study is finished.
        template: any of the models, for its tokens.
        source: where the texts come from.
        command: the command line to repeat it.
    """
    config = stages[0].config
    evaluations = {stage.name: stage.evaluation("test") for stage in stages}
    excerpts = _make_excerpts(stages, evaluations, texts["test"], template)
    models = [_model_result(stage, stages[0], evaluations, excerpts, template) for stage in stages]
    if (versus := models[-1].versus_baseline) and versus.difference.warning:
        notice(versus.difference.warning)
    return Comparison(
        models=models,
        overlap=_overlap(folder / OVERLAP_FILE, texts),
        settings={
            "seed": config.training.seed,
            "resamples": RESAMPLES,
            **describe_generation(config.generation),
            "training": _describe_training(stages),
        },
        data={
            "documents": len(texts["test"]),
            "sha256": evaluations[stages[0].name].data_sha256,
            **source,
            "split": "test",
        },
        versions=versions(),
        history=None,
        command=command,
    )


def _model_result(
    stage: Stage,
    baseline: Stage,
    evaluations: Mapping[str, Evaluation],
    excerpts: Mapping[str, Excerpts],
    template: LanguageModel,
) -> ModelResult:
    """Return what a comparison holds of a stage; of the baseline nothing is compared."""
    evaluation, versus = evaluations[stage.name], None
    if stage.name != baseline.name:
        pair = evaluations[baseline.name], evaluation
        bootstrap: Any = {"resamples": RESAMPLES, "seed": baseline.config.training.seed}
        versus = VersusBaseline(
            paired_difference(*pair, baseline=baseline.name, same_tokens=True, **bootstrap),
            difference_breakdown(*pair, tokenizer=template.tokenizer, end_token_id=template.end_token_id),
            excerpts[stage.name],
        )
    generations = stage.figures["generations"]
    return ModelResult(
        name=stage.name,
        info=stage.figures["info"],
        evaluation=evaluation,
        generations=generations,
        repetition=repetition_by_model(generations).get(stage.name),
        first_call_seconds=stage.figures["first_call_seconds"],
        versus_baseline=versus,
    )


def _describe_training(stages: Sequence[Stage]) -> dict[str, Any]:
    """Return the settings of the training of each stage; a learning rate that differs between models stays None."""
    config = stages[0].config
    rates = {
        resolve_learning_rate(
            config.training_of(stage.method), stage.figures["info"]["parameters"]
        ).learning_rate
        for stage in stages
        if stage.method is not None
    }
    training = (
        config.training if len(rates) > 1 else dataclasses.replace(config.training, learning_rate=rates.pop())
    )
    return describe_training(training) | {"stages": config.stages, "methods": config.methods}


def _overlap(file: pathlib.Path, texts: Mapping[str, Sequence[Any]]) -> dict[str, Any]:
    """Return what the test texts share with the training texts, from the file if it is there."""
    if not file.exists():
        write_json(file, text_overlap(texts["train"], texts["test"]))
    return read_json(file)


def _make_excerpts(
    stages: Sequence[Stage],
    evaluations: Mapping[str, Evaluation],
    texts: Sequence[Any],
    template: LanguageModel,
) -> dict[str, Excerpts]:
    """Show the documents on which each stage differs most from the first; they are scored again, token by token."""
    first = evaluations[stages[0].name]
    largest = (largest_differences(first, evaluations[stage.name], EXCERPTS) for stage in stages[1:])
    indices = sorted({index for improved, regressed in largest for index in improved + regressed})
    if not indices:
        return {stage.name: Excerpts([], []) for stage in stages[1:]}
    chosen = [texts[index] for index in indices]

    def score(stage: Stage) -> Evaluation:
        found = evaluate(stage.load(), chosen, stage.config.evaluation, per_token=True)
        whole = evaluations[stage.name].per_document
        sums = {name: values[np.array(indices)] for name, values in vars(whole).items()}
        return dataclasses.replace(found, per_document=type(whole)(**sums))

    def numbered(excerpts: Sequence[Excerpt]) -> list[Excerpt]:
        return [dataclasses.replace(each, document=indices[each.document]) for each in excerpts]

    scored = score(stages[0])
    found = {
        stage.name: make_excerpts(scored, score(stage), template.tokenizer, count=EXCERPTS)
        for stage in stages[1:]
    }
    return {
        name: Excerpts(numbered(excerpts.improved), numbered(excerpts.regressed))
        for name, excerpts in found.items()
    }
