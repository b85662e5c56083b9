"""What is changed about the logits because of the text so far: penalties, forbidden tokens, a least length.

Everything works on the context as decoding holds it, one row of slots a text, so nothing has to be kept up to date
from step to step. All settings are arrays: changing them compiles nothing.

Sources: Keskar et al. 2019, "CTRL" (repetition penalty); Paulus et al. 2017, "A Deep Reinforced Model for Abstractive
Summarization" (no repeated n-gram); presence and frequency penalties as OpenAI's API defines them.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp


class TokenHistory(NamedTuple):
    """The texts so far.

    Attributes:
        token_ids: [B, S] int32; row b's text lies in the slots [begin[b], end[b]), what is outside is no text.
        begin: [B] int32.
        prompt_end: [B] int32, first slot behind the prompt.
        end: [B] int32.
    """

    token_ids: jax.Array
    begin: jax.Array
    prompt_end: jax.Array
    end: jax.Array


class Penalties(NamedTuple):
    """The settings of each row; see `SamplingConfig` for what they mean.

    Attributes:
        repetition, presence, frequency: [B] float32; 1, 0 and 0 are off.
        no_repeat_ngram: [B] int32, 0 is off.
        min_new_tokens: [B] int32.
        bad_words: [W, M] int32, token ids that must not follow each other, filled up with -1 at the left.
    """

    repetition: jax.Array
    presence: jax.Array
    frequency: jax.Array
    no_repeat_ngram: jax.Array
    min_new_tokens: jax.Array
    bad_words: jax.Array


def apply_penalties(
    logits: jax.Array, context: TokenHistory, penalties: Penalties, steps: jax.Array, stop_ids: jax.Array
) -> jax.Array:
    """Logits [B, V] after the penalties, in the order: repetition, frequency and presence, then what is forbidden.

    A part that no row asks for costs nothing.

    Args:
        logits: [B, V] float32.
        context: the texts so far.
        penalties: the settings.
        steps: [B] int32, new tokens of each text so far.
        stop_ids: [K] int32, forbidden to a row of fewer new tokens than `min_new_tokens`; ids outside of V are none.
    """
    punishes = jnp.any(
        (penalties.repetition != 1.0) | (penalties.presence != 0.0) | (penalties.frequency != 0.0)
    )
    logits = jax.lax.cond(punishes, lambda x: _punish(x, context, penalties), lambda x: x, logits)
    forbids = jnp.any((penalties.no_repeat_ngram > 0) | (penalties.min_new_tokens > 0)) | jnp.any(
        penalties.bad_words[:, -1] >= 0
    )
    return jax.lax.cond(
        forbids, lambda x: _forbid(x, context, penalties, steps, stop_ids), lambda x: x, logits
    )


def common_suffix(context: TokenHistory, longest: jax.Array | int) -> jax.Array:
    """[B, S] int32: how many tokens before slot s equal those before the text's end, up to `longest`.

    Tokens outside of the text equal none.
    """
    token_ids = context.token_ids
    slots = jnp.arange(token_ids.shape[1])

    def compare(k, carry):
        length, shifted, alike = carry
        shifted = jnp.pad(shifted[:, :-1], ((0, 0), (1, 0)))  # the token k + 1 slots before each
        last = jnp.take_along_axis(token_ids, jnp.maximum(context.end - 1 - k, 0)[:, None], axis=1)
        inside = (slots - 1 - k >= context.begin[:, None]) & (context.end - 1 - k >= context.begin)[:, None]
        alike = alike & inside & (shifted == last)
        return length + alike, shifted, alike

    start = (jnp.zeros_like(token_ids), token_ids, jnp.ones(token_ids.shape, bool))
    return jax.lax.fori_loop(0, longest, compare, start)[0]


def _punish(logits: jax.Array, context: TokenHistory, penalties: Penalties) -> jax.Array:
    seen = _count(logits, context, context.begin) > 0
    repetition = penalties.repetition[:, None]
    logits = jnp.where(seen, jnp.where(logits < 0, logits * repetition, logits / repetition), logits)
    count = _count(logits, context, context.prompt_end)
    return logits - penalties.frequency[:, None] * count - penalties.presence[:, None] * (count > 0)


def _count(logits: jax.Array, context: TokenHistory, begin: jax.Array) -> jax.Array:
    """[B, V] float32: how often each token stands in the slots [begin, end)."""
    slots = jnp.arange(context.token_ids.shape[1])
    counted = (slots >= begin[:, None]) & (slots < context.end[:, None])
    return _add(jnp.zeros_like(logits), context.token_ids, counted)


def _forbid(
    logits: jax.Array, context: TokenHistory, penalties: Penalties, steps: jax.Array, stop_ids: jax.Array
) -> jax.Array:
    short = (steps < penalties.min_new_tokens)[:, None]
    forbidden = (  # ids [B, N], and which of them
        (context.token_ids, _ends_of_ngrams(context, penalties.no_repeat_ngram)),
        _ends_of_bad_words(context, penalties.bad_words),
        (jnp.broadcast_to(stop_ids, (logits.shape[0], *stop_ids.shape)), short & (stop_ids >= 0)),
    )
    ids, which = (jnp.concatenate(parts, axis=1) for parts in zip(*forbidden, strict=True))
    return jnp.where(_add(jnp.zeros_like(logits), ids, which) > 0, -jnp.inf, logits)


def _ends_of_ngrams(context: TokenHistory, size: jax.Array) -> jax.Array:
    """Slots [B, S] that end an n-gram of the text which its last n - 1 tokens begin."""
    slots = jnp.arange(context.token_ids.shape[1])
    # no text repeats more than it holds
    before = common_suffix(context, jnp.minimum(jnp.max(size), slots.size) - 1)
    inside = (slots >= context.begin[:, None]) & (slots < context.end[:, None])
    ends = inside & (size > 0)[:, None] & (before >= size[:, None] - 1)
    # an n-gram lies within the text: its first tokens do, too
    return ends & (slots - (size[:, None] - 1) >= context.begin[:, None])


def _ends_of_bad_words(context: TokenHistory, words: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The last id [B, W] of each word, and whether the text ends with all before it."""
    size = words.shape[1]
    # the last M - 1 tokens of each text; -2 where it is shorter, which no word has
    slots = context.end[:, None] - jnp.arange(size - 1, 0, -1)
    tail = jnp.take_along_axis(context.token_ids, jnp.maximum(slots, 0), axis=1)
    tail = jnp.where(slots >= context.begin[:, None], tail, -2)
    begun = ((words[None, :, :-1] == tail[:, None]) | (words[None, :, :-1] < 0)).all(-1) & (words[:, -1] >= 0)
    return jnp.broadcast_to(words[:, -1], begun.shape), begun


def _add(counts: jax.Array, token_ids: jax.Array, which: jax.Array) -> jax.Array:
    """Counts [B, V] and one more at each id [B, N] where `which`; ids outside of V are passed over."""
    rows = jnp.arange(counts.shape[0])[:, None]
    # a negative index would count from the end
    token_ids = jnp.where(token_ids < 0, counts.shape[1], token_ids)
    return counts.at[rows, token_ids].add(which.astype(counts.dtype), mode="drop")
