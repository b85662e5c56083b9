"""Compares models on the same texts: figures, paired differences, and the texts they write."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from gpt2jax.comparison.excerpts import make_excerpts
from gpt2jax.comparison.generations import generate_texts, repetition_by_model
from gpt2jax.comparison.overlap import text_overlap
from gpt2jax.comparison.paired import difference_breakdown, paired_difference
from gpt2jax.comparison.provenance import describe_model, versions
from gpt2jax.comparison.result import Comparison, ModelResult, VersusBaseline
from gpt2jax.evaluation.config import EvaluationConfig
from gpt2jax.evaluation.evaluate import evaluate
from gpt2jax.evaluation.result import Evaluation
from gpt2jax.evaluation.texts import check_scorable
from gpt2jax.generation.config import GenerationConfig
from gpt2jax.generation.requests import Prompt, as_prompts
from gpt2jax.language_model import LanguageModel
from gpt2jax.utils.fingerprint import data_fingerprint
from gpt2jax.utils.jax_switches import default_switches
from gpt2jax.utils.notices import notice
from gpt2jax.utils.validation import (
    check,
    check_names,
    check_texts,
    field_names,
    instance_of,
    must_be,
    optional,
    override_fields,
    positive_int,
)
from gpt2jax.utils.validation import seed as seed_rule

# an unfinished statement, five questions on medicine and networks, and the empty prompt twice
DEFAULT_PROMPTS = (
    "The patients who received the new treatment",
    "What are the first signs of a stroke?",
    "How is high blood pressure treated?",
    "Why do bacteria become resistant to antibiotics?",
    "How does a packet find its way through a computer network?",
    "What does a neural network learn from its examples?",
    "",
    "",
)
DEFAULT_MAX_LENGTH = 200
# the arguments of `compare` that are not settings: a wrong name may be meant as one of them
_ARGUMENTS = ("training_texts", "seed", "resamples", "history", "command", "source", "progress")
_EVALUATION_FIELDS, _GENERATION_FIELDS = field_names(EvaluationConfig), field_names(GenerationConfig)


@default_switches()
def compare(
    models: Mapping[str, LanguageModel],
    texts: Iterable[Any] | Mapping[str, Iterable[Any]],
    prompts: Prompt | Sequence[Prompt] | None = None,
    evaluation: EvaluationConfig | None = None,
    generation: GenerationConfig | None = None,
    *,
    training_texts: Iterable[Any] | None = None,
    seed: int = 0,
    resamples: int = 2000,
    history: Sequence[Mapping[str, float]] | None = None,
    command: str | None = None,
    source: Mapping[str, Any] | None = None,
    progress: bool = False,
    **overrides: Any,
) -> Comparison:
    """Evaluate models on the same texts, pair their losses document by document, and let them write.

    Args:
        models: models by name; the first is the baseline.
        texts: held-out texts, as for `evaluate`; or several such lists by name, as in
            {"validation": ..., "test": ...}: the models are compared on each, and write once.
        prompts: to generate from, as for `generate`. Default: `DEFAULT_PROMPTS`, or no prompts if a model has no
            tokenizer. Prompt number i is sampled with seed + i, the same for every model, so that a prompt that
            occurs twice gives two texts.
        evaluation: settings of the evaluation; default: `EvaluationConfig()`.
        generation: settings of the generated texts, of which each prompt gets one; default: `GenerationConfig()`.
            Without a length, max_length is 200, or the shortest context if that is less.
        training_texts: what the models were trained on; the comparison then says how much of `texts` is in them.
        seed: of sampling and bootstrap.
        resamples: of the bootstrap.
        history: `Run.history` of the fine-tuning, for the training curve of the report.
        command: the command line to repeat it, for the report.
        source: where the texts come from, for the report: {"source": ..., "split": ..., "revision": ...}; of several
            lists of texts one such dict for each, by the same names.
        progress: show progress bars.
        **overrides: fields of the two, such as `sequence_length=64, temperature=0.7`; they win over `evaluation` and
            `generation`.

    Returns:
        A `Comparison`. Every number in it, except times, is the same in the next run. For texts by name it is the
        comparison on the first of them, and holds all in `by_texts`.

    Raises:
        ValueError: no models, a setting is not legal, nothing to score, or windows="truncate" with models whose
            tokenizers differ, since their first tokens cover different parts of the texts. With other windows such
            models are compared in nats per byte.
        TypeError: an unknown setting, or `texts` is one string, or not a list.
    """
    check_names("setting", overrides, [*_EVALUATION_FIELDS, *_GENERATION_FIELDS, *_ARGUMENTS])
    _check_models(models)
    evaluation = _resolve_evaluation(evaluation, overrides, models)
    generation = _resolve_generation(generation, overrides, models)
    resamples = check("resamples", resamples, positive_int)
    seed = check("seed", seed, seed_rule)
    prompts = _default_prompts(models) if prompts is None else as_prompts(prompts)
    samples = _check_samples(models, texts, source, training_texts)
    same_tokens = _same_tokens(list(models.values()), evaluation.windows)
    paired: Any = {"same_tokens": same_tokens, "resamples": resamples, "seed": seed}
    # generation comes first: it is short, and finds a prompt that does not fit
    written = generate_texts(models, prompts, generation, seed)
    shared: Any = {
        "settings": {"seed": seed, "resamples": resamples, **describe_generation(generation)},
        "versions": versions(),
        "history": None if history is None else [dict(entry) for entry in history],
        "command": command,
    }
    compared = {}
    for sample in samples:
        evaluations = sample.evaluate(models, evaluation, per_token=same_tokens, progress=progress)
        results = _model_results(models, evaluations, written, paired)
        compared[sample.name] = Comparison(results, sample.overlap(), data=sample.describe(), **shared)
    first = compared[samples[0].name]
    return dataclasses.replace(first, by_texts=compared) if isinstance(texts, Mapping) else first


@dataclasses.dataclass(frozen=True)
class _Sample:
    """Texts to compare on, and what is known of them; the name is "" if they have none."""

    name: str
    texts: list[Any]
    source: Mapping[str, Any]
    training_texts: Iterable[Any] | None

    def evaluate(
        self,
        models: Mapping[str, LanguageModel],
        config: EvaluationConfig,
        *,
        per_token: bool,
        progress: bool,
    ) -> dict[str, Evaluation]:
        # the name of a model is its source, for notices
        named = {name: dataclasses.replace(model, source=name) for name, model in models.items()}
        return {
            name: evaluate(model, self.texts, config, per_token=per_token, progress=progress)
            for name, model in named.items()
        }

    def overlap(self) -> dict[str, Any] | None:
        return None if self.training_texts is None else text_overlap(self.training_texts, self.texts)

    def describe(self) -> dict[str, Any]:
        name = {"name": self.name} if self.name else {}
        return {
            **name,
            "documents": len(self.texts),
            "sha256": data_fingerprint(self.texts),
            **self.source,
        }


# ---- results ----


def _model_results(
    models: Mapping[str, LanguageModel],
    evaluations: Mapping[str, Evaluation],
    written: tuple[list[dict[str, Any]], dict[str, float]],
    paired: Mapping[str, Any],
) -> list[ModelResult]:
    generations, first_calls = written
    repetition = repetition_by_model(generations)
    baseline = next(iter(models))
    results = [
        ModelResult(
            name=name,
            info=describe_model(model),
            evaluation=evaluations[name],
            generations=[generation for generation in generations if generation["model"] == name],
            repetition=repetition.get(name),
            first_call_seconds=first_calls.get(name),
            versus_baseline=(
                None
                if name == baseline
                else _versus_baseline(baseline, evaluations[baseline], evaluations[name], model, **paired)
            ),
        )
        for name, model in models.items()
    ]
    if (versus := results[-1].versus_baseline) and versus.difference.warning:
        notice(versus.difference.warning)
    return results


def _versus_baseline(
    baseline: str,
    first: Evaluation,
    second: Evaluation,
    model: LanguageModel,
    *,
    same_tokens: bool,
    **bootstrap: int,
) -> VersusBaseline:
    """Compare a model's evaluation with that of the baseline."""
    difference = paired_difference(first, second, baseline=baseline, same_tokens=same_tokens, **bootstrap)
    if not same_tokens:
        return VersusBaseline(difference, None, None)
    breakdown = difference_breakdown(
        first, second, tokenizer=model.tokenizer, end_token_id=model.end_token_id
    )
    return VersusBaseline(difference, breakdown, make_excerpts(first, second, model.tokenizer))


