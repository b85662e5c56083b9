"""Splits: found in file names, made from the content, and the syntax of `datasets` for parts and sums of them."""

from __future__ import annotations

import hashlib
import itertools
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import PurePosixPath
from typing import Any

from gpt2jax.data.columns import Item
from gpt2jax.data.docs_corpus import SPLITS
from gpt2jax.data.files import COMPRESSIONS, FORMATS
from gpt2jax.utils.validation import must_be, unknown_name

# Data without splits is divided by content: 90 % train, 5 % validation, 5 % test.
HELD_OUT = 0.05
# fewer different texts are sliced by position; from so many texts on, the split is a function of the text alone
_FEW, _MANY = 3, 400
# stands between prompt and completion where a pair is hashed
_BETWEEN = "\x00\x1e\x00"

SPLIT_NAMES = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev", "eval"), "validation"),
    **dict.fromkeys(("test", "testing"), "test"),
}

# reads a split from its start
Reader = Callable[[], Iterator[Item]]


def split_of_file(path: str) -> str | None:
    """Return the split that the name of a file, at its start or end, or of a folder above it tells."""
    *folders, name = path.lower().split("/")
    while PurePosixPath(name).suffix in (*COMPRESSIONS, *FORMATS):
        name = PurePosixPath(name).stem
    words = re.split(r"[-_.\s]+", name)
    while len(words) > 1 and (words[-1].isdigit() or words[-1] == "of"):
        words.pop()
    for word in (words[0], words[-1], *reversed(folders)):
        if word in SPLIT_NAMES:
            return SPLIT_NAMES[word]
    return None


def named_splits(readers: Mapping[str, Reader]) -> dict[str, Reader]:
    """Add "all", the usual splits one after the other, and the usual names of splits that are called otherwise."""
    usual = {SPLIT_NAMES.get(name.lower(), name): reader for name, reader in readers.items()}
    parts = [usual[name] for name in SPLITS if name in usual]
    return {**usual, **readers, "all": lambda: itertools.chain.from_iterable(part() for part in parts)}


def content_splits(everything: Reader) -> dict[str, Reader]:
    """Return the splits by content of data that has none."""
    return {
        **{name: lambda name=name: split_by_content(everything(), name) for name in SPLITS},
        "all": everything,
    }


def split_by_content(items: Iterable[Item], split: str) -> Iterator[Item]:
    """Yield the texts or pairs that belong to a split, see `gpt2jax.data.sources.Texts`.

    Raises:
        ValueError: there are fewer than three different pairs, and a pair cannot be sliced as a text can.
    """
    items = iter(items)
    start = list(itertools.islice(items, _MANY))
    every = itertools.chain(start, items)
    ranks = sorted({_fraction(item) for item in start})
    if len(ranks) < _FEW:
        for item in every:
            if not isinstance(item, str):
                raise ValueError(
                    f"{len(ranks)} different rows are too few to split by content; take split='all'"
                )
            if part := _slice_text(item, split):
                yield part
        return
    validation, test = HELD_OUT, 2 * HELD_OUT
    if len(start) < _MANY:
        held_out = max(1, round(HELD_OUT * len(ranks)))
        validation, test = ranks[held_out - 1], ranks[2 * held_out - 1]
    for item in every:
        fraction = _fraction(item)
        if split == ("validation" if fraction <= validation else "test" if fraction <= test else "train"):
            yield item


def _fraction(item: Item) -> float:
    """Return a number in [0, 1) that depends on the content alone."""
    text = item if isinstance(item, str) else _BETWEEN.join(item.values())
    digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:6], "big") / 2**48


def _slice_text(text: str, split: str) -> str:
    """Return the first 90 %, next 5 % or last 5 % of a text, which ends behind a line, else behind a word."""
    bounds = [0]
    for fraction in (1 - 2 * HELD_OUT, 1 - HELD_OUT):
        at = int(len(text) * fraction)
        ends = [text.find(mark, at, at + len(text) // 100 + 80) + 1 for mark in "\n "]
        bounds.append(max(bounds[-1], next((end for end in ends if end), at)))
    start, stop = dict(zip(SPLITS, itertools.pairwise([*bounds, len(text)]), strict=True))[split]
    return text[start:stop]


def check_split(split: Any) -> None:
    """Raise ValueError unless `split` follows the syntax of `datasets`."""
    legal = "a split such as train, train[:50%], test[:100] or train+validation"
    if not isinstance(split, str):
        raise ValueError(must_be("split", legal, split))
    if not re.fullmatch(r"\w+(\.\w+)*", split):
        import datasets

        try:
            datasets.ReadInstruction.from_spec(split)
        except (ValueError, AssertionError) as error:
            reason = " ".join(str(error).split())
            raise ValueError(f"{must_be('split', legal, split)}; {reason}") from None


def read_split(split: str, readers: Mapping[str, Reader], where: str) -> Iterator[Item]:
    """Yield what a split names, with the syntax of `datasets` for slices and sums.

    A percentage or a negative number needs the length of the split, which is read once more for it.

    Args:
        split: see `check_split`.
        readers: the splits that exist.
        where: what messages call the data.

    Raises:
        ValueError: a split does not exist.
    """

    class Lengths(dict[str, int]):
        """Length by name, counted when it is asked for; slices are then bounded by it."""

        def __contains__(self, name: object) -> bool:
            return True

        def __missing__(self, name: str) -> int:
            if name not in readers:
                raise ValueError(f"{where}: {unknown_name('split', name, readers)}")
            needs_count = re.search("[%-]", split)
            self[name] = sum(1 for _ in readers[name]()) if needs_count else sys.maxsize
            return self[name]

    if split.isidentifier():
        if split not in readers:
            raise ValueError(f"{where}: {unknown_name('split', split, readers)}")
        yield from readers[split]()
        return
    import datasets

    for part in datasets.ReadInstruction.from_spec(split).to_absolute(Lengths()):
        yield from itertools.islice(readers[part.splitname](), part.from_, max(part.from_, part.to))
