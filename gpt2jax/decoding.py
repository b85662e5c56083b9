"""The compiled part of generation: first token, then one `while_loop` over the cache for all that follow.

Programs are compiled for shapes only: `prefill` (in inference.py) for a batch and a prompt bucket, `decode`
for a batch, a prompt and a new-token bucket. Prompts, lengths, limits, seeds, stop ids and filters are
arrays. `decode` runs up to a step that is an array as well, so that one program serves a whole generation in
one call, a few steps at a time where the host looks for stop strings, and one step at a time for a stream.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gpt2jax.cache import Cache, grow_cache
from gpt2jax.config import GPT2Config
from gpt2jax.inference import InferenceParams, forward_cached, next_logits
from gpt2jax.precision import Precision
from gpt2jax.sampling import Filters, sample


class Request(NamedTuple):
    """What is asked for, and stays the same over the steps.

    Attributes:
        padding: [B] int32, slots at the left of each prompt that hold nothing.
        limits: [B] int32, new tokens a row may have; 0 for rows that only fill up the batch.
        seeds: [B] uint32.
        stop_ids: [K] int32, token ids that end a row; filled up with -1.
        filters: how tokens are chosen.
    """

    padding: jax.Array
    limits: jax.Array
    seeds: jax.Array
    stop_ids: jax.Array
    filters: Filters


class Progress(NamedTuple):
    """What has been generated.

    Attributes:
        tokens: [B, M] int32, M the new-token bucket.
        logprobs: [B, M] float32.
        lengths: [B] int32, tokens of each row so far, a stop token included.
        done: [B] bool.
        step: int32, tokens of the longest row so far.
    """

    tokens: jax.Array
    logprobs: jax.Array
    lengths: jax.Array
    done: jax.Array
    step: jax.Array


def choose(
    logits: jax.Array, request: Request, step: jax.Array | int, *, window: int | None
) -> tuple[jax.Array, jax.Array]:
    """Token ids [B] and their log-probabilities [B] for step `step`, from logits [B, V]."""
    # the key of a draw is made of the row's seed and the step alone: a row does not depend on its batch
    keys = jax.vmap(lambda seed: jax.random.fold_in(jax.random.key(seed), step))(request.seeds)
    return sample(logits, keys, request.filters, window=window)


def record(progress: Progress, request: Request, token: jax.Array, logprob: jax.Array) -> Progress:
    """Adds one token [B] and its log-probability [B] to every row that is not done."""
    step, active = progress.step, ~progress.done
    token = jnp.where(active, token, 0)[:, None]
    logprob = jnp.where(active, logprob, 0.0)[:, None]
    lengths = progress.lengths + active
    stopped = active & (token == request.stop_ids).any(-1)
    return Progress(
        tokens=jax.lax.dynamic_update_slice(progress.tokens, token, (0, step)),
        logprobs=jax.lax.dynamic_update_slice(progress.logprobs, logprob, (0, step)),
        lengths=lengths,
        done=progress.done | stopped | (lengths >= request.limits),
        step=step + 1,
    )


_choose_first = jax.jit(choose, static_argnames="window")


@functools.partial(jax.jit, static_argnames="max_tokens")
def _record_first(request: Request, token: jax.Array, logprob: jax.Array, *, max_tokens: int) -> Progress:
    batch = token.shape[0]
    empty = Progress(
        tokens=jnp.zeros((batch, max_tokens), jnp.int32),
        logprobs=jnp.zeros((batch, max_tokens), jnp.float32),
        lengths=jnp.zeros(batch, jnp.int32),
        done=request.limits <= 0,
        step=jnp.int32(0),
    )
    return record(empty, request, token, logprob)


def first_tokens(logits: jax.Array, request: Request, *, max_tokens: int, window: int | None) -> Progress:
    """Chooses the first new token of each row from the prompts' logits [B, V]; room for M = `max_tokens`.

    Two programs, so that the sampler is not compiled again for every M.
    """
    token, logprob = _choose_first(logits, request, np.int32(0), window=window)
    return _record_first(request, token, logprob, max_tokens=max_tokens)


@functools.partial(jax.jit, static_argnames=("config", "precision", "window"), donate_argnames=("cache",))
def decode(
    params: InferenceParams,
    cache: Cache,
    progress: Progress,
    request: Request,
    until: jax.Array | int,
    *,
    config: GPT2Config,
    precision: Precision,
    window: int | None,
) -> tuple[Cache, Progress]:
    """Generates until each row is done or `until` tokens of the longest row are reached.

    Args:
        params: from `inference.derive_params`.
        cache: prompt slots followed by M slots, the shape of `progress.tokens`; its buffers are reused, so
            the array passed in must not be used again.
        progress: at least the first tokens.
        request: the settings.
        until: scalar int, at most M.
        config, precision, window: static.

    Returns:
        The cache and the progress.
    """
    prompt_slots = cache[0][0].shape[1] - progress.tokens.shape[1]

    def running(carry):
        _, progress = carry
        return (progress.step < until) & ~progress.done.all()

    def body(carry):
        cache, progress = carry
        newest = jax.lax.dynamic_index_in_dim(progress.tokens, progress.step - 1, axis=1)
        slot = prompt_slots + progress.step - 1
        hidden, cache = forward_cached(params, config, newest, cache, slot, request.padding, precision)
        logits = next_logits(params, hidden[:, 0], precision)
        token, logprob = choose(logits, request, progress.step, window=window)
        return cache, record(progress, request, token, logprob)

    return jax.lax.while_loop(running, body, (cache, progress))


grow = jax.jit(grow_cache, static_argnums=1)
