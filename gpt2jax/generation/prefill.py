"""Prompts into the cache: left padding, cache lengths, and the compiled programs that fill it.

Batch sizes and cache lengths are rounded up to powers of two, so that one compiled program serves many calls.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from gpt2jax.generation.cached_model import DecodingParams, forward_with_cache
from gpt2jax.generation.decoding import DecoderSpec, bucket
from gpt2jax.generation.kv_cache import Cache, init_cache
from gpt2jax.generation.requests import PromptState
from gpt2jax.generation.row_sharding import ROWS, constrain_rows, share_rows
from gpt2jax.model.config import GPT2Config

# the cache of one row is read fast beside the weights, so fewer, larger sizes are compiled for it
_SHORTEST_OF_ONE_ROW, _SHORTEST_OF_ROWS = 256, 64
_SMALLEST_CHUNK = 8
# a shared beginning shorter than this is computed for each row
_SHORTEST_PREFIX = 16


@dataclasses.dataclass(frozen=True)
class PaddedPrompts:
    """Prompts as arrays on the host, all ending at one cache position.

    Attributes:
        token_ids: [B, S] int32, each prompt in the positions [padding, length).
        padding: [B] int32; length - 1 for rows that only fill the batch.
        length: length of the longest prompt.
        prefix: what all prompts begin with, if computing it once pays; else empty.
    """

    token_ids: Any
    padding: Any
    length: int
    prefix: Sequence[int] = ()


def left_pad(rows: Sequence[PromptState], cache_length: int, smallest_batch: int = 1) -> PaddedPrompts:
    """Pad prompts on the left, in a batch of a power of two."""
    length = max(len(row.token_ids) for row in rows)
    batch = bucket(len(rows), smallest_batch)
    token_ids = np.zeros((batch, cache_length), np.int32)
    padding = np.full(batch, length - 1, np.int32)
    for i, row in enumerate(rows):
        padding[i] = length - len(row.token_ids)
        token_ids[i, padding[i] : length] = row.token_ids
    prefix = _shared_prefix([row.token_ids for row in rows]) if len(rows) > 1 else ()
    return PaddedPrompts(token_ids, padding, length, prefix if len(prefix) >= _SHORTEST_PREFIX else ())


def cache_length(config: GPT2Config, needed: int, rows: int = 1) -> int:
    """Return the length of the cache that holds `needed` positions: a power of two."""
    shortest = _SHORTEST_OF_ONE_ROW if rows == 1 else _SHORTEST_OF_ROWS
    return bucket(needed, min(shortest, bucket(config.n_positions, 1)))


def next_cache_length(length: int, rows: int) -> int:
    """Return the next length of a full cache: twice for one row, less for several, whose attention costs more."""
    if rows > 1 and length > _SHORTEST_OF_ROWS and length == bucket(length, 1):
        return length * 3 // 2
    return bucket(length + 1, 1)


def fill_cache(spec: DecoderSpec, params: DecodingParams, prompts: PaddedPrompts) -> Cache:
    """Return a cache of all prompt tokens except the last, which the first decoding step reads."""
    spec = spec.without_sampling
    batch, length = prompts.token_ids.shape
    dtype, mesh = spec.precision.activation_dtype, spec.mesh
    if not prompts.prefix:
        cache = empty_cache(spec.config, batch, length, dtype, mesh)
        return _fill(spec, params, prompts.token_ids, prompts.padding, 0, prompts.length - 1, cache)
    end = len(prompts.prefix)
    single = np.zeros((1, length), np.int32)
    single[0, :end] = prompts.prefix
    cache = empty_cache(spec.config, 1, length, dtype)
    cache = _fill(spec, params, single, np.zeros(1, np.int32), 0, end, cache)
    cache = broadcast_prefix(cache, prompts.padding, spec.config.n_head, mesh)
    return _fill(spec, params, prompts.token_ids, prompts.padding, end, prompts.length - 1, cache)


def _fill(
    spec: DecoderSpec,
    params: DecodingParams,
    token_ids: Any,
    padding: Any,
    begin: int,
    end: int,
    cache: Cache,
) -> Cache:
    """Fill the cache positions [begin, end), a chunk at a time."""
    batch, length = token_ids.shape
    at_once = spec.precision.execution.prefill_tokens // batch
    if begin == 0 < end and at_once >= min(end, _SMALLEST_CHUNK):
        size = min(length, bucket(end, _SMALLEST_CHUNK), 1 << (at_once.bit_length() - 1))
        cache, begin = prefill_empty(spec, params, token_ids[:, :size], cache, padding), size
    size = min(length, max(_SMALLEST_CHUNK, length // 8))
    for position in range(begin, end, size):
        # a chunk that would exceed the cache begins earlier, and computes some positions once more
        position = min(position, length - size)
        chunk = token_ids[:, position : position + size]
        cache = prefill_chunk(spec, params, chunk, cache, np.int32(position), padding)
    return cache


@functools.partial(jax.jit, static_argnames=("spec",), donate_argnames=("cache",))
def prefill_chunk(
    spec: DecoderSpec,
    params: DecodingParams,
    token_ids: jax.Array,
    cache: Cache,
    cache_position: jax.Array | int,
    padding: jax.Array,
) -> Cache:
    """Write keys and values of token_ids [B, C] into the cache from a position on, at most S - C."""

    def fill(params, token_ids, cache, padding, cache_position):
        return forward_with_cache(
            params, spec.config, token_ids, cache, cache_position, padding, spec.precision
        )[1]

    if spec.mesh is not None and len(token_ids) > 1:  # one row is a beginning that all rows share
        fill = share_rows(spec.mesh, fill, (PartitionSpec(), ROWS, ROWS, ROWS, PartitionSpec()), ROWS)
    return fill(params, token_ids, cache, padding, cache_position)


@functools.partial(jax.jit, static_argnames=("spec",), donate_argnames=("cache",))
def prefill_empty(
    spec: DecoderSpec, params: DecodingParams, token_ids: jax.Array, cache: Cache, padding: jax.Array
) -> Cache:
    """Write keys and values of token_ids [B, C] into the first C positions of an empty cache.

    The rows go through the model with their padding behind the text, where causal attention never reads it, and
    become padded on the left as they are written.
    """
    has_padding = len(token_ids) > 1  # a single row has none
    roll = jax.vmap(functools.partial(jnp.roll, axis=0)) if has_padding else lambda x, _: x

    def fill(params, token_ids, cache, padding):
        config, (batch, length) = spec.config, token_ids.shape
        run = init_cache(config, batch, length, spec.precision.activation_dtype)
        token_ids, none = roll(token_ids, -padding), jnp.zeros_like(padding)
        _, run = forward_with_cache(params, config, token_ids, run, 0, none, spec.precision, is_empty=True)
        by_head = jnp.repeat(padding, config.n_head)

        def write(x: jax.Array, new: jax.Array) -> jax.Array:
            return jax.lax.dynamic_update_slice_in_dim(x, roll(new, by_head), 0, axis=1)

        return jax.tree.map(write, cache, run)

    if spec.mesh is not None and has_padding:
        fill = share_rows(spec.mesh, fill, (PartitionSpec(), ROWS, ROWS, ROWS), ROWS)
    return fill(params, token_ids, cache, padding)


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3, 4))
def empty_cache(config: GPT2Config, batch: int, length: int, dtype: Any, mesh: Mesh | None = None) -> Cache:
    """Return `init_cache`, made by one program and split by row over the devices of a mesh."""
    return constrain_rows(init_cache(config, batch, length, dtype), mesh)


@functools.partial(jax.jit, static_argnums=(2, 3))
def broadcast_prefix(cache: Cache, padding: jax.Array, heads: int, mesh: Mesh | None = None) -> Cache:
    """Copy the cache of one text without padding to rows that all begin with the text.

    Args:
        cache: pairs [N, S, H].
        padding: [B] int32, of the rows.
        heads: N.
        mesh: the devices that share the rows.

    Returns:
        Pairs [B * N, S, H].
    """

    def shift(x: jax.Array) -> jax.Array:
        moved = jax.vmap(lambda positions: jnp.roll(x, positions, axis=1))(padding)
        return moved.reshape(padding.shape[0] * heads, *x.shape[1:])

    return constrain_rows(jax.tree.map(shift, cache), mesh)


def repeat_rows(cache: Cache, heads: int, times: int) -> Cache:
    """Repeat each row `times` times in a row: pairs [B * N, S, H] to [B * times * N, S, H]."""

    def repeat(x: jax.Array) -> jax.Array:
        rows = x.reshape(-1, heads, *x.shape[1:])
        return jnp.repeat(rows, times, axis=0).reshape(-1, *x.shape[1:])

    return jax.tree.map(repeat, cache)


def _shared_prefix(texts: Sequence[Sequence[int]]) -> Sequence[int]:
    """Return the longest common beginning that leaves each text its last token."""
    shortest = min(len(text) for text in texts) - 1
    for i in range(shortest):
        if any(text[i] != texts[0][i] for text in texts):
            return texts[0][:i]
    return texts[0][:shortest]
