"""State file of a long evaluation: a run that was killed goes on behind the last finished chunk of texts.

The file holds the sums by document and the tables of `evaluation/accumulators.py`, not the scores of tokens: it grows
by some 80 bytes a document. It is replaced as a whole after each chunk. float64 sums are stored exactly, so a resumed
evaluation ends with the same figures to the last digit. The file is an .npz file followed by its CRC-32, which readers
of .npz files pass over.
"""

from __future__ import annotations

import dataclasses
import io
import json
import pathlib
import zlib
from typing import Any

import numpy as np

from gpt2jax.evaluation.accumulators import Breakdown, DocumentSums
from gpt2jax.utils.atomic_io import atomic_write
from gpt2jax.utils.json_files import parse_json
from gpt2jax.utils.notices import notice

_CHECKSUM = b"\nCRC-32 "  # its eight hexadecimal digits follow
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
    content = io.BytesIO()
    np.savez(content, about=np.array(json.dumps(about)), **arrays)
    with atomic_write(path, "wb") as file:
        file.write(content.getbuffer())
        file.write(_CHECKSUM + b"%08x" % zlib.crc32(content.getbuffer()))


def read_state(path: pathlib.Path, identity: dict[str, Any]) -> State:
    """Read a state back; return an empty `State` if the file does not exist.

    Raises:
        ValueError: the file is not a state, is of another version, or belongs to another evaluation; the message says
            what differs.
    """
    if not path.exists():
        return State()
    try:
        arrays = _read_arrays(path)
        about = parse_json(str(arrays.pop("about")), "its description")
        version = about["state_version"]
        is_current = version == STATE_VERSION
        belongs_to, state = (about["identity"], _as_state(about, arrays)) if is_current else ({}, State())
    except OSError:
        raise
    except Exception as error:  # NumPy and zipfile raise whatever a damaged file leads them to
        raise ValueError(
            f"{path} is not the state of an evaluation, or it is damaged: {error!s:.200}"
        ) from None
    if not is_current:
        raise ValueError(
            f"{path} must have state version {STATE_VERSION}, got {version}; an evaluation is resumed "
            "with the gpt2jax that began it: start it anew in another folder"
        )
    for name, value in identity.items():
        if belongs_to.get(name) != value:
            raise ValueError(
                f"{path} belongs to another evaluation: its {name} is {belongs_to.get(name)!r}, not {value!r}; "
                "choose another folder, or do not resume"
            )
    return state


def _read_arrays(path: pathlib.Path) -> dict[str, np.ndarray]:
    """Read a state file and verify its checksum; one without it, of an older version, gives a notice."""
    content = path.read_bytes()
    end = len(content) - len(_CHECKSUM) - 8
    if content[end:].startswith(_CHECKSUM):
        content, expected = content[:end], int(content[-8:], 16)
        if zlib.crc32(content) != expected:
            raise ValueError("its checksum is another one")
    else:
        notice(f"{path} has no checksum, which older versions did not write: damage can't be told")
    with np.load(io.BytesIO(content), allow_pickle=False) as file:
        if sum(part.file_size for part in file.zip.infolist()) > len(content):
            raise ValueError("it is compressed, which a state is not")
        return {name: file[name] for name in file.files}


def _as_state(about: dict[str, Any], arrays: dict[str, np.ndarray]) -> State:
    def part(kind: type, prefix: str) -> Any:
        values = {field.name: arrays[f"{prefix}.{field.name}"] for field in dataclasses.fields(kind)}
        for name, value in values.items():
            if value.ndim != 1 or value.dtype.kind not in "bif":
                raise ValueError(f"{prefix}.{name} must be a list of numbers")
        return kind(**values)

    sums = part(DocumentSums, "per_document")
    if len({len(value) for value in vars(sums).values()}) != 1:
        raise ValueError("its sums are of different numbers of documents")
    if not isinstance(about["identity"], dict):
        raise ValueError("its identity must be an object")
    breakdown = part(Breakdown, "breakdown")
    return State(sums, breakdown, str(about["data_sha256"]), int(about["longest"]), float(about["seconds"]))
