"""Where texts come from: built-in documentation, files of one's own, the Hugging Face hub."""

from __future__ import annotations

import hashlib
import itertools
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal, overload

from gpt2jax.data.docs_corpus import BUILTIN_NAMES, SPLITS, builtin_texts
from gpt2jax.data.hub import (
    DATA_VARIABLE,
    PAPERS,
    PAPERS_HUB_ID,
    PAPERS_REVISION,
    no_data_set,
    paper_texts,
    resolve_revision,
    where_to_get,
)
from gpt2jax.data.readers import (
    COMPRESSIONS,
    DOCUMENTS,
    READERS,
    File,
    choose_column,
    list_files,
    read_texts,
    row_texts,
    schema_columns,
)
from gpt2jax.utils.validation import check_path, is_integer

# Data without splits of its own: 90 % train, 5 % validation, 5 % test.
HELD_OUT = 0.05
_FEW, _MANY = 3, 400

_SPLIT_WORDS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev", "eval"), "validation"),
    **dict.fromkeys(("test", "testing"), "test"),
}
_HUB_ID = re.compile(r"\w[\w.-]*/[\w.-]+(:[\w.+-]+)?")


@overload
def load_texts(
    source: str | os.PathLike[str],
    *,
    split: str = ...,
    text_column: str | None = ...,
    limit: int | None = ...,
    streaming: Literal[False] = ...,
    revision: str | None = ...,
    documents: str = ...,
) -> list[str]: ...
@overload
def load_texts(
    source: str | os.PathLike[str],
    *,
    split: str = ...,
    text_column: str | None = ...,
    limit: int | None = ...,
    streaming: Literal[True],
    revision: str | None = ...,
    documents: str = ...,
) -> Iterator[str]: ...
def load_texts(
    source: str | os.PathLike[str],
    *,
    split: str = "train",
    text_column: str | None = None,
    limit: int | None = None,
    streaming: bool = False,
    revision: str | None = None,
    documents: str = "file",
) -> list[str] | Iterator[str]:
    """Texts of a data set, in its order; none is left out or changed, empty ones included.

    `source` is one of

    * `"python-docs"`, `"numeric-docs"`: documentation of what is installed (see `gpt2jax.data.docs_corpus`);
    * a file: .jsonl, .json, .csv, .tsv, .parquet with a column of texts (strings, or lists of strings, which
    are
      joined by newlines), .txt; compressed (.gz, .bz2, .xz, .zst) or not. A .txt file with JSON lines in it
      is read as these; other ones are a single text, cut where `<|endoftext|>` stands (see `documents`);
    * a folder or .zip archive of such files, or a folder that `datasets` saved;
    * `"pubmed"`, `"arxiv"`: scientific_papers, the article bodies. From `pubmed-dataset.zip` or the folder
      `pubmed-dataset` in the working folder or in `$GPT2JAX_DATA`, else the Parquet files on the hub, of which
      there must be as many texts as were published;
    * the id of a data set on the hub, `"owner/name"` or `"owner/name:configuration"`.

    Files belong to a split by their name (`train.jsonl`, `val-00000-of-00002.parquet`) or their folder's
    (`test/a.txt`). Where no name tells, the data is split 90/5/5 in a way that depends on the texts alone:
    from 400 texts on by a hash of each, so that equal texts are never in two splits; fewer by the order of
    their hashes, at least one each; one or two texts are cut by position.

    Args:
        source: what to read.
        split: "train", "validation", "test", or "all" for everything.
        text_column: column with the texts. None: `text`, `article`, `article_text`, `content`, `body`,
            `document`, or the only column with texts.
        limit: at most so many texts, the first ones.
        streaming: give an iterator that reads as it goes, instead of a list.
        revision: branch, tag or commit of a data set on the hub; all that is read is of one commit, see
            `pin_revision`.
        documents: what a text is in plain .txt files: "file" (all between two end tokens), "paragraph"
            (between blank lines, too) or "line".

    Raises:
        ValueError: a wrong option, unknown format, unclear column, damaged content, or no text in that split.
        FileNotFoundError: there is no such file, or the hub does not give the data.
    """
    texts = iterate_texts(
        source,
        split=split,
        text_column=text_column,
        limit=limit,
        streaming=streaming,
        revision=revision,
        documents=documents,
    )
    return texts if streaming else list(texts)


