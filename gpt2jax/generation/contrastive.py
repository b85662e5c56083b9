"""Contrastive search: of the most probable tokens the one that is least like what the text has said already.

Each of the k most probable tokens is run through the model. The chosen one has the largest
(1 - alpha) * probability - alpha * (largest cosine between its hidden state and those of the text before it), where
hidden states are those behind the last LayerNorm. There is no chance in it.

A text has k rows of the cache, alike but for the newest slot, where each candidate has its keys and values until one of
them is chosen; so nothing but one slot is ever copied.

Source: Su et al. 2022, "A Contrastive Framework for Neural Text Generation".
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from gpt2jax.generation.cached_model import DecodingParams, forward_with_cache, lm_head
from gpt2jax.generation.decoding import (
    DecodeParams,
    DecodeState,
    LogitsProcessor,
    context_of,
    process_logits,
    record,
    repeat_rows,
    running,
)
from gpt2jax.generation.kv_cache import Cache, init_cache
from gpt2jax.model.config import GPT2Config
from gpt2jax.ops.precision import Precision


@functools.partial(jax.jit, static_argnames=("slots", "candidates", "config", "precision"))
def read_prompts(
    params: DecodingParams,
    token_ids: jax.Array,
    padding: jax.Array,
    *,
    slots: int,
    candidates: int,
    config: GPT2Config,
    precision: Precision,
) -> tuple[Cache, jax.Array]:
    """Runs whole prompts.

    Args:
        params: from `inference.prepare_decoding_params`.
        token_ids: [B, T] int32, T at most S; what lies behind the prompts may be anything.
        padding: [B] int32, slots at the left that hold nothing.
        slots, candidates: S and k.
        config, precision: static.

    Returns:
        The cache of B * k rows, and the hidden states [B, S, D].
    """
    cache = init_cache(config, len(token_ids), slots, precision.activation_dtype)
    hidden, cache = forward_with_cache(params, config, token_ids, cache, 0, padding, precision)
    hidden = jnp.pad(hidden, ((0, 0), (0, slots - hidden.shape[1]), (0, 0)))
    return repeat_rows(cache, config.n_head, candidates), hidden


@functools.partial(
    jax.jit,
    static_argnames=("candidates", "config", "precision", "processor"),
    donate_argnames=("cache", "hidden"),
)
def decode_contrastive(
    params: DecodingParams,
    cache: Cache,
    hidden: jax.Array,
    progress: DecodeState,
    request: DecodeParams,
    until: jax.Array | int,
    alpha: jax.Array | float,
    *,
    candidates: int,
    config: GPT2Config,
    precision: Precision,
    processor: LogitsProcessor | None = None,
) -> tuple[Cache, jax.Array, DecodeState]:
    """As `decoding.decode`, by contrastive search.

    Args:
        cache, hidden: from `read_prompts`, filled with all tokens of `progress`; the cache has room for the tokens up
            to `until`, which are put into it.
        alpha: scalar float32, 0 (greedy) to 1.
        candidates: k, static.

    Returns:
        Cache, hidden states and progress.
    """
    static = {"config": config, "precision": precision, "processor": processor}

    def body(carry):
        cache, hidden, progress = carry
        return _step(params, cache, hidden, progress, request, alpha, candidates=candidates, **static)

    return jax.lax.while_loop(lambda carry: running(carry[2], until), body, (cache, hidden, progress))


def _step(
    params: DecodingParams,
    cache: Cache,
    hidden: jax.Array,
    progress: DecodeState,
    request: DecodeParams,
    alpha: jax.Array | float,
    *,
    candidates: int,
    config: GPT2Config,
    precision: Precision,
    processor: LogitsProcessor | None,
) -> tuple[Cache, jax.Array, DecodeState]:
    """One new token of each row, and its state."""
    slot = progress.slot
    newest = jax.lax.dynamic_slice_in_dim(hidden, slot - 1, 1, axis=1)[:, 0]
    logits = lm_head(params, newest, precision)
    allowed = process_logits(logits, context_of(progress, request), request, processor=processor)
    probabilities, token_ids = jax.lax.top_k(jax.nn.softmax(allowed), candidates)  # [B, k]
    states, cache = forward_with_cache(
        params,
        config,
        token_ids.reshape(-1, 1),
        cache,
        slot,
        jnp.repeat(request.padding, candidates),
        precision,
    )
    states = states.reshape(*token_ids.shape, -1)  # [B, k, D]
    cosines = jnp.einsum("bkd,bsd->bks", _unit(states), _unit(hidden))
    slots = jnp.arange(hidden.shape[1])
    inside = (slots >= request.padding[:, None]) & (slots < slot)
    likeness = jnp.where(inside[:, None], cosines, -1.0).max(-1)
    best = jnp.argmax((1 - alpha) * probabilities - alpha * likeness, axis=-1)[:, None]  # [B, 1]
    chosen = jnp.take_along_axis(states, best[..., None], axis=1)
    hidden = jax.lax.dynamic_update_slice_in_dim(hidden, chosen, slot, axis=1)
    tokens = jnp.take_along_axis(token_ids, best, axis=1)[:, 0]
    cache = _keep(cache, slot, best, candidates)
    return cache, hidden, record(progress, request, tokens, logits)


def _unit(x: jax.Array) -> jax.Array:
    x = x.astype(jnp.float32)
    return x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-12)


def _keep(cache: Cache, slot: jax.Array, best: jax.Array, candidates: int) -> Cache:
    """The cache in which all rows of a text have the chosen one's keys and values in a slot; best [B, 1]."""

    def keep(x):
        column = jax.lax.dynamic_slice_in_dim(x, slot, 1, axis=1)
        each = column.reshape(best.shape[0], candidates, -1)  # [B, k, N * H]
        each = jnp.take_along_axis(each, best[..., None], axis=1)
        column = jnp.repeat(each, candidates, axis=1).reshape(column.shape)
        return jax.lax.dynamic_update_slice_in_dim(x, column, slot, axis=1)

    return jax.tree.map(keep, cache)
