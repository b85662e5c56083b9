"""The stages of a study: evaluate a model, fine-tune it, evaluate what comes out, and keep what was found.

A stage is finished when its folder holds `figures.json` and the sums of both evaluations. Only one model is loaded at a
time, besides one that the caller holds.
"""

from __future__ import annotations

import dataclasses
import itertools
import pathlib
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from gpt2jax.comparison.generations import generate_texts
from gpt2jax.comparison.paired import loss_standard_error, ratio_standard_error
from gpt2jax.comparison.provenance import describe_model
from gpt2jax.evaluation.config import EvaluationConfig
from gpt2jax.evaluation.evaluate import evaluate
from gpt2jax.evaluation.result import Evaluation, finite_values
from gpt2jax.evaluation.resume import read_state
from gpt2jax.language_model import LanguageModel
from gpt2jax.loading import load
from gpt2jax.studies.config import LORA, StudyConfig
from gpt2jax.studies.folder import write_json
from gpt2jax.studies.memory import planned_bytes, used_bytes
from gpt2jax.train.config import FinetuneConfig
from gpt2jax.train.finetune import finetune
from gpt2jax.train.state import offload_params
from gpt2jax.utils.atomic_io import make_folder
from gpt2jax.utils.home_folder import abbreviate_home
from gpt2jax.utils.json_files import read_json
from gpt2jax.utils.notices import count_noun

FIGURES_FILE = "figures.json"
GENERIC = "generic"
HELD_OUT = ("validation", "test")
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
class Stage:
    """A finished stage.

    Attributes:
        name: unique in the study.
        model: name of the model that it comes from; "" in a study of one model.
        method: how it was trained; None for a generic model.
        folder: its place.
        load: returns its model.
        config: settings of the study.
        figures: what its figures.json says.
    """

    name: str
    model: str
    method: str | None
    folder: pathlib.Path
    load: Callable[[], LanguageModel]
    config: StudyConfig
    figures: dict[str, Any]

    def evaluation(self, split: str) -> Evaluation:
        """Return the evaluation of a split, from the sums in the folder."""
        state = read_state(self.folder / f"{split}.npz", {})
        assert state.per_document is not None and state.breakdown is not None
        assert isinstance(self.config.evaluation, EvaluationConfig)
        return Evaluation(
            self.config.evaluation,
            state.per_document,
            state.breakdown,
            has_text=self.figures["has_text"],
            data_sha256=state.data_sha256,
            seconds=state.seconds,
        )


