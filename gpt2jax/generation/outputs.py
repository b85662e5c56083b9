"""`Generation`, the result of generation, and the builder that makes it of tokens as they come."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from gpt2jax.generation.requests import PromptState, Request
from gpt2jax.generation.text_stream import IncrementalDetokenizer


@dataclasses.dataclass(frozen=True)
class Generation:
    """One continuation; `str()` of it is prompt and continuation.

    Attributes:
        prompt: the prompt as given; for token ids, their text ("" without a tokenizer).
        text: the continuation only, cut before a stop string ("" without a tokenizer).
        token_ids: the continuation's tokens, without the stop token that ended it. With a stop string: as many as the
            text needs, so the last one may reach into the stop string.
        logprobs: log-probability of each token under the model's own distribution, the softmax of the logits before
            penalties, temperature and filters; empty for beam search.
        prompt_ids: what the model was given: the prompt's tokens, or the end token alone for an empty prompt.
        finish_reason: "stop" (a stop token or stop string) or "length".
        top_logprobs: if asked for, the most probable ids at each token and their log-probabilities, best first.
        drafted, accepted: in speculative decoding, the number of draft tokens, and of those that were right.
        score: in beam search, the sum of the log-probabilities after penalties, the stop token's too, divided by the
            number of tokens to the power of the length penalty.
        file_settings: the settings that came from a file beside the weights, not from the call.
    """

    prompt: str
    text: str
    token_ids: list[int]
    logprobs: list[float]
    prompt_ids: list[int]
    finish_reason: str
    top_logprobs: list[list[tuple[int, float]]] | None = None
    drafted: int = 0
    accepted: int = 0
    score: float | None = None
    file_settings: dict[str, Any] = dataclasses.field(default_factory=dict)

    def __str__(self) -> str:
        return self.prompt + self.text

    def _repr_html_(self) -> str:
        from gpt2jax.report.notebook import generation_html

        return generation_html(self)


class OutputBuilder:
    """Collects the tokens of one row until it ends.

    Attributes:
        row: the prompt.
        token_ids: its new tokens so far.
        text: their text so far.
        finish_reason: None while the row goes on.
    """

    def __init__(self, request: Request, row: PromptState):
        self.row = row
        self.token_ids: list[int] = []
        self.text = IncrementalDetokenizer(request.stop_strings)
        self.finish_reason: str | None = None
        self._request = request
        self._logprobs: list[float] = []
        self._top: list[list[tuple[int, float]]] = []
        self._drafted = self._accepted = 0

    def append(self, found: Mapping[str, Any], before: int) -> None:
        """Add what is new in a row of `BatchDecoder.fetch`, whose first token is new token `before`."""
        tokenizer = self._request.model.tokenizer
        for step in range(len(self.token_ids) - before, int(found["lengths"])):
            if self.finish_reason is not None:
                return
            token = int(found["token_ids"][step])
            if token in self._request.stop_ids:
                self.finish_reason = "stop"
                return
            self.token_ids.append(token)
            self._logprobs.append(float(found["logprobs"][step]))
            top = zip(found["top_ids"][step].tolist(), found["top_logprobs"][step].tolist(), strict=True)
            self._top.append(list(top)[: self._request.config.top_logprobs])
            self.text.add(b"" if tokenizer is None else tokenizer.decode_bytes([token]))
            if self.text.stopped:
                self.finish_reason = "stop"
            elif len(self.token_ids) == self.row.limit:
                self.finish_reason = "length"

    def add_draft_counts(self, drafted: int, accepted: int) -> None:
        """Add the draft tokens of a batch that has ended."""
        self._drafted, self._accepted = self._drafted + drafted, self._accepted + accepted

    def last_half(self, context: int) -> PromptState:
        """Return the row with as much of its text as half the context holds, as its prompt."""
        text = [*self.row.token_ids, *self.token_ids]
        return dataclasses.replace(self.row, token_ids=text[-max(1, context // 2) :])

    def result(self) -> Generation:
        """Return the continuation of a row that has ended."""
        assert self.finish_reason is not None
        count = self.text.tokens
        return Generation(
            prompt=self.row.text,
            text=self.text.flush(last=True),
            token_ids=self.token_ids[:count],
            logprobs=self._logprobs[:count],
            prompt_ids=list(self.row.token_ids),
            finish_reason=self.finish_reason,
            top_logprobs=self._top[:count] if self._request.config.top_logprobs else None,
            drafted=self._drafted,
            accepted=self._accepted,
            file_settings=dict(self._request.file_settings),
        )
