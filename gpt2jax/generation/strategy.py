"""The protocol of decoding strategies, the one compiled program that runs them, and plain decoding.

A strategy is frozen and hashable: it is a static argument of `decode`, like the spec. It owns the form of its cache, a
pytree of arrays whose axis 1 counts cache positions, so that one donation and one `grow` serve all strategies.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from gpt2jax.generation.cached_model import DecodingParams
from gpt2jax.generation.decoding import (
    PER_POSITION,
    DecodeParams,
    DecoderSpec,
    DecodeState,
    all_uniforms,
    decode_token,
    is_running,
)
from gpt2jax.generation.kv_cache import grow_cache
from gpt2jax.generation.prefill import PaddedPrompts, fill_cache
from gpt2jax.generation.row_sharding import ROWS, settings_rows, share_rows, state_rows


class DecodeStrategy(Protocol):
    """A way to decode a batch."""

    @property
    def max_rows(self) -> int | None:
        """The largest batch; None is any."""
        ...

    @property
    def has_drafts(self) -> bool:
        """Whether it counts draft tokens."""
        ...

    def extra_positions(self, new_tokens: int) -> int:
        """Return the cache positions after the prompts that a batch of `new_tokens` begins with."""
        ...

    def prefill(self, spec: DecoderSpec, params: Any, prompts: PaddedPrompts) -> Any:
        """Return the cache of the prompts, as `decode` takes it."""
        ...

    def decode(
        self,
        spec: DecoderSpec,
        params: Any,
        cache: Any,
        state: DecodeState,
        settings: DecodeParams,
        until: jax.Array | int,
    ) -> tuple[Any, DecodeState]:
        """Decode until all rows are done or cache position `until` is reached; traced by jit."""
        ...


@functools.partial(jax.jit, static_argnames=("strategy", "spec"), donate_argnames=("cache",))
def decode(
    strategy: DecodeStrategy,
    spec: DecoderSpec,
    params: Any,
    cache: Any,
    state: DecodeState,
    settings: DecodeParams,
    until: jax.Array | int,
) -> tuple[Any, DecodeState]:
    """Decode by a strategy until all rows are done or cache position `until` is reached.

    One program serves a whole generation in one call, a few steps at a time between searches for stop strings, and
    one step at a time for a stream, because `until` is an array.

    With a mesh in the spec each device decodes its share of the rows, in a loop that waits for no other device.

    Args:
        strategy, spec: static.
        params: what the strategy reads, from `prepare_decoding_params`.
        cache: from the strategy's `prefill` or from the last call; donated, so it must not be used again.
        state: what has been decoded so far.
        settings: constant over the steps.
        until: scalar int, at most S.

    Returns:
        The cache and the state.
    """
    if spec.mesh is None:
        return strategy.decode(spec, params, cache, state, settings, until)

    def decode_share(*arguments):
        # devices whose rows end early leave their loop early; the position counts for all of them
        cache, state = strategy.decode(spec, *arguments)
        return cache, state._replace(cache_position=jnp.asarray(arguments[-1], jnp.int32))

    in_specs = (PartitionSpec(), ROWS, state_rows(state), settings_rows(settings), PartitionSpec())
    decode_shares = share_rows(spec.mesh, decode_share, in_specs, (ROWS, state_rows(state)))
    return decode_shares(params, cache, state, settings, until)


@functools.partial(jax.jit, static_argnums=2)
def grow(cache: Any, state: DecodeState, length: int) -> tuple[Any, DecodeState]:
    """Pad cache and state to `length` positions."""
    wider = {name: grow_cache(getattr(state, name), length) for name in PER_POSITION}
    return grow_cache(cache, length), state._replace(**wider)


@dataclasses.dataclass(frozen=True)
class Sampling:
    """Plain decoding: one token a step, drawn at random or the most probable."""

    max_rows = None
    has_drafts = False

    def extra_positions(self, new_tokens: int) -> int:
        """Return 1: the cache grows when it is full, because attention reads all of its positions."""
        return 1

    def prefill(self, spec: DecoderSpec, params: DecodingParams, prompts: PaddedPrompts) -> Any:
        """Return the cache of all prompt tokens except the last."""
        return fill_cache(spec, params, prompts)

    def decode(
        self,
        spec: DecoderSpec,
        params: DecodingParams,
        cache: Any,
        state: DecodeState,
        settings: DecodeParams,
        until: jax.Array | int,
    ) -> tuple[Any, DecodeState]:
        """Decode a token at a time."""
        has_draw = spec.stages is not None and not spec.stages.is_greedy
        uniforms = all_uniforms(settings, state.token_ids.shape[1]) if has_draw else None
        return jax.lax.while_loop(
            lambda carry: is_running(carry[1], until),
            lambda carry: decode_token(spec, params, *carry, settings, uniforms),
            (cache, state),
        )
