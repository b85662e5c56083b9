"""The study from beginning to end: evaluate, fine-tune in stages, evaluate each, generate, and write one report.

A study folder holds `study.json` (what the results follow from, and at the end the results), one folder for each stage
(`01-generic`, `02-stage-1`, ...; those of training are run folders) and the report. The stages of several models are in
a folder for each model.
"""

from __future__ import annotations

import dataclasses
import pathlib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from gpt2jax.comparison.compare import token_identity
from gpt2jax.evaluation.texts import check_scorable
from gpt2jax.generation.requests import check_prompts
from gpt2jax.language_model import LanguageModel
from gpt2jax.report.save import save_report
from gpt2jax.studies.compared import compare_stages
from gpt2jax.studies.config import StudyConfig
from gpt2jax.studies.folder import (
    STUDY_FILE,
    begin,
    describe_model,
    describe_study,
    forget_states,
    write_json,
)
from gpt2jax.studies.gains import joined_histories, list_gains
from gpt2jax.studies.plots import study_plots
from gpt2jax.studies.stages import HELD_OUT, Stage, StageRunner
from gpt2jax.studies.tables import study_tables
from gpt2jax.utils.validation import (
    check,
    check_model,
    check_path,
    check_texts,
    instance_of,
    must_be,
    optional,
    override_fields,
)

SPLITS = ("train", "validation", "test")
ModelSource = LanguageModel | Callable[[], LanguageModel]


@dataclasses.dataclass(frozen=True)
class Study:
    """The result of a study.

    Attributes:
        results: one dict a stage: name, model ("" in a study of one), method (None for a generic model), folder,
            validation and test (figures of the split), training (documents, steps, trained_parameters, seconds,
            planned_bytes, measured_bytes; None for a generic model), first_call_seconds and generations (prompt,
            text, seconds, tokens, finish_reason).
        gains: one dict for each model and method, see `list_gains`.
        output: the folder with study.json, report.html, report.md, comparison.json and the folders of the stages.
    """

    results: list[dict[str, Any]]
    gains: list[dict[str, Any]]
    output: pathlib.Path


def study(
    model: LanguageModel | Mapping[str, ModelSource],
    texts: Mapping[str, Iterable[Any]],
    config: StudyConfig | None = None,
    *,
    output: str | pathlib.Path,
    resume: bool = False,
    overwrite: bool = False,
    source: Mapping[str, Any] | None = None,
    command: str | None = None,
    progress: bool = True,
) -> Study:
    """Repeat the study with one or more models and texts.

    Each model is evaluated, fine-tuned in stages, and evaluated after each of them on the validation and test texts,
    all documents of both. Every stage continues the prompts.

    Args:
        model: where to start, or several by name: {"gpt2": ..., "gpt2-medium": ...}, whose tokens must be the same.
            Instead of a model a name may have a function that loads it, so that memory need hold one at a time.
            Adapters that a model has are merged first.
        texts: {"train": ..., "validation": ..., "test": ...}, each as for `finetune`.
        config: settings; default: `StudyConfig()`.
        output: folder for the results.
        resume: go on with the study in the folder, if it holds one; finished stages are not repeated.
        overwrite: delete the study in the folder, if it holds one.
        source: where the texts come from, for the report: {"source": ..., "revision": ...}.
        command: the command line to repeat it, for the report.
        progress: show progress bars.

    Raises:
        ValueError: a setting is not legal, the splits are not those three, fewer training texts than stages, models
            with different tokens, a resumed study had other settings, texts or models, or both `resume` and
            `overwrite`.
        FileExistsError: the folder holds a study, and neither `resume` nor `overwrite` is given.
        KeyboardInterrupt: see `finetune`; `resume` goes on.
    """
    config = override_fields("config", StudyConfig, config, {})
    check("source", source, optional(instance_of(Mapping)))
    loaders = _loaders(model)
    lists = _check_splits(texts, config.stages)
    folder = check_path("output", output)
    templates, models = _check_models(loaders, lists, config)
    description = describe_study(models, lists, config)
    before = begin(folder, description, resume=resume, overwrite=overwrite)
    if before is None:
        config = config.resolve(min(each.config.n_positions for each in templates.values()))
        runners = [
            StageRunner(
                name,
                folder / _folder_name(name),
                load,
                templates[name],
                lists,
                config,
                source=dict(source or {}),
                plans_memory=len(loaders) * len(config.methods) > 1,
                progress=progress,
            )
            for name, load in loaders.items()
        ]
        stages = [stage for runner in runners for stage in runner.run()]
        before = _report(stages, lists, folder, next(iter(templates.values())), dict(source or {}), command)
        before = {**description, **before}
        write_json(folder / STUDY_FILE, before)
    forget_states(folder)
    return Study(before["results"], before["gains"], folder)