def iterate_texts(
    source: str | os.PathLike[str],
    *,
    split: str = "train",
    text_column: str | None = None,
    limit: int | None = None,
    streaming: bool = False,
    revision: str | None = None,
    documents: str = "file",
) -> Iterator[str]:
    """The texts of `load_texts` one by one, so that they are never all in memory.

    Args are those of `load_texts`, but for `streaming`: read a data set of the hub as it comes, without downloading
    it first. Files are always read as they come.
    """
    if split not in (*SPLITS, "all"):
        raise ValueError(f"split={split!r} is not one of {', '.join(SPLITS)}, all")
    if documents not in DOCUMENTS:
        raise ValueError(f"documents={documents!r} is not one of {', '.join(DOCUMENTS)}")
    if limit is not None and (not is_integer(limit) or limit < 1):
        raise ValueError(f"limit={limit!r} is not a positive number of texts")
    check_path("source", source)
    texts = _open_source(
        os.fspath(source), split, text_column, revision, documents, streaming or limit is not None
    )
    first = list(itertools.islice(texts, 1))
    if not first:
        raise ValueError(f"{source} has no texts" + (f" in its {split} split" if split != "all" else ""))
    return itertools.islice(itertools.chain(first, texts), limit)


def split_texts(texts: Iterable[str], split: str) -> Iterator[str]:
    """The part of texts without splits that belongs to one of them; see `load_texts`."""
    texts = iter(texts)
    if split == "all":
        yield from texts
    start = list(itertools.islice(texts, _MANY))
    ranks = sorted({_fraction(text) for text in start})
    if len(ranks) < _FEW:
        yield from filter(None, (_cut(text, split) for text in itertools.chain(start, texts)))
    else:
        bounds = HELD_OUT, 2 * HELD_OUT
        if len(start) < _MANY:
            held_out = max(1, round(HELD_OUT * len(ranks)))
            bounds = ranks[held_out - 1], ranks[2 * held_out - 1]
        every = itertools.chain(start, texts)
        yield from (text for text in every if _split_at(_fraction(text), *bounds) == split)


def _fraction(text: str) -> float:
    """A number in [0, 1) that depends on the text alone."""
    digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:6], "big") / 2**48


def _split_at(fraction: float, validation: float, test: float) -> str:
    return "validation" if fraction <= validation else "test" if fraction <= test else "train"


