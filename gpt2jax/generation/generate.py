"""Text and token ids in, continuations out: one call for one model.

    outs = generate(model, ["a prompt", ""], max_new_tokens=64, top_k=5, seed=0)
    for piece in stream(model, "a prompt"): print(piece, end="")

The weights that were prepared for the last call's model are kept as long as the model lives. A program that alternates
between models, or wants to free the weights, makes a `Generator` for each model.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from gpt2jax.generation.config import DecoderModel, GenerationConfig
from gpt2jax.generation.generator import DecoderWeights, Generator, Stream
from gpt2jax.generation.outputs import Generation
from gpt2jax.generation.requests import Prompt

_last_weights = DecoderWeights()


def generate(
    model: DecoderModel,
    prompts: Prompt | Sequence[Prompt],
    config: GenerationConfig | Sequence[GenerationConfig] | None = None,
    *,
    seed: int | Sequence[int] = 0,
    batch_size: int = 32,
    dtype: str | None = None,
    **overrides: Any,
) -> list[Generation]:
    """Continue prompts.

    Rows do not depend on each other: row i with seed s equals the single run of its prompt with seed s, up to
    rounding, because different shapes sum in a different order. A beginning that all prompts of a batch share is
    computed once. The local devices share the rows of a batch.

    Args:
        model: a `LanguageModel`.
        prompts: a text or list of token ids, or a list of these. An empty one starts from the end token alone, which is
            how GPT-2 begins a text.
        config: the settings; a list has one for each row. Default: those beside the weights, see
            `gpt2jax.generation.file_settings`, else those of `GenerationConfig()`.
        seed: row i draws with seed + i; a list has one seed for each row.
        batch_size: most rows, or beams, to run at once.
        dtype: of the weights: "float32", "bfloat16", "float16" or "int8". Default: float32 on a CPU, bfloat16
            elsewhere.
        overrides: fields of `GenerationConfig`, instead of those of `config`. Lengths, sampling settings and penalties
            also take a list with one value for each row. `eos_token_id` is another name of `stop_token_ids`.

    Returns:
        One `Generation` for each row, in order; sample j of prompt i is row i * num_return_sequences + j. With
        num_beams above 1: the beams of all prompts, best first, fewer than num_return_sequences if there are not as
        many different ones.

    Raises:
        ValueError: a setting is not legal, a prompt has unknown ids or needs a tokenizer that the model does not have,
            or prompt and continuation exceed the context.
        TypeError: there is no such setting.
    """
    generator = Generator(model, dtype=dtype, weights=_last_weights)
    return generator.generate(prompts, config, seed=seed, batch_size=batch_size, **overrides)


def stream(
    model: DecoderModel,
    prompt: Prompt,
    config: GenerationConfig | None = None,
    *,
    seed: int = 0,
    dtype: str | None = None,
    **overrides: Any,
) -> Stream:
    """Continue one prompt and yield its text as it comes.

    Arguments and errors are those of `generate`; errors are raised at the call. The joined pieces are the text that
    `generate` returns. A piece is not empty, ends between characters, and never shows the beginning of a stop string.
    After the last piece, `generation` of the returned object holds the tokens and log-probabilities.

    Raises:
        ValueError: also if the model has no tokenizer, or more than one text is asked for.
    """
    return Generator(model, dtype=dtype, weights=_last_weights).stream(prompt, config, seed=seed, **overrides)


def beam_search(
    model: DecoderModel,
    prompts: Prompt | Sequence[Prompt],
    config: GenerationConfig | Sequence[GenerationConfig] | None = None,
    *,
    batch_size: int = 32,
    dtype: str | None = None,
    **overrides: Any,
) -> list[list[Generation]]:
    """Return the best continuations of prompts by beam search.

        [beams] = beam_search(model, "a prompt", num_beams=4, num_return_sequences=2)
        print(beams[0].score, beams[0].text)

    Arguments and errors are those of `generate`. Penalties change log-probabilities here, and so the scores.

    Args:
        config: the settings. Default: as for `generate`, with 4 beams.
        batch_size: most beams to follow at once; a prompt has `num_beams` of them.

    Returns:
        The beams of each prompt, best first: `num_return_sequences`, or fewer if there are not as many different ones.
    """
    generator = Generator(model, dtype=dtype, weights=_last_weights)
    return generator.beam_search(prompts, config, batch_size=batch_size, **overrides)
