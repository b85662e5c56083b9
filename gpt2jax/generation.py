"""Text and token ids in, continuations out.

    outs = generate(model, ["a prompt", ""], max_new_tokens=64, top_k=5, seed=0)
    for piece in stream(model, "a prompt"): print(piece, end="")

What runs on the device is in decoding.py; here are prompts, buckets, batches, stop strings and text. Shapes
are rounded up to powers of two (rows, prompt slots, new tokens), so that one compiled program serves many
calls.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gpt2jax.decoding import Progress, Request, decode, first_tokens, grow
from gpt2jax.inference import inference_precision, params_for_inference, prefill
from gpt2jax.precision import Precision
from gpt2jax.prompts import Prompt, Row, as_prompts, check_count, make_rows, stop_bytes, stop_ids
from gpt2jax.sampling import SamplingConfig
from gpt2jax.stopping import TextStream

SMALLEST_BUCKET = 16
# steps between two looks for a stop string: few are wasted, and the way to the host is seldom paid
STEPS_PER_LOOK = 8
_UNBOUNDED = 2**31


@dataclasses.dataclass(frozen=True)
class Generation:
    """One continuation; `str()` of it is prompt and continuation.

    Attributes:
        prompt: the prompt as given; of token ids, their text ("" without a tokenizer).
        text: the continuation only, cut before a stop string ("" without a tokenizer).
        token_ids: the continuation's tokens, without the stop token that ended it. With a stop string: as
            many as the text needs, so the last one may reach into the stop string.
        logprobs: log-probability of each of them under the model's own distribution, softmax of the logits
            before temperature and filters.
        prompt_ids: what the model was given: the prompt's tokens, or the end token alone for an empty prompt.
        finish_reason: "stop" (a stop token or stop string) or "length".
    """

    prompt: str
    text: str
    token_ids: list[int]
    logprobs: list[float]
    prompt_ids: list[int]
    finish_reason: str

    def __str__(self) -> str:
        return self.prompt + self.text


def generate(
    model: Any,
    prompts: Prompt | Sequence[Prompt],
    *,
    max_new_tokens: int | None = None,
    max_length: int | None = None,
    temperature: float = 1.0,
    top_k: int | None = 5,
    top_p: float = 1.0,
    min_p: float = 0.0,
    do_sample: bool = True,
    seed: int | Sequence[int] = 0,
    num_samples: int = 1,
    stop_token_ids: Sequence[int] | None = None,
    stop_strings: str | Sequence[str] | None = None,
    dtype: str | None = None,
    batch_size: int = 32,
) -> list[Generation]:
    """Continues prompts.

    Rows do not depend on each other: row i with seed s equals the single run of its prompt with seed s, up to
    the rounding of sums that different shapes bring.

    Args:
        model: a `LanguageModel`.
        prompts: a text or list of token ids, or a list of such. An empty one starts from the end token alone,
            which is how GPT-2 begins a text.
        max_new_tokens: most tokens to add. Default: 64, or what the context has left if that is less.
        max_length: most tokens of prompt and continuation together; instead of `max_new_tokens`.
        temperature, top_k, top_p, min_p, do_sample: see `SamplingConfig`. do_sample=False or temperature=0 is
            greedy.
        seed: row i draws with seed + i. A sequence gives one seed for each row.
        num_samples: continuations of each prompt; sample j of prompt i is row i * num_samples + j.
        stop_token_ids: tokens that end a continuation. Default: the end token; [] never stops.
        stop_strings: texts that end a continuation and are cut off, wherever token borders lie.
        dtype: of the weights: "float32", "bfloat16", "float16". Default: float32 on a CPU, bfloat16
            elsewhere.
        batch_size: most rows to run at once.

    Returns:
        One `Generation` for each row, in order; a list also for a single prompt.

    Raises:
        ValueError: a setting has an impossible value, a prompt has unknown ids or needs a tokenizer that the
            model lacks, or prompt and continuation exceed the context.
    """
    check_count("batch_size", batch_size)
    job = _Job(
        model,
        SamplingConfig(temperature, top_k, top_p, min_p, do_sample),
        stop_ids(model, stop_token_ids),
        stop_bytes(model, stop_strings),
        inference_precision(dtype),
    )
    rows = make_rows(
        model,
        as_prompts(prompts),
        max_new_tokens=max_new_tokens,
        max_length=max_length,
        seed=seed,
        num_samples=num_samples,
    )
    outputs: dict[int, Generation] = {}
    # prompts of like length together need the least padding
    order = sorted(range(len(rows)), key=lambda i: len(rows[i].ids))
    for begin in range(0, len(order), batch_size):
        indices = order[begin : begin + batch_size]
        outputs.update(zip(indices, _run_batch(job, [rows[i] for i in indices]), strict=True))
    return [outputs[i] for i in range(len(rows))]


def stream(
    model: Any,
    prompt: Prompt,
    *,
    max_new_tokens: int | None = None,
    max_length: int | None = None,
    temperature: float = 1.0,
    top_k: int | None = 5,
    top_p: float = 1.0,
    min_p: float = 0.0,
    do_sample: bool = True,
    seed: int = 0,
    stop_token_ids: Sequence[int] | None = None,
    stop_strings: str | Sequence[str] | None = None,
    dtype: str | None = None,
) -> Iterator[str]:
    """Continues one prompt and gives its text out as it comes.

    Arguments and errors are those of `generate`; errors are raised at the call. The pieces joined are the
    text that `generate` returns. A piece is not empty, ends between characters, and never shows the beginning
    of a stop string.

    Raises:
        ValueError: also if the model has no tokenizer.
    """
    if model.tokenizer is None:
        raise ValueError("stream gives out text, and this model has no tokenizer; use generate for token ids")
    job = _Job(
        model,
        SamplingConfig(temperature, top_k, top_p, min_p, do_sample),
        stop_ids(model, stop_token_ids),
        stop_bytes(model, stop_strings),
        inference_precision(dtype),
    )
    prompts = as_prompts(prompt)
    if len(prompts) != 1:
        raise ValueError(f"stream takes one prompt, not {len(prompts)}; use generate for several")
    rows = make_rows(
        model, prompts, max_new_tokens=max_new_tokens, max_length=max_length, seed=seed, num_samples=1
    )
    return _stream_row(job, rows[0])


@dataclasses.dataclass(frozen=True)
class _Job:
    """What all rows of a call have in common."""

    model: Any
    settings: SamplingConfig
    stop_ids: list[int]
    stop_strings: list[bytes]
    precision: Precision


def bucket(size: int, smallest: int, largest: int) -> int:
    """The power of two that holds `size`, between `smallest` and `largest`, which holds it too."""
    return min(max(smallest, 1 << (size - 1).bit_length()), largest)


class _Run:
    """One batch on the device; `progress` is what it has done so far."""

    def __init__(self, job: _Job, rows: list[Row]):
        config = job.model.config
        batch = bucket(len(rows), 1, _UNBOUNDED)
        slots = bucket(max(len(row.ids) for row in rows), SMALLEST_BUCKET, config.n_positions)
        max_tokens = bucket(max(row.limit for row in rows), SMALLEST_BUCKET, config.n_positions)
        token_ids = np.zeros((batch, slots), np.int32)
        padding = np.full(batch, slots - 1, np.int32)
        limits = np.zeros(batch, np.int32)
        seeds = np.zeros(batch, np.uint32)
        stop_ids = np.full(bucket(len(job.stop_ids), 4, _UNBOUNDED), -1, np.int32)
        stop_ids[: len(job.stop_ids)] = job.stop_ids
        for i, row in enumerate(rows):
            token_ids[i, slots - len(row.ids) :] = row.ids
            padding[i] = slots - len(row.ids)
            limits[i], seeds[i] = row.limit, row.seed
        arrays = map(jnp.asarray, (padding, limits, seeds, stop_ids))
        self._request = Request(*arrays, filters=job.settings.filters())
        self._limit = int(limits.max())
        self._step = 1
        self._window = job.settings.window
        self._static = {"config": config, "precision": job.precision}
        self._params = params_for_inference(job.model, job.precision.compute_dtype)
        logits, cache = prefill(self._params, token_ids, padding, **self._static)
        self._cache = grow(cache, slots + max_tokens)
        self.progress = first_tokens(logits, self._request, max_tokens=max_tokens, window=self._window)

    def advance(self, steps: int) -> None:
        """Lets `steps` more steps run, without waiting for them."""
        if self._step < self._limit:
            self._step = min(self._limit, self._step + steps)
            self._cache, self.progress = decode(
                self._params,
                self._cache,
                self.progress,
                self._request,
                np.int32(self._step),
                window=self._window,
                **self._static,
            )

    def end_rows(self, ended: list[bool]) -> None:
        """Rows that the host has ended need no more steps."""
        done = np.ones(len(self._request.limits), bool)
        done[: len(ended)] = ended
        self.progress = self.progress._replace(done=jnp.asarray(done))


class _Reader:
    """Turns one row's tokens into its `Generation`, as they come."""

    def __init__(self, job: _Job, row: Row):
        self._job, self._row = job, row
        self._ids: list[int] = []
        self._logprobs: list[float] = []
        self.text = TextStream(job.stop_strings)
        self.finish_reason: str | None = None

    def read(self, tokens: np.ndarray, logprobs: np.ndarray, length: int) -> None:
        """Takes what is new in tokens [M] and logprobs [M], of which `length` are there."""
        tokenizer = self._job.model.tokenizer
        for step in range(len(self._ids), length):
            if self.finish_reason is not None:
                return
            token = int(tokens[step])
            if token in self._job.stop_ids:
                self.finish_reason = "stop"
                return
            self._ids.append(token)
            self._logprobs.append(float(logprobs[step]))
            self.text.add(b"" if tokenizer is None else tokenizer.decode_bytes([token]))
            if self.text.stopped:
                self.finish_reason = "stop"
            elif len(self._ids) == self._row.limit:
                self.finish_reason = "length"

    def result(self) -> Generation:
        assert self.finish_reason is not None
        count = self.text.tokens
        return Generation(
            prompt=self._row.prompt,
            text=self.text.take(last=True),
            token_ids=self._ids[:count],
            logprobs=self._logprobs[:count],
            prompt_ids=list(self._row.ids),
            finish_reason=self.finish_reason,
        )


def _run_batch(job: _Job, rows: list[Row]) -> list[Generation]:
    run = _Run(job, rows)
    readers = [_Reader(job, row) for row in rows]
    steps = STEPS_PER_LOOK if job.stop_strings else job.model.config.n_positions
    while True:
        run.advance(steps)
        _read_all(readers, run.progress)
        if all(reader.finish_reason for reader in readers):
            return [reader.result() for reader in readers]
        run.end_rows([reader.finish_reason is not None for reader in readers])


def _stream_row(job: _Job, row: Row) -> Iterator[str]:
    run = _Run(job, [row])
    reader = _Reader(job, row)
    while reader.finish_reason is None:
        progress = run.progress
        run.advance(1)  # the device works on the next token while this one is shown
        _read_all([reader], progress)
        if piece := reader.text.take(last=reader.finish_reason is not None):
            yield piece


def _read_all(readers: list[_Reader], progress: Progress) -> None:
    tokens, logprobs, lengths = jax.device_get((progress.tokens, progress.logprobs, progress.lengths))
    for reader, row_tokens, row_logprobs, length in zip(readers, tokens, logprobs, lengths, strict=False):
        reader.read(row_tokens, row_logprobs, length)
