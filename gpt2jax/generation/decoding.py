"""What compiled decoding is made of: its static spec, its settings and state as arrays, and the step of one token.

Programs are compiled for a spec and for shapes: rows B, cache length S. Prompts, lengths, limits, seeds, stop ids and
settings are arrays.

All rows end at the same cache position: position s of row b holds text position s - padding[b]. Positions from the
newest token on may hold anything, because each is written before it is read.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from gpt2jax.generation.cached_model import DecodingParams, forward_with_cache, lm_head
from gpt2jax.generation.kv_cache import Cache
from gpt2jax.generation.logits_processors import Penalties, TokenHistory, apply_penalties
from gpt2jax.generation.requests import PromptState
from gpt2jax.generation.sampling import (
    Filters,
    log_probability,
    make_filters,
    make_uniforms,
    sample,
    sample_by,
    top_candidates,
)
from gpt2jax.generation.stages import Stages
from gpt2jax.model.config import GPT2Config
from gpt2jax.ops.precision import Precision

# changes logits [B, V] by the tokens so far; a pure function, compiled with the rest
LogitsProcessor = Callable[[jax.Array, TokenHistory], jax.Array]
_LARGEST_INT32 = 2**31 - 1


@dataclasses.dataclass(frozen=True)
class DecoderSpec:
    """What a decoding program is compiled for, besides shapes; a static argument.

    Attributes:
        config: the model's.
        precision: dtypes of the computation.
        logits_processor: the user's own change of logits.
        stages: which stages of choosing a token the program has; None: all, and the device skips those that are off.
        mesh: the devices that share the rows of a batch; None is one device.
    """

    config: GPT2Config
    precision: Precision
    logits_processor: LogitsProcessor | None = None
    stages: Stages | None = None
    mesh: Mesh | None = None

    @property
    def without_sampling(self) -> DecoderSpec:
        """The spec of programs without logits: other settings must not compile them anew."""
        return dataclasses.replace(self, logits_processor=None, stages=None)


class DecodeParams(NamedTuple):
    """Settings of a batch, constant over its steps.

    Attributes:
        padding: [B] int32, unused cache positions at the left of each row.
        prompt_end: scalar int32, the cache position of the first new token; negative if a text that exceeded the
            context has lost it.
        limits: [B] int32, new tokens a row may have; 0 for rows that only fill the batch.
        seeds: [B] uint32.
        stop_ids: [K] int32, token ids that end a row; padded with -1.
        penalty_alpha: scalar float32, the weight of contrastive search.
        filters: how tokens are chosen, each [B].
        penalties: how logits are changed before that.
    """

    padding: jax.Array
    prompt_end: jax.Array
    limits: jax.Array
    seeds: jax.Array
    stop_ids: jax.Array
    penalty_alpha: jax.Array
    filters: Filters
    penalties: Penalties


class DecodeState(NamedTuple):
    """What has been decoded so far, without the cache.

    The cache is a separate argument because its buffers are donated to each call, and a stream still reads the last
    state while the next step runs.

    Attributes:
        token_ids: [B, S] int32, prompts and new tokens.
        logprobs: [B, S] float32, of the new tokens under softmax(logits), before penalties and filters.
        top_ids, top_logprobs: [B, S, n], the n most probable tokens at each new token; n may be 0.
        lengths: [B] int32, new tokens of each row so far, a stop token included.
        done: [B] bool.
        cache_position: scalar int32, number of positions filled so far.
        drafted, accepted: scalar int32, draft tokens of speculative decoding, and how many were right.
    """

    token_ids: jax.Array
    logprobs: jax.Array
    top_ids: jax.Array
    top_logprobs: jax.Array
    lengths: jax.Array
    done: jax.Array
    cache_position: jax.Array
    drafted: jax.Array
    accepted: jax.Array


# the fields of `DecodeState` that have an axis of cache positions
PER_POSITION = ("token_ids", "logprobs", "top_ids", "top_logprobs")


def bucket(size: int, smallest: int, largest: int = _LARGEST_INT32) -> int:
    """Return the power of two that holds `size`, between `smallest` and `largest`."""
    return min(max(smallest, 1 << (size - 1).bit_length()), largest)


def initial_state(token_ids: Any, limits: Any, cache_position: int, top_logprobs: int = 0) -> DecodeState:
    """Return the state of prompts [B, S] that end at `cache_position`; NumPy arrays, which compile nothing."""
    batch, length = token_ids.shape
    zeros: Any = np.zeros
    return DecodeState(
        token_ids=token_ids,
        logprobs=zeros((batch, length), np.float32),
        top_ids=zeros((batch, length, top_logprobs), np.int32),
        top_logprobs=zeros((batch, length, top_logprobs), np.float32),
        lengths=zeros(batch, np.int32),
        done=limits <= 0,
        cache_position=zeros((), np.int32) + np.int32(cache_position),
        drafted=zeros((), np.int32),
        accepted=zeros((), np.int32),
    )


def make_decode_params(
    rows: Sequence[PromptState],
    padding: Any,
    limits: Sequence[int],
    prompt_end: int,
    *,
    stop_ids: Sequence[int] = (),
    bad_words: Sequence[Sequence[int]] = (),
) -> DecodeParams:
    """Return the settings of rows as arrays; B - len(rows) more rows fill the batch, with a limit of 0."""
    fill = len(padding) - len(rows)
    configs = [row.config for row in (*rows, *[rows[0]] * fill)]

    def column(name: str, dtype: type = np.float32) -> Any:
        values = [getattr(config, name) for config in configs]
        return np.array(values if dtype is np.float32 else [min(x, _LARGEST_INT32) for x in values], dtype)

    stops: Any = np.full(bucket(len(stop_ids), 4), -1, np.int32)
    stops[: len(stop_ids)] = stop_ids
    longest = max(map(len, bad_words), default=1)
    words: Any = np.full((bucket(len(bad_words), 4), bucket(longest, 4)), -1, np.int32)
    for i, word in enumerate(bad_words):
        words[i, words.shape[1] - len(word) :] = word
    filters = zip(*map(make_filters, configs), strict=True)
    dtypes = (np.float32, np.int32, np.float32, np.float32, np.float32)
    of_rows: Any = np.array([*limits, *[0] * fill], np.int32), np.array([s.seed for s in rows] + [0] * fill)
    scalars: Any = np.array(prompt_end, np.int32), np.array(rows[0].config.penalty_alpha, np.float32)
    return DecodeParams(
        padding=padding,
        prompt_end=scalars[0],
        limits=of_rows[0],
        seeds=of_rows[1].astype(np.uint32),
        stop_ids=stops,
        penalty_alpha=scalars[1],
        filters=Filters(*(np.array(v, d) for v, d in zip(filters, dtypes, strict=True))),  # type: ignore[arg-type]
        penalties=Penalties(
            column("repetition_penalty"),
            column("presence_penalty"),
            column("frequency_penalty"),
            column("no_repeat_ngram_size", np.int32),
            column("min_new_tokens", np.int32),
            words,
        ),
    )


def repeat_decode_params(settings: DecodeParams, times: int) -> DecodeParams:
    """Repeat the settings of each row `times` times in a row."""

    def repeat(x: Any) -> Any:
        return jnp.repeat(x, times, axis=0)

    penalties = settings.penalties
    return settings._replace(
        padding=repeat(settings.padding),
        limits=repeat(settings.limits),
        seeds=repeat(settings.seeds),
        filters=jax.tree.map(repeat, settings.filters),
        penalties=jax.tree.map(repeat, penalties)._replace(bad_words=penalties.bad_words),
    )


# ---- one step, compiled ----


def token_history(state: DecodeState, settings: DecodeParams) -> TokenHistory:
    """Return the tokens so far as penalties and processors read them."""
    rows = settings.padding.shape
    prompt_end = jnp.maximum(jnp.broadcast_to(settings.prompt_end, rows), settings.padding)
    end = jnp.broadcast_to(state.cache_position, rows)
    return TokenHistory(state.token_ids, settings.padding, prompt_end, end)


def process_logits(
    spec: DecoderSpec, logits: jax.Array, history: TokenHistory, settings: DecodeParams
) -> jax.Array:
    """Apply the penalties and the user's processor to logits [B, V]."""
    steps = history.end - settings.prompt_end
    logits = apply_penalties(logits, history, settings.penalties, steps, settings.stop_ids, spec.stages)
    if spec.logits_processor is None:
        return logits
    changed = spec.logits_processor(logits, history)
    if getattr(changed, "shape", None) != logits.shape:
        got = getattr(changed, "shape", type(changed).__name__)
        raise ValueError(f"logits_processor must return logits of shape {logits.shape}, got {got}")
    return changed


