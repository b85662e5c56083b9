"""Where texts come from: documentation, files, the Hugging Face hub, and objects of `datasets`."""

from __future__ import annotations

import itertools
import os
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias

from gpt2jax.data.columns import Columns, Item, row_items, table_items
from gpt2jax.data.docs_corpus import BUILTIN_NAMES, SPLITS, builtin_texts
from gpt2jax.data.files import (
    COMPRESSIONS,
    FORMATS,
    JSON,
    PLAIN,
    TABLES,
    File,
    check_encoding,
    has_pattern,
    list_files,
)
from gpt2jax.data.hub import (
    DATA_VARIABLE,
    PAPERS,
    PAPERS_HUB_ID,
    PAPERS_REVISION,
    is_commit,
    load_hub_dataset,
    no_data_set,
    paper_items,
    resolve_revision,
    where_to_get,
)
from gpt2jax.data.readers import read_items
from gpt2jax.data.splits import (
    ContentSplit,
    Reader,
    check_split,
    content_splits,
    named_splits,
    read_split,
    split_of_file,
)
from gpt2jax.utils.json_files import read_json
from gpt2jax.utils.notices import enumerate_names, notice
from gpt2jax.utils.validation import (
    check_path,
    must_be,
    non_empty_string,
    positive_int,
    set_field,
    validated,
)

# a name or a path, or a Dataset, IterableDataset, DatasetDict, IterableDatasetDict or column of `datasets`
Source: TypeAlias = Any

_HUB_ID = re.compile(r"\w[\w.-]*/[\w.-]+(:[\w.+-]+)?")
_HF_PATH = re.compile(
    r"hf://datasets/(?P<id>[^/@]+/[^/@]+)(@(?P<revision>refs/(convert|pr)/[^/]+|[^/]+))?(/(?P<path>.+))?"
)

# options, and the extensions of the files that they have an effect on
_OPTIONS_OF_FILES = {
    "documents": PLAIN,
    "records_field": JSON,
    "encoding": tuple(suffix for suffix in FORMATS if suffix not in TABLES),
}


