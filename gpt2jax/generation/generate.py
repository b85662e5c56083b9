"""Text and token ids in, continuations out.

    outs = generate(model, ["a prompt", ""], max_new_tokens=64, top_k=5, seed=0)
    for piece in stream(model, "a prompt"): print(piece, end="")

Here are settings, batches, stop strings and text; what a batch does on the device is in generation_run.py and
decoding.py.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, TypedDict, Unpack

import numpy as np

from gpt2jax.generation.decoding import LogitsProcessor
from gpt2jax.generation.requests import Prompt, Row, as_prompts, make_rows, stop_bytes
from gpt2jax.generation.runner import Contrast, GenerationRun, Job, Speculation, make_job
from gpt2jax.generation.sampling import SamplingConfig
from gpt2jax.generation.text_stream import IncrementalDetokenizer
from gpt2jax.utils.validation import check_count, check_model, is_integer, is_number

# steps between two looks for a stop string: few are wasted, and the way to the host is seldom paid
STEPS_PER_LOOK = 8
MOST_TOP_LOGPROBS = 20


@dataclasses.dataclass(frozen=True)
class Generation:
    """One continuation; `str()` of it is prompt and continuation.

    Attributes:
        prompt: the prompt as given; of token ids, their text ("" without a tokenizer).
        text: the continuation only, cut before a stop string ("" without a tokenizer).
        token_ids: the continuation's tokens, without the stop token that ended it. With a stop string: as
            many as the text needs, so the last one may reach into the stop string.
        logprobs: log-probability of each of them under the model's own distribution, softmax of the logits
            before penalties, temperature and filters.
        prompt_ids: what the model was given: the prompt's tokens, or the end token alone for an empty prompt.
        finish_reason: "stop" (a stop token or stop string) or "length".
        top_logprobs: where asked for, the most probable ids at each token and their log-probabilities, best first.
        drafted, accepted: with speculation, how many tokens were guessed, and how many of the guesses were right.
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

    def __str__(self) -> str:
        return self.prompt + self.text


class Settings(TypedDict, total=False):
    """The settings of `generate` and `stream`, which tells what they mean."""

    max_new_tokens: int | None
    max_length: int | None
    temperature: float | Sequence[float]
    top_k: int | None | Sequence[int | None]
    top_p: float | Sequence[float]
    min_p: float | Sequence[float]
    typical_p: float | Sequence[float]
    do_sample: bool | Sequence[bool]
    repetition_penalty: float | Sequence[float]
    presence_penalty: float | Sequence[float]
    frequency_penalty: float | Sequence[float]
    no_repeat_ngram: int | Sequence[int]
    min_new_tokens: int | Sequence[int]
    bad_words: Sequence[str | Sequence[int]] | None
    processor: LogitsProcessor | None
    seed: int | Sequence[int]
    num_samples: int
    stop_token_ids: Sequence[int] | None
    stop_strings: str | Sequence[str] | None
    top_logprobs: int
    prompt_lookup: int
    draft: Any
    draft_tokens: int
    penalty_alpha: float
    past_context: str
    dtype: str | None


