"""The texts that models write for the same prompts: how fast, and how much they repeat themselves."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from gpt2jax.generation.config import GenerationConfig
from gpt2jax.generation.generate import generate
from gpt2jax.generation.outputs import Generation
from gpt2jax.generation.requests import check_prompts
from gpt2jax.language_model import LanguageModel
from gpt2jax.utils.validation import SEED_RANGE

COMPILED = "/jax/core/compile/backend_compile_duration"  # jax's event


def generate_texts(
    models: Mapping[str, LanguageModel], prompts: Sequence[Any], config: GenerationConfig, seed: int
) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """Continue each prompt with each model; also return the time of each model's first call.

    Raises:
        ValueError: a prompt does not fit a model.
    """
    for model in models.values():  # all of them before the first is continued
        check_prompts(model, prompts, config)
    generations, first_calls = [], {}
    for name, model in models.items():
        for index, prompt in enumerate(prompts):
            own_seed = (seed + index) % SEED_RANGE

            def call(model=model, prompt=prompt, own_seed=own_seed) -> Generation:
                return generate(model, [prompt], config, seed=own_seed)[0]

            output, seconds, compiled = _timed(call)
            first_calls.setdefault(name, seconds)
            if compiled:  # a second call tells the speed
                output, seconds, _ = _timed(call)
            # the stop token is not in `token_ids`, and was generated all the same
            steps = len(output.token_ids) + (output.finish_reason == "stop")
            generations.append(
                {
                    "model": name,
                    "prompt": prompt if isinstance(prompt, str) else [int(token_id) for token_id in prompt],
                    "text": output.text,
                    "seconds": round(seconds, 4),
                    "tokens_per_second": round(steps / seconds, 1),
                    "token_ids": list(output.token_ids),
                    "tokens": len(output.token_ids),
                    "finish_reason": output.finish_reason,
                    "seed": own_seed,
                    "mean_logprob": float(np.mean(output.logprobs)) if output.logprobs else None,
                    **repetition(output.token_ids),
                }
            )
    return generations, first_calls


def _timed(call: Callable[[], Generation]) -> tuple[Generation, float, bool]:
    """Return the result of a call, its seconds, and whether it compiled anything."""
    events: list[str] = []

    def listen(event: str, duration_secs: float, **_: Any) -> None:
        events.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        began = time.perf_counter()
        output = call()
        seconds = time.perf_counter() - began
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    return output, seconds, COMPILED in events


def repetition(token_ids: Sequence[int]) -> dict[str, float | None]:
    """Figures of one text; None where it has no n-gram of that size.

    Returns:
        distinct_1, distinct_2, distinct_3: different n-grams over all of them, 1 = none occurs twice.
        repeated_4: fraction of the 4-grams that occurred before in the text, 0 = none.

    Source: distinct-n of Li et al. 2016, "A Diversity-Promoting Objective Function for Neural Conversation Models";
    repeated n-grams (seq-rep-4) of Welleck et al. 2019, "Neural Text Generation with Unlikelihood Training".
    """
    return _repetition([token_ids])


def repetition_by_model(generations: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float | None]]:
    """Figures over all texts of each model.

    Args:
        generations: from `generate_texts`.

    Returns:
        Name to those of `repetition`, n-grams of all texts counted together, and self_overlap_4: fraction of a text's
        different 4-grams that also occur in another text of the model, the mean over texts; None for a
        single text, or if no text has a 4-gram. tokens, seconds and tokens_per_second are sums over the texts and
        their ratio.
    """
    found = {}
    for name in dict.fromkeys(generation["model"] for generation in generations):
        mine = [generation for generation in generations if generation["model"] == name]
        texts = [generation["token_ids"] for generation in mine]
        seconds, tokens = sum(g["seconds"] for g in mine), sum(g["tokens"] for g in mine)
        found[name] = {
            **_repetition(texts),
            "self_overlap_4": _self_overlap(texts),
            "tokens": tokens,
            "seconds": round(seconds, 4),
            "tokens_per_second": round(tokens / seconds, 1) if seconds else None,
        }
    return found


def _repetition(texts: Sequence[Sequence[int]]) -> dict[str, float | None]:
    four = _distinct(texts, 4)
    return {
        **{f"distinct_{n}": _distinct(texts, n) for n in (1, 2, 3)},
        "repeated_4": None if four is None else 1.0 - four,
    }


def _distinct(texts: Sequence[Sequence[int]], n: int) -> float | None:
    """Different n-grams within each text over all n-grams; None if there are none."""
    grams = [_grams(text, n) for text in texts]
    total = sum(map(len, grams))
    return sum(len(set(each)) for each in grams) / total if total else None


def _self_overlap(texts: Sequence[Sequence[int]]) -> float | None:
    grams = [set(_grams(text, 4)) for text in texts]
    holders = Counter(gram for each in grams for gram in each)
    fractions = [sum(holders[gram] > 1 for gram in each) / len(each) for each in grams if each]
    return sum(fractions) / len(fractions) if fractions and len(texts) > 1 else None


def _grams(token_ids: Sequence[int], n: int) -> list[tuple[int, ...]]:
    return list(zip(*(token_ids[i:] for i in range(n)), strict=False))
