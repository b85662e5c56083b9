"""The vocabulary and the merges of a tokenizer: read from its files, and checked against each other."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from gpt2jax.tokenizer.bpe import Merge, Tokenizer, parse_merges, token_bytes
from gpt2jax.utils.json_files import read_json
from gpt2jax.utils.stand_ins import describe_stand_in
from gpt2jax.utils.validation import must_be

MAX_TOKEN_BYTES = 1024  # the longest token of GPT-2 has 128
# (vocabulary, merges) of Hugging Face, OpenAI's release, a Keras preset and its folder above.
VOCABULARY_FILES = (
    ("vocab.json", "merges.txt"),
    ("encoder.json", "vocab.bpe"),
    ("vocabulary.json", "merges.txt"),
    ("assets/tokenizer/vocabulary.json", "assets/tokenizer/merges.txt"),
)


def read_vocabulary(folder: Path) -> tuple[dict[str, int], list[Merge]]:
    for vocabulary, merges in VOCABULARY_FILES:
        if (folder / vocabulary).is_file() and (folder / merges).is_file():
            try:
                data = (folder / merges).read_bytes()
                if reason := describe_stand_in(data[:512]):
                    raise ValueError(f"{folder / merges} {reason}")
                return read_json(folder / vocabulary), parse_merges(data.decode().replace("\r\n", "\n"))
            except ValueError as error:
                raise ValueError(
                    str(error) if str(folder) in str(error) else f"{folder / merges}: {error}"
                ) from None
    pairs = ", ".join(" + ".join(pair) for pair in VOCABULARY_FILES)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is not a folder with a tokenizer in it")
    for pair in VOCABULARY_FILES:
        for here, other in (pair, pair[::-1]):
            if (folder / here).is_file():
                raise FileNotFoundError(f"{folder} has {here} but no {other}")
    raise FileNotFoundError(f"{folder} has no tokenizer: neither tokenizer.json nor one of {pairs}")


def read_fast(file: Path, fast: Mapping[str, Any]) -> tuple[dict[str, int], list[Merge]]:
    """Return (vocabulary, merges) of a tokenizer.json; raise ValueError unless the rest of it is as in GPT-2's."""
    model, splitter = fast["model"], fast.get("pre_tokenizer") or {}
    supported = {
        "model.type": (model.get("type", "BPE"), ("BPE",)),
        "model.dropout": (model.get("dropout"), (None, 0, 0.0)),
        "model.byte_fallback": (model.get("byte_fallback", False), (False,)),
        "model.continuing_subword_prefix": (model.get("continuing_subword_prefix"), (None, "")),
        "model.end_of_word_suffix": (model.get("end_of_word_suffix"), (None, "")),
        "normalizer": (fast.get("normalizer"), (None,)),
        "pre_tokenizer.type": (splitter.get("type"), ("ByteLevel",)),
        "pre_tokenizer.use_regex": (splitter.get("use_regex", True), (True,)),
    }
    for name, (value, legal) in supported.items():
        if value not in legal:
            raise ValueError(must_be(f"{file}: {name}", f"{legal[0]!r} as in GPT-2's byte-level BPE", value))
    for name, kind in (("vocab", dict), ("merges", list)):
        if not isinstance(model.get(name), kind):
            raise ValueError(must_be(f"{file}: model.{name}", f"a {kind.__name__}", model.get(name)))
    return model["vocab"], [_parse_merge(file, entry) for entry in model["merges"]]


def _parse_merge(file: Path, entry: Any) -> Merge:
    """Return a merge of a tokenizer.json, which is "a b" in older files, ["a", "b"] in newer ones."""
    texts = entry.split(" ") if isinstance(entry, str) else entry
    if isinstance(texts, list) and len(texts) == 2 and all(isinstance(text, str) for text in texts):
        left, right = map(token_bytes, texts)
        if left and right:
            return left, right
    raise ValueError(must_be(f"{file}: a merge", "a pair of byte-level tokens", entry))


def check_tokens(folder: Path, texts: Iterable[str], merges: Iterable[Merge]) -> None:
    """Raise ValueError for a token that is so long that the checks of merges would take too long."""
    size = max(map(len, texts), default=0)
    size = max(size, max((len(left) + len(right) for left, right in merges), default=0))
    if size > MAX_TOKEN_BYTES:
        raise ValueError(f"{folder}: a token must have at most {MAX_TOKEN_BYTES} bytes, got {size}")


def check_complete(
    id_of: Mapping[bytes, int], merges: Sequence[Merge], unreachable: Mapping[int, bytes]
) -> None:
    """Raise ValueError for a list of merges that ends before the vocabulary does.

    A token without a merge may be one that was added by hand. It was cut off if the vocabulary goes on with it behind
    the token of the last merge, or if there are more such tokens than merges; and if it consists of two tokens.
    """

    def is_pair(token: bytes) -> bool:
        return any(token[:at] in id_of and token[at:] in id_of for at in range(1, len(token)))

    last = id_of[merges[-1][0] + merges[-1][1]] if merges else -1
    lost = [token for _, token in sorted(unreachable.items()) if is_pair(token)]
    if lost and (unreachable.get(last + 1) == lost[0] or len(lost) > len(merges)):
        raise ValueError(
            f"the merges are cut off after {len(merges)}: the vocabulary has {len(lost)} tokens that no merge makes, "
            f"first {lost[0]!r}; fetch merges.txt or tokenizer.json again"
        )


def check_merges(folder: Path, merges: Sequence[Merge]) -> None:
    """Raise ValueError for merges that tiktoken would apply in another way.

    A merges file allows the pairs that it lists; tiktoken joins any two neighbours whose bytes are a token. Both
    agree if the earlier merges alone turn each token's bytes into the pair listed for it. That is so for merges
    that were learned from a text, but not for all lists that were made by hand.
    """
    known = Tokenizer.gpt2().merges
    same = 0
    while same < min(len(known), len(merges)) and merges[same] == known[same]:
        same += 1
    ranks = {left + right: rank for rank, (left, right) in enumerate(merges)}
    for rank, (left, right) in enumerate(merges[same:], start=same):
        parts = [bytes([byte]) for byte in left + right]
        pairs = [ranks.get(one + two, rank) for one, two in itertools.pairwise(parts)]
        while len(parts) > 2 and (best := min(pairs)) < rank:
            at = pairs.index(best)
            parts[at : at + 2] = [parts[at] + parts[at + 1]]
            near = parts[max(at - 1, 0) : at + 2]
            again = [ranks.get(one + two, rank) for one, two in itertools.pairwise(near)]
            pairs[max(at - 1, 0) : at + 2] = again
        if parts != [left, right]:
            raise ValueError(
                f"{folder}: the merges are not those of a learned byte-pair encoding: {left + right!r} is "
                f"listed as {left!r} + {right!r}, but the merges before it give {parts!r}"
            )
