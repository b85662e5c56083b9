"""Cache of token ids: a file for each data set, which later runs map into memory.

The name of a file is a digest of all that its content depends on: the texts, the tokenizer, the vocabulary size and
the version of this format. A file is written under another name, chunk by chunk, and renamed when it is complete. Runs
that tokenize the same texts at the same time therefore never see a half-written file; the last one to finish replaces
a file by an equal one.

Layout: ids, prompt lengths [n] int64 (if there are any), offsets [n + 1] int64, each part padded to 8 bytes; then a
footer of five int64: magic number, bytes of one id, number of ids, number of documents, 1 if there are prompts.
"""

from __future__ import annotations

import hashlib
import os
import pathlib
import uuid
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from gpt2jax.data.documents import Documents, to_offsets, token_dtype
from gpt2jax.data.encoding import write_chunks
from gpt2jax.tokenizer.bpe import Tokenizer
from gpt2jax.utils.atomic_io import atomic_write
from gpt2jax.utils.cache_folder import cache_folder
from gpt2jax.utils.fingerprint import add_text
from gpt2jax.utils.validation import check_path

VERSION = 3  # of reading, digest, tokenizing and layout: with another number all files are written anew
_MAGIC = 0x6770_7432_6A61_7831
_FOOTER = 5 * 8


def default_cache() -> pathlib.Path | None:
    """Return the folder of tokenized texts in the user's cache folder; None if that is not writable."""
    return cache_folder("tokens")


def cached_documents(
    texts: Iterable[Any],
    tokenizer: Tokenizer | None,
    *,
    vocab_size: int,
    cache: str | os.PathLike[str],
    progress: bool = False,
) -> Documents:
    """Return the documents of `texts`, mapped from a file in the folder `cache`, which is written if it is new.

    The texts are read once for their digest and, if they are new, once more for their ids. Texts with a `fingerprint`
    (a str that names their origin, if its content never changes) are not read for the digest. An iterator, which can
    be read only once, is always tokenized.

    Raises:
        ValueError: as `tokenize_documents`.
    """
    digest = _digest(tokenizer, vocab_size)
    reads_once = isinstance(texts, Iterator)
    if not reads_once:
        fingerprint = getattr(texts, "fingerprint", None)
        if fingerprint is not None:
            digest.update(f"from {fingerprint}".encode())
        else:
            for text in texts:
                add_text(digest, text)
        path = check_path("cache", cache) / f"{digest.hexdigest()}.tokens"
        if found := read_tokens(path):
            return found
    else:
        texts = _digested(texts, digest)
        # its name is known when all texts are read
        path = check_path("cache", cache) / f"{uuid.uuid4().hex}.tokens"
    with atomic_write(path, "wb") as file:
        lengths, prompts = write_chunks(
            texts, tokenizer, vocab_size, lambda ids: file.write(ids.data), progress=progress
        )
        _write_end(file, vocab_size, lengths, prompts)
    if reads_once:
        path = path.replace(path.with_name(f"{digest.hexdigest()}.tokens"))
    documents = read_tokens(path)
    if documents is None:
        raise ValueError(f"{path} can't be read back: is the disk full?")
    return documents


def read_tokens(path: str | os.PathLike[str]) -> Documents | None:
    """Return the documents of a file of this format, mapped; None if it does not exist or is damaged."""
    path = pathlib.Path(path)
    try:
        size = path.stat().st_size
        content = np.memmap(path, np.uint8, mode="r")
    except (OSError, ValueError):
        return None
    if size < _FOOTER or size % 8:
        return None
    magic, itemsize, tokens, documents, has_prompts = (int(x) for x in content[-_FOOTER:].view(np.int64))
    if magic != _MAGIC or itemsize not in (2, 4):
        return None
    begins = [_padded(tokens * itemsize)]
    begins.append(begins[0] + 8 * documents * has_prompts)
    if begins[1] + 8 * (documents + 1) + _FOOTER != size:
        return None
    ids = content[: tokens * itemsize].view(token_dtype(1 << (8 * itemsize)))
    prompts = content[begins[0] : begins[1]].view(np.int64) if has_prompts else None
    return Documents(ids, np.array(content[begins[1] : -_FOOTER].view(np.int64)), prompts)


def _write_end(file: Any, vocab_size: int, lengths: np.ndarray, prompts: np.ndarray | None) -> None:
    """Write all that follows the ids."""
    itemsize, count = token_dtype(vocab_size).itemsize, int(lengths.sum())
    file.write(bytes(_padded(count * itemsize) - count * itemsize))
    if prompts is not None:
        file.write(prompts.data)
    file.write(to_offsets(lengths).data)
    footer = [_MAGIC, itemsize, count, len(lengths), int(prompts is not None)]
    file.write(np.array(footer, np.int64).data)


def _padded(size: int) -> int:
    """Return a number of bytes rounded up to 8."""
    return -(-size // 8) * 8


def _digest(tokenizer: Tokenizer | None, vocab_size: int) -> Any:
    """Start the digest of a file's name."""
    fingerprint = "no tokenizer" if tokenizer is None else tokenizer.fingerprint
    return hashlib.sha256(f"{VERSION} {vocab_size} {fingerprint} ".encode())


def _digested(texts: Iterable[Any], digest: Any) -> Iterator[Any]:
    """Yield the texts, which are added to the digest on their way."""
    for text in texts:
        add_text(digest, text)
        yield text
