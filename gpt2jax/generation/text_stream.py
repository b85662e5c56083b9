"""The text of a continuation as its tokens come in: where it stops, and what of it can be shown already.

Works on bytes. A token of byte-level BPE can end within a character, and a stop string can begin in one token
and end in another; UTF-8 makes a match of bytes a match of characters.
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence


class IncrementalDetokenizer:
    """Takes the bytes of one token after another and gives out text.

    Attributes:
        stopped: a stop string was found; no token counts after that.
        tokens: number of tokens taken that the text needs: up to the stop string, where there is one.
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
        """Takes the bytes of the next token."""
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

    def take(self, *, last: bool = False) -> str:
        """The text that is certain by now and was not given out before.

        Held back are bytes that may be the beginning of a stop string, and the beginning of a character.

        Args:
            last: no token follows: give out all that is left. Bytes that are no UTF-8 become U+FFFD.
        """
        end = len(self._bytes) - (0 if last or self.stopped else self._open_stop())
        piece = self._decoder.decode(bytes(self._bytes[self._shown : end]), final=last or self.stopped)
        self._shown = end
        return piece

    def _open_stop(self) -> int:
        """Length of the longest end of the text that begins a stop string."""
        longest = max((len(stop) - 1 for stop in self._stops), default=0)
        for length in range(min(longest, len(self._bytes)), 0, -1):
            tail = self._bytes[-length:]
            if any(stop.startswith(bytes(tail)) for stop in self._stops if len(stop) > length):
                return length
        return 0
