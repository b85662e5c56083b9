"""GPT-2's byte-level byte-pair encoding, offline: the merges are part of the package, tiktoken does the work.

A regular expression splits a text into pieces (words with their leading space, numbers, punctuation, runs of
white space); the UTF-8 bytes of each piece are merged pair by pair, always the pair that was learned first.
Every byte is a token, so any text can be encoded and comes back byte for byte.

Source: Radford et al. 2019, "Language Models are Unsupervised Multitask Learners", section 2.2, and the files
`vocab.bpe` and `encoder.json` published with it.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import hashlib
import itertools
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib import resources
from typing import Literal

import tiktoken

from gpt2jax.tokenizer import cutting
from gpt2jax.tokenizer.added_tokens import TokenFinder, TokenFlags
from gpt2jax.utils.notices import notice
from gpt2jax.utils.validation import check, int_in_range, must_be, one_of, unicode_text

END_TOKEN = "<|endoftext|>"
GPT2_VOCAB_SIZE = 50257
MIN_VOCAB_SIZE = 257  # all bytes and the end token
# The digest that tiktoken publishes for OpenAI's file (tiktoken_ext/openai_public.py, vocab_bpe_hash).
VOCAB_BPE_SHA256 = "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5"
# OpenAI's pattern is  's|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+
# This one matches the same pieces; its possessive repeats need no backtracking in long runs.
PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"

# Files write a byte as one printable character: itself where Latin-1 prints it, else one from U+0100 on. The
# printable ones come first: that is the order of the 256 byte tokens, too.
_PRINTABLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
BYTE_ORDER = bytes(_PRINTABLE + [byte for byte in range(256) if byte not in _PRINTABLE])
_BYTE_TO_CHAR = {
    byte: chr(byte) if rank < len(_PRINTABLE) else chr(0x100 + rank - len(_PRINTABLE))
    for rank, byte in enumerate(BYTE_ORDER)
}
_CHAR_TO_BYTE = {ord(char): byte for byte, char in _BYTE_TO_CHAR.items()}
# Latin-1 characters that stand for no byte become a character that is not in Latin-1.
_CHAR_TO_BYTE |= {code: 0xFFFD for code in range(256) if code not in _CHAR_TO_BYTE}

Merge = tuple[bytes, bytes]
SpecialTokens = Literal["text", "parse"]
SPECIAL_TOKENS = ("text", "parse")


class Tokenizer:
    """Text to token ids and back.

    `Tokenizer.gpt2()` is that of GPT-2; `load_tokenizer(path)` reads the files of any byte-level BPE
    saved with a GPT-2 model. A tokenizer is immutable; threads may share it.

    Attributes:
        vocab_size: number of ids: every id is below it.
        end_token: text of the token that ends a document; None if the files name none that has an id.
        end_token_id: its id, or None.
        special_tokens: text to id of the tokens that are found in a text only if asked for.
        added_tokens: text to id of the tokens that are found in every text, before any merging.
        token_flags: how each of these is looked for.
        parses_special: `encode` reads special tokens in a text as such unless told otherwise.
        roles: names of special tokens in the files, such as "eos_token", to their text.
        merges: the pairs of byte strings, in the order they were learned.
        extras: what else tokenizer_config.json holds, such as a chat template; it is saved with the tokenizer.
    """

    def __init__(
        self,
        merges: Sequence[Merge],
        *,
        token_ids: Sequence[int] | None = None,
        special_tokens: Mapping[str, int] | None = None,
        added_tokens: Mapping[str, int] | None = None,
        token_flags: Mapping[str, TokenFlags] | None = None,
        unreachable_tokens: Mapping[int, bytes] | None = None,
        end_token: str | None = END_TOKEN,
        roles: Mapping[str, str] | None = None,
        add_prefix_space: bool = False,
        extras: Mapping[str, object] | None = None,
    ):
        """Build from the merges in the order they were learned.

        Args:
            merges: pairs of byte strings; the token of merge i is their concatenation and has rank 256 + i.
            token_ids: id of each rank, for the 256 bytes (in `BYTE_ORDER`) and then the merges; -1 is a byte
                that the vocabulary lacks and encoding leaves out. None: the id is the rank.
            special_tokens: text to id. None: the end token gets the id after the last one of the merges.
            added_tokens: text to id of tokens looked for in every text.
            token_flags: how special and added tokens are looked for. Default: without any flag.
            unreachable_tokens: id to bytes of tokens that no merge makes; they are only decoded.
            end_token: the special token that ends a document; None: there is none.
            roles: names of special tokens in the files. None: the end token is "bos_token", "eos_token" and
                "unk_token".
            add_prefix_space: put a space before a text that does not begin with one; between tokens, too.
            extras: see the attribute.

        Raises:
            ValueError: two tokens have the same id or the same bytes, or `end_token` is not a special token.
        """
        ranks = _rank_tokens(merges)
        ids = _ids_of_ranks(ranks, token_ids)
        self.merges = tuple(merges)
        if special_tokens is None:
            special_tokens = {} if end_token is None else {end_token: max(ids) + 1}
        self.special_tokens = dict(special_tokens)
        self.added_tokens = dict(added_tokens or {})
        self.add_prefix_space = add_prefix_space
        self.end_token = None if end_token is None else check("end_token", end_token, one_of(special_tokens))
        self.end_token_id = None if end_token is None else self.special_tokens[end_token]
        all_roles = () if end_token is None else ("bos_token", "eos_token", "unk_token")
        self.roles = dict(roles or dict.fromkeys(all_roles, end_token))
        self.extras = dict(extras or {})
        self.parses_special = False

        self._unsplit = {**self.special_tokens, **self.added_tokens}
        flags = token_flags or {}
        self.token_flags = {token: flags.get(token, TokenFlags()) for token in self._unsplit}
        self._finder = TokenFinder(self.token_flags, self.special_tokens)
        # tiktoken has one number for rank and id: it works on ranks. If these are not the ids, a table maps them.
        self._encoding = tiktoken.Encoding(
            "gpt2jax", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens={}
        )
        self._id_of_rank = None if ids == list(range(len(ids))) else ids
        named = list(zip(ranks, ids, strict=True))
        named += [(token.encode(), id_) for token, id_ in self._unsplit.items()]
        named += [(token, id_) for id_, token in (unreachable_tokens or {}).items()]
        self._token_of_id = _invert([(token, id_) for token, id_ in named if id_ >= 0])
        self.vocab_size = len(self._token_of_id)

    @staticmethod
    @functools.cache
    def gpt2(vocab_size: int = GPT2_VOCAB_SIZE) -> Tokenizer:
        """Return GPT-2's tokenizer, or a smaller one made of its first merges.

        Args:
            vocab_size: 257 to 50257: the first `vocab_size - 1` tokens of GPT-2, and the end token as last
                id. The 256 bytes are the first tokens, so every size encodes every text.

        Raises:
            ValueError: another size, or the packaged file of merges is damaged.
        """
        vocab_size = check("vocab_size", vocab_size, int_in_range(MIN_VOCAB_SIZE, GPT2_VOCAB_SIZE))
        data = resources.files("gpt2jax").joinpath("assets", "vocab.bpe").read_bytes()
        if hashlib.sha256(data).hexdigest() != VOCAB_BPE_SHA256:
            raise ValueError(
                f"gpt2jax/assets/vocab.bpe is damaged: its SHA-256 must be {VOCAB_BPE_SHA256}, that of OpenAI's "
                "file; install gpt2jax again"
            )
        return Tokenizer(parse_merges(data.decode())[: vocab_size - MIN_VOCAB_SIZE])

    def encode(self, text: str, allow_special: bool | None = None) -> list[int]:
        """Return the token ids of a text, without special tokens around them.

        Args:
            text: any string. A lone half of a surrogate pair, which UTF-8 cannot express, counts as U+FFFD.
            allow_special: read "<|endoftext|>" and the like as special tokens. False: as plain characters. Default:
                `parses_special`, and a notice if a text holds such a token that is read as characters.

        Raises:
            TypeError: `text` is not a string.
        """
        if not isinstance(text, str):
            raise TypeError(must_be("text", "a str", text))
        if not text.isascii():
            text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        parse = self.parses_special if allow_special is None else allow_special
        if allow_special is None and not parse:
            self._notice_special(text)
        ids: list[int] = []
        for part, is_token in self._finder.split(text, parse_special=parse):
            if is_token:
                ids.append(self._unsplit[part])
            else:
                ids += self._encode_plain(part)
        return ids

    def encode_batch(self, texts: Iterable[str], num_threads: int | None = None) -> list[list[int]]:
        """Return the token ids of each text, as `encode(text)` does, on several cores.

        Args:
            texts: strings.
            num_threads: None: one for each core.

        Raises:
            TypeError: an element is not a string.
        """
        if isinstance(texts, str):
            raise TypeError(f"{must_be('texts', 'a list of texts', texts)}; use encode for one text")
        texts = list(texts)
        size = 64  # texts for a thread at a time: handing a task over costs as much as encoding a short text
        chunks = [texts[start : start + size] for start in range(0, len(texts), size)]
        with ThreadPoolExecutor(num_threads or os.cpu_count()) as pool:  # tiktoken releases Python's lock
            results = pool.map(lambda chunk: [self.encode(text) for text in chunk], chunks)
            return list(itertools.chain.from_iterable(results))

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of token ids; bytes that are not UTF-8, such as half a character, become U+FFFD.

        Raises:
            ValueError: an id is not in the vocabulary.
        """
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """Return the bytes of token ids, exact even if they are not UTF-8.

        Raises:
            ValueError: an id is not in the vocabulary.
        """
        table = self._token_of_id
        pieces = []
        for id_ in getattr(ids, "tolist", lambda: ids)():  # array scalars are slow to index with
            token = table[id_] if 0 <= id_ < len(table) else None
            if token is None:
                raise ValueError(must_be("token id", f"in the vocabulary, 0 to {len(table) - 1}", id_))
            pieces.append(token)
        return b"".join(pieces)

    def with_special_tokens(self, mode: SpecialTokens) -> Tokenizer:
        """Return the same tokenizer, which reads special tokens in a text as such ("parse") or as characters ("text").

        Raises:
            ValueError: another mode.
        """
        check("special_tokens", mode, one_of(SPECIAL_TOKENS))
        return self._replace(parses_special=mode == "parse")

    def with_end_token(self, end_token: str | int) -> Tokenizer:
        """Return the same tokenizer with another end token.

        Args:
            end_token: the text or the id of a token. A text that is not a token yet becomes a special token with the
                next free id, as transformers does it.

        Raises:
            ValueError: there is no such id, or the text is empty.
        """
        if isinstance(end_token, int):
            check("end_token", end_token, int_in_range(0, self.vocab_size - 1))
            text = self.decode([end_token])
            return self._replace(
                end_token=text, end_token_id=end_token, roles={**self.roles, "eos_token": text}
            )
        rule = dataclasses.replace(unicode_text, legal="the text or the id of a token")
        token: str = check("end_token", end_token, rule)
        found = self._unsplit.get(token)
        if found is None and token.encode() in self._token_of_id:
            found = self._token_of_id.index(token.encode())
        changes = {"end_token": token, "roles": {**self.roles, "eos_token": token}}
        if found is not None:
            return self._replace(end_token_id=found, **changes)
        notice(f"{token!r:.60} is not a token yet: it becomes one, with the id {self.vocab_size}")
        flags, special = {**self.token_flags, token: TokenFlags()}, {token: self.vocab_size}
        return self._replace(
            end_token_id=self.vocab_size,
            special_tokens=self.special_tokens | special,
            token_flags=flags,
            vocab_size=self.vocab_size + 1,
            _unsplit=self._unsplit | special,
            _finder=TokenFinder(flags, self.special_tokens | special),
            _token_of_id=[*self._token_of_id, token.encode()],
            **changes,
        )

    def tokens(self) -> list[tuple[int, bytes]]:
        """Return (id, bytes) of all tokens, by id."""
        return [(id_, token) for id_, token in enumerate(self._token_of_id) if token is not None]

    @functools.cached_property
    def fingerprint(self) -> str:
        """SHA-256 (hex) of all that decides the ids: tokenizers of equal fingerprint encode every text alike."""
        options: list[object] = [PATTERN, self._id_of_rank, self.special_tokens, self.added_tokens]
        flags = {token: dataclasses.astuple(value) for token, value in self.token_flags.items()}
        if self.parses_special or any(map(any, flags.values())):
            options += [flags, self.parses_special]
        digest = hashlib.sha256(json.dumps([*options, self.end_token, self.add_prefix_space]).encode())
        for left, right in self.merges:
            digest.update(b"%d %d " % (len(left), len(right)) + left + right)
        return digest.hexdigest()

    def __repr__(self) -> str:
        return f"Tokenizer(vocab_size={self.vocab_size}, end_token={self.end_token!r})"

    def _notice_special(self, text: str) -> None:
        """Say once that a text holds a special token which is read as plain characters."""
        token = self._finder.find_special(text)  # 0.3 % of the time that encoding takes
        if token is not None:
            notice(
                f"a text holds the special token {token!r}, which is read as plain characters; "
                'special_tokens="parse" (--special-tokens parse) reads it as the token'
            )

    def _encode_plain(self, text: str) -> list[int]:
        """Return the ids of a text without regard to special and added tokens."""
        if self.add_prefix_space and text and text[0] != " ":
            text = " " + text
        if len(text) <= cutting.LONG_RUN:
            return self._to_ids(self._encoding.encode_ordinary(text))
        ids: list[int] = []
        same = list(
            range(self._encoding.n_vocab)
        )  # one object for each id: tiktoken makes one for each token
        cuts = cutting.find_cuts(text, self._encoding.encode_ordinary, self._lengths)
        for start, end in itertools.pairwise((0, *sorted(cuts), len(text))):
            ids += self._to_ids([same[rank] for rank in self._encoding.encode_ordinary(text[start:end])])
        return ids

    def _to_ids(self, ranks: list[int]) -> list[int]:
        table = self._id_of_rank
        return ranks if table is None else [table[rank] for rank in ranks if table[rank] >= 0]

    @functools.cached_property
    def _lengths(self) -> list[int]:
        """Bytes of the token of each rank."""
        return [1] * len(BYTE_ORDER) + [len(left) + len(right) for left, right in self.merges]

    def _replace(self, **changes: object) -> Tokenizer:
        """Return a copy with other attributes."""
        other = copy.copy(self)
        other.__dict__.pop("fingerprint", None)
        other.__dict__.update(changes)
        return other


