"""Compares models on the same texts: figures, paired differences, and the texts they write."""

from __future__ import annotations

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
from gpt2jax.evaluation.texts import check_scorable
from gpt2jax.generation.config import GenerationConfig
from gpt2jax.generation.requests import Prompt, as_prompts
from gpt2jax.language_model import LanguageModel
from gpt2jax.utils.fingerprint import data_fingerprint
from gpt2jax.utils.validation import check, check_texts, must_be, positive_int
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


def compare(
    models: Mapping[str, LanguageModel],
    texts: Iterable[Any],
    prompts: Prompt | Sequence[Prompt] | None = None,
    config: EvaluationConfig | None = None,
    *,
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
    **overrides: Any,
) -> Comparison:
    """Evaluate models on the same texts, pair their losses document by document, and let them write.

    Args:
        models: models by name; the first is the baseline.
        texts: held-out texts, as for `evaluate`.
        prompts: to generate from, as for `generate`. Default: `DEFAULT_PROMPTS`, or no prompts if a model has no
            tokenizer. Prompt number i is sampled with seed + i, the same for every model, so that a prompt that
            occurs twice gives two texts.
        config: settings of the evaluation; default: `EvaluationConfig()`.
        training_texts: what the models were trained on; the comparison then says how much of `texts` is in them.
        max_length, max_new_tokens: of the generated texts, see `generate`. Default: max_length 200, or the shortest
            context if that is less.
        temperature, top_k, top_p, do_sample: see `generate`.
        seed: of sampling and bootstrap.
        resamples: of the bootstrap.
        history: `Run.history` of the fine-tuning, for the training curve of the report.
        command: the command line to repeat it, for the report.
        source: where the texts come from, for the report: {"source": ..., "split": ..., "revision": ...}.
        progress: show progress bars.
        **overrides: fields of `EvaluationConfig`, such as `sequence_length=64`; they win over `config`.

    Returns:
        A `Comparison`. Every number in it, except times, is the same in the next run.

    Raises:
        ValueError: no models, a setting is not legal, nothing to score, or windows="truncate" with models whose
            tokenizers differ, since their first tokens cover different parts of the texts. With other windows such
            models are compared in nats per byte.
        TypeError: an unknown setting, or `texts` is one string, or not a list.
    """
    _check_models(models)
    config = EvaluationConfig.merge(config, overrides, compare.__kwdefaults__)
    config = config.resolve(min(model.config.n_positions for model in models.values()))
    resamples = check("resamples", resamples, positive_int)
    seed = check("seed", seed, seed_rule)
    sampling: Any = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "do_sample": do_sample}
    sampling |= _length_limit(models, max_length, max_new_tokens)
    generation = GenerationConfig(**sampling)
    prompts = _default_prompts(models) if prompts is None else as_prompts(prompts)
    if source is not None and not isinstance(source, Mapping):
        raise ValueError(must_be("source", "a dict, or None", source))
    check_texts("texts", texts)
    texts = list(texts)
    if training_texts is not None:
        check_texts("training_texts", training_texts)
    for model in models.values():
        check_scorable(model, texts)
    same_tokens = _same_tokens(list(models.values()), config.windows)
    # generation comes first: it is short, and finds a prompt that does not fit
    generations, first_calls = generate_texts(models, prompts, generation, seed)
    repetition = repetition_by_model(generations)
    evaluations = {
        name: evaluate(model, texts, config, per_token=same_tokens, progress=progress)
        for name, model in models.items()
    }
    baseline = next(iter(models))

    def versus_baseline(name: str) -> VersusBaseline:
        pair, model = (evaluations[baseline], evaluations[name]), models[name]
        kwargs: Any = {"baseline": baseline, "same_tokens": same_tokens, "resamples": resamples, "seed": seed}
        difference = paired_difference(*pair, **kwargs)
        if not same_tokens:
            return VersusBaseline(difference, None, None)
        about: Any = {"tokenizer": model.tokenizer, "end_token_id": model.end_token_id}
        breakdown = difference_breakdown(*pair, **about)
        return VersusBaseline(difference, breakdown, make_excerpts(*pair, model.tokenizer))

    return Comparison(
        models=[
            ModelResult(
                name=name,
                info=describe_model(model),
                evaluation=evaluations[name],
                generations=[generation for generation in generations if generation["model"] == name],
                repetition=repetition.get(name),
                first_call_seconds=first_calls.get(name),
                versus_baseline=None if name == baseline else versus_baseline(name),
            )
            for name, model in models.items()
        ],
        overlap=None if training_texts is None else text_overlap(training_texts, texts),
        settings={"seed": seed, "resamples": resamples}
        | {name: getattr(generation, name) for name in sampling},
        data={"documents": len(texts), "sha256": data_fingerprint(texts), **(source or {})},
        versions=versions(),
        history=None if history is None else [dict(entry) for entry in history],
        command=command,
    )


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

    def identity(model: LanguageModel) -> tuple[Any, int]:
        if model.tokenizer is None:
            return model.config.vocab_size, model.end_token_id
        return model.tokenizer.fingerprint, model.end_token_id

    same = len({identity(model) for model in models}) == 1
    if not same and windows == "truncate":
        legal = "'non_overlapping', 'sliding' or 'rolling' for models with different tokenizers"
        raise ValueError(
            must_be("windows", legal, windows)
            + "; these score whole texts and are compared in nats per byte, "
            "while the first tokens of different tokenizers cover different parts of a text"
        )
    return same


def _length_limit(
    models: Mapping[str, LanguageModel], max_length: int | None, max_new_tokens: int | None
) -> dict[str, int]:
    if max_length is not None and max_new_tokens is not None:
        raise ValueError(f"max_length={max_length} and max_new_tokens={max_new_tokens}: give one of them")
    if max_new_tokens is not None:
        return {"max_new_tokens": check("max_new_tokens", max_new_tokens, positive_int)}
    context = min(model.config.n_positions for model in models.values())
    default = min(DEFAULT_MAX_LENGTH, context)
    return {"max_length": default if max_length is None else check("max_length", max_length, positive_int)}


def _default_prompts(models: Mapping[str, LanguageModel]) -> list[str]:
    return [] if any(model.tokenizer is None for model in models.values()) else list(DEFAULT_PROMPTS)