def _report(
    stages: Sequence[Stage],
    texts: Mapping[str, Sequence[Any]],
    folder: pathlib.Path,
    template: LanguageModel,
    source: Mapping[str, Any],
    command: str | None,
) -> dict[str, Any]:
    """Compare the stages and write the report; return results and gains."""
    results = [_result(stage, folder) for stage in stages]
    gains = list_gains(stages)
    histories = joined_histories(stages)
    if len(gains) > 1:  # of each model what it began with and what came out
        last = {gain["stage"] for gain in gains}
        compared = [stage for stage in stages if stage.method is None or stage.name in last]
    else:
        compared = stages
    comparison = compare_stages(compared, texts, folder, template, source=source, command=command)
    if len(gains) == 1:
        comparison = dataclasses.replace(comparison, history=next(iter(histories.values())))
    colours = {
        gain["name"]: index
        for gain in gains
        for index, stage in enumerate(compared)
        if stage.name == gain["stage"]
    }
    save_report(
        comparison,
        folder,
        tables=study_tables(results, gains),
        plots=study_plots(gains, histories, colours),
    )
    return {"results": results, "gains": gains}


def _result(stage: Stage, folder: pathlib.Path) -> dict[str, Any]:
    kept = ("prompt", "text", "seconds", "tokens", "finish_reason")
    figures = stage.figures
    return {
        "name": stage.name,
        "model": stage.model,
        "method": stage.method,
        "folder": stage.folder.relative_to(folder).as_posix(),
        **{split: figures[split] for split in HELD_OUT},
        "training": figures["training"],
        "first_call_seconds": figures["first_call_seconds"],
        "generations": [{name: generation[name] for name in kept} for generation in figures["generations"]],
    }


# ---- arguments ----


def _loaders(model: Any) -> dict[str, Callable[[], LanguageModel]]:
    """Return functions that load the models, by name; "" for a single model."""
    if not isinstance(model, Mapping):
        check_model("model", model)
        merged = model.merge_adapter()
        return {"": lambda: merged}
    if not model:
        raise ValueError(must_be("model", "a LanguageModel, or a dict of at least one by its name", model))
    for name in model:
        if not isinstance(name, str) or not _folder_name(name):
            raise ValueError(must_be("the name of a model", "a text with letters or digits", name))
    folders = [_folder_name(name) for name in model]
    if len({name.casefold() for name in folders}) < len(folders):
        raise ValueError(must_be("names of models", "different ones as names of folders", list(model)))
    return {name: _loader(name, source) for name, source in model.items()}


def _loader(name: str, source: Any) -> Callable[[], LanguageModel]:
    def load() -> LanguageModel:
        model: Any = source() if callable(source) else source
        check_model(f"model[{name!r}]", model)
        return model.merge_adapter()

    return load


def _folder_name(model: str) -> str:
    """Return the name of a model's folder."""
    return re.sub(r"[^\w.-]+", "-", model).strip(".-")


def _check_splits(texts: Mapping[str, Iterable[Any]], stages: int) -> dict[str, list[Any]]:
    if not isinstance(texts, Mapping) or set(texts) != set(SPLITS):
        found = sorted(texts) if isinstance(texts, Mapping) else texts
        raise ValueError(must_be("texts", "a dict of train, validation and test", found))
    for split in SPLITS:
        check_texts(f"texts[{split!r}]", texts[split])
    lists = {split: list(texts[split]) for split in SPLITS}
    if len(lists["train"]) < stages:
        raise ValueError(must_be("stages", f"at most the {len(lists['train'])} training texts", stages))
    return lists


def _check_models(
    loaders: Mapping[str, Callable[[], LanguageModel]], texts: Mapping[str, list[Any]], config: StudyConfig
) -> tuple[dict[str, LanguageModel], dict[str, dict[str, Any]]]:
    """Load one model after the other; return each without its parameters, and what identifies it."""
    templates, descriptions, first = {}, {}, None
    for name, load in loaders.items():
        model = load()
        for split in HELD_OUT:
            check_scorable(model, texts[split])
        check_prompts(model, config.prompts, config.resolve(model.config.n_positions).generation)
        first = token_identity(model) if first is None else first
        if token_identity(model) != first:
            raise ValueError(f"models of one study must have the same tokens, but those of {name} are others")
        descriptions[name or "model"] = describe_model(model)
        templates[name] = dataclasses.replace(model, params={})
    return templates, descriptions