@dataclasses.dataclass(frozen=True)
class StageRunner:
    """Runs the stages of one model that are not finished.

    Attributes:
        model: its name; "" in a study of one model.
        folder: of its stages.
        load: returns the model.
        template: the model without its parameters.
        texts: of the splits.
        config: settings, with all defaults filled in.
        source: where the texts come from.
        plans_memory: ask XLA for the memory of the training step, which compiles it once more.
        progress: show progress bars.
    """

    model: str
    folder: pathlib.Path
    load: Callable[[], LanguageModel]
    template: LanguageModel
    texts: Mapping[str, Sequence[Any]]
    config: StudyConfig
    source: Mapping[str, Any]
    plans_memory: bool
    progress: bool

    def run(self) -> list[Stage]:
        """Return the generic model and, by each method, the stages of training."""
        generic = self._finish(None, GENERIC, self.folder / f"01-{GENERIC}", self.load, dict)
        stages = [generic]
        for method in self.config.methods:
            last = generic
            for index, part in enumerate(split_in_parts(self.texts["train"], self.config.stages), start=1):
                last = self._train(method, index, len(stages) + 1, part, last)
                stages.append(last)
        return stages

    def _train(self, method: str, index: int, number: int, texts: Sequence[Any], last: Stage) -> Stage:
        name = f"{method} stage {index}" if len(self.config.methods) > 1 else f"stage {index}"
        folder = self.folder / f"{number:02}-{name.replace(' ', '-')}"
        found = {}
        if not _is_finished(folder):
            self._say(name, f"train on {count_noun(len(texts), 'text')}")
            found = self._finetune(method, index, folder, texts, last)

        def load_trained() -> LanguageModel:
            # what is compared is what the folder holds, in a run that was resumed and in one that was not
            saved = load(folder)
            return dataclasses.replace(
                self.template,
                params=saved.params,
                adapters=saved.adapters,
                lora=saved.lora,
                source=str(folder),
            )

        return self._finish(method, name, folder, load_trained, lambda: found)

    def _finetune(
        self, method: str, index: int, folder: pathlib.Path, texts: Sequence[Any], last: Stage
    ) -> dict[str, Any]:
        """Train, and return what figures.json tells about it."""
        training = self.config.training_of(method)
        before = used_bytes()
        run = finetune(
            offload_params(last.load(), training),
            texts,
            training,
            validation_texts=self.texts["validation"][:VALIDATION_DOCUMENTS],
            output=folder,
            resume=True,
            source={**self.source, "split": "train", "stage": index},
            progress=self.progress,
        )
        after = used_bytes()
        trained = run.model.params if method != LORA else run.model.adapters
        figures = {
            "documents": len(texts),
            "steps": run.history[-1]["step"],
            "trained_parameters": sum(leaf.size for leaf in jax.tree.leaves(trained)),
            "seconds": run.history[-1].get("seconds"),
            "planned_bytes": self._planned_bytes(training),
            # the peak is that of the whole process: one that did not rise is an earlier run's
            "measured_bytes": after if after > before else None,
        }
        return {"training": figures, "history": run.history}

    def _say(self, name: str, what: str) -> None:
        if self.progress:
            print(f"{self.model} {name}: {what}".lstrip(), file=sys.stderr)

    def _planned_bytes(self, training: FinetuneConfig) -> int | None:
        return planned_bytes(self.template.config, training) if self.plans_memory else None

    def _finish(
        self,
        method: str | None,
        name: str,
        folder: pathlib.Path,
        load: Callable[[], LanguageModel],
        found: Callable[[], dict[str, Any]],
    ) -> Stage:
        """Evaluate a model on both splits, let it write, and write figures.json, unless that is done."""
        is_finished = _is_finished(folder)
        self._say(name, f"finished before, in {folder}" if is_finished else "evaluate, continue the prompts")
        name = f"{self.model} {name}".lstrip()
        if not is_finished:
            make_folder(folder)
            model = load()
            info = abbreviate_home(describe_model(model))
            model = dataclasses.replace(model, source=name)  # for notices
            evaluations = {split: self._evaluate(model, split, folder) for split in HELD_OUT}
            generations, first_calls = generate_texts(
                {name: model}, self.config.prompts, self.config.generation, self.config.training.seed
            )
            figures = {
                "name": name,
                "info": info,
                "has_text": model.tokenizer is not None,
                **{split: held_out_figures(evaluation) for split, evaluation in evaluations.items()},
                "generations": finite_values(generations),
                "first_call_seconds": first_calls.get(name),
                "training": None,
                "history": [],
            }
            write_json(folder / FIGURES_FILE, figures | found())
        return Stage(name, self.model, method, folder, load, self.config, _read_figures(folder))

    def _evaluate(self, model: LanguageModel, split: str, folder: pathlib.Path) -> Evaluation:
        state = folder / f"{split}.npz"
        return evaluate(
            model,
            self.texts[split],
            self.config.evaluation,
            state=state,
            resume=True,
            progress=self.progress,
        )


def split_in_parts(texts: Sequence[Any], count: int) -> list[Sequence[Any]]:
    """Return `count` parts of the texts in their order, whose sizes differ by one at most."""
    ends = [len(texts) * index // count for index in range(count + 1)]
    return [texts[begin:end] for begin, end in itertools.pairwise(ends)]


def held_out_figures(evaluation: Evaluation) -> dict[str, Any]:
    """Return the figures of a study, standard errors over documents, and the seconds that they took."""
    found, sums = evaluation.as_dict(), evaluation.per_document
    return {name: found[name] for name in FIGURES} | {
        "loss_standard_error": loss_standard_error(evaluation),
        "accuracy_standard_error": ratio_standard_error(sums.correct, sums.tokens),
        "seconds": round(evaluation.seconds, 3),
    }


def _is_finished(folder: pathlib.Path) -> bool:
    return all((folder / name).exists() for name in (FIGURES_FILE, *(f"{split}.npz" for split in HELD_OUT)))


def _read_figures(folder: pathlib.Path) -> dict[str, Any]:
    names = (
        *HELD_OUT,
        "name",
        "info",
        "has_text",
        "generations",
        "first_call_seconds",
        "training",
        "history",
    )
    return read_json(folder / FIGURES_FILE, names)
