"""Running a batch: its arrays, its steps on the device as the host asks for them, and its rows to their ends.

A batch begins with the shortest cache that holds its prompts and moves to a longer one when that is full, because
attention reads all positions of the cache, and a short text should not pay for a long one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np

from gpt2jax.generation.config import MAX_TOP_LOGPROBS
from gpt2jax.generation.decoding import (
    PER_POSITION,
    DecoderSpec,
    DecodeState,
    initial_state,
    make_decode_params,
)
from gpt2jax.generation.outputs import OutputBuilder
from gpt2jax.generation.prefill import cache_length, left_pad, next_cache_length
from gpt2jax.generation.requests import PromptState, Request
from gpt2jax.generation.strategy import DecodeStrategy, decode, grow


@dataclasses.dataclass(frozen=True, eq=False)
class Decoder:
    """How a call decodes: strategy, spec, and the weights that the strategy reads."""

    strategy: DecodeStrategy
    spec: DecoderSpec
    params: Any


class BatchDecoder:
    """Rows that are decoded together.

    Args:
        decoder: how.
        request: what the rows share.
        rows: at least one, at most as many as the strategy takes, and only one if its text exceeds the context.
        generated: how many tokens at the end of the row's `token_ids` were generated before.

    Attributes:
        state: what the device has been asked to do so far.
        limit: most new tokens of a row.
    """

    def __init__(self, decoder: Decoder, request: Request, rows: Sequence[PromptState], generated: int = 0):
        self._decoder, self.generated = decoder, generated
        config = decoder.spec.config
        self._prompt_length = length = max(len(row.token_ids) for row in rows)
        limits = [min(row.limit - generated, config.n_positions - len(row.token_ids)) for row in rows]
        self.limit = max(limits)
        needed = length + decoder.strategy.extra_positions(self.limit)
        self._cache_length = cache_length(config, needed, len(rows))
        self._step = 0
        mesh = decoder.spec.mesh
        prompts = left_pad(rows, self._cache_length, 1 if mesh is None else mesh.size)
        self._settings = make_decode_params(
            rows,
            prompts.padding,
            limits,
            length - generated,
            stop_ids=request.stop_ids,
            bad_words=request.bad_words,
        )
        top_logprobs = min(MAX_TOP_LOGPROBS, config.vocab_size) if request.config.top_logprobs else 0
        self.state = initial_state(prompts.token_ids, self._settings.limits, length, top_logprobs)
        self._cache = decoder.strategy.prefill(decoder.spec, decoder.params, prompts)

    def advance(self, steps: int) -> None:
        """Start up to `steps` more steps, without waiting for them."""
        decoder, target = self._decoder, min(self.limit, self._step + steps)
        while self._step < target:
            self._step = min(target, self._cache_length - self._prompt_length)
            until = np.int32(self._prompt_length + self._step)
            self._cache, self.state = decode(
                decoder.strategy,
                decoder.spec,
                decoder.params,
                self._cache,
                self.state,
                self._settings,
                until,
            )
            if self._step < target:
                self._cache_length = next_cache_length(self._cache_length, len(self._settings.limits))
                self._cache, self.state = grow(self._cache, self.state, self._cache_length)

    def fetch(self, state: DecodeState) -> Iterator[dict[str, np.ndarray]]:
        """Return the new tokens and scores of each row of a state; waits for the device."""
        names = (*PER_POSITION, "lengths")
        arrays = jax.device_get({name: getattr(state, name) for name in names})
        for name in PER_POSITION:
            arrays[name] = arrays[name][:, self._prompt_length :]
        return ({name: arrays[name][row] for name in names} for row in range(len(arrays["lengths"])))

    def draft_counts(self) -> tuple[int, int]:
        """Return how many draft tokens there were, and how many were right; waits for the device if there were any."""
        if not self._decoder.strategy.has_drafts:
            return 0, 0
        drafted, accepted = jax.device_get((self.state.drafted, self.state.accepted))
        return int(drafted), int(accepted)

    def mark_done(self, done: Sequence[bool]) -> None:
        """Stop decoding rows that the host has ended."""
        all_done: Any = np.ones(len(self._settings.limits), bool)
        all_done[: len(done)] = done
        self.state = self.state._replace(done=all_done)


def decode_rows(
    decoder: Decoder,
    request: Request,
    outputs: Sequence[OutputBuilder],
    steps: int,
    *,
    is_ahead: bool = False,
) -> Iterator[None]:
    """Decode rows to their ends; yield after every `steps` steps, with the new tokens in `outputs`.

    Args:
        decoder: how.
        request: what the rows share.
        outputs: one for each row.
        steps: fewer find a stop string earlier, more wait for the device less often.
        is_ahead: the device computes the next steps while the host reads the last ones.
    """
    context = decoder.spec.config.n_positions
    # a prompt that fills the context slides before its first token
    rows = [x.last_half(context) if len(x.row.token_ids) >= context else x.row for x in outputs]
    batch = BatchDecoder(decoder, request, rows)
    while True:
        state = batch.state
        batch.advance(steps)
        for output, found in zip(outputs, batch.fetch(state if is_ahead else batch.state), strict=False):
            output.append(found, batch.generated)
        is_over = all(output.finish_reason for output in outputs)
        # a row can reach the limit of its batch without ending only if it slides, and then it is alone
        is_full = not is_over and len(outputs[0].token_ids) - batch.generated == batch.limit
        if is_over or is_full:
            outputs[0].add_draft_counts(*batch.draft_counts())
        yield
        if is_over:
            return
        if is_full:
            row = outputs[0].last_half(context)
            batch = BatchDecoder(decoder, request, [row], len(outputs[0].token_ids))
        elif not is_ahead:
            batch.mark_done([output.finish_reason is not None for output in outputs])
