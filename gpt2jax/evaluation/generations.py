"""The texts that models write for the same prompts: how fast, and how much they repeat themselves."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from gpt2jax.generation import Generation, generate
from gpt2jax.language_model import LanguageModel


def generate_texts(
    models: Mapping[str, LanguageModel], prompts: Sequence[Any], sampling: Mapping[str, Any], seed: int
) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """Each model's text for each prompt, prompt by prompt, and the time of each model's very first call."""
    generations, first_calls = [], {}
    for name, model in models.items():
        compiled: set[tuple[int, int]] = set()
        for index, prompt in enumerate(prompts):

            def call(model=model, prompt=prompt, index=index) -> Generation:
                return generate(model, [prompt], seed=seed + index, **sampling)[0]

            output, seconds = _timed(call)
            first_calls.setdefault(name, seconds)
            shapes = _shapes(output, sampling)
            if shapes not in compiled:  # that call compiled: a second one tells the speed
                compiled.add(shapes)
                output, seconds = _timed(call)
            # the stop token is not in `token_ids`, and was generated all the same
            steps = len(output.token_ids) + (output.finish_reason == "stop")
            generations.append(
                {
                    "model": name,
                    "prompt": prompt if isinstance(prompt, str) else [int(token_id) for token_id in prompt],
                    "text": output.text,
                    "seconds": round(seconds, 4),
                    "tokens_per_second": round(steps / seconds, 1),
                    "tokens": len(output.token_ids),
                    "finish_reason": output.finish_reason,
                    "seed": seed + index,
                    "mean_logprob": float(np.mean(output.logprobs)) if output.logprobs else None,
                    **repetition(output.token_ids),
                }
            )
    return generations, first_calls


def _timed(call: Callable[[], Generation]) -> tuple[Generation, float]:
    began = time.perf_counter()
    output = call()
    return output, time.perf_counter() - began


def _shapes(output: Generation, sampling: Mapping[str, Any]) -> tuple[int, int]:
    """Powers of two that hold the prompt and the new tokens: what decoding compiles for."""
    length = len(output.prompt_ids)
    new = sampling.get("max_new_tokens") or sampling["max_length"] - length
    return (length - 1).bit_length(), (new - 1).bit_length()


def repetition(token_ids: Sequence[int]) -> dict[str, float | None]:
    """Figures of one text; None where it has no n-gram of that size.

    Returns:
        distinct_1, distinct_2: different 1-grams and 2-grams over all of them, 1 = none occurs twice.
        repeated_4: share of the 4-grams that occurred before in the text, 0 = none.

    Source: distinct-n of Li et al. 2016, "A Diversity-Promoting Objective Function for Neural Conversation
        Models";
    repeated n-grams (seq-rep-4) of Welleck et al. 2019, "Neural Text Generation with Unlikelihood Training".
    """
    four = distinct(token_ids, 4)
    return {
        "distinct_1": distinct(token_ids, 1),
        "distinct_2": distinct(token_ids, 2),
        "repeated_4": None if four is None else 1.0 - four,
    }


def distinct(token_ids: Sequence[int], n: int) -> float | None:
    """Different n-grams over all n-grams; None if there are none."""
    grams = list(zip(*(token_ids[i:] for i in range(n)), strict=False))
    return len(set(grams)) / len(grams) if grams else None
