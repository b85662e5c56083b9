"""Several tokens a step: guesses that cost little, checked by one pass of the model over all of them.

The model chooses each token as it would without guesses, by the same seed and the same step; a guess counts if it is
that token. So the text is the one of plain decoding, sampled or greedy, whatever the guesses are: they decide the speed
alone. A pass over a few tokens costs little more than one over one token, for what takes time is reading the weights.

Sources: Leviathan et al. 2023, "Fast Inference from Transformers via Speculative Decoding" (a draft model; there the
two draw independently and correct, here they draw with common random numbers); Saxena 2023, "Prompt Lookup Decoding".
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from gpt2jax.generation.cached_model import DecodingParams, forward_with_cache, lm_head
from gpt2jax.generation.decoding import (
    DecodeParams,
    DecodeState,
    LogitsProcessor,
    choose,
    context_of,
    record_scores,
    repeat_decode_params,
    running,
    step,
)
from gpt2jax.generation.kv_cache import Cache
from gpt2jax.generation.logits_processors import TokenHistory, common_suffix
from gpt2jax.model.config import GPT2Config
from gpt2jax.ops.precision import Precision

# a guess by lookup wants this many equal tokens in front of it, and looks at no more than that
_SHORTEST, _LONGEST = 2, 4


class Draft(NamedTuple):
    """What may come next.

    Attributes:
        token_ids: [1, K] int32.
        found: scalar bool, whether they are guesses at all.
    """

    token_ids: jax.Array
    found: jax.Array


def prompt_lookup(context: TokenHistory, size: int) -> Draft:
    """What followed the last few tokens where they stood before: the longest such place, of equal ones the latest.

    Behind the end of the text it goes on from that place again, as a text would that says the same over and over.

    Args:
        context: one text, [1, S].
        size: K, tokens to guess.
    """
    slots = jnp.arange(context.token_ids.shape[1])
    length = common_suffix(context, _LONGEST)
    length = jnp.where((slots < context.end[:, None]) & (length >= _SHORTEST), length, 0)[0]
    place = jnp.argmax(length * slots.size + slots)
    found = length[place] > 0
    period = jnp.maximum(context.end[0] - place, 1)
    guess = jnp.take(context.token_ids, place + jnp.arange(size) % period, axis=1, mode="clip")
    return Draft(guess, found)


@functools.partial(
    jax.jit, static_argnames=("size", "config", "precision", "processor"), donate_argnames=("cache",)
)
def decode_with_lookup(
    params: DecodingParams,
    cache: Cache,
    progress: DecodeState,
    request: DecodeParams,
    until: jax.Array | int,
    *,
    size: int,
    config: GPT2Config,
    precision: Precision,
    processor: LogitsProcessor | None = None,
) -> tuple[Cache, DecodeState]:
    """As `decoding.decode` for one row, with guesses from the text itself, `size` at a time.

    The cache has at least `size` slots more than the text will need; up to so many tokens may come behind `until`.
    """
    static = {"config": config, "precision": precision, "processor": processor}

    def look(progress):
        return prompt_lookup(context_of(progress, request), size)

    def plain(carry):
        cache, progress, _ = carry
        cache, progress = step(params, cache, progress, request, **static)
        return cache, progress, look(progress)

    def body(carry):
        # where there is no guess, one token at a time is cheaper
        cache, progress, guess = jax.lax.while_loop(
            lambda carry: running(carry[1], until) & ~carry[2].found, plain, carry
        )
        cache, progress = verify(params, cache, progress, request, guess, until, **static)
        return cache, progress, look(progress)

    carry = (cache, progress, look(progress))
    cache, progress, _ = jax.lax.while_loop(lambda carry: running(carry[1], until), body, carry)
    return cache, progress


@functools.partial(
    jax.jit,
    static_argnames=("size", "config", "precision", "processor", "draft_config"),
    donate_argnames=("cache", "draft_cache"),
)
def decode_with_draft(
    params: DecodingParams,
    cache: Cache,
    draft_params: DecodingParams,
    draft_cache: Cache,
    progress: DecodeState,
    request: DecodeParams,
    until: jax.Array | int,
    *,
    size: int,
    config: GPT2Config,
    draft_config: GPT2Config,
    precision: Precision,
    processor: LogitsProcessor | None = None,
) -> tuple[Cache, Cache, DecodeState]:
    """As `decoding.decode` for one row, with `size` guesses a step from a smaller model.

    Both caches have `size` slots more than the text will need. The draft's ids are the model's.

    Returns:
        The cache, the draft's cache and the progress.
    """
    draft = functools.partial(
        step, draft_params, config=draft_config, precision=precision, processor=processor
    )
    static = {"config": config, "precision": precision, "processor": processor}

    def body(carry):
        cache, draft_cache, progress = carry
        ahead = progress._replace(done=jnp.zeros_like(progress.done))
        # one step more than there are guesses: it puts the last guess into the draft's cache
        draft_cache, ahead = jax.lax.fori_loop(
            0, size + 1, lambda _, carry: draft(carry[0], carry[1], request), (draft_cache, ahead)
        )
        guess = jax.lax.dynamic_slice_in_dim(ahead.token_ids, progress.slot, size, axis=1)
        cache, progress = verify(
            params, cache, progress, request, Draft(guess, jnp.array(True)), until, **static
        )
        return cache, draft_cache, progress

    return jax.lax.while_loop(lambda carry: running(carry[2], until), body, (cache, draft_cache, progress))


def verify(
    params: DecodingParams,
    cache: Cache,
    progress: DecodeState,
    request: DecodeParams,
    guess: Draft,
    until: jax.Array | int,
    *,
    config: GPT2Config,
    precision: Precision,
    processor: LogitsProcessor | None,
) -> tuple[Cache, DecodeState]:
    """Chooses the token behind each guess that is right, at least one; none where nothing is left to do."""
    slot, size = progress.slot, guess.token_ids.shape[1]
    guessed = jax.lax.dynamic_update_slice_in_dim(progress.token_ids, guess.token_ids, slot, axis=1)
    inputs = jax.lax.dynamic_slice_in_dim(guessed, slot - 1, size + 1, axis=1)
    hidden, cache = forward_with_cache(params, config, inputs, cache, slot - 1, request.padding, precision)
    logits = lm_head(params, hidden[0], precision)  # [K + 1, V]
    each = repeat_decode_params(request, size + 1)
    context = context_of(progress._replace(token_ids=guessed), each)
    context = context._replace(
        token_ids=jnp.broadcast_to(guessed, (size + 1, guessed.shape[1])),
        end=slot + jnp.arange(size + 1),
    )
    tokens = choose(logits, context, each, processor=processor)

    right = (tokens[:-1] == guess.token_ids[0]) & guess.found
    agreed = jnp.cumprod(right.astype(jnp.int32)).sum()
    stops = (tokens[:, None] == request.stop_ids).any(-1)
    first_stop = jnp.where(stops.any(), jnp.argmax(stops), size + 1)
    new = jnp.minimum(jnp.minimum(agreed, first_stop) + 1, request.limits[0] - progress.lengths[0])
    new = jnp.where(running(progress, until), new, 0).astype(jnp.int32)  # sums are wider with jax_enable_x64
    lengths = progress.lengths + new
    stopped = (first_stop < new) | (lengths >= request.limits)
    used = jnp.maximum(new - 1, 0)
    progress = record_scores(progress, tokens[None], logits[None])._replace(
        lengths=lengths,
        done=progress.done | stopped,
        slot=slot + new,
        drafted=progress.drafted + jnp.where((new > 0) & guess.found, size, 0),
        accepted=progress.accepted + used,
    )
    return cache, progress