@validated
@dataclass(frozen=True)
class Texts:
    """Texts of a data set, in its order, read anew each time that they are iterated over; never all in memory.

    None is left out or changed; empty ones are included.

    Files belong to a split by their whole name (`train.jsonl`, `val-00000-of-00002.parquet`) or their folder's
    (`test/a.txt`). What is not there of validation and test is split off the training texts, 5 % each, in a way that
    depends on the texts alone: from 400 texts on by a hash of each, so that equal texts are never in two splits; fewer
    by the order of their hashes, at least one each; one or two different texts are sliced by position.

    Attributes:
        source: one of

            * `"python-docs"`, `"numeric-docs"`: documentation of what is installed (`gpt2jax.data.docs_corpus`);
            * a file: .jsonl, .json, .csv, .tsv, .parquet, .arrow, .feather with a column of texts (strings, or lists of
              strings, which are joined by newlines), or plain text (`gpt2jax.data.files.PLAIN`); compressed (gzip,
              bzip2, xz, zstd) or not. A .txt file of JSON lines is read as these; any other plain text is one text, cut
              where `<|endoftext|>` stands (see `documents`);
            * a folder or .zip archive of such files, or a folder that `save_to_disk` of `datasets` wrote;
            * a pattern such as "data/*.jsonl" (** for folders), or a list of files, folders and patterns;
            * a `Dataset`, `IterableDataset` or `DatasetDict` of `datasets`, or a column of one;
            * `"owner/name"` or `"owner/name:configuration"`, a data set on the hub, and `"hf://datasets/owner/name"`,
              which may go on with `@revision` and with the path of a file or folder in it;
            * `"pubmed"`, `"arxiv"`: scientific_papers, the article bodies. From `pubmed-dataset.zip` or the folder
              `pubmed-dataset` in the working folder or in `$GPT2JAX_DATA`, else the Parquet files on the hub, which
              must hold as many texts as were published.
        split: "train", "validation", "test", "all", or another that the data has, with the syntax of `datasets`:
            "train[:50%]", "test[:100]", "train+validation".
        text_column: column with the texts, "outer.inner" for a field of a column of objects. None: `text`, `article`,
            `article_text`, `content`, `body`, `document`, or the only column with texts.
        prompt_column, completion_column: two columns instead; each row is then {"prompt": ..., "completion": ...}.
        limit: at most so many texts, the first ones.
        documents: what a text is in plain .txt files: "file" (all between two end tokens), "paragraph" (between blank
            lines, too) or "line".
        streaming: read a data set of the hub as it comes, without downloading it first; so does `limit`. Files are
            always read as they come.
        encoding: of the texts in files of plain text, JSON and CSV. None: UTF-8.
        records_field: the field of a JSON object that holds the rows, in files that hold one object with more in it.
        revision: branch, tag or commit of a data set on the hub. All that is read is of one commit, see
            `pin_revision`.

    Raises:
        ValueError: an option is not legal; when iterated over: unknown format, unclear column, damaged content, or no
            text in that split.
        FileNotFoundError: when iterated over: there is no such file, or the hub does not give the data.
    """

    source: Source
    split: str = "train"
    text_column: str | None = None
    prompt_column: str | None = None
    completion_column: str | None = None
    limit: Annotated[int | None, positive_int] = None
    documents: Literal["file", "paragraph", "line"] = "file"
    streaming: bool = False
    revision: str | None = None
    encoding: str | None = None
    records_field: Annotated[str | None, non_empty_string] = None

    def __post_init__(self) -> None:
        check_split(self.split)
        check_encoding(self.encoding)
        if isinstance(self.source, list | tuple):
            if not self.source:
                raise ValueError(
                    must_be("source", "a name or a path, or a list of at least one", self.source)
                )
            for source in self.source:
                check_path("each source", source)
            set_field(self, "source", tuple(map(os.fspath, self.source)))
        elif not _is_dataset(self.source):
            check_path("source", self.source)
            set_field(self, "source", os.fspath(self.source))
        if (self.prompt_column is None) != (self.completion_column is None):
            raise ValueError(
                f"prompt_column={self.prompt_column!r} and completion_column={self.completion_column!r}: name both"
            )
        if self.text_column is not None and self.prompt_column is not None:
            raise ValueError(
                "text_column has no effect with prompt_column and completion_column; name one kind"
            )

    @property
    def fingerprint(self) -> str | None:
        """What the texts follow from, if that never changes: data of the hub at a commit. None for all else."""
        return repr(self) if isinstance(self.source, str) and is_commit(self.revision) else None

    @property
    def where(self) -> str:
        """What messages call the source."""
        if isinstance(self.source, tuple):
            return enumerate_names(list(self.source))
        return self.source if isinstance(self.source, str) else f"the {type(self.source).__name__}"

    def is_papers(self) -> bool:
        """Return whether this is scientific_papers, by whatever name or path: it has the columns of these."""
        if self.source in PAPERS or self.source in BUILTIN_NAMES:
            return self.source in PAPERS
        columns = _columns(self)
        next(_open(self, self.where, columns)["all"](), None)
        return "section_names" in columns.seen and not columns.seen.isdisjoint(("article", "article_text"))

    def has_split(self, name: str) -> bool:
        """Return whether the data has a split by name; one that is made from its content does not count."""
        reader = _open(self, self.where).get(name)
        return reader is not None and not isinstance(reader, ContentSplit)

    def count_undivided(self) -> int | None:
        """Return how many texts the data has in all if the split is made from its content, else None."""
        readers = _open(self, self.where)
        names = re.findall(r"[^\W\d]\w*", self.split)
        if any(isinstance(readers.get(name), ContentSplit) for name in names):
            return sum(1 for _ in readers["all"]())
        return None

    def __iter__(self) -> Iterator[Any]:
        where = self.where
        items = read_split(self.split, _open(self, where), where)
        first = list(itertools.islice(items, 1))
        if not first:
            raise ValueError(f"{where} has no texts" + f" in its {self.split} split" * (self.split != "all"))
        limit = None if self.limit is None else min(self.limit, sys.maxsize)  # islice takes no more
        return itertools.islice(itertools.chain(first, items), limit)


