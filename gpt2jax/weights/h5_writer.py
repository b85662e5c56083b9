"""Write HDF5 files; a full disk is an error, where HDF5 alone would end the process when it closes the file."""

from __future__ import annotations

import io
import os
from collections.abc import Iterable
from typing import Any

import numpy as np


def write_h5(path: str | os.PathLike[str], tensors: Iterable[tuple[str, np.ndarray]]) -> None:
    """Write arrays into a new file by the paths of their datasets.

    Raises:
        OSError: the file can't be written.
    """
    import h5py

    with _File(path, "w+") as file:
        with h5py.File(file, "w") as target:
            for name, values in tensors:
                target[name] = values
                if file.error is not None:
                    break
        if file.error is not None:
            raise file.error


class _File(io.FileIO):
    """A file that keeps its first error for its owner, because HDF5 must not meet one."""

    error: OSError | None = None

    def write(self, data: Any) -> int:
        rest = memoryview(data).cast("B")
        size = len(rest)
        try:
            while rest and self.error is None:  # the system takes at most 2 GB at once
                rest = rest[super().write(rest) :]
        except OSError as error:
            self.error = error
        return size

    def truncate(self, size: int | None = None) -> int:
        try:
            return super().truncate(size)
        except OSError as error:
            self.error = self.error or error
            return size or 0
