"""State file of a long evaluation: a run that was killed goes on behind the last finished chunk of texts.

The file holds the sums by document and the tables of `evaluation/accumulators.py`, not the scores of tokens: it grows
by some 80 bytes a document. It is replaced as a whole after each chunk. float64 sums are stored exactly, so a resumed
evaluation ends with the same figures to the last digit.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
import zipfile
from typing import Any

import numpy as np

from gpt2jax.evaluation.accumulators import Breakdown, DocumentSums
from gpt2jax.utils.atomic_io import atomic_write

STATE_VERSION = 2  # 1 had the Keras loss of every document, and other names


@dataclasses.dataclass(frozen=True, eq=False)
class State:
    """Progress of an evaluation.

    Attributes:
        per_document: sums of the documents that are done, or None before the first chunk.
        breakdown: sums over them.
        data_sha256: hash of these documents' texts.
        longest: tokens of the longest.
        seconds: spent so far.
    """

    per_document: DocumentSums | None = None
    breakdown: Breakdown | None = None
    data_sha256: str = ""
    longest: int = 0
    seconds: float = 0.0

    @property
    def documents(self) -> int:
        """Number of documents that are done."""
        return 0 if self.per_document is None else len(self.per_document)

    def extend(self, chunk: State) -> State:
        """Return the state after another chunk, whose hash and seconds count everything so far."""
        if self.per_document is None or self.breakdown is None:
            return chunk
        assert chunk.per_document is not None and chunk.breakdown is not None
        return State(
            DocumentSums.join([self.per_document, chunk.per_document]),
            self.breakdown + chunk.breakdown,
            chunk.data_sha256,
            max(self.longest, chunk.longest),
            chunk.seconds,
        )


def write_state(path: pathlib.Path, state: State, identity: dict[str, Any]) -> None:
    """Write a state; `identity` says what it belongs to: model, settings, chunk size."""
    assert state.per_document is not None and state.breakdown is not None
    about = {
        "state_version": STATE_VERSION,
        "identity": identity,
        "data_sha256": state.data_sha256,
        "longest": state.longest,
        "seconds": state.seconds,
    }
    arrays = {f"per_document.{name}": value for name, value in vars(state.per_document).items()}
    arrays |= {f"breakdown.{name}": value for name, value in vars(state.breakdown).items()}
    with atomic_write(path, "wb") as file:
        np.savez(file, about=np.array(json.dumps(about)), **arrays)


def read_state(path: pathlib.Path, identity: dict[str, Any]) -> State:
    """Read a state back; return an empty `State` if the file does not exist.

    Raises:
        ValueError: the file is not a state, is of another version, or belongs to another evaluation; the message says
            what differs.
    """
    if not path.exists():
        return State()
    try:
        with open(path, "rb") as stream, np.load(stream, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        about = json.loads(str(arrays.pop("about")))
    except (ValueError, KeyError, AttributeError, TypeError, zipfile.BadZipFile, EOFError) as error:
        raise ValueError(f"{path} is not the state of an evaluation, or it is damaged: {error}") from None
    if about["state_version"] != STATE_VERSION:
        raise ValueError(
            f"{path} must have state version {STATE_VERSION}, got {about['state_version']}; an evaluation is resumed "
            "with the gpt2jax that began it: start it anew in another folder"
        )
    for name, value in identity.items():
        if about["identity"].get(name) != value:
            raise ValueError(
                f"{path} belongs to another evaluation: its {name} is {about['identity'].get(name)!r}, not {value!r}; "
                "choose another folder, or do not resume"
            )

    def part(kind: type, prefix: str) -> Any:
        return kind(**{field.name: arrays[f"{prefix}.{field.name}"] for field in dataclasses.fields(kind)})

    return State(
        part(DocumentSums, "per_document"),
        part(Breakdown, "breakdown"),
        about["data_sha256"],
        about["longest"],
        about["seconds"],
    )
