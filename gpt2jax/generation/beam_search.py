"""Beam search: the most probable continuations instead of sampled ones.

Live and finished beams are kept separately, `num_beams` of each. Each step expands the live beams; candidates that
finish replace worse finished beams. The search is one compiled loop. Tokens and scores are those of transformers'
beam search.

Sources: Wu et al. 2016, "Google's Neural Machine Translation System" (length penalty); Freitag and Al-Onaizan 2017,
"Beam Search Strategies for Neural Machine Translation".
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gpt2jax.generation.cached_model import DecodingParams, forward_with_cache, lm_head
from gpt2jax.generation.decoding import DecodeParams, DecoderSpec, make_decode_params, repeat_decode_params
from gpt2jax.generation.kv_cache import Cache
from gpt2jax.generation.logits_processors import TokenHistory, apply_penalties
from gpt2jax.generation.outputs import Generation
from gpt2jax.generation.prefill import cache_length, fill_cache, left_pad, repeat_rows
from gpt2jax.generation.requests import PromptState, Request


def search_prompts(
    spec: DecoderSpec, params: DecodingParams, request: Request, rows: Sequence[PromptState]
) -> list[list[Generation]]:
    """Return the beams of prompts that are searched together, best first."""
    config, num_beams = request.config, request.config.num_beams
    length = max(len(row.token_ids) for row in rows)
    needed = length + max(row.limit for row in rows)
    prompts = left_pad(rows, cache_length(spec.config, needed, len(rows) * num_beams))
    settings = make_decode_params(
        rows,
        prompts.padding,
        [row.limit for row in rows],
        length,
        stop_ids=request.stop_ids,
        bad_words=request.bad_words,
    )
    rules = SearchRules(
        length_penalty=np.float32(config.length_penalty),
        stop_when_full=np.bool_(config.early_stopping is True),
        is_optimistic=np.bool_(config.early_stopping == "never" and config.length_penalty > 0),
    )
    found = search(
        params,
        fill_cache(spec, params, prompts),
        prompts.token_ids,
        settings,
        rules,
        num_beams=num_beams,
        num_candidates=max(2, 1 + len(request.stop_ids)) * num_beams,
        spec=spec,
    )
    finished = jax.device_get(found)
    return [
        [
            _generation(
                request, row, finished.token_ids[i, k, length : length + finished.lengths[i, k]], score
            )
            for k, score in enumerate(finished.scores[i, : config.num_return_sequences])
            if score != -np.inf
        ]
        for i, row in enumerate(rows)
    ]


def _generation(request: Request, row: PromptState, new_tokens: np.ndarray, score: float) -> Generation:
    """Build the result of one beam from its tokens, a stop token included."""
    token_ids = new_tokens.tolist()
    is_stopped = token_ids[-1] in request.stop_ids
    token_ids = token_ids[:-1] if is_stopped else token_ids
    tokenizer = request.model.tokenizer
    return Generation(
        prompt=row.text,
        text="" if tokenizer is None else tokenizer.decode(token_ids),
        token_ids=token_ids,
        logprobs=[],
        prompt_ids=list(row.token_ids),
        finish_reason="stop" if is_stopped else "length",
        score=float(score),
        file_settings=dict(request.file_settings),
    )


# ---- the compiled part ----


class SearchRules(NamedTuple):
    """When a search ends, and what a score is; scalars.

    Attributes:
        length_penalty: float32.
        stop_when_full: bool, whether to end as soon as there are `num_beams` finished beams.
        is_optimistic: bool, whether a live beam is bounded by its score at the greatest length, not at its present one.
    """

    length_penalty: Any
    stop_when_full: Any
    is_optimistic: Any


class Beams(NamedTuple):
    """K beams of each row, best first.

    Attributes:
        token_ids: [B, K, S] int32.
        scores: [B, K] float32: the log-probability, of finished beams divided by the length penalty; -inf: empty.
        lengths: [B, K] int32, new tokens.
    """

    token_ids: jax.Array
    scores: jax.Array
    lengths: jax.Array


class SearchState(NamedTuple):
    """The search so far.

    Attributes:
        live, finished: the beams.
        done: [B] bool.
        cache_position: scalar int32, number of positions filled so far.
    """

    live: Beams
    finished: Beams
    done: jax.Array
    cache_position: jax.Array


@functools.partial(jax.jit, static_argnames=("num_beams", "num_candidates", "spec"))
def search(
    params: DecodingParams,
    cache: Cache,
    token_ids: jax.Array,
    settings: DecodeParams,
    rules: SearchRules,
    *,
    num_beams: int,
    num_candidates: int,
    spec: DecoderSpec,
) -> Beams:
    """Search until each row is done.

    Args:
        params: from `prepare_decoding_params`.
        cache: B rows, filled with all prompt tokens except the last.
        token_ids: [B, S] int32, the prompts.
        settings: its limits and stop ids finish beams; its penalties apply.
        rules: when to end.
        num_beams, num_candidates: K, and how many expansions a step looks at: enough that K of them are live.
        spec: static.

    Returns:
        The finished beams.
    """
    batch = len(token_ids)
    shape = (batch, num_beams)
    texts = jnp.repeat(token_ids[:, None], num_beams, axis=1)
    no_scores = jnp.full(shape, -jnp.inf)
    lengths = jnp.zeros(shape, jnp.int32)
    start = SearchState(
        live=Beams(texts, no_scores.at[:, 0].set(0.0), lengths),
        finished=Beams(texts, no_scores, lengths),
        done=settings.limits <= 0,
        cache_position=jnp.asarray(settings.prompt_end, jnp.int32),
    )
    each_beam = repeat_decode_params(settings, num_beams)

    def body(carry):
        cache, state = carry
        cache, logprobs = _score(spec, params, cache, state, each_beam)
        parents, state = _expand(state, logprobs, settings, rules, num_candidates)
        return _reorder_cache(cache, parents, spec.config.n_head), state

    carry = (repeat_rows(cache, spec.config.n_head, num_beams), start)
    return jax.lax.while_loop(lambda carry: ~carry[1].done.all(), body, carry)[1].finished


def _score(
    spec: DecoderSpec, params: DecodingParams, cache: Cache, state: SearchState, each_beam: DecodeParams
) -> tuple[Cache, jax.Array]:
    """Compute the log-probabilities [B, K, V] of the next token of each live beam."""
    batch, num_beams, length = state.live.token_ids.shape
    texts = state.live.token_ids.reshape(-1, length)
    newest = jax.lax.dynamic_slice_in_dim(texts, state.cache_position - 1, 1, axis=1)
    hidden, cache = forward_with_cache(
        params, spec.config, newest, cache, state.cache_position - 1, each_beam.padding, spec.precision
    )
    logprobs = jax.nn.log_softmax(lm_head(params, hidden[:, 0], spec.precision))
    end = jnp.broadcast_to(state.cache_position, each_beam.padding.shape)
    prompt_end = jnp.broadcast_to(each_beam.prompt_end, each_beam.padding.shape)
    history = TokenHistory(texts, each_beam.padding, prompt_end, end)
    logprobs = apply_penalties(
        logprobs, history, each_beam.penalties, end - prompt_end, each_beam.stop_ids, spec.stages
    )
    return cache, logprobs.reshape(batch, num_beams, -1)


def _expand(
    state: SearchState, logprobs: jax.Array, settings: DecodeParams, rules: SearchRules, num_candidates: int
) -> tuple[jax.Array, SearchState]:
    """Expand the live beams by one token; also return which beam [B, K] each new live beam continues."""
    batch, num_beams, vocab_size = logprobs.shape
    totals = (state.live.scores[..., None] + logprobs).reshape(batch, -1)
    totals, which = jax.lax.top_k(totals, min(num_candidates, totals.shape[1]))
    parents, tokens = which // vocab_size, which % vocab_size
    token_ids = jnp.take_along_axis(state.live.token_ids, parents[..., None], axis=1)
    token_ids = jax.lax.dynamic_update_slice_in_dim(
        token_ids, tokens[..., None], state.cache_position, axis=2
    )
    length = state.cache_position + 1 - settings.prompt_end
    ends = (tokens[..., None] == settings.stop_ids).any(-1) | (length >= settings.limits)[:, None]
    expanded = Beams(token_ids, totals, jnp.broadcast_to(length, totals.shape))

    # only the best K candidates may finish: a worse one is not a result while better ones go on
    may_finish = ends & (jnp.arange(totals.shape[1]) < num_beams) & ~state.done[:, None]
    scores = totals / length.astype(jnp.float32) ** rules.length_penalty
    candidates = expanded._replace(scores=jnp.where(may_finish, scores, -jnp.inf))
    both = jax.tree.map(lambda *x: jnp.concatenate(x, axis=1), state.finished, candidates)
    finished, _ = _best(both, num_beams)
    live, chosen = _best(expanded._replace(scores=jnp.where(ends, -jnp.inf, totals)), num_beams)

    bound_length = jnp.where(rules.is_optimistic, settings.limits, length).astype(jnp.float32)
    optimistic_bound = live.scores[:, 0] / bound_length**rules.length_penalty
    is_full = jnp.isfinite(finished.scores).all(-1)
    cannot_improve = rules.stop_when_full | (optimistic_bound <= finished.scores.min(-1))
    done = state.done | ends.all(-1) | (is_full & cannot_improve)
    state = SearchState(live, finished, done, state.cache_position + 1)
    return jnp.take_along_axis(parents, chosen, axis=1), state


def _best(beams: Beams, count: int) -> tuple[Beams, jax.Array]:
    """Return the `count` best beams, and where they were [B, count]."""
    _, which = jax.lax.top_k(beams.scores, count)

    def take(x: jax.Array) -> jax.Array:
        return jnp.take_along_axis(x, which.reshape(which.shape + (1,) * (x.ndim - 2)), axis=1)

    return jax.tree.map(take, beams), which


def _reorder_cache(cache: Cache, parents: jax.Array, heads: int) -> Cache:
    """Reorder the rows of the cache [B * K * N, S, H] to follow the beams [B, K] that go on."""
    batch, num_beams = parents.shape
    rows = (parents + num_beams * jnp.arange(batch)[:, None]).reshape(-1)

    def take(x: jax.Array) -> jax.Array:
        return x.reshape(batch * num_beams, heads, *x.shape[1:])[rows].reshape(x.shape)

    return jax.tree.map(take, cache)
