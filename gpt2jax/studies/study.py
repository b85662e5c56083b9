"""The study from beginning to end: evaluate, fine-tune in stages, evaluate each, generate, and write one report.

A study folder holds `study.json` (what the results follow from, and at the end the results), one folder for each stage
(`01-generic`, `02-stage-1`, ...; those of training are run folders) and the report. A stage is finished when its
folder holds `figures.json`.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import pathlib
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax

from gpt2jax.comparison.compare import compare
from gpt2jax.comparison.result import Comparison
from gpt2jax.evaluation.config import EvaluationConfig
from gpt2jax.evaluation.evaluate import evaluate
from gpt2jax.evaluation.result import Evaluation
from gpt2jax.evaluation.texts import check_scorable
from gpt2jax.generation.requests import check_prompts
from gpt2jax.language_model import LanguageModel
from gpt2jax.loading import load
from gpt2jax.report.save import save_report
from gpt2jax.studies.config import StudyConfig
from gpt2jax.studies.tables import study_tables
from gpt2jax.train.config import FinetuneConfig
from gpt2jax.train.finetune import finetune
from gpt2jax.utils.atomic_io import atomic_write, make_folder
from gpt2jax.utils.fingerprint import data_fingerprint, params_fingerprint
from gpt2jax.utils.home_folder import abbreviate_home
from gpt2jax.utils.json_files import read_json
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

SCHEMA = "gpt2jax.study"
SCHEMA_VERSION = 1
SPLITS = ("train", "validation", "test")
STUDY_FILE, FIGURES_FILE = "study.json", "figures.json"
GENERIC = "generic"
VALIDATION_DOCUMENTS = 120  # of the validations during a training, which are repeated
FIGURES = (
    "keras_loss",
    "keras_accuracy",
    "keras_correct",
    "keras_positions",
    "loss",
    "accuracy",
    "perplexity",
    "bits_per_byte",
    "tokens",
    "documents",
)


@dataclasses.dataclass(frozen=True)
class Study:
    """The result of a study.

    Attributes:
        results: one dict a stage: name, folder, validation and test (figures of the split), training (documents, steps,
            trained_parameters, seconds; None for the generic model), first_call_seconds and generations (prompt,
            text, seconds, tokens, finish_reason).
        output: the folder with study.json, report.html, report.md, comparison.json and a folder for each stage.
    """

    results: list[dict[str, Any]]
    output: pathlib.Path


def study(
    model: LanguageModel,
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
    """Repeat the study with a model and texts.

    The model is evaluated, fine-tuned in stages, and evaluated after each of them on the validation and test texts, all
    documents of both. Every stage continues the prompts.

    Args:
        model: where to start. Adapters that it has are merged first.
        texts: {"train": ..., "validation": ..., "test": ...}, each as for `finetune`.
        config: settings; default: `StudyConfig()`.
        output: folder for the results.
        resume: go on with the study in the folder, if it holds one; finished stages are not repeated.
        overwrite: delete the study in the folder, if it holds one.
        source: where the texts come from, for the report: {"source": ..., "revision": ...}.
        command: the command line to repeat it, for the report.
        progress: show progress bars.

    Raises:
        ValueError: a setting is not legal, the splits are not those three, fewer training texts than stages, a
            resumed study had other settings, texts or another model, or both `resume` and `overwrite`.
        FileExistsError: the folder holds a study, and neither `resume` nor `overwrite` is given.
        KeyboardInterrupt: see `finetune`; `resume` goes on.
    """
    check_model("model", model)
    config = override_fields("config", StudyConfig, config, {})
    check("source", source, optional(instance_of(Mapping)))
    model = model.merge_adapter()
    lists = _check_splits(texts, config.stages)
    for split in ("validation", "test"):
        check_scorable(model, lists[split])
    training, evaluation = config.resolve(model.config.n_positions)
    check_prompts(model, config.prompts, config.generation)
    folder = check_path("output", output)
    description = abbreviate_home(_describe(model, lists, config))
    results = _begin(folder, description, resume=resume, overwrite=overwrite)
    if results is not None:
        return Study(results, folder)
    runner = _Runner(folder, model, lists, training, evaluation, dict(source or {}), progress)
    stages = runner.run(config.stages)
    comparison = compare(
        {stage.name: stage.model for stage in stages},
        lists["test"],
        config.prompts,
        evaluation,
        config.generation,
        training_texts=lists["train"],
        seed=training.seed,
        history=_join_histories([stage.figures["history"] for stage in stages]),
        command=command,
        source={**(source or {}), "split": "test"},
        progress=progress,
    )
    results = [_result(stage, comparison) for stage in stages]
    save_report(comparison, folder, tables=study_tables(results))
    _write_json(folder / STUDY_FILE, {**description, "results": results})
    return Study(results, folder)


def split_in_parts(texts: Sequence[Any], count: int) -> list[Sequence[Any]]:
    """Return `count` parts of the texts in their order, whose sizes differ by one at most."""
    ends = [len(texts) * index // count for index in range(count + 1)]
    return [texts[begin:end] for begin, end in itertools.pairwise(ends)]


# ---- stages ----


@dataclasses.dataclass(frozen=True)
class _Stage:
    """A finished stage; `figures` is what its figures.json says."""

    name: str
    folder: pathlib.Path
    model: LanguageModel
    figures: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class _Runner:
    """Runs the stages that are not finished."""

    folder: pathlib.Path
    model: LanguageModel
    texts: Mapping[str, Sequence[Any]]
    training: FinetuneConfig
    evaluation: EvaluationConfig
    source: Mapping[str, Any]
    progress: bool

    def run(self, count: int) -> list[_Stage]:
        """Return the generic model and `count` stages of training."""
        stages = [self._finish(GENERIC, self.folder / f"01-{GENERIC}", self.model, dict)]
        for index, part in enumerate(split_in_parts(self.texts["train"], count), start=1):
            stages.append(self._train(index, part, stages[-1].model))
        return stages

    def _train(self, index: int, texts: Sequence[Any], model: LanguageModel) -> _Stage:
        name, folder = f"stage {index}", self.folder / f"{index + 1:02}-stage-{index}"
        found: dict[str, Any] = {"training": None, "history": []}
        if not (folder / FIGURES_FILE).exists():
            run = finetune(
                model,
                texts,
                self.training,
                validation_texts=self.texts["validation"][:VALIDATION_DOCUMENTS],
                output=folder,
                resume=True,
                source={**self.source, "split": "train", "stage": index},
                progress=self.progress,
            )
            last = run.history[-1]
            found = {
                "training": {
                    "documents": len(texts),
                    "steps": last["step"],
                    "trained_parameters": _count_trained(run.model),
                    "seconds": last.get("seconds"),
                },
                "history": run.history,
            }
        # what is compared is what the folder holds, in a run that was resumed and in one that was not
        saved = load(folder)
        trained = dataclasses.replace(
            self.model, params=saved.params, adapters=saved.adapters, lora=saved.lora, source=str(folder)
        )
        return self._finish(name, folder, trained, lambda: found)

    def _finish(
        self, name: str, folder: pathlib.Path, model: LanguageModel, found: Callable[[], dict[str, Any]]
    ) -> _Stage:
        """Evaluate a model on the validation texts and write figures.json, unless that is done."""
        file, state = folder / FIGURES_FILE, folder / "validation.npz"
        if not file.exists():
            make_folder(folder)
            result = evaluate(
                model,
                self.texts["validation"],
                self.evaluation,
                state=state,
                resume=True,
                progress=self.progress,
            )
            figures = {"training": None, "history": [], **found()}
            _write_json(file, {"name": name, "validation": _figures(result), **figures})
            state.unlink()
        return _Stage(name, folder, model, read_json(file, ("validation", "training", "history")))


def _figures(evaluation: Evaluation) -> dict[str, Any]:
    """Return the figures of a study, and the seconds they took."""
    found = evaluation.as_dict()
    return {name: found[name] for name in FIGURES} | {"seconds": round(evaluation.seconds, 3)}


def _count_trained(model: LanguageModel) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(model.params if model.lora is None else model.adapters))


def _result(stage: _Stage, comparison: Comparison) -> dict[str, Any]:
    found = comparison[stage.name]
    kept = ("prompt", "text", "seconds", "tokens", "finish_reason")
    return {
        "name": stage.name,
        "folder": stage.folder.name,
        "validation": stage.figures["validation"],
        "test": _figures(found.evaluation),
        "training": stage.figures["training"],
        "first_call_seconds": found.first_call_seconds,
        "generations": [{name: generation[name] for name in kept} for generation in found.generations],
    }


def _join_histories(histories: Iterable[Sequence[Mapping[str, float]]]) -> list[dict[str, float]]:
    """Return the logs of all stages one behind the other, with steps counted through."""
    joined: list[dict[str, float]] = []
    for history in histories:
        first = joined[-1]["step"] if joined else 0
        joined += [{**entry, "step": first + entry["step"]} for entry in history]
    return joined


# ---- the folder and the arguments ----


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


def _describe(model: LanguageModel, texts: Mapping[str, list[Any]], config: StudyConfig) -> dict[str, Any]:
    """Return what the results follow from."""
    settings = dataclasses.asdict(config)
    del settings["training"]["token_cache"]
    return json.loads(
        json.dumps(
            {
                "schema": SCHEMA,
                "schema_version": SCHEMA_VERSION,
                "model": {
                    "source": model.source,
                    "parameters": model.num_parameters(),
                    "fingerprint": params_fingerprint(model.params),
                },
                "texts": {
                    split: {"documents": len(found), "sha256": data_fingerprint(found)}
                    for split, found in texts.items()
                },
                "config": settings,
            },
            default=repr,
        )
    )


def _begin(
    folder: pathlib.Path, description: dict[str, Any], *, resume: bool, overwrite: bool
) -> list[dict[str, Any]] | None:
    """Write study.json, or check that the one there agrees; return the results of a finished study."""
    if resume and overwrite:
        raise ValueError("resume must be False with overwrite=True, which deletes the study; got True")
    file = folder / STUDY_FILE
    if file.exists() and not (resume or overwrite):
        raise FileExistsError(f"{folder} holds a study; resume it, overwrite it, or choose another folder")
    if file.exists() and resume:
        before = read_json(file, tuple(description))
        for name in ("model", "texts", "config"):
            if differences := _differences(before[name], description[name]):
                raise ValueError(f"cannot resume {folder}: {'; '.join(differences)}; choose another folder")
        return before.get("results")
    if folder.exists() and any(folder.iterdir()) and not file.exists():
        raise FileExistsError(f"{folder} is not empty and holds no study; choose another folder")
    make_folder(folder)
    if file.exists():  # overwrite: a kill before its end leaves a file that cannot be resumed
        _write_json(file, {})
        for place in folder.glob("[0-9][0-9]-*"):
            shutil.rmtree(place)
    _write_json(file, description)
    return None


def _differences(before: Any, now: Any, name: str = "") -> list[str]:
    """Say which values of two nested dicts differ."""
    if before == now:
        return []
    if not (isinstance(before, dict) and isinstance(now, dict)):
        return [f"{name} was {before!r:.100}, is {now!r:.100}"]
    found = (
        _differences(before.get(key), now.get(key), f"{name}.{key}".lstrip("."))
        for key in sorted(before.keys() | now.keys())
    )
    return list(itertools.chain.from_iterable(found))


def _write_json(path: pathlib.Path, content: Mapping[str, Any]) -> None:
    with atomic_write(path) as file:
        json.dump(content, file, indent=2)
