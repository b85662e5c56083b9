"""Data sets on the Hugging Face hub: which commit a name means, and the papers of the study file by file."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gpt2jax.data.readers import File, list_files, read_texts

# scientific_papers, the data of the study: the authors' archives, and the copy on the hub. That is a loading
# script, which `datasets` runs no more; its Parquet conversion stands on a branch of its own.
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


def resolve_revision(hub_id: str, revision: str | None = None, *, advice: str = "") -> str:
    """The commit that a branch or tag of a data set points at; a commit is taken as it is.

    Where the hub does not answer, the commit that the name had when the data set was read last.

    Args:
        hub_id: `owner/name`.
        revision: commit, tag or branch; default: the head of the main branch.
        advice: end of the message where it fails.

    Raises:
        FileNotFoundError: there is no such data set or revision, or the hub does not answer and the cache does not
            have it.
    """
    from huggingface_hub import snapshot_download

    if revision is not None and _COMMIT.fullmatch(revision):
        return revision
    try:
        # a file that is everywhere; what counts is that the cache then knows what the name stands for
        folder = snapshot_download(
            hub_id, repo_type="dataset", revision=revision, allow_patterns=[".gitattributes"]
        )
    except Exception as error:
        raise no_data_set(hub_id, error, advice) from error
    return Path(folder).name


def no_data_set(hub_id: str, error: Exception, advice: str = "") -> FileNotFoundError:
    """One line for the dozens of kinds of errors of the network, the hub and the data."""
    reason = " ".join(str(error).split()) or type(error).__name__
    if "scripts are no longer supported" in reason:
        reason += f"; its Parquet conversion, if there is one, has revision={PAPERS_REVISION!r}"
    return FileNotFoundError(
        f"no file or folder {hub_id} is here, and the hub does not give a data set of that name "
        f"({type(error).__name__}: {reason[:300]}){advice}"
    )


def paper_texts(
    name: str, parts: tuple[str, ...], text_column: str | None, commit: str, *, lazy: bool
) -> Iterator[str]:
    """The texts of "pubmed" or "arxiv" at a commit of the hub's copy.

    Args:
        name: which of them.
        parts: the splits; files of others are not fetched.
        text_column: default: the article.
        commit: of `PAPERS_HUB_ID`.
        lazy: read as they come what is not in the cache, instead of fetching whole files.

    Raises:
        FileNotFoundError: the hub does not give them.
        ValueError: a split is read to its end, and there are more or fewer texts than were published.
    """
    for part in parts:
        count = 0
        for file in _paper_files(name, part, commit, lazy):
            for text in read_texts(file, text_column):
                yield text
                count += 1
        expected = PAPERS_TEXTS[name][part]
        if count != expected:
            raise ValueError(
                f"the hub's copy of {name} at commit {commit} has {count:,} texts in its {part} split instead of "
                f"{expected:,}{where_to_get(name)}, or take the first ones with a limit"
            )


def where_to_get(name: str) -> str:
    """End of a message: what to fetch and where to put it."""
    return (
        f". Get {name}-dataset.zip from {PAPERS_HOME} and put it into the working folder or into ${DATA_VARIABLE}, "
        "or give its path as the source"
    )


def _paper_files(name: str, part: str, commit: str, lazy: bool) -> list[File]:
    """The Parquet files of a split, sorted; "partial-" says that the conversion was cut short."""
    from huggingface_hub import HfFileSystem, snapshot_download

    patterns = [f"{name}/{prefix}{part}/*.parquet" for prefix in ("", "partial-")]

    def cached(**options) -> list[File]:
        folder = snapshot_download(
            PAPERS_HUB_ID, repo_type="dataset", revision=commit, allow_patterns=patterns, **options
        )
        found = sorted(path for pattern in patterns for path in Path(folder).glob(pattern))
        return [file for path in found for file in list_files(path)]

    def remote() -> list[File]:
        system: Any = HfFileSystem()
        root = f"datasets/{PAPERS_HUB_ID}@{commit}"
        found = sorted(path for pattern in patterns for path in system.glob(f"{root}/{pattern}"))
        return [File(path, path, lambda path=path: system.open(path, "rb")) for path in found]

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