def generate(
    model: Any,
    prompts: Prompt | Sequence[Prompt],
    *,
    batch_size: int = 32,
    **settings: Unpack[Settings],
) -> list[Generation]:
    """Continues prompts.

    Rows do not depend on each other: row i with seed s equals the single run of its prompt with seed s, up to
    the rounding of sums that different shapes bring. A beginning that all prompts of a batch share is computed once.

    Args:
        model: a `LanguageModel`.
        prompts: a text or list of token ids, or a list of such. An empty one starts from the end token alone,
            which is how GPT-2 begins a text.
        batch_size: most rows to run at once.
        max_new_tokens: most tokens to add. Default: 64, or what the context has left if that is less.
        max_length: most tokens of prompt and continuation together; instead of `max_new_tokens`.
        temperature (1.0), top_k (5), top_p (1.0), min_p (0.0), typical_p (1.0), do_sample (True),
            repetition_penalty (1.0), presence_penalty (0.0), frequency_penalty (0.0), no_repeat_ngram (0),
            min_new_tokens (0): see `SamplingConfig`; one value, or a list with one for each row. do_sample=False or
            temperature=0 is greedy.
        bad_words: texts or lists of token ids that a continuation must not hold. A text is forbidden as the tokens
            that it has alone and behind a space.
        processor: a pure function of JAX arrays, (logits [B, V] float32, `penalties.TokenHistory`) -> logits [B, V],
            applied behind the penalties and before the temperature. Another function object compiles anew.
        seed: row i draws with seed + i. A sequence gives one seed for each row. Default: 0.
        num_samples: continuations of each prompt; sample j of prompt i is row i * num_samples + j.
        stop_token_ids: tokens that end a continuation. Default: the end token; [] never stops.
        stop_strings: texts that end a continuation and are cut off, wherever token borders lie.
        top_logprobs: 0 to 20, how many of the most probable tokens to report at each step.
        prompt_lookup: most tokens to guess at a time from what followed the same words earlier in the text; 0 is
            off. Guesses change the speed, never the tokens. Rows run one after another.
        draft: a smaller model with the same vocabulary that guesses `draft_tokens` (4) tokens at a time instead.
        penalty_alpha: above 0 (to 1) is contrastive search among the `top_k` most probable tokens in place of
            sampling: so much weight lies on a token not being like the text before it (Su et al. 2022; they use 0.6
            and a top-k of 4 to 10). No other filter counts.
        past_context: "refuse" raises if prompt and continuation exceed the context; "slide" goes on from the last
            half of the text whenever the context is full. Rows that slide run one after another.
        dtype: of the weights: "float32", "bfloat16", "float16", "int8". Default: float32 on a CPU, bfloat16
            elsewhere.

    Returns:
        One `Generation` for each row, in order; a list also for a single prompt.

    Raises:
        ValueError: a setting has an impossible value, a prompt has unknown ids or needs a tokenizer that the
            model lacks, or prompt and continuation exceed the context.
        TypeError: there is no such setting.
    """
    check_model("model", model)
    batch_size = check_count("batch_size", batch_size)
    job, rows = _prepare(model, as_prompts(prompts), **settings)
    outputs: dict[int, Generation] = {}
    # prompts of like length together need the least padding
    order = sorted(range(len(rows)), key=lambda i: len(rows[i].ids))
    for indices in _batches(job, rows, order, batch_size):
        readers = [_Reader(job, rows[i]) for i in indices]
        for _ in _work(job, readers, STEPS_PER_LOOK if job.stop_strings else job.model.config.n_positions):
            pass
        outputs.update((i, reader.result()) for i, reader in zip(indices, readers, strict=True))
    return [outputs[i] for i in range(len(rows))]


def stream(model: Any, prompt: Prompt, **settings: Unpack[Settings]) -> Stream:
    """Continues one prompt and gives its text out as it comes.

    Settings and errors are those of `generate`; errors are raised at the call. The pieces joined are the
    text that `generate` returns. A piece is not empty, ends between characters, and never shows the beginning
    of a stop string. Behind the last piece, `generation` of what is returned holds the rest: tokens, log-probabilities.

    Raises:
        ValueError: also if the model has no tokenizer, or there is more than one text to make.
    """
    check_model("model", model)
    if model.tokenizer is None:
        raise ValueError("stream gives out text, and this model has no tokenizer; use generate for token ids")
    prompts = as_prompts(prompt)
    if len(prompts) != 1:
        raise ValueError(f"stream takes one prompt, not {len(prompts)}; use generate for several")
    job, rows = _prepare(model, prompts, **settings)
    if len(rows) != 1:
        raise ValueError(f"stream makes one text, not {len(rows)}; use generate for num_samples above 1")
    return Stream(job, rows[0])


