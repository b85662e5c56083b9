"""What `generate` is asked for: prompts, lengths, seeds, stops; checked and turned into rows of ids."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from gpt2jax.generation.sampling import SamplingConfig
from gpt2jax.utils.validation import SEED_RANGE, check_count, is_integer, is_seed

DEFAULT_NEW_TOKENS = 64
# a text that grows beyond the context is an error, or goes on from its last half
PAST_CONTEXT = ("refuse", "slide")

Prompt = str | Sequence[int]


@dataclasses.dataclass(frozen=True)
class Row:
    """One continuation to make.

    Attributes:
        prompt: the text of the prompt, "" where there is none.
        ids: what the model is given; never empty.
        limit: most new tokens.
        seed: 32 bits.
        sampling: how its tokens are chosen.
    """

    prompt: str
    ids: list[int]
    limit: int
    seed: int
    sampling: SamplingConfig = SamplingConfig()


def as_prompts(prompts: Any) -> list[Any]:
    """A list of prompts from one prompt or several: a text, token ids, or a list or array of such.

    Raises:
        ValueError: it is none of them.
    """
    if isinstance(prompts, str):
        return [prompts]
    if isinstance(prompts, bytes | Mapping | set | frozenset) or not isinstance(prompts, Iterable):
        raise ValueError(f"prompts={prompts!r:.60} must be a text, a list of token ids, or a list of such")
    prompts = list(_plain(prompts))
    return [prompts] if prompts and all(is_integer(item) for item in prompts) else prompts


def make_rows(
    model: Any,
    prompts: Sequence[Any],
    *,
    max_new_tokens: int | None,
    max_length: int | None,
    seed: int | Sequence[int] = 0,
    num_samples: int = 1,
    sampling: Mapping[str, Any] | None = None,
    past_context: str | None = "refuse",
) -> list[Row]:
    """The rows of prompts, each `num_samples` times in a row; arguments as for `generate`.

    Args:
        sampling: fields of `SamplingConfig`, each one value or one a row.
        past_context: None is "refuse" for a caller that has no "slide" to advise.

    Raises:
        ValueError: an argument has an impossible value, or a prompt does not fit the model.
    """
    if max_new_tokens is not None and max_length is not None:
        raise ValueError(f"max_new_tokens={max_new_tokens} and max_length={max_length}: give one of them")
    if max_new_tokens is not None:
        max_new_tokens = check_count("max_new_tokens", max_new_tokens)
    if max_length is not None:
        max_length = check_count("max_length", max_length)
    num_samples = check_count("num_samples", num_samples)
    if past_context is not None and past_context not in PAST_CONTEXT:
        raise ValueError(f"past_context={past_context!r} must be one of {', '.join(PAST_CONTEXT)}")
    seeds = _row_seeds(seed, len(prompts) * num_samples)
    settings = _row_settings(sampling or {}, len(prompts) * num_samples)
    rows: list[Row] = []
    for index, prompt in enumerate(prompts):
        text, ids = _encode(model, prompt, f"prompt {index}")
        limit = _new_tokens(
            f"prompt {index}", len(ids), model.config.n_positions, max_new_tokens, max_length, past_context
        )
        first = len(rows)
        rows += [Row(text, ids, limit, seeds[i], settings[i]) for i in range(first, first + num_samples)]
    return rows


def stop_ids(model: Any, stop_token_ids: Iterable[int] | None) -> list[int]:
    """Token ids that end a continuation; None is the end token.

    Raises:
        ValueError: an id is outside the vocabulary.
    """
    if stop_token_ids is None:
        return [end_token_id(model)]
    return _checked_ids("stop_token_ids", stop_token_ids, model.config.vocab_size)


def stop_bytes(model: Any, stop_strings: str | Iterable[str] | None) -> list[bytes]:
    """Texts that end a continuation, as bytes.

    Raises:
        ValueError: one is empty, or the model has no tokenizer.
    """
    strings = _several(stop_strings)
    if not all(isinstance(string, str) and string for string in strings):
        raise ValueError(f"stop_strings={stop_strings!r:.60} must be texts, none of them empty")
    if strings and model.tokenizer is None:
        raise ValueError("stop_strings need a tokenizer, and this model has none; use stop_token_ids")
    return [string.encode() for string in strings]


def end_token_id(model: Any) -> int:
    """The configuration's end token; the tokenizer's where that one has no text (a padded vocabulary)."""
    end = model.config.eos_token_id
    if model.tokenizer is not None and end >= model.tokenizer.vocab_size:
        return model.tokenizer.end_token_id
    return end


def _encode(model: Any, prompt: Any, name: str) -> tuple[str, list[int]]:
    """The text and the token ids of one prompt."""
    tokenizer, vocab_size = model.tokenizer, model.config.vocab_size
    if isinstance(prompt, str):
        if tokenizer is None:
            raise ValueError(f"{name} is a text and this model has no tokenizer; give token ids")
        text, ids = prompt, _checked_ids(name, tokenizer.encode(prompt), vocab_size)
    else:
        if isinstance(prompt, bytes) or not isinstance(prompt, Iterable):
            raise ValueError(f"{name} is {prompt!r:.60}; expected a text or a list of token ids")
        ids = _checked_ids(name, prompt, vocab_size)
        text = "" if tokenizer is None else tokenizer.decode(ids)
    # GPT-2 has no token for "nothing": a text begins behind the end of another
    return text, ids or [end_token_id(model)]


def _new_tokens(
    name: str,
    length: int,
    context: int,
    max_new_tokens: int | None,
    max_length: int | None,
    past_context: str | None,
) -> int:
    """Most new tokens behind a prompt of `length` tokens."""
    if max_length is not None:
        if max_length <= length:
            raise ValueError(
                f"{name} has {length} tokens, which leaves no new ones within max_length={max_length} "
                f"(it counts the prompt)"
            )
        new = max_length - length
    elif max_new_tokens is not None:
        new = max_new_tokens
    else:
        new = DEFAULT_NEW_TOKENS
        new = new if past_context == "slide" else max(1, min(new, context - length))
    slides = (
        past_context == "slide" and context > 1
    )  # in a context of one token there is no half to go on from
    if length + new > context and not slides:
        room = context - length
        advice = (
            f"ask for at most {room} new ones" if room > 0 else f"shorten the prompt below {context} tokens"
        )
        slide = ", or past_context='slide'" if past_context == "refuse" and context > 1 else ""
        raise ValueError(
            f"{name} has {length} tokens; with {new} new ones that makes {length + new}, and the context "
            f"(n_positions) is {context}: {advice}{slide}"
        )
    return new


def _row_seeds(seed: Any, rows: int) -> list[int]:
    if is_seed(seed):
        return [(int(seed) + row) % SEED_RANGE for row in range(rows)]
    seeds = list(_plain(seed)) if isinstance(seed, Iterable) and not isinstance(seed, str) else None
    valid = seeds is not None and all(is_seed(s) for s in seeds)
    if seeds is None or not valid or len(seeds) != rows:
        raise ValueError(
            f"seed={seed!r:.60} must be a whole number from 0 to 2**32 - 1, or {rows} of them, one a row"
        )
    return [int(s) for s in seeds]


def _row_settings(sampling: Mapping[str, Any], rows: int) -> list[SamplingConfig]:
    """One value of a setting counts for all rows; of several, each for its own."""
    plain = {name: _plain(value) for name, value in sampling.items()}
    several = {name: list(value) for name, value in plain.items() if isinstance(value, list | tuple)}
    for name, values in several.items():
        if len(values) != rows:
            raise ValueError(f"{name} has {len(values)} values; expected one, or {rows}, one a row")
    if not several:
        return [SamplingConfig(**sampling)] * rows
    return [
        SamplingConfig(**{**plain, **{name: values[row] for name, values in several.items()}})
        for row in range(rows)
    ]


def bad_word_ids(model: Any, bad_words: Iterable[Any] | None) -> list[list[int]]:
    """Token ids that must not follow each other; a text counts with and without a space in front of it.

    Raises:
        ValueError: one is empty, has ids outside the vocabulary, or is a text and the model has no tokenizer.
    """
    words = _several(bad_words)
    found: list[list[int]] = []
    for word in words:
        if isinstance(word, str):
            if model.tokenizer is None:
                raise ValueError(
                    "bad_words as texts need a tokenizer, and this model has none; give token ids"
                )
            found += [model.tokenizer.encode(text) for text in dict.fromkeys((word, " " + word)) if word]
        else:
            found.append(_checked_ids("bad_words", word, model.config.vocab_size))
        if not word or not found[-1]:
            raise ValueError(f"bad_words={bad_words!r:.60} must be texts or token ids, none of them empty")
    return found


def _several(values: Any) -> list[Any]:
    """A list of what may be given as one text, as several things, or as None; what is neither stands alone."""
    values = () if values is None else _plain(values)
    return list(values) if isinstance(values, Iterable) and not isinstance(values, str | bytes) else [values]


def _checked_ids(name: str, ids: Any, vocab_size: int) -> list[int]:
    ids = _plain(ids)
    if isinstance(ids, str | bytes) or not isinstance(ids, Iterable):
        raise ValueError(f"{name}: {ids!r:.60} is not a list of token ids")
    ids = list(ids)
    for i in ids:
        if not is_integer(i):
            raise ValueError(f"{name}: {i!r:.60} is not a token id (a whole number)")
        if not 0 <= i < vocab_size:
            raise ValueError(f"{name}: token id {i} is outside the vocabulary of {vocab_size} ids")
    return [int(i) for i in ids]


def _plain(values: Any) -> Any:
    """Arrays as lists of Python numbers."""
    return values.tolist() if hasattr(values, "tolist") else values