def step_keys(settings: DecodeParams, steps: jax.Array) -> jax.Array:
    """Return the keys [B, ...] of the draws at steps [B, ...].

    A key depends on the row's seed and step alone: a row does not depend on its batch.
    """

    def keys_of_row(seed, steps):
        key = jax.random.key(seed)
        return jnp.vectorize(lambda step: jax.random.fold_in(key, step))(steps)

    return jax.vmap(keys_of_row)(settings.seeds, steps)


def all_uniforms(settings: DecodeParams, length: int) -> jax.Array:
    """Return the random numbers [B, S, 2] of the draws at all cache positions, for a loop that reads its own.

    Made before the loop they cost a token one slice instead of some ten kernels.
    """
    steps = jnp.arange(length, dtype=jnp.int32) - settings.prompt_end
    return make_uniforms(step_keys(settings, jnp.broadcast_to(steps, (len(settings.seeds), length))))


class Choice(NamedTuple):
    """The tokens [B] of a step, and the largest logit [B, 1] of each row if it was found on the way."""

    tokens: jax.Array
    largest: jax.Array | None = None


def choose_tokens(
    spec: DecoderSpec,
    logits: jax.Array,
    history: TokenHistory,
    settings: DecodeParams,
    uniforms: jax.Array | None = None,
) -> Choice:
    """Choose the next token of each row from logits [B, V]; `uniforms` [B, 2] if they are known already."""
    processed, steps = process_logits(spec, logits, history, settings), history.end - settings.prompt_end
    if spec.stages is None:
        return Choice(sample(processed, step_keys(settings, steps), settings.filters))
    if uniforms is None and not spec.stages.is_greedy:
        uniforms = make_uniforms(step_keys(settings, steps))
    tokens, largest = sample_by(spec.stages, processed, uniforms, settings.filters)
    return Choice(tokens, largest if processed is logits else None)


