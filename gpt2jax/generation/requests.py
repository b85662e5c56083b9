"""From a call's arguments to token ids: prompts, lengths, seeds and stops, checked against the model."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from gpt2jax.generation.config import (
    DEFAULT_NEW_TOKENS,
    DecoderModel,
    GenerationConfig,
    as_list,
    resolve_configs,
)
from gpt2jax.generation.file_settings import find_file_settings
from gpt2jax.tokenizer.end_tokens import find_end_token, require_end_token
from gpt2jax.utils.validation import SEED_RANGE, is_integer, is_seed, must_be

Prompt = str | Sequence[int]


@dataclasses.dataclass(frozen=True)
class PromptState:
    """One row: a prompt to continue.

    Attributes:
        text: the prompt's text, "" if it has none.
        token_ids: what the model is given; never empty.
        limit: most new tokens.
        seed: 32 bits.
        config: the row's own settings, of which only `ROW_FIELDS` count.
    """

    text: str
    token_ids: list[int]
    limit: int
    seed: int = 0
    config: GenerationConfig = GenerationConfig()


@dataclasses.dataclass(frozen=True)
class Request:
    """All that one call asks for.

    Attributes:
        model: continues the prompts.
        config: the settings that all rows share.
        rows: the prompts, each as often as continuations are wanted.
        stop_ids: token ids that end a row.
        stop_strings: texts that end a row, as UTF-8.
        bad_words: sequences of token ids that must not occur.
        file_settings: the settings among these that come from a file beside the weights.
    """

    model: DecoderModel
    config: GenerationConfig
    rows: list[PromptState]
    stop_ids: list[int]
    stop_strings: list[bytes]
    bad_words: list[list[int]]
    file_settings: dict[str, Any] = dataclasses.field(default_factory=dict)


def make_request(
    model: DecoderModel,
    prompts: Prompt | Sequence[Prompt],
    config: GenerationConfig | Sequence[GenerationConfig] | None,
    overrides: Mapping[str, Any],
    seed: int | Sequence[int] = 0,
    *,
    is_search: bool = False,
) -> Request:
    """Check the arguments of a call against the model.

    Args:
        config: None stands for what lies beside the weights; see `gpt2jax.generation.file_settings`.
        is_search: beam search, also with one beam.

    Raises:
        ValueError: an argument is not legal, or a prompt does not fit the model.
        TypeError: there is no such setting.
    """
    prompts = as_prompts(prompts)
    saved = find_file_settings(model, overrides) if config is None else {}
    shared, configs = resolve_configs(config, {**saved, **overrides}, len(prompts), is_search=is_search)
    can_slide = not is_search and shared.num_beams == 1
    return Request(
        model=model,
        config=shared,
        rows=prepare_prompts(model, prompts, configs, seed, can_slide=can_slide),
        stop_ids=stop_ids(model, shared.stop_token_ids),
        stop_strings=_stop_bytes(model, shared.stop_strings),
        bad_words=_bad_word_ids(model, shared.bad_words),
        file_settings=saved,
    )


def as_prompts(prompts: Any) -> list[Any]:
    """Return a list of prompts from one prompt or several: a text, token ids, or a list or array of them.

    Raises:
        ValueError: it is something else.
    """
    if isinstance(prompts, str):
        return [prompts]
    items = as_list(prompts)
    if items is None:
        raise ValueError(must_be("prompts", "a text, a list of token ids, or a list of these", prompts))
    return [items] if items and all(is_integer(item) for item in items) else items


def check_prompts(model: DecoderModel, prompts: Sequence[Any], config: GenerationConfig) -> None:
    """Raise ValueError for a prompt that does not fit the model, or whose continuation exceeds the context."""
    prepare_prompts(model, prompts, [config] * len(prompts), can_slide=False)


def prepare_prompts(
    model: DecoderModel,
    prompts: Sequence[Any],
    configs: Sequence[GenerationConfig],
    seed: int | Sequence[int] = 0,
    *,
    can_slide: bool = True,
) -> list[PromptState]:
    """Encode prompts into rows; one with several continuations gives as many rows.

    Args:
        model: encodes the prompts and bounds their lengths.
        prompts: P of them.
        configs: one for each of the B rows, a multiple of P.
        seed: row i draws with seed + i; a sequence has one seed for each row.
        can_slide: whether an error may advise overflow="sliding_window".

    Raises:
        ValueError: a seed is not legal, or a prompt does not fit the model.
    """
    seeds = _row_seeds(seed, len(configs))
    copies = len(configs) // max(1, len(prompts))
    rows: list[PromptState] = []
    for index, prompt in enumerate(prompts):
        name = f"prompt {index}"
        text, token_ids = _encode(model, prompt, name)
        for row in range(len(rows), len(rows) + copies):
            limit = _new_tokens(
                name, len(token_ids), model.config.n_positions, configs[row], can_slide=can_slide
            )
            config = configs[row]
            if config.min_length:
                least = max(0, config.min_length - len(token_ids))
                config = dataclasses.replace(config, min_length=0, min_new_tokens=least)
            rows.append(PromptState(text, token_ids, limit, seeds[row], config))
    return rows


def stop_ids(model: DecoderModel, stop_token_ids: Iterable[int] | None) -> list[int]:
    """Return the token ids that end a continuation; None stands for the end token and the model's other ones."""
    if stop_token_ids is None:
        end = find_end_token(model)
        return list(dict.fromkeys([*([] if end is None else [end]), *getattr(model, "stop_token_ids", ())]))
    return _checked_ids("stop_token_ids", stop_token_ids, model.config.vocab_size)


