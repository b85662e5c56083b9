"""The compiled part of generation: prompts into the cache in chunks, then one `while_loop` for all new tokens.

Programs are compiled for shapes only: rows B, slots S. Prompts, lengths, limits, seeds, stop ids and settings are
arrays. `decode` runs up to a slot that is an array as well, so that one program serves a whole generation in one call,
a few steps at a time where the host looks for stop strings, and one step at a time for a stream.

All rows end at the same slot: slot s of row b holds position s - padding[b]. The last token of the prompts is left to
`decode`, so that no other program needs logits. Slots at or behind the newest may hold anything: each is written
before it is read.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from gpt2jax.generation.cached_model import DecodingParams, forward_with_cache, lm_head
from gpt2jax.generation.kv_cache import Cache, grow_cache, init_cache
from gpt2jax.generation.logits_processors import Penalties, TokenHistory, apply_penalties
from gpt2jax.generation.sampling import Filters, log_probability, sample
from gpt2jax.model.config import GPT2Config
from gpt2jax.ops.precision import Precision

# changes logits [B, V] by what the text holds so far; a pure function, compiled with the rest
LogitsProcessor = Callable[[jax.Array, TokenHistory], jax.Array]


class DecodeParams(NamedTuple):
    """What is asked for, and stays the same over the steps.

    Attributes:
        padding: [B] int32, slots at the left of each prompt that hold nothing.
        prompt_end: scalar int32, the slot of the first new token; may lie before the first slot, where a text that
            went past the context goes on.
        limits: [B] int32, new tokens a row may have; 0 for rows that only fill up the batch.
        seeds: [B] uint32.
        stop_ids: [K] int32, token ids that end a row; filled up with -1.
        filters: how tokens are chosen, each [B].
        penalties: how logits are changed before.
    """

    padding: jax.Array
    prompt_end: jax.Array
    limits: jax.Array
    seeds: jax.Array
    stop_ids: jax.Array
    filters: Filters
    penalties: Penalties


class DecodeState(NamedTuple):
    """What there is so far.

    Attributes:
        token_ids: [B, S] int32, prompts and new tokens.
        logprobs: [B, S] float32, of the new tokens under softmax(logits), before penalties and filters.
        top_ids, top_logprobs: [B, S, n], the n most probable at each new token; n may be 0.
        lengths: [B] int32, new tokens of each row so far, a stop token included.
        done: [B] bool.
        slot: scalar int32, slots filled so far.
        drafted, accepted: scalar int32, tokens that speculation guessed, and how many were right.
    """

    token_ids: jax.Array
    logprobs: jax.Array
    top_ids: jax.Array
    top_logprobs: jax.Array
    lengths: jax.Array
    done: jax.Array
    slot: jax.Array
    drafted: jax.Array
    accepted: jax.Array


def context_of(progress: DecodeState, request: DecodeParams) -> TokenHistory:
    """The texts so far, as penalties and processors see them."""
    rows = request.padding.shape
    prompt_end = jnp.maximum(jnp.broadcast_to(request.prompt_end, rows), request.padding)
    return TokenHistory(
        progress.token_ids, request.padding, prompt_end, jnp.broadcast_to(progress.slot, rows)
    )


def process_logits(
    logits: jax.Array, context: TokenHistory, request: DecodeParams, *, processor: LogitsProcessor | None
) -> jax.Array:
    """Logits [B, V] behind penalties and processor."""
    steps = context.end - request.prompt_end
    logits = apply_penalties(logits, context, request.penalties, steps, request.stop_ids)
    if processor is None:
        return logits
    changed = processor(logits, context)
    if getattr(changed, "shape", None) != logits.shape:
        given = getattr(changed, "shape", type(changed).__name__)
        raise ValueError(f"processor gave {given}; expected logits of shape {logits.shape}")
    return changed


def choose(
    logits: jax.Array, context: TokenHistory, request: DecodeParams, *, processor: LogitsProcessor | None
) -> jax.Array:
    """The next token [B] of each text, from logits [B, V]."""
    # the key of a draw is made of the row's seed and the step alone: a row does not depend on its batch
    steps = context.end - request.prompt_end
    keys = jax.vmap(lambda seed, step: jax.random.fold_in(jax.random.key(seed), step))(request.seeds, steps)
    return sample(process_logits(logits, context, request, processor=processor), keys, request.filters)


def record(progress: DecodeState, request: DecodeParams, tokens: jax.Array, logits: jax.Array) -> DecodeState:
    """Adds one token [B], chosen from logits [B, V], to every row that is not done."""
    slot, active = progress.slot, ~progress.done
    tokens = jnp.where(active, tokens, 0)
    lengths = progress.lengths + active
    stopped = active & (tokens[:, None] == request.stop_ids).any(-1)
    return record_scores(progress, tokens[:, None], logits[:, None])._replace(
        lengths=lengths,
        done=progress.done | stopped | (lengths >= request.limits),
        slot=slot + 1,
    )


def record_scores(progress: DecodeState, tokens: jax.Array, logits: jax.Array) -> DecodeState:
    """Writes tokens [B, T] and what their logits [B, T, V] say of them from the present slot on."""

    def write(array, values):
        return jax.lax.dynamic_update_slice_in_dim(array, values.astype(array.dtype), progress.slot, axis=1)

    flat = logits.reshape(-1, logits.shape[-1])
    logprobs = log_probability(flat, tokens.reshape(-1)).reshape(tokens.shape)
    progress = progress._replace(
        token_ids=write(progress.token_ids, tokens), logprobs=write(progress.logprobs, logprobs)
    )
    count = progress.top_ids.shape[-1]
    if count:
        values, ids = jax.lax.top_k(flat, count)
        values = values - jax.nn.logsumexp(flat, axis=-1, keepdims=True)
        progress = progress._replace(
            top_ids=write(progress.top_ids, ids.reshape(*tokens.shape, count)),
            top_logprobs=write(progress.top_logprobs, values.reshape(*tokens.shape, count)),
        )
    return progress


def running(progress: DecodeState, until: jax.Array | int) -> jax.Array:
    """Whether there is something to do before slot `until`."""
    return (progress.slot < until) & ~progress.done.all()


def step(
    params: DecodingParams,
    cache: Cache,
    progress: DecodeState,
    request: DecodeParams,
    *,
    config: GPT2Config,
    precision: Precision,
    processor: LogitsProcessor | None,
) -> tuple[Cache, DecodeState]:
    """One new token of each row."""
    newest = jax.lax.dynamic_slice_in_dim(progress.token_ids, progress.slot - 1, 1, axis=1)
    hidden, cache = forward_with_cache(
        params, config, newest, cache, progress.slot - 1, request.padding, precision
    )
    logits = lm_head(params, hidden[:, 0], precision)
    tokens = choose(logits, context_of(progress, request), request, processor=processor)
    return cache, record(progress, request, tokens, logits)


@functools.partial(jax.jit, static_argnames=("config", "precision", "processor"), donate_argnames=("cache",))
def decode(
    params: DecodingParams,
    cache: Cache,
    progress: DecodeState,
    request: DecodeParams,
    until: jax.Array | int,
    *,
    config: GPT2Config,
    precision: Precision,
    processor: LogitsProcessor | None = None,
) -> tuple[Cache, DecodeState]:
    """Generates until each row is done or slot `until` is reached.

    Args:
        params: from `inference.prepare_decoding_params`.
        cache: S slots, as many as `progress` has, filled up to the last but one of its tokens; its buffers are
            reused, so the array passed in must not be used again.
        progress: at least one token a row.
        request: the settings.
        until: scalar int, at most S.
        config, precision, processor: static.

    Returns:
        The cache and the progress.
    """
    once = functools.partial(step, params, config=config, precision=precision, processor=processor)
    return jax.lax.while_loop(
        lambda carry: running(carry[1], until),
        lambda carry: once(*carry, request),
        (cache, progress),
    )


@functools.partial(jax.jit, static_argnames=("config", "precision"), donate_argnames=("cache",))
def prefill_chunk(
    params: DecodingParams,
    token_ids: jax.Array,
    cache: Cache,
    slot: jax.Array | int,
    padding: jax.Array,
    *,
    config: GPT2Config,
    precision: Precision,
) -> Cache:
    """The cache with the keys and values of token_ids [B, C] in its slots from `slot` on; `slot` + C is at most S."""
    return forward_with_cache(params, config, token_ids, cache, slot, padding, precision)[1]


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def empty_cache(config: GPT2Config, batch: int, slots: int, dtype: jnp.dtype) -> Cache:
    """`init_cache` as one program."""
    return init_cache(config, batch, slots, dtype)


@functools.partial(jax.jit, static_argnums=2)
def grow(cache: Cache, progress: DecodeState, slots: int) -> tuple[Cache, DecodeState]:
    """The same with room for `slots` slots."""

    def wider(x):
        widths = [(0, 0), (0, slots - x.shape[1])] + [(0, 0)] * (x.ndim - 2)
        return jnp.pad(x, widths)

    per_slot = {name: wider(getattr(progress, name)) for name in PER_SLOT}
    return grow_cache(cache, slots), progress._replace(**per_slot)


PER_SLOT = ("token_ids", "logprobs", "top_ids", "top_logprobs")


@functools.partial(jax.jit, static_argnums=2)
def broadcast_prefix(cache: Cache, padding: jax.Array, heads: int) -> Cache:
    """The cache of one text, without padding, as that of rows which all begin with it.

    Args:
        cache: pairs [N, S, H].
        padding: [B] int32, of the rows.
        heads: N.

    Returns:
        Pairs [B * N, S, H].
    """

    def rows(x):
        moved = jax.vmap(lambda shift: jnp.roll(x, shift, axis=1))(padding)
        return moved.reshape(padding.shape[0] * heads, *x.shape[1:])

    return jax.tree.map(rows, cache)


def repeat_decode_params(request: DecodeParams, times: int) -> DecodeParams:
    """What is asked for each row, `times` times in a row."""

    def rows(x):
        return jnp.repeat(x, times, axis=0)

    penalties = request.penalties
    return request._replace(
        padding=rows(request.padding),
        limits=rows(request.limits),
        seeds=rows(request.seeds),
        filters=jax.tree.map(rows, request.filters),
        penalties=jax.tree.map(rows, penalties)._replace(bad_words=penalties.bad_words),
    )


def repeat_rows(cache: Cache, heads: int, times: int) -> Cache:
    """Each row `times` times in a row: pairs [B * N, S, H] -> [B * times * N, S, H]."""

    def repeated(x):
        rows = x.reshape(-1, heads, *x.shape[1:])
        return jnp.repeat(rows, times, axis=0).reshape(-1, *x.shape[1:])

    return jax.tree.map(repeated, cache)
