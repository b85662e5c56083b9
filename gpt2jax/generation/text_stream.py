"""Incremental detokenization: from tokens to text that is certain, up to a stop string.

Works on bytes: a token of byte-level BPE can end within a character, and a stop string can begin in one token and
end in another. In UTF-8, a match of bytes is a match of characters.
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence


class IncrementalDetokenizer:
    """Collects the bytes of tokens and returns the text that no later token can change.

    Attributes:
        stopped: a stop string was found; later tokens are ignored.
        tokens: number of tokens that the text needs, up to the stop string if there is one.
    """

    def __init__(self, stop_strings: Sequence[bytes] = ()):
        self.stopped = False
        self.tokens = 0
        self._stops = tuple(stop_strings)
        self._ends: list[int] = []  # number of bytes after each token
        self._bytes = bytearray()
        self._shown = 0
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def add(self, token: bytes) -> None:
        """Add the bytes of the next token."""
        if self.stopped:
            return
        searched = len(self._bytes)
        self._bytes += token
        self._ends.append(len(self._bytes))
        self.tokens += 1
        found = [self._bytes.find(stop, max(0, searched - len(stop) + 1)) for stop in self._stops]
        if any(at >= 0 for at in found):
            self.stopped = True
            del self._bytes[min(at for at in found if at >= 0) :]
            self.tokens = 0 if not self._bytes else 1 + sum(end < len(self._bytes) for end in self._ends)

    def flush(self, *, last: bool = False) -> str:
        """Return the text that is certain by now and was not returned before.

        Bytes that may begin a stop string, and the beginning of a character, are held back.

        Args:
            last: no token follows, so return all that is left. Bytes that are not UTF-8 become U+FFFD.
        """
        end = len(self._bytes) - (0 if last or self.stopped else self._partial_stop())
        piece = self._decoder.decode(bytes(self._bytes[self._shown : end]), final=last or self.stopped)
        self._shown = end
        return piece

    def _partial_stop(self) -> int:
        """Return the length of the longest end of the text that begins a stop string."""
        longest = max((len(stop) - 1 for stop in self._stops), default=0)
        for length in range(min(longest, len(self._bytes)), 0, -1):
            tail = self._bytes[-length:]
            if any(stop.startswith(bytes(tail)) for stop in self._stops if len(stop) > length):
                return length
        return 0
