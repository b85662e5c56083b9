"""What a long evaluation has found so far, as a file: a run that was killed goes on behind the last piece of texts.

The file holds the sums by document and the tables of `evaluation/accumulators.py`, not the scores of tokens: its size
grows by some 90 bytes a document. It is replaced whole after each piece, and float64 sums come back as they were, so
that a resumed evaluation ends with the same figures to the last digit.
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

STATE_VERSION = 1


@dataclasses.dataclass(frozen=True, eq=False)
class State:
    """Progress of an evaluation.

    Attributes:
        sums: of the documents that are done, or None before the first piece.
        breakdown: sums over them.
        data_sha256: hash of these documents' texts.
        longest: tokens of the longest.
        seconds: spent so far.
    """

    sums: DocumentSums | None = None
    breakdown: Breakdown | None = None
    data_sha256: str = ""
    longest: int = 0
    seconds: float = 0.0

    @property
    def documents(self) -> int:
        """Number of documents that are done."""
        return 0 if self.sums is None else len(self.sums)

    def with_piece(
        self, sums: DocumentSums, breakdown: Breakdown, data_sha256: str, longest: int, seconds: float
    ) -> State:
        """The state behind some more documents; `data_sha256` and `seconds` are of all of them."""
        return State(
            sums if self.sums is None else DocumentSums.join([self.sums, sums]),
            breakdown if self.breakdown is None else self.breakdown + breakdown,
            data_sha256,
            max(self.longest, longest),
            seconds,
        )


def write_state(path: pathlib.Path, state: State, identity: dict[str, Any]) -> None:
    """Writes the file; `identity` says what it belongs to: model, settings, size of a piece."""
    assert state.sums is not None and state.breakdown is not None
    about = {
        "state_version": STATE_VERSION,
        "identity": identity,
        "data_sha256": state.data_sha256,
        "longest": state.longest,
        "seconds": state.seconds,
    }
    arrays = {f"sums.{name}": value for name, value in vars(state.sums).items()}
    arrays |= {f"breakdown.{name}": value for name, value in vars(state.breakdown).items()}
    with atomic_write(path, "wb") as file:
        np.savez(file, about=np.array(json.dumps(about)), **arrays)


def read_state(path: pathlib.Path, identity: dict[str, Any]) -> State:
    """Reads it back; an empty `State` if there is no such file.

    Raises:
        ValueError: the file belongs to another evaluation, naming what differs, or is no such file.
    """
    if not path.exists():
        return State()
    try:
        with open(path, "rb") as stream, np.load(stream, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        about = json.loads(str(arrays.pop("about")))
    except (ValueError, KeyError, AttributeError, TypeError, zipfile.BadZipFile, EOFError) as error:
        raise ValueError(f"{path} is no state of an evaluation, or a damaged one: {error}") from None
    if about["state_version"] != STATE_VERSION:
        raise ValueError(
            f"{path} has state version {about['state_version']}; this gpt2jax reads {STATE_VERSION}"
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
        part(DocumentSums, "sums"),
        part(Breakdown, "breakdown"),
        about["data_sha256"],
        about["longest"],
        about["seconds"],
    )
