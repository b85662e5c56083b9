"""Digests that tell whether parameters or texts are the same."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np


# Two digests of the same parameters, because both are stored: run.json of every run holds `params_sha256` of its base,
# which resuming compares, and comparison.json holds `params_fingerprint`, which also tells dtypes and shapes apart.
def params_sha256(params: Any) -> str:
    """Return the SHA-256 (hex) of all numbers, leaf by leaf."""
    digest = hashlib.sha256()
    for array in jax.tree.leaves(params):
        digest.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)  # whatever the dtype
    return digest.hexdigest()


def params_fingerprint(params: Any) -> str:
    """Return the SHA-256 (hex) of all arrays of a tree with their places, dtypes and shapes."""
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        array = np.ascontiguousarray(jax.device_get(leaf))
        digest.update(f"{jax.tree_util.keystr(path)} {array.dtype} {array.shape}\n".encode())
        digest.update(array.reshape(-1).view(np.uint8).data)  # bytes, whatever the dtype
    return digest.hexdigest()


def data_fingerprint(texts: Sequence[Any]) -> str:
    """Return the SHA-256 (hex) of the texts, each behind its length, so that the ends of texts count too."""
    digest = hashlib.sha256()
    for text in texts:
        add_text(digest, text)
    return digest.hexdigest()


def add_text(digest: Any, text: Any) -> None:
    """Feed one text to the hash of `data_fingerprint`: a string, token ids, or a dict of two of these."""
    if isinstance(text, Mapping):
        for name, part in text.items():
            digest.update(f"{name}: ".encode())
            add_text(digest, part)
        return
    kind = int(isinstance(text, str))
    if isinstance(text, str):
        data = text.encode("utf-8", "surrogatepass")
    else:
        ids = np.asarray(text)
        if ids.size and not np.issubdtype(ids.dtype, np.integer):  # not a text, which tokenization will say
            kind, data = 2, repr(text).encode()
        else:
            data = ids.astype("<i8").tobytes()
    digest.update(f"{kind} {len(data)}\n".encode())
    digest.update(data)
