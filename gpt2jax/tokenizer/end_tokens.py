"""The end token, which begins, separates and ends texts, and the tokens that stop generation: one rule.

The end token is the tokenizer's, if it names one within the model's vocabulary; else the first that `config.json`
names; else the first of `generation_config.json`. An id outside the vocabulary names no token. Generation stops at
the end token and at all ids that the two files name, with one exception: an ordinary token that `config.json` alone
names against the tokenizer is taken for a mistake.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from gpt2jax.model.config import GPT2Config
from gpt2jax.tokenizer.bpe import Tokenizer
from gpt2jax.utils.notices import notice
from gpt2jax.utils.validation import is_integer, must_be


class HasTokenizer(Protocol):
    """What the rule needs of a model."""

    @property
    def config(self) -> GPT2Config: ...
    @property
    def tokenizer(self) -> Tokenizer | None: ...


@dataclasses.dataclass(frozen=True)
class EndTokens:
    """The end token of a model, None if it has none, and all tokens at which generation stops."""

    end: int | None
    stops: tuple[int, ...]


def find_end_token(model: HasTokenizer) -> int | None:
    """Return the id that begins, separates and ends texts, or None."""
    vocab_size, tokenizer = model.config.vocab_size, model.tokenizer
    own = None if tokenizer is None else tokenizer.end_token_id
    return own if own is not None and own < vocab_size else model.config.eos_token_id


def require_end_token(model: HasTokenizer, purpose: str = "to begin and to separate texts") -> int:
    """Return the id that `find_end_token` finds.

    Raises:
        ValueError: the model has none; the message says how to name one.
    """
    end = find_end_token(model)
    if end is None:
        raise ValueError(
            f"the model has no end token {purpose}: neither its tokenizer nor config.json nor generation_config.json "
            f"names one of its {model.config.vocab_size} ids; name one with load(..., end_token=...), in the commands "
            "with --end-token"
        )
    return end


def read_token_ids(source: str, content: Mapping[str, Any], name: str = "eos_token_id") -> list[int]:
    """Return the ids under a name of config.json or generation_config.json; null and negative ids name no token.

    Raises:
        ValueError: it is neither an id nor a list of ids; the message begins with `source`.
    """
    value = content.get(name)
    ids = list(value) if isinstance(value, list | tuple) else [] if value is None else [value]
    if not all(map(is_integer, ids)):
        raise ValueError(must_be(f"{source}: {name}", "a token id, a list of them, or null", value))
    return [int(i) for i in ids if i >= 0]


def choose_end_tokens(
    vocab_size: int,
    tokenizer: Tokenizer | None,
    named: Mapping[str, Sequence[int]],
    *,
    trusted: Sequence[str] = (),
) -> EndTokens:
    """Apply the rule; a notice tells of sources that disagree and of ids outside the vocabulary.

    Args:
        vocab_size: V.
        tokenizer: beside the weights, or None.
        named: the ids that each file names, by the name of the file, the first file first.
        trusted: the files whose ids stop generation whatever the tokenizer says.
    """
    sources = {name: list(ids) for name, ids in named.items() if ids}
    if tokenizer is not None and tokenizer.end_token_id is not None:
        sources = {"the tokenizer": [tokenizer.end_token_id], **sources}
    usable = {name: [i for i in ids if i < vocab_size] for name, ids in sources.items()}
    end = next((ids[0] for ids in usable.values() if ids), None)
    stops = [] if end is None else [end]
    for name, ids in usable.items():
        is_mistake = (
            end not in ids and len(ids) == 1 and name not in trusted and _is_ordinary(tokenizer, ids[0])
        )
        stops += [] if is_mistake else ids
    stops = list(dict.fromkeys(stops))
    if any(end not in ids or len(usable[name]) < len(ids) for name, ids in sources.items()):
        told = "; ".join(
            f"{name} says {' and '.join(_describe(i, vocab_size, tokenizer) for i in ids)}"
            for name, ids in sources.items()
        )
        use = (
            "the model has no end token; name one with end_token=... (--end-token)"
            if end is None
            else f"texts begin and end with {end}, generation stops at {' and '.join(map(str, stops))}"
        )
        notice(f"the end tokens do not agree: {told}: {use}")
    return EndTokens(end, tuple(stops))


def _is_ordinary(tokenizer: Tokenizer | None, token_id: int) -> bool:
    if tokenizer is None or token_id >= tokenizer.vocab_size:
        return False
    return token_id not in tokenizer.special_tokens.values() and token_id != tokenizer.end_token_id


def _describe(token_id: int, vocab_size: int, tokenizer: Tokenizer | None) -> str:
    if token_id >= vocab_size:
        return f"{token_id}, outside the vocabulary of {vocab_size} ids"
    if tokenizer is None or token_id >= tokenizer.vocab_size:
        return str(token_id)
    return f"{token_id} {tokenizer.decode([token_id])!r}"