def describe_generation(config: GenerationConfig) -> dict[str, Any]:
    """Return the settings that sampling always has, and those that differ from their defaults, as plain values."""
    settings = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.name in ("temperature", "top_k", "top_p", "do_sample") or value != field.default:
            plain = isinstance(value, bool | int | float | str | tuple | None)
            settings[field.name] = value if plain else getattr(value, "__qualname__", type(value).__name__)
    return settings


# ---- arguments ----


def _check_models(models: Mapping[str, LanguageModel]) -> None:
    if not isinstance(models, Mapping) or not models:
        raise ValueError(must_be("models", "a dict of at least one name and model", models))
    for name, model in models.items():
        if not isinstance(name, str) or not name.strip():
            raise ValueError(must_be("the name of a model", "a text that is not empty", name))
        if not isinstance(model, LanguageModel):
            hint = "; gpt2jax.load(name) returns one"
            raise ValueError(must_be(f"models[{name!r}]", "a LanguageModel", model) + hint)


def _same_tokens(models: Sequence[LanguageModel], windows: str) -> bool:
    """Return whether all models have the same token ids: equal tokenizers, or equal vocabularies without a tokenizer.

    Raises:
        ValueError: they differ, and the texts are to be truncated.
    """
    same = len({token_identity(model) for model in models}) == 1
    if not same and windows == "truncate":
        legal = "'non_overlapping', 'sliding' or 'rolling' for models with different tokenizers"
        raise ValueError(
            must_be("windows", legal, windows)
            + "; these score whole texts and are compared in nats per byte, "
            "while the first tokens of different tokenizers cover different parts of a text"
        )
    return same