def _prepare(
    model: Any,
    prompts: list[Any],
    *,
    max_new_tokens: int | None = None,
    max_length: int | None = None,
    bad_words: Any = None,
    processor: LogitsProcessor | None = None,
    seed: int | Sequence[int] = 0,
    num_samples: int = 1,
    stop_token_ids: Sequence[int] | None = None,
    stop_strings: str | Sequence[str] | None = None,
    top_logprobs: int = 0,
    prompt_lookup: int = 0,
    draft: Any = None,
    draft_tokens: int = 4,
    penalty_alpha: float = 0.0,
    past_context: str = "refuse",
    dtype: str | None = None,
    **sampling: Any,
) -> tuple[Job, list[Row]]:
    """Checks the settings; what all rows have in common, and the rows."""
    for name in sampling:
        if name not in Settings.__annotations__:
            raise TypeError(f"there is no setting {name!r}; known: {', '.join(Settings.__annotations__)}")
    if processor is not None and not callable(processor):
        raise ValueError(f"processor={processor!r:.60} must be a function of logits and context, or None")
    if not is_integer(top_logprobs) or not 0 <= top_logprobs <= MOST_TOP_LOGPROBS:
        raise ValueError(
            f"top_logprobs={top_logprobs!r} must be a whole number from 0 to {MOST_TOP_LOGPROBS}"
        )
    speculation = _speculation(model, prompt_lookup, draft, draft_tokens)
    contrast = _contrast(penalty_alpha, sampling.get("top_k", SamplingConfig.top_k), model.config.vocab_size)
    if speculation is not None and contrast is not None:
        raise ValueError(f"penalty_alpha={penalty_alpha} goes with neither prompt_lookup nor draft")
    job = make_job(
        model,
        stop_token_ids=stop_token_ids,
        bad_words=bad_words,
        dtype=dtype,
        stop_strings=stop_bytes(model, stop_strings),
        processor=processor,
        top_logprobs=top_logprobs,
        speculation=speculation,
        contrast=contrast,
    )
    rows = make_rows(
        model,
        prompts,
        max_new_tokens=max_new_tokens,
        max_length=max_length,
        seed=seed,
        num_samples=num_samples,
        sampling=sampling,
        past_context=past_context,
    )
    return job, rows


def _speculation(model: Any, prompt_lookup: int, draft: Any, draft_tokens: int) -> Speculation | None:
    if not is_integer(prompt_lookup) or prompt_lookup < 0:
        raise ValueError(f"prompt_lookup={prompt_lookup!r} must be a whole number, 0 (off) or above")
    prompt_lookup, draft_tokens = int(prompt_lookup), check_count("draft_tokens", draft_tokens)
    if draft is None:
        return Speculation(prompt_lookup) if prompt_lookup else None
    check_model("draft", draft)
    if prompt_lookup:
        raise ValueError(f"prompt_lookup={prompt_lookup} and draft: give one of them")
    if draft.config.vocab_size != model.config.vocab_size:
        raise ValueError(
            f"draft has {draft.config.vocab_size} ids and the model {model.config.vocab_size}; they must be the same"
        )
    return Speculation(draft_tokens, draft)


def _contrast(alpha: float, top_k: Any, vocab_size: int) -> Contrast | None:
    if not is_number(alpha) or not 0 <= alpha <= 1:
        raise ValueError(f"penalty_alpha={alpha!r} must be a number from 0 (off) to 1")
    if not alpha:
        return None
    if not is_integer(top_k) or not 1 <= top_k <= vocab_size:
        raise ValueError(
            f"top_k={top_k!r:.60} with penalty_alpha={alpha} must be one number of candidates, 1 to {vocab_size}"
        )
    return Contrast(int(top_k), float(alpha))


def _batches(job: Job, rows: list[Row], order: list[int], batch_size: int) -> Iterator[list[int]]:
    """Rows in the given order, as many at a time as can run together."""

    def runs_alone(i):
        return job.speculation is not None or rows[i].limit + len(rows[i].ids) > job.model.config.n_positions

    yield from ([i] for i in order if runs_alone(i))
    together = [i for i in order if not runs_alone(i)]
    yield from (together[start : start + batch_size] for start in range(0, len(together), batch_size))


