"""Data sets on the Hugging Face hub: the commit that a name stands for, and scientific_papers file by file."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gpt2jax.data.columns import Columns, Item
from gpt2jax.data.files import File, list_files
from gpt2jax.data.readers import read_items

# scientific_papers: the authors' archives, and the copy on the hub. That is a loading script, which `datasets` no
# longer runs; its Parquet conversion stands on a branch.
PAPERS_HOME = "https://github.com/armancohan/long-summarization"
PAPERS_HUB_ID, PAPERS_REVISION = "armanc/scientific_papers", "refs/convert/parquet"
# texts of each split, as published: the hub converts no more than the first 5 GB of a data set
PAPERS_TEXTS = {
    "pubmed": {"train": 119_924, "validation": 6_633, "test": 6_658},
    "arxiv": {"train": 203_037, "validation": 6_436, "test": 6_440},
}
PAPERS = tuple(PAPERS_TEXTS)
DATA_VARIABLE = "GPT2JAX_DATA"  # a folder where archives are looked for, besides the working folder

_COMMIT = re.compile(r"[0-9a-f]{40}")


def is_commit(revision: str | None) -> bool:
    """Return True for a commit, whose content never changes; False for a branch or tag."""
    return revision is not None and _COMMIT.fullmatch(revision) is not None


def resolve_revision(hub_id: str, revision: str | None = None, *, advice: str = "") -> str:
    """Return the commit that a branch or tag of a data set points at; a commit is returned as it is.

    If the hub does not answer, it is the commit that the name had when the data set was read last.

    Args:
        hub_id: `owner/name`.
        revision: commit, tag or branch; default: the head of the main branch.
        advice: end of the message of a failure.

    Raises:
        FileNotFoundError: there is no such data set or revision, or the hub does not answer and the cache does not
            have it.
    """
    from huggingface_hub import snapshot_download

    if revision is not None and is_commit(revision):
        return revision
    try:
        # a file that every data set has: what counts is that the cache then knows the commit of the name
        folder = snapshot_download(
            hub_id, repo_type="dataset", revision=revision, allow_patterns=[".gitattributes"]
        )
    except Exception as error:
        raise no_data_set(hub_id, error, advice) from error
    return Path(folder).name


def no_data_set(hub_id: str, error: Exception, advice: str = "") -> FileNotFoundError:
    """Build one line for the dozens of kinds of errors of the network, the hub and the data."""
    reason = " ".join(str(error).split()) or type(error).__name__
    if "scripts are no longer supported" in reason:
        reason += f"; its Parquet conversion, if it exists, has revision={PAPERS_REVISION!r}"
    return FileNotFoundError(
        f"there is no file or folder {hub_id}, and the hub does not give a data set of that name "
        f"({type(error).__name__}: {reason[:300]}){advice}"
    )


def load_hub_dataset(hub_id: str, configuration: str, commit: str, *, lazy: bool) -> Any:
    """Return the splits of a data set at a commit, by name.

    Args:
        hub_id: `owner/name`.
        configuration: of the data set; "" for its default.
        commit: 40 hexadecimal digits.
        lazy: read it as it comes, instead of downloading it first.

    Raises:
        FileNotFoundError: the hub does not give it, and the cache does not have it of that commit.
    """
    import datasets

    try:
        loaded = datasets.load_dataset(hub_id, configuration or None, revision=commit, streaming=lazy)
    except Exception as error:
        raise no_data_set(hub_id, error) from error
    # without the hub `datasets` takes what its cache has, of whatever commit
    files = [file["filename"] for part in loaded.values() for file in getattr(part, "cache_files", ())]
    folders = {Path(file).parent.name for file in files}
    if others := {name for name in folders if is_commit(name)} - {commit}:
        raise FileNotFoundError(
            f"{hub_id} at commit {commit} can't be had from the hub now, and the cache has {', '.join(others)}"
        )
    return loaded


def paper_items(name: str, part: str, columns: Columns, commit: str, *, lazy: bool) -> Iterator[Item]:
    """Yield the texts of a split of "pubmed" or "arxiv" at a commit of the hub's copy.

    Args:
        name: one of the two.
        part: the split; files of others are not fetched.
        columns: default: the article.
        commit: of `PAPERS_HUB_ID`.
        lazy: read what is not in the cache as it comes, instead of fetching whole files.

    Raises:
        FileNotFoundError: the hub does not give them.
        ValueError: the split is read to its end, and has more or fewer texts than were published.
    """
    count = 0
    for file in _paper_files(name, part, commit, lazy):
        for item in read_items(file, columns):
            yield item
            count += 1
    expected = PAPERS_TEXTS[name][part]
    if count != expected:
        raise ValueError(
            f"the hub's copy of {name} at commit {commit} has {count:,} texts in its {part} split instead of "
            f"{expected:,}{where_to_get(name)}, or take the first ones with a limit"
        )


def where_to_get(name: str) -> str:
    """Build the end of a message: what to fetch and where to put it."""
    return (
        f". Get {name}-dataset.zip from {PAPERS_HOME} and put it into the working folder or into ${DATA_VARIABLE}, "
        "or give its path as the source"
    )


def _paper_files(name: str, part: str, commit: str, lazy: bool) -> list[File]:
    """Return the Parquet files of a split, sorted; "partial-" says that the conversion was cut short."""
    from huggingface_hub import snapshot_download

    folders = [f"{name}/{prefix}{part}" for prefix in ("", "partial-")]
    patterns = [f"{folder}/*.parquet" for folder in folders]

    def cached(**options) -> list[File]:
        root = snapshot_download(
            PAPERS_HUB_ID, repo_type="dataset", revision=commit, allow_patterns=patterns, **options
        )
        found = sorted(path for pattern in patterns for path in Path(root).glob(pattern))
        return [file for path in found for file in list_files(str(path))]

    def remote() -> list[File]:
        found: list[File] = []
        for folder in folders:
            with contextlib.suppress(FileNotFoundError):
                found += list_files(f"hf://datasets/{PAPERS_HUB_ID}@{commit}/{folder}")
        return found

    try:
        files = remote() if lazy else cached()
    except Exception as error:
        try:  # without the hub
            files = cached(local_files_only=True)
        except Exception:
            raise no_data_set(PAPERS_HUB_ID, error, where_to_get(name)) from error
    if not files:
        raise FileNotFoundError(
            f"{PAPERS_HUB_ID} has no files {patterns[0]} at commit {commit}{where_to_get(name)}"
        )
    return files