def _cut(text: str, split: str) -> str:
    """The first 90 %, next 5 % or last 5 % of a text, cut after a line, else after a word."""
    bounds = [0]
    for share in (1 - 2 * HELD_OUT, 1 - HELD_OUT):
        at = int(len(text) * share)
        ends = [text.find(mark, at, at + len(text) // 100 + 80) + 1 for mark in "\n "]
        bounds.append(max(bounds[-1], next((end for end in ends if end), at)))
    start, stop = dict(zip(SPLITS, itertools.pairwise([*bounds, len(text)]), strict=True))[split]
    return text[start:stop]


def pin_revision(source: str | os.PathLike[str], revision: str | None = None) -> str | None:
    """The commit that is read of a data set on the hub: give it as `revision` to read the same again.

    Args:
        source: as for `load_texts`.
        revision: commit, tag or branch. Default: the main branch, of pubmed and arxiv the one with Parquet files.

    Returns:
        40 hexadecimal digits; None for what is on this machine.

    Raises:
        ValueError: the source is nothing that is known, or not on the hub and a revision is given.
        FileNotFoundError: there is no such file, data set or revision, or the hub does not answer.
    """
    path, source = check_path("source", source), os.fspath(source)
    if revision is None and _archive(source):
        return None
    if path.exists() or source in BUILTIN_NAMES:
        if revision is not None:
            raise ValueError(f"{source} is not on the hub: it has no revision {revision!r}")
        return None
    if source in PAPERS:
        return resolve_revision(PAPERS_HUB_ID, revision or PAPERS_REVISION, advice=where_to_get(source))
    if source.endswith((*READERS, *COMPRESSIONS, ".zip")) or not _HUB_ID.fullmatch(source):
        if re.search(r"[/\\~]|\.\w+$", source):
            raise FileNotFoundError(f"there is no file or folder {source}")
        names = ", ".join((*BUILTIN_NAMES, *PAPERS))
        raise ValueError(
            f"{source!r} is no data set: give {names}, the path of a file or folder, or the id of a data set "
            "on the hub (owner/name)"
        )
    return resolve_revision(source.partition(":")[0], revision)


def _open_source(
    source: str, split: str, text_column: str | None, revision: str | None, documents: str, lazy: bool
) -> Iterator[str]:
    commit = pin_revision(source, revision)
    if commit is not None and source in PAPERS:
        return paper_texts(source, _parts(split), text_column, commit, lazy=lazy)
    if commit is not None:
        return _hub_texts(source, split, text_column, commit, lazy)
    path = check_path("source", source)
    if not path.exists() and source in BUILTIN_NAMES:
        if text_column is not None:
            raise ValueError(f"{source} has no columns to choose text_column={text_column!r} from")
        return itertools.chain.from_iterable(builtin_texts(source, part) for part in _parts(split))
    return _path_texts(path if path.exists() else _archive(source) or path, split, text_column, documents)


def _archive(name: str) -> Path | None:
    """The authors' archive of pubmed or arxiv, packed or not, in the working folder or in `DATA_VARIABLE`'s."""
    folders = [Path(), *filter(None, [Path(os.environ.get(DATA_VARIABLE, ""))])]
    places = [folder / f"{name}-dataset{end}" for folder in folders for end in ("", ".zip")]
    return next((place for place in places if name in PAPERS and place.exists()), None)


def _parts(split: str) -> tuple[str, ...]:
    return SPLITS if split == "all" else (split,)


def _path_texts(path: Path, split: str, text_column: str | None, documents: str) -> Iterator[str]:
    if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
        return _saved_texts(path, split, text_column)
    by_split: dict[str | None, list[File]] = {}
    for file in list_files(path):
        by_split.setdefault(split_by_name(file.path), []).append(file)

    def texts(files: list[File]) -> Iterator[str]:
        return itertools.chain.from_iterable(read_texts(file, text_column, documents) for file in files)

    named = [part for part in SPLITS if part in by_split]
    if not named:
        return split_texts(texts(by_split[None]), split)
    return texts([file for part in _pick(named, split, str(path)) for file in by_split[part]])


def _pick(named: list[str], split: str, where: str) -> list[str]:
    """The splits to read of those there are."""
    if split == "all":
        return named
    if split not in named:
        raise ValueError(f"{where} has no {split} split: by its names it holds {', '.join(named)}")
    return [split]


def split_by_name(path: str) -> str | None:
    """The split that a file belongs to by a word at either end of its name, or by the folder it is in."""
    *folders, name = path.lower().split("/")
    for extension in (*COMPRESSIONS, *READERS):
        name = name.removesuffix(extension)
    words = re.split(r"[-_.\s]+", name)
    while len(words) > 1 and (words[-1].isdigit() or words[-1] == "of"):
        words.pop()
    for word in (words[0], words[-1], *reversed(folders)):
        if word in _SPLIT_WORDS:
            return _SPLIT_WORDS[word]
    return None


def _saved_texts(path: Path, split: str, text_column: str | None) -> Iterator[str]:
    """Texts of what `save_to_disk` of `datasets` wrote."""
    import datasets

    saved = datasets.load_from_disk(str(path))
    if isinstance(saved, datasets.Dataset):
        return split_texts(_dataset_texts(saved, text_column, str(path)), split)
    return _dict_texts(saved, split, text_column, str(path))


def _dict_texts(by_name: Any, split: str, text_column: str | None, where: str) -> Iterator[str]:
    """Texts of a split of a DatasetDict, which may call the splits otherwise, or have a single one."""
    names = {_SPLIT_WORDS.get(name.lower(), name): name for name in by_name}
    if list(names) == ["train"] or not set(names) & set(SPLITS):
        texts = (_dataset_texts(by_name[name], text_column, where) for name in by_name)
        return split_texts(itertools.chain.from_iterable(texts), split)
    picked = _pick([part for part in SPLITS if part in names], split, where)
    return itertools.chain.from_iterable(
        _dataset_texts(by_name[names[part]], text_column, where) for part in picked
    )


def _dataset_texts(dataset: Any, text_column: str | None, where: str) -> Iterator[str]:
    if dataset.features is not None:
        text_column = choose_column(schema_columns(dataset.features.arrow_schema), text_column, where)
        dataset = dataset.select_columns([text_column])
    rows = ((f"{where}, row {number}", row) for number, row in enumerate(dataset, start=1))
    return row_texts(rows, text_column, where)


def _hub_texts(source: str, split: str, text_column: str | None, commit: str, lazy: bool) -> Iterator[str]:
    import datasets

    hub_id, _, configuration = source.partition(":")
    try:
        loaded = datasets.load_dataset(hub_id, configuration or None, revision=commit, streaming=lazy)
    except Exception as error:
        raise no_data_set(hub_id, error) from error
    # without the hub `datasets` takes what its cache has, of whatever commit
    files = [file["filename"] for part in loaded.values() for file in getattr(part, "cache_files", ())]
    folders = {Path(file).parent.name for file in files}
    if others := {name for name in folders if re.fullmatch("[0-9a-f]{40}", name)} - {commit}:
        raise FileNotFoundError(
            f"{hub_id} at commit {commit} can't be had from the hub now, and the cache has {', '.join(others)}"
        )
    return _dict_texts(loaded, split, text_column, hub_id)