def load_texts(source: Source, split: str = "train", **options: Any) -> list[str]:
    """Return the texts of a data set; `Texts` explains all arguments, and reads the same as a stream.

    Raises:
        ValueError, FileNotFoundError: see `Texts`.
    """
    return list(Texts(source, split, **options))


def pin_revision(source: Source, revision: str | None = None) -> str | None:
    """Return the commit that is read of a data set on the hub: as `revision` it reads the same again.

    Args:
        source: see `Texts`.
        revision: commit, tag or branch. Default: the main branch, for pubmed and arxiv the one with Parquet files.

    Returns:
        40 hexadecimal digits; None for data on this machine.

    Raises:
        ValueError: the source is not known, or a revision is given for data on this machine.
        FileNotFoundError: there is no such file, data set or revision, or the hub does not answer.
    """
    if isinstance(source, list | tuple):
        for one in source:
            if pin_revision(one, revision) is not None or str(one) in BUILTIN_NAMES:
                raise ValueError(must_be("each of several sources", "a file or folder on this machine", one))
        return None
    if _is_dataset(source):
        name, is_here = f"the {type(source).__name__}", True
    else:
        path, name = check_path("source", source), os.fspath(source)
        is_here = path.exists() or name in BUILTIN_NAMES or ("://" not in name and has_pattern(str(path)))
        is_here = is_here or (revision is None and _archive(name) is not None)
    if is_here:
        if revision is not None:
            raise ValueError(f"{name} is not on the hub: it has no revision {revision!r}")
        return None
    if name in PAPERS:
        return resolve_revision(PAPERS_HUB_ID, revision or PAPERS_REVISION, advice=where_to_get(name))
    if match := _HF_PATH.fullmatch(name):
        return resolve_revision(match["id"], revision or match["revision"])
    if name.endswith((*FORMATS, *COMPRESSIONS, ".zip")) or not _HUB_ID.fullmatch(name):
        if re.search(r"[/\\~]|\.\w+$", name):
            raise FileNotFoundError(f"there is no file or folder {name}")
        legal = (
            f"{', '.join((*BUILTIN_NAMES, *PAPERS))}, the path of a file or folder, or the id of a data set on the "
            "hub (owner/name)"
        )
        raise ValueError(must_be("source", legal, name))
    return resolve_revision(name.partition(":")[0], revision)


def _is_dataset(source: Any) -> bool:
    """Return True for an object of `datasets`, which takes a second to import."""
    return type(source).__module__.partition(".")[0] == "datasets"


def _is_saved_dataset(path: Path) -> bool:
    """Return True for a folder that `save_to_disk` of `datasets` wrote."""
    state = path / "state.json"  # other programs write a file of that name too
    return (path / "dataset_dict.json").is_file() or (state.is_file() and "_data_files" in read_json(state))


def _columns(texts: Texts) -> Columns:
    pair = (texts.prompt_column, texts.completion_column)
    return Columns(texts.text_column, None if None in pair else pair)  # pyright: ignore[reportArgumentType]


def _open(texts: Texts, where: str, columns: Columns | None = None) -> Mapping[str, Reader]:
    """Return the readers of all splits of a source."""
    source = texts.source
    columns = columns or _columns(texts)
    commit = pin_revision(source, texts.revision)
    files = _find_files(texts, commit)
    _note_unused(texts, files or (), where)
    if files is not None:
        return _file_splits(files, columns, texts, where)
    if not isinstance(source, str):
        return _dataset_splits(source, columns, where)
    is_lazy = texts.streaming or texts.limit is not None
    if commit is not None and source in PAPERS:
        return named_splits(
            {part: partial(paper_items, source, part, columns, commit, lazy=is_lazy) for part in SPLITS}
        )
    if commit is not None:
        match = _HF_PATH.fullmatch(source)
        hub_id, _, configuration = (match["id"] if match else source).partition(":")
        return _dataset_splits(load_hub_dataset(hub_id, configuration, commit, lazy=is_lazy), columns, where)
    if _is_builtin(source):
        if columns.wanted:
            raise ValueError(f"{source} has no columns to choose {columns.wanted[0]!r} from")
        return named_splits({part: lambda part=part: iter(builtin_texts(source, part)) for part in SPLITS})
    import datasets

    return _dataset_splits(datasets.load_from_disk(str(_local_path(source))), columns, where)


