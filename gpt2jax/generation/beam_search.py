"""Beam search: the most probable continuations rather than drawn ones.

    [beams] = beam_search(model, "a prompt", num_beams=4, num_return=2)
    print(beams[0].score, beams[0].text)

Open texts and ended ones stand side by side, `num_beams` of each. A step makes of the open ones the most probable
longer texts; those of them that end take the place of worse ended ones. All of it is one compiled loop. Tokens and
scores are those of transformers' beam search.

Sources: Wu et al. 2016, "Google's Neural Machine Translation System" (length penalty); Freitag and Al-Onaizan 2017,
"Beam Search Strategies for Neural Machine Translation".
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gpt2jax.generation.cached_model import (
    DecodingParams,
    forward_with_cache,
    lm_head,
    params_for_decoding,
)
from gpt2jax.generation.decoding import DecodeParams, repeat_decode_params, repeat_rows
from gpt2jax.generation.kv_cache import Cache
from gpt2jax.generation.logits_processors import TokenHistory, apply_penalties
from gpt2jax.generation.requests import Prompt, Row, as_prompts, make_rows
from gpt2jax.generation.runner import (
    Job,
    bucket,
    cache_slots,
    fill_cache,
    left_padded,
    make_job,
    make_request,
)
from gpt2jax.model.config import GPT2Config
from gpt2jax.ops.precision import Precision
from gpt2jax.utils.validation import check_count, check_model, is_number


@dataclasses.dataclass(frozen=True)
class Beam:
    """One continuation; `str()` of it is prompt and continuation.

    Attributes:
        prompt: the prompt as given; of token ids, their text ("" without a tokenizer).
        text: the continuation only ("" without a tokenizer).
        token_ids: the continuation's tokens, without the stop token that ended it.
        score: sum of the log-probabilities of its tokens, the stop token's too, divided by their number to the power
            of the length penalty.
        prompt_ids: what the model was given.
        finish_reason: "stop" (a stop token) or "length".
    """

    prompt: str
    text: str
    token_ids: list[int]
    score: float
    prompt_ids: list[int]
    finish_reason: str

    def __str__(self) -> str:
        return self.prompt + self.text


def beam_search(
    model: Any,
    prompts: Prompt | Sequence[Prompt],
    *,
    num_beams: int = 4,
    num_return: int = 1,
    max_new_tokens: int | None = None,
    max_length: int | None = None,
    length_penalty: float = 1.0,
    early_stopping: bool | str = False,
    repetition_penalty: float = 1.0,
    no_repeat_ngram: int = 0,
    min_new_tokens: int = 0,
    bad_words: Sequence[str | Sequence[int]] | None = None,
    stop_token_ids: Sequence[int] | None = None,
    batch_size: int = 32,
    dtype: str | None = None,
) -> list[list[Beam]]:
    """The best continuations of prompts by beam search.

    Args:
        model: a `LanguageModel`.
        prompts, max_new_tokens, max_length, bad_words, stop_token_ids, dtype: as for `generate`.
        num_beams: texts that are followed at once.
        num_return: how many to return, at most `num_beams`.
        length_penalty: above 0 prefers longer texts, below 0 shorter ones; 0 goes by probability alone.
        early_stopping: True ends when there are `num_beams` ended texts; False when no text could be better at its
            present length; "never" when none could be better at any length.
        repetition_penalty, no_repeat_ngram, min_new_tokens: see `SamplingConfig`; they change log-probabilities here,
            and so the scores.
        batch_size: most texts to follow at once; a prompt has `num_beams` of them.

    Returns:
        For each prompt its beams, best first. Fewer than `num_return` only where there are not so many different ones.

    Raises:
        ValueError: a setting has an impossible value, or a prompt does not fit the model.
    """
    check_model("model", model)
    num_beams, num_return = check_count("num_beams", num_beams), check_count("num_return", num_return)
    batch_size = check_count("batch_size", batch_size)
    if num_return > num_beams:
        raise ValueError(f"num_return={num_return} is over num_beams={num_beams}")
    if not is_number(length_penalty):
        raise ValueError(f"length_penalty={length_penalty!r} must be a finite number")
    if not isinstance(early_stopping, bool) and early_stopping != "never":
        raise ValueError(f"early_stopping={early_stopping!r} must be True, False or 'never'")
    job = make_job(model, stop_token_ids=stop_token_ids, bad_words=bad_words, dtype=dtype)
    rows = make_rows(
        model,
        as_prompts(prompts),
        max_new_tokens=max_new_tokens,
        max_length=max_length,
        sampling={
            "repetition_penalty": repetition_penalty,
            "no_repeat_ngram": no_repeat_ngram,
            "min_new_tokens": min_new_tokens,
        },
        past_context=None,
    )
    rules = Rules(
        length_penalty=np.float32(length_penalty),
        stop_when_full=np.bool_(early_stopping is True),
        hope_to_the_end=np.bool_(early_stopping == "never" and length_penalty > 0),
    )
    found: dict[int, list[Beam]] = {}
    order = sorted(range(len(rows)), key=lambda i: len(rows[i].ids))
    together = max(1, batch_size // num_beams)
    for start in range(0, len(rows), together):
        indices = order[start : start + together]
        beams = _run(job, [rows[i] for i in indices], num_beams, rules)
        found.update((i, own[:num_return]) for i, own in zip(indices, beams, strict=True))
    return [found[i] for i in range(len(rows))]


def _run(job: Job, rows: list[Row], num_beams: int, rules: Rules) -> list[list[Beam]]:
    """The beams of prompts that are searched together."""
    config, tokenizer = job.model.config, job.model.tokenizer
    length = max(len(row.ids) for row in rows)
    slots = cache_slots(config, length + max(row.limit for row in rows), len(rows) * num_beams)
    token_ids, padding = left_padded(rows, length, bucket(len(rows), 1), slots)
    request = make_request(job, rows, padding, [row.limit for row in rows], length)
    params = params_for_decoding(job.model, job.weights)
    static = {"config": config, "precision": job.precision}
    cache = fill_cache(params, token_ids, padding, 0, length - 1, **static)
    kept = max(2, 1 + len(job.stop_ids)) * num_beams
    ended = jax.device_get(
        search(params, cache, token_ids, request, rules, num_beams=num_beams, kept=kept, **static)
    )
    beams: list[list[Beam]] = []
    for i, row in enumerate(rows):
        beams.append([])
        for text, score, count in zip(ended.token_ids[i], ended.scores[i], ended.lengths[i], strict=True):
            if score == -np.inf:
                continue
            ids = text[length : length + count].tolist()
            stopped = ids[-1] in job.stop_ids
            ids = ids[:-1] if stopped else ids
            words = "" if tokenizer is None else tokenizer.decode(ids)
            reason = "stop" if stopped else "length"
            beams[-1].append(Beam(row.prompt, words, ids, float(score), list(row.ids), reason))
    return beams


# ---- the compiled part ----


class Rules(NamedTuple):
    """When a search ends, and what a score is; scalars.

    Attributes:
        length_penalty: float32.
        stop_when_full: bool, whether to end as soon as there are as many ended texts as wanted.
        hope_to_the_end: bool, whether a text counts as what it would be worth at the greatest length.
    """

    length_penalty: Any
    stop_when_full: Any
    hope_to_the_end: Any


class Texts(NamedTuple):
    """K texts of each row, best first.

    Attributes:
        token_ids: [B, K, S] int32.
        scores: [B, K] float32, log-probability, of ended texts by length; -inf is no text.
        lengths: [B, K] int32, new tokens.
    """

    token_ids: jax.Array
    scores: jax.Array
    lengths: jax.Array


class Search(NamedTuple):
    """What there is so far.

    Attributes:
        open, ended: the texts.
        done: [B] bool.
        slot: scalar int32, slots filled so far.
    """

    open: Texts
    ended: Texts
    done: jax.Array
    slot: jax.Array


@functools.partial(jax.jit, static_argnames=("num_beams", "kept", "config", "precision"))
def search(
    params: DecodingParams,
    cache: Cache,
    token_ids: jax.Array,
    request: DecodeParams,
    rules: Rules,
    *,
    num_beams: int,
    kept: int,
    config: GPT2Config,
    precision: Precision,
) -> Texts:
    """Searches until each row is done.

    Args:
        params: from `inference.prepare_decoding_params`.
        cache: B rows, filled with all tokens of the prompts but the last.
        token_ids: [B, S] int32, the prompts.
        request: its limits and stop ids end texts; of its penalties, what is asked for.
        rules: when to end.
        num_beams, kept: K, and how many longer texts a step looks at: enough that K of them are not ended.
        config, precision: static.

    Returns:
        The ended texts.
    """
    batch = len(token_ids)
    shape = (batch, num_beams)
    texts = jnp.repeat(token_ids[:, None], num_beams, axis=1)
    none = jnp.full(shape, -jnp.inf)
    lengths = jnp.zeros(shape, jnp.int32)
    start = Search(
        open=Texts(texts, none.at[:, 0].set(0.0), lengths),
        ended=Texts(texts, none, lengths),
        done=request.limits <= 0,
        slot=jnp.asarray(request.prompt_end, jnp.int32),
    )
    every = repeat_decode_params(request, num_beams)

    def body(carry):
        cache, state = carry
        cache, logprobs = _read(params, cache, state, every, config=config, precision=precision)
        parents, state = _extend(state, logprobs, request, rules, kept)
        return _follow(cache, parents, config.n_head), state

    carry = (repeat_rows(cache, config.n_head, num_beams), start)
    return jax.lax.while_loop(lambda carry: ~carry[1].done.all(), body, carry)[1].ended


def _read(
    params: DecodingParams,
    cache: Cache,
    state: Search,
    every: DecodeParams,
    *,
    config: GPT2Config,
    precision: Precision,
) -> tuple[Cache, jax.Array]:
    """Log-probabilities [B, K, V] of what may come next."""
    batch, num_beams, slots = state.open.token_ids.shape
    texts = state.open.token_ids.reshape(-1, slots)
    newest = jax.lax.dynamic_slice_in_dim(texts, state.slot - 1, 1, axis=1)
    hidden, cache = forward_with_cache(
        params, config, newest, cache, state.slot - 1, every.padding, precision
    )
    logprobs = jax.nn.log_softmax(lm_head(params, hidden[:, 0], precision))
    ends = jnp.broadcast_to(state.slot, every.padding.shape)
    begins = jnp.broadcast_to(every.prompt_end, every.padding.shape)
    context = TokenHistory(texts, every.padding, begins, ends)
    logprobs = apply_penalties(logprobs, context, every.penalties, ends - begins, every.stop_ids)
    return cache, logprobs.reshape(batch, num_beams, -1)


def _extend(
    state: Search, logprobs: jax.Array, request: DecodeParams, rules: Rules, kept: int
) -> tuple[jax.Array, Search]:
    """The texts one token longer, and which of the K texts before each open one [B, K] continues."""
    batch, num_beams, vocab_size = logprobs.shape
    totals = (state.open.scores[..., None] + logprobs).reshape(batch, -1)
    totals, which = jax.lax.top_k(totals, min(kept, totals.shape[1]))
    parents, tokens = which // vocab_size, which % vocab_size
    token_ids = jnp.take_along_axis(state.open.token_ids, parents[..., None], axis=1)
    token_ids = jax.lax.dynamic_update_slice_in_dim(token_ids, tokens[..., None], state.slot, axis=2)
    length = state.slot + 1 - request.prompt_end
    ends = (tokens[..., None] == request.stop_ids).any(-1) | (length >= request.limits)[:, None]
    new = Texts(token_ids, totals, jnp.broadcast_to(length, totals.shape))

    # only the best K may end: a worse one is no result while better ones go on
    counts = ends & (jnp.arange(totals.shape[1]) < num_beams) & ~state.done[:, None]
    worth = totals / length.astype(jnp.float32) ** rules.length_penalty
    candidates = new._replace(scores=jnp.where(counts, worth, -jnp.inf))
    both = jax.tree.map(lambda *x: jnp.concatenate(x, axis=1), state.ended, candidates)
    ended, _ = _best(both, num_beams)
    open_, chosen = _best(new._replace(scores=jnp.where(ends, -jnp.inf, totals)), num_beams)

    horizon = jnp.where(rules.hope_to_the_end, request.limits, length).astype(jnp.float32)
    hope = open_.scores[:, 0] / horizon**rules.length_penalty
    full = jnp.isfinite(ended.scores).all(-1)
    done = state.done | ends.all(-1) | (full & (rules.stop_when_full | (hope <= ended.scores.min(-1))))
    state = Search(open_, ended, done, state.slot + 1)
    return jnp.take_along_axis(parents, chosen, axis=1), state


def _best(texts: Texts, count: int) -> tuple[Texts, jax.Array]:
    """The `count` best ones and where they were [B, count]."""
    _, which = jax.lax.top_k(texts.scores, count)

    def take(x):
        return jnp.take_along_axis(x, which.reshape(which.shape + (1,) * (x.ndim - 2)), axis=1)

    return jax.tree.map(take, texts), which


def _follow(cache: Cache, parents: jax.Array, heads: int) -> Cache:
    """The cache [B * K * N, S, H] with the rows of those texts [B, K] that go on."""
    batch, num_beams = parents.shape
    rows = (parents + num_beams * jnp.arange(batch)[:, None]).reshape(-1)

    def take(x):
        return x.reshape(batch * num_beams, heads, *x.shape[1:])[rows].reshape(x.shape)

    return jax.tree.map(take, cache)
