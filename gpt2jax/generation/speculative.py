"""Speculative decoding: cheap draft tokens, verified by one pass of the model over all of them.

The model chooses each token as it would without drafts, with the same seed and step; a draft token is accepted if it is
that token. So the text is that of plain decoding, sampled or greedy, and drafts only change the speed. A pass over a
few tokens takes little longer than one over a single token, because reading the weights takes most of the time.

Sources: Leviathan et al. 2023, "Fast Inference from Transformers via Speculative Decoding" (a draft model; there, both
models draw independently and rejections are corrected, here they draw with common random numbers); Saxena 2023,
"Prompt Lookup Decoding".
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from gpt2jax.generation.cached_model import DecodingParams, forward_with_cache, lm_head
from gpt2jax.generation.decoding import (
    DecodeParams,
    DecoderSpec,
    DecodeState,
    choose_tokens,
    decode_token,
    is_running,
    record_scores,
    repeat_decode_params,
    token_history,
)
from gpt2jax.generation.kv_cache import Cache
from gpt2jax.generation.logits_processors import TokenHistory, common_suffix
from gpt2jax.generation.prefill import PaddedPrompts, fill_cache
from gpt2jax.model.config import GPT2Config

# prompt lookup needs this many equal tokens before the match, and compares no more than that
_SHORTEST_MATCH, _LONGEST_MATCH = 2, 4


class Draft(NamedTuple):
    """Draft tokens.

    Attributes:
        token_ids: [1, K] int32.
        found: scalar bool, False if there is no draft.
    """

    token_ids: jax.Array
    found: jax.Array


@dataclasses.dataclass(frozen=True)
class PromptLookup:
    """Drafts `num_tokens` tokens a step from an earlier occurrence of the last tokens; one row at a time."""

    num_tokens: int
    max_rows = 1
    has_drafts = True

    def extra_positions(self, new_tokens: int) -> int:
        """Return room for all new tokens, since the host does not know how far a row is, and for one draft."""
        return 1 + new_tokens + self.num_tokens

    def prefill(self, spec: DecoderSpec, params: DecodingParams, prompts: PaddedPrompts) -> Cache:
        """Return the cache of all prompt tokens except the last."""
        return fill_cache(spec, params, prompts)

    def decode(
        self,
        spec: DecoderSpec,
        params: DecodingParams,
        cache: Cache,
        state: DecodeState,
        settings: DecodeParams,
        until: jax.Array | int,
    ) -> tuple[Cache, DecodeState]:
        """Decode up to `num_tokens` tokens beyond `until`."""

        def find_draft(state: DecodeState) -> Draft:
            return prompt_lookup(token_history(state, settings), self.num_tokens)

        def plain(carry: Any) -> Any:
            cache, state = decode_token(spec, params, carry[0], carry[1], settings)
            return cache, state, find_draft(state)

        def body(carry: Any) -> Any:
            # without a draft, one token at a time is cheaper
            cache, state, draft = jax.lax.while_loop(
                lambda carry: is_running(carry[1], until) & ~carry[2].found, plain, carry
            )
            cache, state = verify(spec, params, cache, state, settings, draft, until)
            return cache, state, find_draft(state)

        carry = (cache, state, find_draft(state))
        return jax.lax.while_loop(lambda carry: is_running(carry[1], until), body, carry)[:2]


@dataclasses.dataclass(frozen=True)
class DraftModel:
    """Drafts `num_tokens` tokens a step with a smaller model of the same vocabulary; one row at a time.

    Weights and caches are pairs: the model's and the draft model's.

    Attributes:
        num_tokens: draft tokens a step.
        config: the draft model's.
    """

    num_tokens: int
    config: GPT2Config
    max_rows = 1
    has_drafts = True

    def extra_positions(self, new_tokens: int) -> int:
        """Return room for all new tokens, since the host does not know how far a row is, and for one draft."""
        return 1 + new_tokens + self.num_tokens

    def prefill(
        self, spec: DecoderSpec, params: tuple[DecodingParams, DecodingParams], prompts: PaddedPrompts
    ) -> tuple[Cache, Cache]:
        """Return the caches of both models, of all prompt tokens except the last."""
        return fill_cache(spec, params[0], prompts), fill_cache(self._spec(spec), params[1], prompts)

    def decode(
        self,
        spec: DecoderSpec,
        params: tuple[DecodingParams, DecodingParams],
        cache: tuple[Cache, Cache],
        state: DecodeState,
        settings: DecodeParams,
        until: jax.Array | int,
    ) -> tuple[tuple[Cache, Cache], DecodeState]:
        """Decode up to `num_tokens` tokens beyond `until`."""
        model_params, draft_params = params
        draft_spec = self._spec(spec)

        def body(carry: Any) -> Any:
            (cache, draft_cache), state = carry
            ahead = state._replace(done=jnp.zeros_like(state.done))
            # one step more than there are draft tokens: it puts the last one into the draft model's cache
            draft_cache, ahead = jax.lax.fori_loop(
                0,
                self.num_tokens + 1,
                lambda _, carry: decode_token(draft_spec, draft_params, carry[0], carry[1], settings),
                (draft_cache, ahead),
            )
            token_ids = jax.lax.dynamic_slice_in_dim(
                ahead.token_ids, state.cache_position, self.num_tokens, axis=1
            )
            draft = Draft(token_ids, jnp.array(True))
            cache, state = verify(spec, model_params, cache, state, settings, draft, until)
            return (cache, draft_cache), state

        return jax.lax.while_loop(lambda carry: is_running(carry[1], until), body, (cache, state))

    def _spec(self, spec: DecoderSpec) -> DecoderSpec:
        return dataclasses.replace(spec, config=self.config)


def prompt_lookup(history: TokenHistory, num_tokens: int) -> Draft:
    """Return the continuation of the longest earlier match of the last tokens (ties: the latest).

    A draft that reaches the end of the text goes on from its own beginning, as a text does that repeats itself.

    Args:
        history: one text, [1, S].
        num_tokens: K, tokens to draft.
    """
    positions = jnp.arange(history.token_ids.shape[1])
    length = common_suffix(history, _LONGEST_MATCH)
    length = jnp.where((positions < history.end[:, None]) & (length >= _SHORTEST_MATCH), length, 0)[0]
    place = jnp.argmax(length * positions.size + positions)
    found = length[place] > 0
    period = jnp.maximum(history.end[0] - place, 1)
    drafted = jnp.take(history.token_ids, place + jnp.arange(num_tokens) % period, axis=1, mode="clip")
    return Draft(drafted, found)


def verify(
    spec: DecoderSpec,
    params: DecodingParams,
    cache: Cache,
    state: DecodeState,
    settings: DecodeParams,
    draft: Draft,
    until: jax.Array | int,
) -> tuple[Cache, DecodeState]:
    """Choose the token after each right draft token, so at least one; none if nothing is left to do."""
    position, size = state.cache_position, draft.token_ids.shape[1]
    drafted = jax.lax.dynamic_update_slice_in_dim(state.token_ids, draft.token_ids, position, axis=1)
    inputs = jax.lax.dynamic_slice_in_dim(drafted, position - 1, size + 1, axis=1)
    hidden, cache = forward_with_cache(
        params, spec.config, inputs, cache, position - 1, settings.padding, spec.precision
    )
    logits = lm_head(params, hidden[0], spec.precision)  # [K + 1, V]
    each = repeat_decode_params(settings, size + 1)
    history = token_history(state._replace(token_ids=drafted), each)
    history = history._replace(
        token_ids=jnp.broadcast_to(drafted, (size + 1, drafted.shape[1])),
        end=position + jnp.arange(size + 1),
    )
    tokens = choose_tokens(spec, logits, history, each).tokens

    right = (tokens[:-1] == draft.token_ids[0]) & draft.found
    agreed = jnp.cumprod(right.astype(jnp.int32)).sum()
    stops = (tokens[:, None] == settings.stop_ids).any(-1)
    first_stop = jnp.where(stops.any(), jnp.argmax(stops), size + 1)
    new = jnp.minimum(jnp.minimum(agreed, first_stop) + 1, settings.limits[0] - state.lengths[0])
    new = jnp.where(is_running(state, until), new, 0).astype(jnp.int32)  # sums are wider with jax_enable_x64
    lengths = state.lengths + new
    stopped = (first_stop < new) | (lengths >= settings.limits)
    used = jnp.maximum(new - 1, 0)
    state = record_scores(state, tokens[None], logits[None])._replace(
        lengths=lengths,
        done=state.done | stopped,
        cache_position=position + new,
        drafted=state.drafted + jnp.where((new > 0) & draft.found, size, 0),
        accepted=state.accepted + used,
    )
    return cache, state
