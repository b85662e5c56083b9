"""Contrastive search: of the most probable tokens, take one that is unlike the text so far.

Each of the k most probable tokens is run through the model. The chosen one has the largest
(1 - alpha) * probability - alpha * (largest cosine between its hidden state and those of the text before it), where
hidden states are those after the last LayerNorm. The search is deterministic.

A text has k rows of the cache, which differ only at the newest position, where each candidate has its keys and values
until one of them is chosen. So one position is all that is ever copied.

Source: Su et al. 2022, "A Contrastive Framework for Neural Text Generation".
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp

from gpt2jax.generation.cached_model import DecodingParams, forward_with_cache, lm_head
from gpt2jax.generation.decoding import (
    DecodeParams,
    DecoderSpec,
    DecodeState,
    bucket,
    is_running,
    process_logits,
    record_tokens,
    token_history,
)
from gpt2jax.generation.kv_cache import Cache, init_cache
from gpt2jax.generation.prefill import PaddedPrompts, repeat_rows

_SHORTEST_PROMPT = 8

# the cache of B * k rows, and the hidden states [B, S, D]
CacheAndStates = tuple[Cache, jax.Array]


@dataclasses.dataclass(frozen=True)
class ContrastiveSearch:
    """Contrastive search among `num_candidates` tokens, k."""

    num_candidates: int
    max_rows = None
    has_drafts = False

    def extra_positions(self, new_tokens: int) -> int:
        """Return room for all new tokens."""
        return 1 + new_tokens

    def prefill(self, spec: DecoderSpec, params: DecodingParams, prompts: PaddedPrompts) -> CacheAndStates:
        """Return cache and hidden states of all prompt tokens."""
        length = prompts.token_ids.shape[1]
        token_ids = prompts.token_ids[:, : bucket(prompts.length, _SHORTEST_PROMPT, length)]
        return prefill_states(
            spec.without_sampling, params, token_ids, prompts.padding, length, self.num_candidates
        )

    def decode(
        self,
        spec: DecoderSpec,
        params: DecodingParams,
        cache: CacheAndStates,
        state: DecodeState,
        settings: DecodeParams,
        until: jax.Array | int,
    ) -> tuple[CacheAndStates, DecodeState]:
        """Decode a token at a time."""
        return jax.lax.while_loop(
            lambda carry: is_running(carry[1], until),
            lambda carry: _decode_token(spec, params, *carry, settings, self.num_candidates),
            (cache, state),
        )


@functools.partial(jax.jit, static_argnames=("spec", "length", "num_candidates"))
def prefill_states(
    spec: DecoderSpec,
    params: DecodingParams,
    token_ids: jax.Array,
    padding: jax.Array,
    length: int,
    num_candidates: int,
) -> CacheAndStates:
    """Run whole prompts.

    Args:
        spec: static.
        params: from `prepare_decoding_params`.
        token_ids: [B, T] int32, T at most S; what comes after the prompts may be anything.
        padding: [B] int32, unused positions at the left.
        length, num_candidates: S and k, static.

    Returns:
        The cache of B * k rows, and the hidden states [B, S, D].
    """
    cache = init_cache(spec.config, len(token_ids), length, spec.precision.activation_dtype)
    hidden, cache = forward_with_cache(params, spec.config, token_ids, cache, 0, padding, spec.precision)
    hidden = jnp.pad(hidden, ((0, 0), (0, length - hidden.shape[1]), (0, 0)))
    return repeat_rows(cache, spec.config.n_head, num_candidates), hidden


def _decode_token(
    spec: DecoderSpec,
    params: DecodingParams,
    cache_and_states: CacheAndStates,
    state: DecodeState,
    settings: DecodeParams,
    num_candidates: int,
) -> tuple[CacheAndStates, DecodeState]:
    """Decode one new token of each row, and its hidden state."""
    (cache, hidden), position = cache_and_states, state.cache_position
    newest = jax.lax.dynamic_slice_in_dim(hidden, position - 1, 1, axis=1)[:, 0]
    logits = lm_head(params, newest, spec.precision)
    processed = process_logits(spec, logits, token_history(state, settings), settings)
    probabilities, token_ids = jax.lax.top_k(jax.nn.softmax(processed), num_candidates)  # [B, k]
    states, cache = forward_with_cache(
        params,
        spec.config,
        token_ids.reshape(-1, 1),
        cache,
        position,
        jnp.repeat(settings.padding, num_candidates),
        spec.precision,
    )
    states = states.reshape(*token_ids.shape, -1)  # [B, k, D]
    cosines = jnp.einsum("bkd,bsd->bks", _normalize(states), _normalize(hidden))
    positions = jnp.arange(hidden.shape[1])
    inside = (positions >= settings.padding[:, None]) & (positions < position)
    similarity = jnp.where(inside[:, None], cosines, -1.0).max(-1)
    alpha = settings.penalty_alpha
    best = jnp.argmax((1 - alpha) * probabilities - alpha * similarity, axis=-1)[:, None]  # [B, 1]
    chosen = jnp.take_along_axis(states, best[..., None], axis=1)
    hidden = jax.lax.dynamic_update_slice_in_dim(hidden, chosen, position, axis=1)
    tokens = jnp.take_along_axis(token_ids, best, axis=1)[:, 0]
    cache = _keep_candidate(cache, position, best, num_candidates)
    return (cache, hidden), record_tokens(state, settings, tokens, logits)


def _normalize(x: jax.Array) -> jax.Array:
    """Scale vectors to unit length, in float32."""
    x = x.astype(jnp.float32)
    return x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-12)


def _keep_candidate(cache: Cache, position: jax.Array, best: jax.Array, num_candidates: int) -> Cache:
    """Copy the chosen candidate's keys and values at a position to all rows of its text; best [B, 1]."""

    def keep(x: jax.Array) -> jax.Array:
        column = jax.lax.dynamic_slice_in_dim(x, position, 1, axis=1)
        each = column.reshape(best.shape[0], num_candidates, -1)  # [B, k, N * H]
        each = jnp.take_along_axis(each, best[..., None], axis=1)
        column = jnp.repeat(each, num_candidates, axis=1).reshape(column.shape)
        return jax.lax.dynamic_update_slice_in_dim(x, column, position, axis=1)

    return jax.tree.map(keep, cache)
