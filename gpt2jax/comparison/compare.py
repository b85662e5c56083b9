"""Two or more models on the same texts: figures, paired differences, and the texts they write."""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from gpt2jax.comparison.excerpts import Excerpt, excerpts
from gpt2jax.comparison.generations import generate_texts, repetition_by_model
from gpt2jax.comparison.overlap import text_overlap
from gpt2jax.comparison.paired import loss_standard_error, paired_difference, where_gain_lies
from gpt2jax.comparison.provenance import describe_model, versions
from gpt2jax.comparison.statistics import PairedDifference
from gpt2jax.evaluation.evaluate import check_scorable, check_settings, evaluate
from gpt2jax.evaluation.result import Evaluation
from gpt2jax.generation.config import GenerationConfig
from gpt2jax.generation.requests import Prompt, as_prompts
from gpt2jax.language_model import LanguageModel
from gpt2jax.utils.atomic_io import atomic_write
from gpt2jax.utils.fingerprint import data_fingerprint
from gpt2jax.utils.validation import check_count, check_path, check_seed, check_texts

SCHEMA = "gpt2jax.comparison"
SCHEMA_VERSION = 1

# the study's kind: an unfinished statement, five questions on medicine and networks, and the empty prompt twice
STUDY_PROMPTS = (
    "The patients who received the new treatment",
    "What are the first signs of a stroke?",
    "How is high blood pressure treated?",
    "Why do bacteria become resistant to antibiotics?",
    "How does a packet find its way through a computer network?",
    "What does a neural network learn from its examples?",
    "",
    "",
)
STUDY_MAX_LENGTH = 200


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Comparison:
    """What a comparison found. The first model is the baseline that the others are held against.

    Attributes:
        models: name to {"source", "parameters", "fingerprint"}.
        evaluations: name to `Evaluation`.
        paired: name to `PairedDifference`, for every model but the first.
        gains: name to where the difference to the first model lies, see `gpt2jax.comparison.paired`; none where the
            models' tokens differ.
        overlap: what the texts share with the training texts, see `gpt2jax.comparison.overlap`; None where no
            training texts were given.
        generations: one dict a text: model, prompt, text, seconds, tokens_per_second, token_ids, tokens,
            finish_reason, seed, mean_logprob, distinct_1, distinct_2, distinct_3, repeated_4.
        repetition: name to the same figures over all texts of the model, and self_overlap_4.
        excerpts: name to the documents on which the model gains and loses most against the first; none where
            the models' tokens differ.
        settings: of the generation and the bootstrap.
        data: number of documents and SHA-256 of the texts, and where they come from if that was said.
        versions: of Python, the packages and the device.
        first_call_seconds: name to the time of the first generation, which compiles.
        history: what `finetune` logged, for the training curve; or None.
        command: the command line that made this, or None.
    """

    models: dict[str, dict[str, Any]]
    evaluations: dict[str, Evaluation]
    paired: dict[str, PairedDifference]
    gains: dict[str, dict[str, list[dict[str, Any]]]]
    overlap: dict[str, Any] | None
    generations: list[dict[str, Any]]
    repetition: dict[str, dict[str, float | None]]
    excerpts: dict[str, dict[str, list[Excerpt]]]
    settings: dict[str, Any]
    data: dict[str, Any]
    versions: dict[str, str]
    first_call_seconds: dict[str, float]
    history: list[dict[str, float]] | None
    command: str | None

    @property
    def baseline(self) -> str:
        """Name of the first model."""
        return next(iter(self.evaluations))

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON.

        Two runs with the same seed on the same machine give the same, except under the keys `seconds` and
        `tokens_per_second`.
        """
        return {
            "schema": SCHEMA,
            "schema_version": SCHEMA_VERSION,
            "models": [
                {
                    "name": name,
                    **evaluation.as_dict(),
                    "loss_standard_error": loss_standard_error(evaluation),
                    **self.models[name],
                }
                for name, evaluation in self.evaluations.items()
            ],
            "paired": {name: difference.as_dict() for name, difference in self.paired.items()},
            "gains": self.gains,
            "overlap": self.overlap,
            "generations": self.generations,
            "repetition": self.repetition,
            "settings": self.settings,
            "data": self.data,
            "versions": self.versions,
            "command": self.command,
            "timing": [
                {
                    "model": name,
                    "step": step,
                    "seconds": round(seconds, 3),
                }
                for name, evaluation in self.evaluations.items()
                for step, seconds in (
                    ("evaluation", evaluation.seconds),
                    ("first generation", self.first_call_seconds.get(name)),
                )
                if seconds is not None
            ],
        }

    def as_json(self) -> str:
        """`as_dict()` as the text of a JSON file."""
        return json.dumps(self.as_dict(), indent=2, ensure_ascii=False, allow_nan=False) + "\n"

    def save(self, folder: str | pathlib.Path) -> pathlib.Path:
        """Writes `report.html`, `report.md` and `comparison.json` into a folder, each whole or not at all.

        Returns:
            The folder.
        """
        from gpt2jax.report.html import html_report
        from gpt2jax.report.summary import markdown_report

        folder = check_path("folder", folder)
        files = {
            "report.html": html_report(self),
            "report.md": markdown_report(self),
            "comparison.json": self.as_json(),
        }
        for name, content in files.items():
            with atomic_write(folder / name) as file:
                # half of a surrogate pair, which a prompt may hold, cannot be written as UTF-8
                file.write(content.encode("utf-16", "surrogatepass").decode("utf-16", "replace"))
        return folder

    def __repr__(self) -> str:
        losses = ", ".join(f"{name}: {evaluation.loss:.4f}" for name, evaluation in self.evaluations.items())
        return f"Comparison({losses} nats per token)"


def compare(
    models: Mapping[str, LanguageModel],
    texts: Iterable[Any],
    prompts: Prompt | Sequence[Prompt] | None = None,
    *,
    sequence_length: int = 128,
    batch_size: int = 32,
    windows: str = "first",
    stride: int | None = None,
    compute_dtype: str = "float32",
    training_texts: Iterable[Any] | None = None,
    max_length: int | None = None,
    max_new_tokens: int | None = None,
    temperature: float = 1.0,
    top_k: int | None = 5,
    top_p: float = 1.0,
    do_sample: bool = True,
    seed: int = 0,
    resamples: int = 2000,
    history: Sequence[Mapping[str, float]] | None = None,
    command: str | None = None,
    source: Mapping[str, Any] | None = None,
    progress: bool = False,
) -> Comparison:
    """Evaluates models on the same texts, pairs their losses document by document, and lets them write.

    Args:
        models: name to model; the first is the baseline.
        texts: held-out texts, as for `evaluate`.
        prompts: to generate from, as for `generate`. None: `STUDY_PROMPTS`, or none at all if a
            model has no tokenizer. Prompt number i is sampled with seed + i, the same for every model, so
            that a prompt that occurs twice gives two texts.
        sequence_length, batch_size, windows, stride, compute_dtype: see `evaluate`.
        training_texts: what the models were trained on: the comparison says how much of `texts` stands in them.
        max_length, max_new_tokens: of the generated texts, see `generate`. Default: max_length 200, as in the
            study, or the shortest context if that is less.
        temperature, top_k, top_p, do_sample: see `generate`.
        seed: of sampling and bootstrap.
        resamples: of the bootstrap.
        history: `Run.history` of the fine-tuning, for the training curve of the report.
        command: the command line to repeat it, for the report.
        source: where the texts come from, for the report: {"source": ..., "split": ..., "revision": ...}.
        progress: show progress bars.

    Returns:
        A `Comparison`. Every number in it, times aside, is the same in the next run.

    Raises:
        ValueError: no models, a setting out of range, nothing to score, or `windows="first"` between models
            that cut texts into different tokens, since their first tokens cover different parts of the texts.
            With the other windows such models are compared in nats per byte.
    """
    _check_models(models)
    resamples = check_count("resamples", resamples)
    seed = check_seed(seed)
    sampling = _sampling(temperature, top_k, top_p, do_sample)
    sampling |= _length_limit(models, max_length, max_new_tokens)
    prompts = _default_prompts(models) if prompts is None else as_prompts(prompts)
    if source is not None and not isinstance(source, Mapping):
        raise ValueError(f"source={source!r:.60} must be a dict, or None")
    check_texts("texts", texts)
    texts = list(texts)
    if training_texts is not None:
        check_texts("training_texts", training_texts)
    for model in models.values():
        check_settings(model, sequence_length, batch_size, windows, stride, compute_dtype)
        check_scorable(model, texts)
    same_tokens = _same_tokens(list(models.values()), windows)
    # first, since it is short and finds a prompt that does not fit
    generations, first_calls = generate_texts(models, prompts, sampling, seed)
    evaluations = {
        name: evaluate(
            model,
            texts,
            sequence_length=sequence_length,
            batch_size=batch_size,
            windows=windows,
            stride=stride,
            compute_dtype=compute_dtype,
            per_token=same_tokens,
            progress=progress,
        )
        for name, model in models.items()
    }
    baseline, *others = models
    pairs = {name: (evaluations[baseline], evaluations[name]) for name in others}
    alike = pairs if same_tokens else {}
    bootstrap = {"resamples": resamples, "seed": seed}
    tokenizer, end = models[baseline].tokenizer, models[baseline].end_token_id
    return Comparison(
        models={name: describe_model(model) for name, model in models.items()},
        evaluations=evaluations,
        paired={
            name: paired_difference(*pair, baseline=baseline, same_tokens=same_tokens, **bootstrap)
            for name, pair in pairs.items()
        },
        gains={
            name: where_gain_lies(*pair, tokenizer=tokenizer, end_token_id=end)
            for name, pair in alike.items()
        },
        overlap=None if training_texts is None else text_overlap(training_texts, texts),
        generations=generations,
        repetition=repetition_by_model(generations),
        excerpts={name: excerpts(*pair, tokenizer) for name, pair in alike.items()},
        settings={"seed": seed, "resamples": resamples, **sampling},
        data={"documents": len(texts), "sha256": data_fingerprint(texts), **(source or {})},
        versions=versions(),
        first_call_seconds=first_calls,
        history=None if history is None else [dict(entry) for entry in history],
        command=command,
    )


# ---- arguments ----


def _check_models(models: Mapping[str, LanguageModel]) -> None:
    if not isinstance(models, Mapping) or not models:
        raise ValueError(f"models={models!r:.60} must be a dict of at least one name and model")
    for name, model in models.items():
        if not isinstance(name, str) or not name.strip():
            raise ValueError(f"the name of a model is {name!r}; it must be a text that is not empty")
        if not isinstance(model, LanguageModel):
            raise ValueError(f"models[{name!r}] is a {type(model).__name__}; expected a LanguageModel")


def _same_tokens(models: Sequence[LanguageModel], windows: str) -> bool:
    """All models make the same ids of a text: equal tokenizers, or none and equal vocabularies.

    Raises:
        ValueError: they do not, and `windows` are the first tokens of each text.
    """

    def identity(model: LanguageModel) -> tuple[Any, int]:
        if model.tokenizer is None:
            return model.config.vocab_size, model.end_token_id
        return model.tokenizer.fingerprint, model.end_token_id

    same = len({identity(model) for model in models}) == 1
    if not same and windows == "first":
        raise ValueError(
            "the models have different tokenizers, so their first tokens cover different parts of the texts: "
            "use windows='disjoint', 'sliding' or 'rolling', which score whole texts and are compared in nats per byte"
        )
    return same


def _length_limit(
    models: Mapping[str, LanguageModel], max_length: int | None, max_new_tokens: int | None
) -> dict[str, int]:
    if max_length is not None and max_new_tokens is not None:
        raise ValueError(f"max_length={max_length} and max_new_tokens={max_new_tokens}: give one of them")
    if max_new_tokens is not None:
        return {"max_new_tokens": check_count("max_new_tokens", max_new_tokens)}
    context = min(model.config.n_positions for model in models.values())
    default = min(STUDY_MAX_LENGTH, context)
    return {"max_length": default if max_length is None else check_count("max_length", max_length)}


def _sampling(temperature: float, top_k: int | None, top_p: float, do_sample: bool) -> dict[str, Any]:
    """One value of each for all texts, as plain values, checked."""
    given = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "do_sample": do_sample}
    GenerationConfig(**given)
    return given | {
        "temperature": float(temperature),
        "top_k": None if top_k is None else int(top_k),
        "top_p": float(top_p),
    }


def _default_prompts(models: Mapping[str, LanguageModel]) -> list[str]:
    return [] if any(model.tokenizer is None for model in models.values()) else list(STUDY_PROMPTS)
