"""GPT-2's byte-level byte-pair encoding, offline: the merge table is part of the package, tiktoken does the work.

A text is split by a regular expression into pieces (words with their leading space, numbers, punctuation, runs of
white space); the UTF-8 bytes of each piece are merged pair by pair, always the pair that was learned first. Every
byte is a token of its own, so any text can be encoded and comes back byte for byte.

Source: Radford et al. 2019, "Language Models are Unsupervised Multitask Learners", section 2.2, and the files
`vocab.bpe` and `encoder.json` published with it.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib import resources
from pathlib import Path
from typing import Any

import tiktoken

from gpt2jax.files import atomic_write

END_TOKEN = "<|endoftext|>"
GPT2_VOCAB_SIZE = 50257
# The digest that tiktoken publishes for OpenAI's file (tiktoken_ext/openai_public.py, vocab_bpe_hash).
VOCAB_BPE_SHA256 = "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5"
# OpenAI's pattern is  's|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+
# This one matches the same pieces; its possessive repeats need no backtracking in long runs.
PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"

# Only \s+(?!\S) backtracks: tiktoken runs out of stack in a run of a million spaces before a word. The spaces are
# those of Unicode's White_Space, which is Rust's \s; Python's \s has U+001C to U+001F as well.
_SPACE = r"\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"
_LONG_RUN = 50_000
_LONG_SPACE = re.compile(f"(?<![{_SPACE}])[{_SPACE}]{{{_LONG_RUN},}}+(?=[^{_SPACE}])")

# The files write a byte as one printable character: itself where it is printable in Latin-1, U+0100 and up otherwise.
# The printable ones come first: that is the order of the 256 byte tokens too.
_PRINTABLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
BYTE_ORDER = bytes(_PRINTABLE + [byte for byte in range(256) if byte not in _PRINTABLE])
_BYTE_TO_CHAR = {
    byte: chr(byte) if i < len(_PRINTABLE) else chr(0x100 + i - len(_PRINTABLE))
    for i, byte in enumerate(BYTE_ORDER)
}
_CHAR_TO_BYTE = {ord(char): byte for byte, char in _BYTE_TO_CHAR.items()}

Merge = tuple[bytes, bytes]


class Tokenizer:
    """Text to token ids and back.

    `Tokenizer.gpt2()` is GPT-2's own; `Tokenizer.from_folder(path)` reads the files of any byte-level BPE that
    Hugging Face saves for a GPT-2 model. A tokenizer does not change after it is made, and can be shared by threads.

    Attributes:
        vocab_size: number of ids: every id is below it.
        end_token: the text of the token that ends a document.
        end_token_id: its id.
        special_tokens: text to id of the tokens that no text encodes to unless it is asked for.
        fingerprint: SHA-256 (hex) of all that decides the ids: equal fingerprints encode every text alike.
    """

    def __init__(
        self,
        merges: Sequence[Merge],
        *,
        token_ids: Sequence[int] | None = None,
        special_tokens: Mapping[str, int] | None = None,
        end_token: str = END_TOKEN,
        add_prefix_space: bool = False,
    ):
        """Build from the merges in the order they were learned.

        Args:
            merges: pairs of byte strings; the token of merge i is their concatenation and has rank 256 + i.
            token_ids: id of each rank, for the 256 bytes (in `BYTE_ORDER`) and then the merges; -1 = a byte that
                the vocabulary lacks, left out when encoding. None: the id is the rank.
            special_tokens: text to id. None: the end token gets the id after the last rank.
            end_token: the special token that ends a document.
            add_prefix_space: put a space before a text that does not begin with white space.

        Raises:
            ValueError: the ids clash, or `end_token` is not among the special tokens.
        """
        ranks = {bytes([byte]): rank for rank, byte in enumerate(BYTE_ORDER)}
        for rank, (left, right) in enumerate(merges, start=256):
            ranks[left + right] = rank
        if len(ranks) != 256 + len(merges):
            raise ValueError("two merges make the same token: this is not a byte-pair encoding that was learned")
        ids = range(len(ranks)) if token_ids is None else list(token_ids)
        if len(ids) != len(ranks):
            raise ValueError(f"{len(ids)} token ids for {len(ranks)} tokens (256 bytes and {len(merges)} merges)")
        if special_tokens is None:
            special_tokens = {end_token: max(ids) + 1}
        if end_token not in special_tokens:
            raise ValueError(f"end_token={end_token!r} is not a special token: {sorted(special_tokens)}")

        self.merges = tuple(merges)
        self.special_tokens = dict(special_tokens)
        self.end_token = end_token
        self.end_token_id = self.special_tokens[end_token]
        self.add_prefix_space = add_prefix_space
        self.vocab_size = max(*ids, *self.special_tokens.values()) + 1
        self._token_of_id: list[bytes | None] = [None] * self.vocab_size
        named = [(token.encode(), id_) for token, id_ in self.special_tokens.items()]
        for token, id_ in itertools.chain(zip(ranks, ids, strict=True), named):
            if id_ < 0:
                continue
            if self._token_of_id[id_] is not None:
                raise ValueError(f"token id {id_} is given to both {self._token_of_id[id_]!r} and {token!r}")
            self._token_of_id[id_] = token
        # tiktoken takes one number for rank and id: it works on ranks, special tokens behind them, and where that
        # is not the id, a table follows.
        self._encoding = tiktoken.Encoding(
            name="gpt2jax",
            pat_str=PATTERN,
            mergeable_ranks=ranks,
            special_tokens={token: len(ranks) + i for i, token in enumerate(self.special_tokens)},
        )
        table = [*ids, *self.special_tokens.values()]
        self._id_of_rank = None if table == list(range(len(table))) else table

    @staticmethod
    @functools.cache
    def gpt2(vocab_size: int = GPT2_VOCAB_SIZE) -> Tokenizer:
        """GPT-2's tokenizer, or a smaller one made of its first merges.

        Args:
            vocab_size: 257 to 50257: the first `vocab_size - 1` tokens of GPT-2 and the end token as the last id.
                The 256 bytes are the first tokens, so every size encodes every text.

        Raises:
            ValueError: another size, or the packaged merge table is damaged.
        """
        if not 257 <= vocab_size <= GPT2_VOCAB_SIZE:
            raise ValueError(
                f"vocab_size={vocab_size}: GPT-2's tokenizer has 257 (bytes and the end token) to "
                f"{GPT2_VOCAB_SIZE} tokens"
            )
        data = resources.files("gpt2jax").joinpath("assets/vocab.bpe").read_bytes()
        if hashlib.sha256(data).hexdigest() != VOCAB_BPE_SHA256:
            raise ValueError(
                f"gpt2jax/assets/vocab.bpe is damaged: its SHA-256 is not {VOCAB_BPE_SHA256}. Install gpt2jax again."
            )
        lines = data.decode().split("\n")[1 : vocab_size - 256]
        return Tokenizer([_parse_merge(line) for line in lines])

    def encode(self, text: str, allow_special: bool = False) -> list[int]:
        """Token ids of a text.

        Args:
            text: any string. Half of a surrogate pair on its own, which UTF-8 cannot express, counts as U+FFFD.
            allow_special: read "<|endoftext|>" and the like as the special token. False: as the characters they are.

        Raises:
            TypeError: `text` is not a string.
        """
        return self._to_ids(self._encode_ranks(text, allow_special))

    def encode_batch(self, texts: Iterable[str], num_threads: int | None = None) -> list[list[int]]:
        """Token ids of each text, as `encode(text)` gives them, on all cores.

        Args:
            texts: strings.
            num_threads: None = one for each core.
        """
        texts = list(texts)
        threads = min(num_threads or os.cpu_count() or 1, max(1, len(texts)))
        with ThreadPoolExecutor(threads) as pool:  # tiktoken lets go of the interpreter's lock
            return list(pool.map(self.encode, texts))

    def decode(self, ids: Iterable[int]) -> str:
        """The text of token ids; bytes that are no UTF-8 (a character cut in two) become U+FFFD.

        Raises:
            ValueError: an id that the vocabulary lacks, named.
        """
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The bytes of token ids; exact where `decode` must replace.

        Raises:
            ValueError: an id that the vocabulary lacks, named.
        """
        table = self._token_of_id
        pieces = []
        for id_ in _as_list(ids):
            token = table[id_] if 0 <= id_ < len(table) else None
            if token is None:
                raise ValueError(f"token id {int(id_)} is not in the vocabulary of {self.vocab_size} tokens")
            pieces.append(token)
        return b"".join(pieces)

    @functools.cached_property
    def fingerprint(self) -> str:
        """SHA-256 (hex) of the merges, the ids and the options: what decides how a text is encoded."""
        options = [self._id_of_rank, self.special_tokens, self.end_token, self.add_prefix_space, PATTERN]
        digest = hashlib.sha256(json.dumps(options, sort_keys=True).encode())
        for left, right in self.merges:
            digest.update(b"%d %d " % (len(left), len(right)) + left + right)
        return digest.hexdigest()

    def __repr__(self) -> str:
        return f"Tokenizer(vocab_size={self.vocab_size}, end_token={self.end_token!r})"

    def _encode_ranks(self, text: str, allow_special: bool) -> list[int]:
        if not isinstance(text, str):
            raise TypeError(f"a text must be a str, not {type(text).__name__}: {text!r:.60}")
        if not text.isascii():
            text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        if self.add_prefix_space and text and not text[0].isspace():
            text = " " + text
        if allow_special:
            encode = functools.partial(
                self._encoding.encode, allowed_special="all", disallowed_special=()
            )
        else:
            encode = self._encoding.encode_ordinary
        if len(text) <= _LONG_RUN:
            return encode(text)
        # A cut before the last space of a run is where the pattern cuts too.
        cuts = [0, *(match.end() - 1 for match in _LONG_SPACE.finditer(text)), len(text)]
        return [rank for start, end in itertools.pairwise(cuts) for rank in encode(text[start:end])]

    def _to_ids(self, ranks: list[int]) -> list[int]:
        table = self._id_of_rank
        return ranks if table is None else [table[rank] for rank in ranks if table[rank] >= 0]


def _as_list(ids: Iterable[int]) -> Iterable[int]:
    """Arrays as plain numbers: indexing with array scalars is slow."""
    tolist = getattr(ids, "tolist", None)
    return ids if tolist is None else tolist()


def _parse_merge(line: str) -> Merge:
    """The two byte strings of a line of a merges file."""
    left, right = line.split(" ")
    return _to_bytes(left), _to_bytes(right)


def _to_bytes(token: str) -> bytes:
    """The bytes of a token as the files write it."""
    return token.translate(_CHAR_TO_BYTE).encode("latin-1")


def _to_chars(token: bytes) -> str:
    """A token as the files write it."""
    return "".join(map(_BYTE_TO_CHAR.__getitem__, token))