class _Reader:
    """Turns one row's tokens into its `Generation`, as they come."""

    def __init__(self, job: Job, row: Row):
        self._job, self.row = job, row
        self.token_ids: list[int] = []
        self._logprobs: list[float] = []
        self._top: list[list[tuple[int, float]]] = []
        self._guesses = (0, 0)
        self.text = IncrementalDetokenizer(job.stop_strings)
        self.finish_reason: str | None = None

    def read(self, found: dict[str, np.ndarray], before: int) -> None:
        """Takes what is new in a row of `GenerationRun.found`, the first of which is new token `before`."""
        tokenizer = self._job.model.tokenizer
        for step in range(len(self.token_ids) - before, int(found["lengths"])):
            if self.finish_reason is not None:
                return
            token = int(found["token_ids"][step])
            if token in self._job.stop_ids:
                self.finish_reason = "stop"
                return
            self.token_ids.append(token)
            self._logprobs.append(float(found["logprobs"][step]))
            top = zip(found["top_ids"][step].tolist(), found["top_logprobs"][step].tolist(), strict=True)
            self._top.append(list(top)[: self._job.top_logprobs])
            self.text.add(b"" if tokenizer is None else tokenizer.decode_bytes([token]))
            if self.text.stopped:
                self.finish_reason = "stop"
            elif len(self.token_ids) == self.row.limit:
                self.finish_reason = "length"

    def add_guesses(self, drafted: int, accepted: int) -> None:
        """Counts those of a run that is over."""
        self._guesses = (self._guesses[0] + drafted, self._guesses[1] + accepted)

    def result(self) -> Generation:
        assert self.finish_reason is not None
        count = self.text.tokens
        return Generation(
            prompt=self.row.prompt,
            text=self.text.take(last=True),
            token_ids=self.token_ids[:count],
            logprobs=self._logprobs[:count],
            prompt_ids=list(self.row.ids),
            finish_reason=self.finish_reason,
            top_logprobs=self._top[:count] if self._job.top_logprobs else None,
            drafted=self._guesses[0],
            accepted=self._guesses[1],
        )


def _work(job: Job, readers: list[_Reader], steps: int, *, ahead: bool = False) -> Iterator[None]:
    """Runs rows to their ends, and comes back after each `steps` steps.

    Args:
        ahead: the device works on the next steps while the last ones are read.
    """
    context = job.model.config.n_positions
    # a prompt that fills the context slides before its first token
    rows = [_last_half(job, x) if len(x.row.ids) >= context else x.row for x in readers]
    run = GenerationRun(job, rows)
    while True:
        progress = run.progress
        run.advance(steps)
        for reader, found in zip(readers, run.found(progress if ahead else run.progress), strict=False):
            reader.read(found, run.generated)
        over = all(reader.finish_reason for reader in readers)
        # a row can come to the end of a run only where it slides, and then it is alone
        full = not over and len(readers[0].token_ids) - run.generated == run.limit
        if job.speculation is not None and (over or full):
            readers[0].add_guesses(*run.guesses())
        yield
        if over:
            return
        if full:
            run = GenerationRun(job, [_last_half(job, readers[0])], len(readers[0].token_ids))
        elif not ahead:
            run.end_rows([reader.finish_reason is not None for reader in readers])


def _last_half(job: Job, reader: _Reader) -> Row:
    """The row with as much of its text as half the context holds."""
    text = [*reader.row.ids, *reader.token_ids]
    return dataclasses.replace(reader.row, ids=text[-max(1, job.model.config.n_positions // 2) :])


class Stream(Iterator[str]):
    """The pieces of a text as they come.

    Attributes:
        generation: what `generate` returns for it, once the last piece was given out; None before.
    """

    def __init__(self, job: Job, row: Row):
        self._reader = _Reader(job, row)
        self._steps = _work(job, [self._reader], 1, ahead=True)
        self._text = ""
        self.generation: Generation | None = None

    def __next__(self) -> str:
        for _ in self._steps:
            piece = self._reader.text.take(last=self._reader.finish_reason is not None)
            if piece:
                self._text += piece
                return piece
        if self.generation is None:
            self.generation = dataclasses.replace(self._reader.result(), text=self._text)
        raise StopIteration