def token_identity(model: LanguageModel) -> tuple[Any, int]:
    """Return what is equal for models with the same token ids."""
    if model.tokenizer is None:
        return model.config.vocab_size, model.end_token_id
    return model.tokenizer.fingerprint, model.end_token_id


def _resolve_evaluation(
    config: EvaluationConfig | None, overrides: Mapping[str, Any], models: Mapping[str, LanguageModel]
) -> EvaluationConfig:
    mine = {name: value for name, value in overrides.items() if name in _EVALUATION_FIELDS}
    config = override_fields("evaluation", EvaluationConfig, config, mine)
    return config.resolve(_shortest_context(models))


def _resolve_generation(
    config: GenerationConfig | None, overrides: Mapping[str, Any], models: Mapping[str, LanguageModel]
) -> GenerationConfig:
    mine = {name: value for name, value in overrides.items() if name in _GENERATION_FIELDS}
    config = override_fields("generation", GenerationConfig, config, mine)
    if config.num_return_sequences != 1:
        hint = "; repeat a prompt for several texts"
        raise ValueError(must_be("num_return_sequences", "1", config.num_return_sequences) + hint)
    if config.max_length is None and config.max_new_tokens is None:
        length = min(DEFAULT_MAX_LENGTH, _shortest_context(models))
        config = dataclasses.replace(config, max_length=length)
    return config


def _shortest_context(models: Mapping[str, LanguageModel]) -> int:
    return min(model.config.n_positions for model in models.values())


def _check_samples(
    models: Mapping[str, LanguageModel], texts: Any, source: Any, training_texts: Iterable[Any] | None
) -> list[_Sample]:
    """Return the texts as lists that every model can score."""
    check("source", source, optional(instance_of(Mapping)))
    if training_texts is not None:
        check_texts("training_texts", training_texts)
    if not isinstance(texts, Mapping):
        found = [_Sample("", _check_texts("texts", texts), source or {}, training_texts)]
    else:
        if not texts or not all(isinstance(name, str) and name.strip() for name in texts):
            legal = "a list of texts, or a dict of such lists by name"
            raise ValueError(must_be("texts", legal, texts))
        sources = {name: {} for name in texts} if source is None else source
        if set(sources) != set(texts) or not all(isinstance(each, Mapping) for each in sources.values()):
            raise ValueError(must_be("source", f"a dict for each of {', '.join(texts)}", source))
        if training_texts is not None:
            training_texts = list(training_texts)  # read for each of the lists
        found = [
            _Sample(name, _check_texts(f"texts[{name!r}]", each), sources[name], training_texts)
            for name, each in texts.items()
        ]
    for sample in found:
        for model in models.values():
            check_scorable(model, sample.texts)
    return found


def _check_texts(name: str, texts: Iterable[Any]) -> list[Any]:
    check_texts(name, texts)
    return list(texts)


def _default_prompts(models: Mapping[str, LanguageModel]) -> list[str]:
    return [] if any(model.tokenizer is None for model in models.values()) else list(DEFAULT_PROMPTS)
