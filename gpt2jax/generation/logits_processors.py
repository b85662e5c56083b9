"""Logits processors that depend on the tokens so far: penalties, forbidden tokens, a least length.

They read the token history as decoding holds it, so that no counts have to be updated from step to step. All settings
are arrays: changing them compiles nothing.

Sources: Keskar et al. 2019, "CTRL" (repetition penalty); Paulus et al. 2017, "A Deep Reinforced Model for Abstractive
Summarization" (no repeated n-gram); presence and frequency penalties as OpenAI's API defines them.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float32, Int, Int32

from gpt2jax.generation.stages import Stages, apply_stage


class TokenHistory(NamedTuple):
    """The tokens so far.

    Attributes:
        token_ids: [B, S] int32; the text of row b lies in the positions [begin[b], end[b]), the others are unused.
        begin: [B] int32.
        prompt_end: [B] int32, the first position after the prompt.
        end: [B] int32.
    """

    token_ids: jax.Array
    begin: jax.Array
    prompt_end: jax.Array
    end: jax.Array


class Penalties(NamedTuple):
    """The settings of each row, explained in `GenerationConfig`.

    Attributes:
        repetition, presence, frequency: [B] float32; 1, 0 and 0 are off.
        no_repeat_ngram_size: [B] int32, 0 is off.
        min_new_tokens: [B] int32.
        bad_words: [W, M] int32, token ids that must not follow each other, padded with -1 on the left.
    """

    repetition: jax.Array
    presence: jax.Array
    frequency: jax.Array
    no_repeat_ngram_size: jax.Array
    min_new_tokens: jax.Array
    bad_words: jax.Array


def apply_penalties(
    logits: Float32[Array, "B V"],
    history: TokenHistory,
    penalties: Penalties,
    steps: Int[Array, " B"],
    stop_ids: Int32[Array, " K"],
    stages: Stages | None = None,
) -> Float32[Array, "B V"]:
    """Apply the penalties, in the order: repetition, frequency and presence, forbidden tokens.

    A part that no row asks for is skipped.

    Args:
        logits: the scores of all tokens.
        history: the tokens so far.
        penalties: the settings.
        steps: new tokens of each row so far.
        stop_ids: forbidden to rows of fewer new tokens than `min_new_tokens`; ids >= V are ignored.
        stages: which parts the program has; None decides that on the device.
    """

    def has_penalty():
        return jnp.any(
            (penalties.repetition != 1.0) | (penalties.presence != 0.0) | (penalties.frequency != 0.0)
        )

    def has_forbidden():
        return jnp.any((penalties.no_repeat_ngram_size > 0) | (penalties.min_new_tokens > 0)) | jnp.any(
            penalties.bad_words[:, -1] >= 0
        )

    is_on = (stages.has_penalties, stages.has_forbidden) if stages else (None, None)
    logits = apply_stage(
        is_on[0], has_penalty, lambda x: _repetition_penalties(x, history, penalties), logits
    )
    return apply_stage(
        is_on[1], has_forbidden, lambda x: _mask_forbidden(x, history, penalties, steps, stop_ids), logits
    )


def common_suffix(history: TokenHistory, longest: jax.Array | int) -> jax.Array:
    """Count how many tokens before position s equal those before the text's end, up to `longest`.

    Tokens outside the text do not count as equal.

    Returns:
        [B, S] int32.
    """
    token_ids = history.token_ids
    positions = jnp.arange(token_ids.shape[1])

    def compare(k, carry):
        length, shifted, alike = carry
        shifted = jnp.pad(shifted[:, :-1], ((0, 0), (1, 0)))  # the token k + 1 positions before each
        last = jnp.take_along_axis(token_ids, jnp.maximum(history.end - 1 - k, 0)[:, None], axis=1)
        inside = (positions - 1 - k >= history.begin[:, None]) & (history.end - 1 - k >= history.begin)[
            :, None
        ]
        alike = alike & inside & (shifted == last)
        return length + alike, shifted, alike

    start = (jnp.zeros_like(token_ids), token_ids, jnp.ones(token_ids.shape, bool))
    return jax.lax.fori_loop(0, longest, compare, start)[0]


def _repetition_penalties(logits: jax.Array, history: TokenHistory, penalties: Penalties) -> jax.Array:
    """Apply repetition, frequency and presence penalty."""
    seen = _count(logits, history, history.begin) > 0
    repetition = penalties.repetition[:, None]
    logits = jnp.where(seen, jnp.where(logits < 0, logits * repetition, logits / repetition), logits)
    count = _count(logits, history, history.prompt_end)
    return logits - penalties.frequency[:, None] * count - penalties.presence[:, None] * (count > 0)


def _count(logits: jax.Array, history: TokenHistory, begin: jax.Array) -> jax.Array:
    """Count how often each token occurs in the positions [begin, end): [B, V] float32."""
    positions = jnp.arange(history.token_ids.shape[1])
    counted = (positions >= begin[:, None]) & (positions < history.end[:, None])
    return _add(jnp.zeros_like(logits), history.token_ids, counted)


def _mask_forbidden(
    logits: jax.Array, history: TokenHistory, penalties: Penalties, steps: jax.Array, stop_ids: jax.Array
) -> jax.Array:
    """Set the logits of forbidden tokens to -inf."""
    short = (steps < penalties.min_new_tokens)[:, None]
    forbidden = (  # ids [B, N], and which of them
        (history.token_ids, _ends_of_ngrams(history, penalties.no_repeat_ngram_size)),
        _ends_of_bad_words(history, penalties.bad_words),
        (jnp.broadcast_to(stop_ids, (logits.shape[0], *stop_ids.shape)), short & (stop_ids >= 0)),
    )
    ids, which = (jnp.concatenate(parts, axis=1) for parts in zip(*forbidden, strict=True))
    return jnp.where(_add(jnp.zeros_like(logits), ids, which) > 0, -jnp.inf, logits)


def _ends_of_ngrams(history: TokenHistory, size: jax.Array) -> jax.Array:
    """Mark the tokens [B, S] that would repeat an n-gram after the last n - 1 tokens."""
    positions = jnp.arange(history.token_ids.shape[1])
    # a text repeats at most all its tokens
    before = common_suffix(history, jnp.minimum(jnp.max(size), positions.size) - 1)
    inside = (positions >= history.begin[:, None]) & (positions < history.end[:, None])
    ends = inside & (size > 0)[:, None] & (before >= size[:, None] - 1)
    # all tokens of the n-gram lie within the text
    return ends & (positions - (size[:, None] - 1) >= history.begin[:, None])


def _ends_of_bad_words(history: TokenHistory, words: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return the last id [B, W] of each word, and whether the text ends with all ids before it."""
    size = words.shape[1]
    # the last M - 1 tokens of each text; -2, which no word has, if the text is shorter
    positions = history.end[:, None] - jnp.arange(size - 1, 0, -1)
    tail = jnp.take_along_axis(history.token_ids, jnp.maximum(positions, 0), axis=1)
    tail = jnp.where(positions >= history.begin[:, None], tail, -2)
    begun = ((words[None, :, :-1] == tail[:, None]) | (words[None, :, :-1] < 0)).all(-1) & (words[:, -1] >= 0)
    return jnp.broadcast_to(words[:, -1], begun.shape), begun


def _add(counts: jax.Array, token_ids: jax.Array, which: jax.Array) -> jax.Array:
    """Add 1 to counts [B, V] at each id [B, N] that `which` marks; ids outside V are ignored."""
    rows = jnp.arange(counts.shape[0])[:, None]
    # a negative index would count from the end
    token_ids = jnp.where(token_ids < 0, counts.shape[1], token_ids)
    return counts.at[rows, token_ids].add(which.astype(counts.dtype), mode="drop")
