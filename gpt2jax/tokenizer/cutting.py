"""Where a long text can be cut so that its parts have the tokens of the whole: little is in memory at a time."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from gpt2jax.tokenizer.added_tokens import SPACE

# The pattern of `bpe` backtracks in \s+(?!\S) alone, and runs out of stack in a run of a million spaces before a word.
LONG_RUN = 50_000
# A word, or a run of spaces, of more characters than this is cut; it takes 12 MB.
WINDOW = 1 << 18
LONG_WORD = re.compile(rf"[^{SPACE}]{{{WINDOW},}}+|[{SPACE}]{{{WINDOW},}}+")
LONG_SPACE = re.compile(f"(?<![{SPACE}])[{SPACE}]{{{LONG_RUN},}}+(?=[^{SPACE}])")
_WORD_END = re.compile(rf"(?<=[^{SPACE}])(?=[{SPACE}])")
# the middle of a character, and what the pattern reads otherwise behind another sign
_CANNOT_BEGIN = re.compile(rb"[\x80-\xbf]|'(?:[sdmt]|ll|ve|re)")

Encode = Callable[[str], Sequence[int]]


def find_cuts(text: str, encode: Encode, lengths: Sequence[int]) -> set[int]:
    """Return places where cutting a long text does not change its tokens, so that few are made at a time.

    Args:
        text: the text.
        encode: returns the ranks of the tokens of a part.
        lengths: bytes of the token of each rank.
    """
    # the pattern, too, splits a run of spaces before its last one, and before the first one
    cuts = {match.end() - 1 for match in LONG_SPACE.finditer(text)}
    for start in range(WINDOW, len(text), WINDOW):
        if match := _WORD_END.search(text, start, start + WINDOW):
            cuts.add(match.start())
    for match in LONG_WORD.finditer(text):
        start = match.start() - (text[match.start() - 1 : match.start()] == " ")  # which belongs to the word
        while match.end() - start > WINDOW:  # tiktoken takes 48 times the size of a word
            start += _cut_word(text[start : start + WINDOW], encode, lengths)
            cuts.add(start)
    return cuts


def _cut_word(part: str, encode: Encode, lengths: Sequence[int]) -> int:
    """Return the end of a token in the middle of a part of a word.

    It is the end of a token of the whole word, too. Of equal pairs the left one is merged first, so that what follows
    changes tokens before it only through pairs each of which was learned earlier than the one before: at most as many
    as there are merges, and half a window has more bytes.
    """
    data, place = part.encode(), 0
    for rank in encode(part):
        place += lengths[rank]
        if 2 * place >= len(data) and not _CANNOT_BEGIN.match(data, place):
            break
    return len(data[:place].decode())
