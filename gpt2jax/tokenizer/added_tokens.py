"""Tokens that are found in a text before it is split and merged: special tokens, and words added to a vocabulary.

Source: `AddedToken` of the library tokenizers, whose flags say how such a token is looked for.
"""

from __future__ import annotations

import dataclasses
import os
import re
import unicodedata
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

# Unicode's White_Space, which is Rust's \s; Python's \s has U+001C to U+001F as well
SPACE = r"\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"
_SPACES_AFTER = re.compile(f"[{SPACE}]*")
_SPACE_CHAR = re.compile(f"[{SPACE}]")
_MAX_DEPTH = 20  # of groups within each other in a pattern
# letters by Unicode's Alphabetic although their category is "symbol", and the joiners
_WORD_RANGES = (
    (0x24B6, 0x24E9),
    (0x1F130, 0x1F149),
    (0x1F150, 0x1F169),
    (0x1F170, 0x1F189),
    (0x200C, 0x200D),
)


@dataclasses.dataclass(frozen=True)
class TokenFlags:
    """How a token is looked for in a text.

    Attributes:
        single_word: only where it is not a part of a word.
        lstrip: it takes the white space before it.
        rstrip: it takes the white space behind it.
        normalized: after the tokens without this flag, in what they leave of the text.
    """

    single_word: bool = False
    lstrip: bool = False
    rstrip: bool = False
    normalized: bool = False

    @classmethod
    def read(cls, entry: Mapping[str, Any], *, special: bool) -> TokenFlags:
        """Return the flags in an entry of a tokenizer's file; absent ones as in tokenizers."""
        given = {"normalized": not special} | dict(entry)
        return cls(**{field.name: bool(given.get(field.name)) for field in dataclasses.fields(cls)})


class TokenFinder:
    """Splits texts at tokens, the longest token first at each place.

    Args:
        flags: of each token, by its text.
        special: the tokens that `split` finds only with `parse_special`.
    """

    def __init__(self, flags: Mapping[str, TokenFlags], special: Collection[str]):
        self._flags = {token: value for token, value in flags.items() if token}
        self._special = frozenset(special) & self._flags.keys()
        self._finds_plain = len(self._special) < len(self._flags)
        raw = [token for token, value in self._flags.items() if not value.normalized]
        passes = (raw, [token for token in self._flags if token not in raw])
        self._special_pattern = re.compile(_longest_first(self._special))
        self._patterns = [re.compile(_longest_first(tokens)) for tokens in passes if tokens]

    def split(self, text: str, *, parse_special: bool) -> Iterator[tuple[str, bool]]:
        """Yield the parts of a text: (token, True), or (text between tokens, False)."""
        parts = [(text, False)]
        if self._finds_plain or (parse_special and self._special):
            for pattern in self._patterns:
                parts = [
                    found
                    for part, is_token in parts
                    for found in ([(part, True)] if is_token else self._find(pattern, part, parse_special))
                ]
        yield from parts

    def find_special(self, text: str) -> str | None:
        """Return the first special token whose characters a text holds, or None."""
        match = self._special_pattern.search(text) if self._special else None
        return None if match is None else match[0]

    def _find(self, pattern: re.Pattern[str], text: str, parse_special: bool) -> Iterator[tuple[str, bool]]:
        done = 0  # the end of what has been yielded
        for match in pattern.finditer(text):
            token, start, end = match[0], match.start(), match.end()
            if token in self._special and not parse_special:
                continue
            flags = self._flags[token]
            if flags.single_word and (_is_word(text[start - 1 : start]) or _is_word(text[end : end + 1])):
                continue
            if flags.lstrip:
                while start > done and _SPACE_CHAR.match(text, start - 1):
                    start -= 1
                start = max(start, done)  # all of it may be what the token before took
            if flags.rstrip:
                end = _SPACES_AFTER.match(text, end).end()  # pyright: ignore[reportOptionalMemberAccess]
            if start > done:
                yield text[done:start], False
            if start < end:
                yield token, True
            done = end
        if done < len(text):
            yield text[done:], False


def _is_word(character: str) -> bool:
    r"""Return whether a character, or "", is Rust's \w."""
    if not character:
        return False
    category = unicodedata.category(character)
    if category[0] in "LM" or category in ("Nd", "Nl", "Pc"):
        return True
    return any(low <= ord(character) <= high for low, high in _WORD_RANGES)


def _longest_first(tokens: Iterable[str], depth: int = 0) -> str:
    """Return a pattern that matches the longest token at a place; common beginnings are tried once."""
    tokens = set(tokens)
    if depth == _MAX_DEPTH:
        return f"(?:{'|'.join(map(re.escape, sorted(tokens, key=len, reverse=True)))})"
    branches: dict[str, list[str]] = {}
    for token in sorted(tokens - {""}):
        branches.setdefault(token[0], []).append(token)
    patterns = []
    for group in branches.values():
        common = os.path.commonprefix(group)  # noqa: RUF071, of texts
        rest = _longest_first((token[len(common) :] for token in group), depth + 1)
        patterns.append(re.escape(common) + rest)
    if not patterns:
        return ""
    return f"(?:{'|'.join(patterns)})" + ("?" if "" in tokens else "")
