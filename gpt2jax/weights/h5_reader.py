"""HDF5 files, as Keras writes its weights: the datasets by name, nothing read yet."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from gpt2jax.weights.mapping import MAX_NAME_LENGTH, LazyTensor

H5_START = b"\x89HDF\r\n\x1a\n"
MAX_DEPTH = 20
# what h5py raises about damaged files
H5_ERRORS = (OSError, RuntimeError, KeyError, TypeError, ValueError, MemoryError)


def read_h5(path: Path) -> dict[str, LazyTensor]:
    """Return the datasets of an HDF5 file by path, nothing read yet.

    Raises:
        ValueError: the file is of another kind, damaged, or points to other files; the message names it.
    """
    import h5py

    with open(path, "rb") as file:
        if file.read(8) != H5_START:
            raise ValueError(f"{path} is not an HDF5 file: it does not begin with the format's mark")
    try:
        with h5py.File(path, "r") as file:
            return {name: _lazy_tensor(path, name, dataset) for name, dataset in _iter_datasets(file, set())}
    except H5_ERRORS as error:
        raise ValueError(f"{path} is cut short or damaged: {error}") from None


def _iter_datasets(group: Any, seen: set[int], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (path, dataset) below a group; links are refused, and so are groups that are there under two names."""
    import h5py

    place = h5py.h5o.get_info(group.id).addr  # pyright: ignore[reportAttributeAccessIssue]
    if place in seen or prefix.count("/") > MAX_DEPTH or len(prefix) > MAX_NAME_LENGTH:
        raise RuntimeError(
            "its groups are nested too deeply, hold each other, or have names that are too long"
        )
    seen.add(place)
    for name in group:
        if not isinstance(group.get(name, getlink=True), h5py.HardLink):
            raise RuntimeError(f"{prefix}{name} is a link, which is refused")
        item = group[name]
        if isinstance(item, h5py.Group):
            yield from _iter_datasets(item, seen, f"{prefix}{name}/")
        elif isinstance(item, h5py.Dataset):
            yield f"{prefix}{name}", item


def _lazy_tensor(path: Path, name: str, dataset: Any) -> LazyTensor:
    dtype = dataset.dtype
    is_bfloat16 = dtype == np.dtype("V2") and str(dataset.attrs.get("dtype", "")) == "bfloat16"
    stored = dataset.id.get_storage_size()
    if dataset.external or dataset.is_virtual or (dataset.shape is not None and stored != dataset.nbytes):
        # this also bounds the memory that a damaged file can ask for
        raise RuntimeError(f"{name} is compressed, or its numbers are not in the file")

    def read() -> np.ndarray:
        import h5py

        try:
            with h5py.File(path, "r") as file:
                values = np.asarray(file[name])
        except H5_ERRORS as error:
            raise ValueError(f"{path} is damaged at {name}: {error}") from None
        return values.view(ml_dtypes.bfloat16) if is_bfloat16 else values

    return LazyTensor(tuple(dataset.shape or ()), "bfloat16" if is_bfloat16 else dtype.name, read, str(path))