def _rank_tokens(merges: Iterable[Merge]) -> dict[bytes, int]:
    """Return the rank of each token: the bytes, then what the merges make."""
    tokens = [bytes([byte]) for byte in BYTE_ORDER] + [left + right for left, right in merges]
    ranks = {token: rank for rank, token in enumerate(tokens)}
    if len(ranks) != len(tokens):
        raise ValueError("two merges make the same token; the merges of a learned encoding are all different")
    return ranks


def _ids_of_ranks(ranks: Mapping[bytes, int], token_ids: Sequence[int] | None) -> list[int]:
    ids = list(range(len(ranks)) if token_ids is None else token_ids)
    if len(ids) != len(ranks):
        legal = f"{len(ranks)} ids, for 256 bytes and {len(ranks) - 256} merges"
        raise ValueError(must_be("token_ids", legal, len(ids)))
    return ids


def parse_merges(text: str) -> list[Merge]:
    """Return the pairs of byte strings in a merges file: one pair a line, after a line "#version: ...".

    Raises:
        ValueError: a line is not a pair; the message has its number.
    """
    # One translation of the whole text is fast; the separators become characters that stand for no byte.
    lines = text.translate(_CHAR_TO_BYTE | {ord(" "): 0x100, ord("\n"): 0x101}).split(chr(0x101))
    merges = []
    for number, line in enumerate(lines, start=1):
        if not line or (number == 1 and line.startswith("#version")):
            continue
        left, _, right = line.partition(chr(0x100))
        try:
            merges.append((left.encode("latin-1"), right.encode("latin-1")))
        except UnicodeEncodeError:
            right = ""
        if not left or not right:
            line = text.split("\n")[number - 1]
            raise ValueError(must_be(f"line {number} of the merges", "a pair of byte-level tokens", line))
    return merges


def token_bytes(token: str) -> bytes | None:
    """Return the bytes of a token as files write it; None if it has characters that stand for no byte."""
    try:
        return token.translate(_CHAR_TO_BYTE).encode("latin-1")
    except UnicodeEncodeError:
        return None


def token_chars(token: bytes) -> str:
    """Return a token as files write it."""
    return "".join(map(_BYTE_TO_CHAR.__getitem__, token))


def _invert(tokens: list[tuple[bytes, int]]) -> list[bytes | None]:
    """Return the token of each id, None for ids that are not used."""
    table: list[bytes | None] = [None] * (max(id_ for _, id_ in tokens) + 1)
    for token, id_ in tokens:
        if table[id_] not in (
            None,
            token_bytes(token.decode("utf-8", "replace")),
        ):  # an added word may be in the merges
            raise ValueError(f"token id {id_} is given to both {table[id_]!r} and {token!r}")
        table[id_] = table[id_] or token
    return table