def record_tokens(
    state: DecodeState,
    settings: DecodeParams,
    tokens: jax.Array,
    logits: jax.Array,
    largest: jax.Array | None = None,
) -> DecodeState:
    """Add one token [B], chosen from logits [B, V], to every row that is not done."""
    active = ~state.done
    tokens = jnp.where(active, tokens, 0)
    lengths = state.lengths + active
    stopped = active & (tokens[:, None] == settings.stop_ids).any(-1)
    return record_scores(state, tokens[:, None], logits[:, None], largest)._replace(
        lengths=lengths,
        done=state.done | stopped | (lengths >= settings.limits),
        cache_position=state.cache_position + 1,
    )


def record_scores(
    state: DecodeState, tokens: jax.Array, logits: jax.Array, largest: jax.Array | None = None
) -> DecodeState:
    """Write tokens [B, T] and their scores from logits [B, T, V] from the present position on.

    The largest logits [B * T, 1], if they are known, spare a pass over all of them.
    """

    def write(array: jax.Array, values: jax.Array) -> jax.Array:
        values = values.astype(array.dtype)
        return jax.lax.dynamic_update_slice_in_dim(array, values, state.cache_position, axis=1)

    flat = logits.reshape(-1, logits.shape[-1])
    logprobs = log_probability(flat, tokens.reshape(-1), largest).reshape(tokens.shape)
    state = state._replace(token_ids=write(state.token_ids, tokens), logprobs=write(state.logprobs, logprobs))
    count = state.top_ids.shape[-1]
    if count:
        values, ids = jax.lax.top_k(flat, count) if largest is None else top_candidates(flat, count)
        values = values - jax.nn.logsumexp(flat, axis=-1, keepdims=True)
        state = state._replace(
            top_ids=write(state.top_ids, ids.reshape(*tokens.shape, count)),
            top_logprobs=write(state.top_logprobs, values.reshape(*tokens.shape, count)),
        )
    return state


def is_running(state: DecodeState, until: jax.Array | int) -> jax.Array:
    """Return whether a row still needs tokens before cache position `until`."""
    return (state.cache_position < until) & ~state.done.all()


def decode_token(
    spec: DecoderSpec,
    params: DecodingParams,
    cache: Cache,
    state: DecodeState,
    settings: DecodeParams,
    uniforms: jax.Array | None = None,
) -> tuple[Cache, DecodeState]:
    """Decode one new token of each row; `uniforms` [B, S, 2] are those of `all_uniforms`, if they were made before."""
    newest = jax.lax.dynamic_slice_in_dim(state.token_ids, state.cache_position - 1, 1, axis=1)
    hidden, cache = forward_with_cache(
        params, spec.config, newest, cache, state.cache_position - 1, settings.padding, spec.precision
    )
    logits = lm_head(params, hidden[:, 0], spec.precision)
    if uniforms is not None:
        uniforms = jax.lax.dynamic_index_in_dim(uniforms, state.cache_position, axis=1, keepdims=False)
    choice = choose_tokens(spec, logits, token_history(state, settings), settings, uniforms)
    return cache, record_tokens(state, settings, choice.tokens, logits, choice.largest)
