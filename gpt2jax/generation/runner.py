"""One batch on the device: buckets of shapes, prompts into the cache, and steps as the host asks for them.

Rows and slots are rounded up to powers of two, so that one compiled program serves many calls. A run begins with the
smallest cache that holds its prompts and moves to a larger one when it is full: attention reads all slots, and a short
text should not pay for a long one.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gpt2jax.generation.cached_model import (
    DecodingParams,
    decoding_precision,
    params_for_decoding,
    weight_dtype,
)
from gpt2jax.generation.contrastive import decode_contrastive, read_prompts
from gpt2jax.generation.decoding import (
    PER_SLOT,
    DecodeParams,
    DecodeState,
    LogitsProcessor,
    broadcast_prefix,
    decode,
    empty_cache,
    grow,
    prefill_chunk,
)
from gpt2jax.generation.kv_cache import Cache
from gpt2jax.generation.logits_processors import Penalties
from gpt2jax.generation.requests import Row, bad_word_ids, stop_ids
from gpt2jax.generation.sampling import Filters
from gpt2jax.generation.speculative import decode_with_draft, decode_with_lookup
from gpt2jax.model.config import GPT2Config
from gpt2jax.ops.precision import Precision

# a batch of one reads few slots beside the weights, and should compile few programs
_SLOTS_ALONE, _SLOTS_TOGETHER = 256, 64
_SMALLEST_CHUNK = 8
# a shared beginning shorter than this is computed for each row
_SHORTEST_SHARED = 16
_UNBOUNDED = 2**31
_TOP_COLUMNS = 20


@dataclasses.dataclass(frozen=True)
class Speculation:
    """How guesses are made: `size` at a time, by the model `draft`, or looked up in the text where there is none."""

    size: int
    draft: Any = None


@dataclasses.dataclass(frozen=True)
class Contrast:
    """Contrastive search among so many `candidates`; see contrastive.py."""

    candidates: int
    alpha: float


@dataclasses.dataclass(frozen=True)
class Job:
    """What all rows of a call have in common.

    Attributes:
        model: has `config`, `params`, `tokenizer`, `adapters`, `lora`.
        stop_ids: end a row.
        bad_words: token ids that must not follow each other.
        precision: dtypes of the computation.
        weights: dtype of the weights.
        stop_strings: end a row, as bytes.
        processor: the user's change of logits.
        top_logprobs: how many of the most probable tokens to report.
        speculation: how guesses are made, if any are.
        contrast: how contrastive search chooses, in place of sampling.
    """

    model: Any
    stop_ids: list[int]
    bad_words: list[list[int]]
    precision: Precision
    weights: jnp.dtype
    stop_strings: list[bytes] = dataclasses.field(default_factory=list)
    processor: LogitsProcessor | None = None
    top_logprobs: int = 0
    speculation: Speculation | None = None
    contrast: Contrast | None = None


def make_job(
    model: Any,
    *,
    stop_token_ids: Sequence[int] | None,
    bad_words: Sequence[Any] | None,
    dtype: str | None,
    **others: Any,
) -> Job:
    """A job from arguments as `generate` has them, and its other fields."""
    precision = decoding_precision(dtype)
    return Job(
        model=model,
        stop_ids=stop_ids(model, stop_token_ids),
        bad_words=bad_word_ids(model, bad_words),
        precision=precision,
        weights=weight_dtype(dtype, precision),
        **others,
    )


def bucket(size: int, smallest: int, largest: int = _UNBOUNDED) -> int:
    """The power of two that holds `size`, between `smallest` and `largest`, which holds it too."""
    return min(max(smallest, 1 << (size - 1).bit_length()), largest)


def initial_progress(token_ids: Any, limits: Any, slot: int, top: int = 0) -> DecodeState:
    """Nothing but prompts: token_ids [B, S] filled up to `slot`; with room for `top` log-probabilities a token."""
    batch, slots = token_ids.shape
    return DecodeState(
        token_ids=token_ids,
        logprobs=_zeros((batch, slots), np.float32),
        top_ids=_zeros((batch, slots, top)),
        top_logprobs=_zeros((batch, slots, top), np.float32),
        lengths=_zeros(batch),
        done=limits <= 0,
        slot=_zeros(()) + slot,
        drafted=_zeros(()),
        accepted=_zeros(()),
    )


def left_padded(rows: Sequence[Row], length: int, batch: int, slots: int) -> tuple[Any, Any]:
    """Prompts that end behind slot `length` - 1: token ids [batch, slots] and padding [batch], int32.

    What only fills up the batch has the last slot for its text.
    """
    token_ids = np.zeros((batch, slots), np.int32)
    padding = np.full(batch, length - 1, np.int32)
    for i, row in enumerate(rows):
        padding[i] = length - len(row.ids)
        token_ids[i, padding[i] : length] = row.ids
    return token_ids, padding


def fill_cache(
    params: DecodingParams,
    token_ids: Any,
    padding: Any,
    begin: int,
    end: int,
    *,
    config: GPT2Config,
    precision: Precision,
    cache: Cache | None = None,
) -> Cache:
    """The slots [begin, end) of token_ids [B, S] in a cache, an empty one for None; a chunk at a time."""
    batch, slots = token_ids.shape
    filled: Cache = cache or empty_cache(config, batch, slots, precision.activation_dtype)
    size = min(slots, max(_SMALLEST_CHUNK, slots // 8))
    for slot in range(begin, end, size):
        # a chunk that would reach beyond the cache begins earlier, and computes the same once more
        slot = min(slot, slots - size)
        chunk = token_ids[:, slot : slot + size]
        filled = prefill_chunk(
            params, chunk, filled, np.int32(slot), padding, config=config, precision=precision
        )
    return filled


def cache_slots(config: GPT2Config, slots: int, rows: int = 1) -> int:
    """Slots of the cache that holds `slots` slots: a power of two."""
    smallest = _SLOTS_ALONE if rows == 1 else _SLOTS_TOGETHER
    return bucket(slots, min(smallest, bucket(config.n_positions, 1)))


def more_slots(slots: int, rows: int) -> int:
    """The next size of a full cache: of one row twice as large, of several rows, whose attention costs more, less."""
    if rows > 1 and slots > _SLOTS_TOGETHER and slots == bucket(slots, 1):
        return slots * 3 // 2
    return bucket(slots + 1, 1)


class GenerationRun:
    """Rows that run together; `progress` is what the device has been asked to do so far.

    Args:
        job: what the rows have in common.
        rows: at least one; with speculation, or where the texts go past the context, just one.
        generated: tokens of the row's `ids` that were generated before, at their end.
    """

    def __init__(self, job: Job, rows: Sequence[Row], generated: int = 0):
        self._job, self.generated = job, generated
        config = job.model.config
        self._length = length = max(len(row.ids) for row in rows)
        limits = [min(row.limit - generated, config.n_positions - len(row.ids)) for row in rows]
        self.limit = max(limits)
        # a run with guesses does not know how far it is, and one with contrasts cannot move: room for all of it
        spare = 1
        if job.speculation is not None or job.contrast is not None:
            spare += self.limit + (job.speculation.size if job.speculation else 0)
        self._slots = cache_slots(config, length + spare, len(rows))
        self._step = 0
        batch = bucket(len(rows), 1)
        token_ids, padding = left_padded(rows, length, batch, self._slots)
        self._request = make_request(job, rows, padding, limits, length - generated)
        top = min(_TOP_COLUMNS, config.vocab_size) if job.top_logprobs else 0
        self.progress = initial_progress(token_ids, self._request.limits, length, top)
        self._params = params_for_decoding(job.model, job.weights)
        if job.contrast is not None:
            self._cache, self._hidden = self._contrasted(job.contrast)
        else:
            self._cache = self._prompts(job.model.config, self._params, rows)
        if job.speculation and job.speculation.draft is not None:
            draft = job.speculation.draft
            self._draft_params = params_for_decoding(draft, job.weights)
            self._draft_cache = self._prompts(draft.config, self._draft_params, rows)

    def _prompts(self, config: GPT2Config, params: DecodingParams, rows: Sequence[Row]) -> Cache:
        """A cache of all tokens of the prompts but the last."""
        token_ids, padding = self.progress.token_ids, self._request.padding
        fill = functools.partial(fill_cache, params, config=config, precision=self._job.precision)
        shared = _shared([row.ids for row in rows])
        if len(rows) == 1 or len(shared) < _SHORTEST_SHARED:
            return fill(token_ids, padding, 0, self._length - 1)
        alone = np.zeros((1, self._slots), np.int32)
        alone[0, : len(shared)] = shared
        cache = fill(alone, np.zeros(1, np.int32), 0, len(shared))
        cache = broadcast_prefix(cache, padding, config.n_head)
        return fill(token_ids, padding, len(shared), self._length - 1, cache=cache)

    def _contrasted(self, contrast: Contrast) -> tuple[Cache, jax.Array]:
        """Cache and hidden states of all tokens of the prompts."""
        read = self.progress.token_ids[:, : bucket(self._length, _SMALLEST_CHUNK, self._slots)]
        return read_prompts(
            self._params,
            read,
            self._request.padding,
            slots=self._slots,
            candidates=contrast.candidates,
            config=self._job.model.config,
            precision=self._job.precision,
        )

    def advance(self, steps: int) -> None:
        """Lets up to `steps` more steps run, without waiting for them."""
        target = min(self.limit, self._step + steps)
        while self._step < target:
            self._step = min(target, self._slots - self._length)
            self._decode(np.int32(self._length + self._step))
            if self._step < target:
                self._slots = more_slots(self._slots, len(self._request.limits))
                self._cache, self.progress = grow(self._cache, self.progress, self._slots)

    def _decode(self, until: np.int32) -> None:
        job = self._job
        static = {"config": job.model.config, "precision": job.precision, "processor": job.processor}
        request, progress = self._request, self.progress
        if job.contrast is not None:
            self._cache, self._hidden, self.progress = decode_contrastive(
                self._params,
                self._cache,
                self._hidden,
                progress,
                request,
                until,
                np.float32(job.contrast.alpha),
                candidates=job.contrast.candidates,
                **static,
            )
            return
        if job.speculation is None:
            self._cache, self.progress = decode(self._params, self._cache, progress, request, until, **static)
            return
        static["size"] = job.speculation.size
        if job.speculation.draft is None:
            self._cache, self.progress = decode_with_lookup(
                self._params, self._cache, progress, request, until, **static
            )
            return
        self._cache, self._draft_cache, self.progress = decode_with_draft(
            self._params,
            self._cache,
            self._draft_params,
            self._draft_cache,
            progress,
            request,
            until,
            draft_config=job.speculation.draft.config,
            **static,
        )

    def found(self, progress: DecodeState) -> Iterator[dict[str, np.ndarray]]:
        """The new tokens of each row of a `progress`, and what goes with them; waits for the device."""
        names = (*PER_SLOT, "lengths")
        arrays = jax.device_get({name: getattr(progress, name) for name in names})
        for name in PER_SLOT:
            arrays[name] = arrays[name][:, self._length :]
        return ({name: arrays[name][row] for name in names} for row in range(len(arrays["lengths"])))

    def guesses(self) -> tuple[int, int]:
        """Tokens that were guessed, and how many of them were right."""
        return int(self.progress.drafted), int(self.progress.accepted)

    def end_rows(self, ended: Sequence[bool]) -> None:
        """Rows that the host has ended need no more steps."""
        done: Any = np.ones(len(self._request.limits), bool)
        done[: len(ended)] = ended
        self.progress = self.progress._replace(done=done)


def make_request(
    job: Job, rows: Sequence[Row], padding: Any, limits: Sequence[int], prompt_end: int
) -> DecodeParams:
    """The settings as arrays; rows that only fill up the batch have those of the first one and a limit of 0."""
    fill = len(padding) - len(rows)
    settings = [row.sampling for row in (*rows, *[rows[0]] * fill)]
    each = [setting.filters() for setting in settings]

    def real(name: str) -> Any:
        return np.array([getattr(setting, name) for setting in settings], np.float32)

    def whole(name: str) -> Any:
        return np.array([min(getattr(setting, name), _UNBOUNDED - 1) for setting in settings], np.int32)

    stop_ids: Any = np.full(bucket(len(job.stop_ids), 4), -1, np.int32)
    stop_ids[: len(job.stop_ids)] = job.stop_ids
    longest = max(map(len, job.bad_words), default=1)
    bad_words: Any = np.full((bucket(len(job.bad_words), 4), bucket(longest, 4)), -1, np.int32)
    for i, word in enumerate(job.bad_words):
        bad_words[i, bad_words.shape[1] - len(word) :] = word
    dtypes = (np.float32, np.int32, np.float32, np.float32, np.float32)
    filters: Any = [np.array(v, d) for v, d in zip(zip(*each, strict=True), dtypes, strict=True)]
    of_rows: Any = (
        np.array([*limits, *[0] * fill], np.int32),
        np.array([s.seed for s in rows] + [0] * fill, np.uint32),
    )
    return DecodeParams(
        padding=padding,
        prompt_end=_zeros(()) + prompt_end,
        limits=of_rows[0],
        seeds=of_rows[1],
        stop_ids=stop_ids,
        filters=Filters(*filters),
        penalties=Penalties(
            real("repetition_penalty"),
            real("presence_penalty"),
            real("frequency_penalty"),
            whole("no_repeat_ngram"),
            whole("min_new_tokens"),
            bad_words,
        ),
    )


def _zeros(shape: Any, dtype: type = np.int32) -> Any:
    """On the host: a jitted function takes it as it is, and nothing is compiled to make it."""
    return np.zeros(shape, dtype)


def _shared(texts: Sequence[Sequence[int]]) -> Sequence[int]:
    """The longest beginning of all texts that leaves each of them a last token."""
    shortest = min(len(text) for text in texts) - 1
    for i in range(shortest):
        if any(text[i] != texts[0][i] for text in texts):
            return texts[0][:i]
    return texts[0][:shortest]
