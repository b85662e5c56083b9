"""Splits: found in file names, made from the content, and the syntax of `datasets` for parts and sums of them."""

from __future__ import annotations

import hashlib
import itertools
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from gpt2jax.data.columns import Item
from gpt2jax.data.docs_corpus import SPLITS
from gpt2jax.data.files import COMPRESSIONS, FORMATS
from gpt2jax.utils.notices import notice
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

# the number of a part of a data set, and what the hub writes after it
_PART = re.compile(r"[-_.]?\d+([-_]of[-_]\d+)?(-[0-9a-f]{8,})?$")

# reads a split from its start
Reader = Callable[[], Iterator[Item]]


def split_of_file(path: str) -> str | None:
    """Return the split that a file's whole name, or that of a folder above it, tells.

    A name counts without extensions and the number of a part (`train-00000-of-00001.parquet`), and one word and a dot
    may stand before it (`wiki.train.tokens`). A word inside a longer name, as in a title, tells nothing.
    """
    *folders, name = path.lower().split("/")
    while PurePosixPath(name).suffix in (*COMPRESSIONS, *FORMATS):
        name = PurePosixPath(name).stem
    name = (
        re.sub(r"[^\W_]+\.", "", _PART.sub("", name), count=1)
        if name.count(".") == 1
        else _PART.sub("", name)
    )
    return next((SPLIT_NAMES[word] for word in (name, *reversed(folders)) if word in SPLIT_NAMES), None)


def named_splits(readers: Mapping[str, Reader], where: str | None = None) -> dict[str, Reader]:
    """Add "all", the usual splits one after the other, and the usual names of splits that are called otherwise.

    Args:
        readers: the splits that exist.
        where: what a line calls the data that says which splits are held out of the training texts, by content,
            because they do not exist. None: a split that does not exist is an error.
    """
    usual = {SPLIT_NAMES.get(name.lower(), name): reader for name, reader in readers.items()}
    parts = [usual[name] for name in SPLITS if name in usual]
    splits = {**usual, **readers, "all": lambda: itertools.chain.from_iterable(part() for part in parts)}
    absent = tuple(name for name in SPLITS[1:] if name not in usual)
    if where is None or "train" not in usual or not absent:
        return splits
    derived = _held_out_splits(usual["train"], absent, f"{where} has no {' and no '.join(absent)} split")
    # the training split by all its names
    others = {name: derived["train"] for name in readers if SPLIT_NAMES.get(name.lower()) == "train"}
    return {**splits, **derived, **others}


def content_splits(everything: Reader, where: str) -> dict[str, Reader]:
    """Return the splits by content of data that has none; a line that names the data says so."""
    return {**_held_out_splits(everything, SPLITS[1:], f"{where} has no splits by name"), "all": everything}


def _held_out_splits(everything: Reader, held_out: tuple[str, ...], reason: str) -> dict[str, Reader]:
    fractions = " and ".join(f"{HELD_OUT:.0%} for {name}" for name in held_out)
    message = (
        f"{reason}: its training texts are split by content, {fractions}, at least one text each; "
        "split 'all' takes every text"
    )
    return {name: ContentSplit(everything, name, held_out, message) for name in ("train", *held_out)}


@dataclass(frozen=True)
class ContentSplit:
    """The reader of a split that the data does not have by name: it says so, and splits the texts by content."""

    everything: Reader
    name: str
    held_out: tuple[str, ...]
    message: str

    def __call__(self) -> Iterator[Item]:
        notice(self.message)
        return split_by_content(self.everything(), self.name, self.held_out)


def split_by_content(
    items: Iterable[Item], split: str, held_out: tuple[str, ...] = SPLITS[1:]
) -> Iterator[Item]:
    """Yield the texts or pairs that belong to a split, see `gpt2jax.data.sources.Texts`.

    Args:
        items: those of all splits.
        split: "train" or one of `held_out`.
        held_out: the splits that get `HELD_OUT` each.

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
            if part := _slice_text(item, split, held_out):
                yield part
        return
    count = max(1, round(HELD_OUT * len(ranks))) if len(start) < _MANY else None
    bounds = {
        name: HELD_OUT * place if count is None else ranks[count * place - 1]
        for place, name in enumerate(held_out, start=1)
    }
    for item in every:
        fraction = _fraction(item)
        if split == next((name for name, bound in bounds.items() if fraction <= bound), "train"):
            yield item


def _fraction(item: Item) -> float:
    """Return a number in [0, 1) that depends on the content alone."""
    text = item if isinstance(item, str) else _BETWEEN.join(item.values())
    digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:6], "big") / 2**48


def _slice_text(text: str, split: str, held_out: tuple[str, ...]) -> str:
    """Return the first part of a text, or a later one of 5 %, which ends after a line, else after a word."""
    bounds = [0]
    for place in range(len(held_out), 0, -1):
        at, following = (int(len(text) * (1 - after * HELD_OUT)) for after in (place, place - 1))
        # not as far as the next part begins: in a short text a line may be longer than a part
        ends = [text.find(mark, at, min(following - 1, at + len(text) // 100 + 80)) + 1 for mark in "\n "]
        bounds.append(max(bounds[-1], next((end for end in ends if end), at)))
    parts = itertools.pairwise([*bounds, len(text)])
    start, stop = dict(zip(("train", *held_out), parts, strict=True))[split]
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