def _stop_bytes(model: DecoderModel, stop_strings: Iterable[str]) -> list[bytes]:
    if stop_strings and model.tokenizer is None:
        raise ValueError("stop_strings need a tokenizer, and this model has none; use stop_token_ids")
    return [string.encode() for string in stop_strings]


def _bad_word_ids(model: DecoderModel, bad_words: Iterable[str | Sequence[int]]) -> list[list[int]]:
    """Return token ids that must not follow each other; a text with and without a space before it."""
    found: list[list[int]] = []
    for word in bad_words:
        if not isinstance(word, str):
            found.append(_checked_ids("bad_words", word, model.config.vocab_size))
        elif model.tokenizer is None:
            raise ValueError("bad_words as texts need a tokenizer, and this model has none; give token ids")
        else:
            found += [model.tokenizer.encode(text) for text in (word, " " + word)]
    return found


def _encode(model: DecoderModel, prompt: Any, name: str) -> tuple[str, list[int]]:
    """Return the text and the token ids of one prompt."""
    tokenizer, vocab_size = model.tokenizer, model.config.vocab_size
    if isinstance(prompt, str):
        if tokenizer is None:
            raise ValueError(
                f"{name} is a text and this model has no tokenizer; name one with load(..., tokenizer=...), in the "
                "commands with --tokenizer, or give token ids"
            )
        text, ids = prompt, _checked_ids(name, tokenizer.encode(prompt), vocab_size)
    else:
        ids = as_list(prompt)
        if ids is None:
            raise ValueError(must_be(name, "a text or a list of token ids", prompt))
        ids = _checked_ids(name, ids, vocab_size)
        text = "" if tokenizer is None else tokenizer.decode(ids)
    # GPT-2 has no token for "nothing": a text begins after the end of another
    return text, ids or [require_end_token(model, f"for {name}, which is empty, to begin with")]


def _new_tokens(name: str, length: int, context: int, config: GenerationConfig, *, can_slide: bool) -> int:
    """Return the most new tokens after a prompt of `length` tokens."""
    # a context of one token has no half to go on from
    slides = can_slide and config.overflow == "sliding_window" and context > 1
    room = context - length
    if config.max_length is not None:
        new = config.max_length - length
        if new < 1:
            raise ValueError(
                f"max_length must be above the length of {name} ({length} tokens), got {config.max_length}; "
                "max_new_tokens counts new ones alone"
            )
    elif config.max_new_tokens is not None:
        new = config.max_new_tokens
    else:
        new = DEFAULT_NEW_TOKENS if slides else max(1, min(DEFAULT_NEW_TOKENS, room))
    if new > room and not slides:
        advice = (
            f"ask for at most {room} new ones" if room > 0 else f"shorten the prompt below {context} tokens"
        )
        slide = ", or give overflow='sliding_window'" if can_slide and context > 1 else ""
        raise ValueError(
            f"{name} has {length} tokens; with {new} new ones that makes {length + new}, and the context "
            f"(n_positions) is {context}: {advice}{slide}"
        )
    return new


def _row_seeds(seed: Any, rows: int) -> list[int]:
    if is_seed(seed):
        return [(int(seed) + row) % SEED_RANGE for row in range(rows)]
    seeds = as_list(seed)
    if seeds is None or len(seeds) != rows or not all(is_seed(item) for item in seeds):
        legal = f"a whole number from 0 to 2**32 - 1, or {rows} of them, one for each row"
        raise ValueError(must_be("seed", legal, seed))
    return [int(item) for item in seeds]


def _checked_ids(name: str, ids: Iterable[Any], vocab_size: int) -> list[int]:
    ids = list(ids)
    for i in ids:
        if not is_integer(i):
            raise ValueError(f"{name}: {i!r:.60} is not a token id (a whole number)")
        if not 0 <= i < vocab_size:
            raise ValueError(f"{name}: token id {i} is outside the vocabulary of {vocab_size} ids")
    return [int(i) for i in ids]