def _find_files(texts: Texts, commit: str | None) -> list[File] | None:
    """Return the files of a source; None for one that is not made of files of texts."""
    source = texts.source
    if isinstance(source, tuple):
        return _list_once(source, texts.encoding)
    if not isinstance(source, str) or _is_builtin(source):
        return None
    if commit is None:
        path = _local_path(source)
        return None if _is_saved_dataset(path) else list_files(str(path), texts.encoding)
    match = _HF_PATH.fullmatch(source)
    if not match or not match["path"]:
        return None
    try:
        return list_files(f"hf://datasets/{match['id']}@{commit}/{match['path']}", texts.encoding)
    except OSError as error:
        raise no_data_set(source, error) from error


def _list_once(sources: tuple[str, ...], encoding: str | None) -> list[File]:
    """Return the files of several sources, a file that several of them hold only once."""
    files: dict[str, File] = {}
    twice: list[str] = []
    for source in sources:
        for file in list_files(str(check_path("source", source)), encoding):
            if files.setdefault(os.path.realpath(file.name), file) is not file:
                twice.append(file.name)
    if twice:
        notice(f"named more than once, read only once: {enumerate_names(twice)}")
    return list(files.values())


def _note_unused(texts: Texts, files: Iterable[File], where: str) -> None:
    """Say which options have no effect, because no file is of the kind that they are for."""
    kinds = {file.suffixes[0] for file in files}
    for name, suffixes in _OPTIONS_OF_FILES.items():
        value = getattr(texts, name)
        if value not in (None, "file") and kinds.isdisjoint(suffixes):
            known = ", ".join(suffixes)
            notice(f"{where}: {name}={value!r} has no effect; it is for files of {known}")


def _is_builtin(source: str) -> bool:
    return source in BUILTIN_NAMES and not check_path("source", source).exists()


def _local_path(source: str) -> Path:
    path = check_path("source", source)
    return path if path.exists() else _archive(source) or path


def _archive(name: str) -> Path | None:
    """Return the authors' archive of pubmed or arxiv, packed or not, in the working folder or in `DATA_VARIABLE`'s."""
    folders = [Path(), *filter(None, [Path(os.environ.get(DATA_VARIABLE, ""))])]
    places = [folder / f"{name}-dataset{end}" for folder in folders for end in ("", ".zip")]
    return next((place for place in places if name in PAPERS and place.exists()), None)


def _file_splits(files: list[File], columns: Columns, texts: Texts, where: str) -> Mapping[str, Reader]:
    by_split: dict[str | None, list[File]] = {}
    for file in files:
        by_split.setdefault(split_of_file(file.path), []).append(file)

    def read(files: list[File]) -> Iterator[Item]:
        same = columns.for_files()
        return itertools.chain.from_iterable(
            read_items(file, same, texts.documents, texts.records_field) for file in files
        )

    named = {name: partial(read, files) for name, files in by_split.items() if name is not None}
    if not named:
        return content_splits(partial(read, files), where)
    if others := [file.path for file in by_split.get(None, [])]:
        notice(f"{where}: passed over files of no split: {enumerate_names(others)}")
    return named_splits(named, where)


def _dataset_splits(data: Any, columns: Columns, where: str) -> Mapping[str, Reader]:
    """Return the splits of an object of `datasets`, which may have other names, or be a single one."""
    if isinstance(data, Mapping):
        readers = {str(name): partial(table_items, part, columns, where) for name, part in data.items()}
        splits = named_splits(readers, where)
        if set(SPLITS) & set(splits):
            return splits
        parts = list(readers.values())
        everything = lambda: itertools.chain.from_iterable(part() for part in parts)  # noqa: E731
        return {**splits, **content_splits(everything, where)}
    if hasattr(data, "select_columns"):
        return content_splits(partial(table_items, data, columns, where), where)
    if columns.wanted:
        raise ValueError(f"{where} is one column: it has no column {columns.wanted[0]!r}")
    return content_splits(
        lambda: row_items(((f"{where}, row {i}", cell) for i, cell in enumerate(data, 1)), columns, where),
        where,
    )
