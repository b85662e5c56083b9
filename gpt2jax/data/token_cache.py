"""Tokenized once: ids of a data set in a file that later runs map into memory.

One file a data set, named by a digest of everything that its content follows from: the texts, the tokenizer, the
vocabulary's size and the version of this format. It is written beside its name, in pieces, and renamed when it is
whole, so that runs which tokenize the same texts at once do not see each other's half, and the last one to end
replaces a file by its equal.

Layout: ids, prompt lengths [n] int64 (if there are any), offsets [n + 1] int64, each part filled up to 8 bytes; then a
footer of five int64: magic number, bytes of one id, number of ids, number of documents, 1 if there are prompts.
"""

from __future__ import annotations

import hashlib
import os
import pathlib
import uuid
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from gpt2jax.data.documents import Documents, to_offsets, token_dtype
from gpt2jax.data.encoding import prompt_and_completion, write_pieces
from gpt2jax.utils.atomic_io import atomic_write
from gpt2jax.utils.validation import check_path

CACHE_VARIABLE = "GPT2JAX_CACHE"
VERSION = 1  # of reading, tokenizing and of the layout: another number makes all files new
_MAGIC = 0x6770_7432_6A61_7831
_FOOTER = 5 * 8


def default_cache() -> pathlib.Path | None:
    """$GPT2JAX_CACHE, or gpt2jax in the user's cache folder; there the folder `tokens`.

    None where the user's folder can't be written to, or there is no home: nobody asked for this one.
    """
    home = os.environ.get(CACHE_VARIABLE)
    if home:
        return check_path(CACHE_VARIABLE, home) / "tokens"
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    folder = check_path("XDG_CACHE_HOME", base)
    there = next((place for place in (folder, *folder.parents) if os.path.exists(place)), folder)
    if folder.parts[0] == "~" or not os.access(there, os.W_OK):
        return None
    return folder / "gpt2jax" / "tokens"


def cached_documents(
    texts: Iterable[Any],
    tokenizer: Any,
    *,
    vocab_size: int,
    cache: str | os.PathLike[str],
    progress: bool = False,
) -> Documents:
    """The documents of `texts`, mapped from a file in the folder `cache` that is written if it is not there.

    The texts are read once for their digest and, where they are new, once more for their ids. Texts that have a
    `fingerprint` (str, of where they come from, if what is there never changes) are not read for the digest. An
    iterator, which can be read only once, is always tokenized anew.

    Raises:
        ValueError: as `tokenize_documents`.
    """
    digest = _digest(tokenizer, vocab_size)
    once = isinstance(texts, Iterator)  # `iter` would open a source
    if not once:
        fingerprint = getattr(texts, "fingerprint", None)
        if fingerprint is not None:
            digest.update(f"from {fingerprint}".encode())
        else:
            for index, text in enumerate(texts):
                _add_text(digest, text, index)
        path = check_path("cache", cache) / f"{digest.hexdigest()}.tokens"
        if found := read_tokens(path):
            return found
    else:
        texts = _digested(texts, digest)
        path = (
            check_path("cache", cache) / f"{uuid.uuid4().hex}.tokens"
        )  # its name is known when all texts are read
    with atomic_write(path, "wb") as file:
        lengths, prompts = write_pieces(
            texts, tokenizer, vocab_size, lambda ids: file.write(ids.data), progress=progress
        )
        _write_end(file, vocab_size, lengths, prompts)
    if once:
        path = path.replace(path.with_name(f"{digest.hexdigest()}.tokens"))
    documents = read_tokens(path)
    if documents is None:
        raise ValueError(f"{path} can't be read back: is the disk full?")
    return documents


def read_tokens(path: str | os.PathLike[str]) -> Documents | None:
    """The documents of a file of this format, mapped; None where there is none or it is damaged."""
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
    begins = [_filled(tokens * itemsize)]
    begins.append(begins[0] + 8 * documents * has_prompts)
    if begins[1] + 8 * (documents + 1) + _FOOTER != size:
        return None
    ids = content[: tokens * itemsize].view(token_dtype(1 << (8 * itemsize)))
    prompts = content[begins[0] : begins[1]].view(np.int64) if has_prompts else None
    return Documents(ids, np.array(content[begins[1] : -_FOOTER].view(np.int64)), prompts)


def _write_end(file: Any, vocab_size: int, lengths: np.ndarray, prompts: np.ndarray | None) -> None:
    itemsize, count = token_dtype(vocab_size).itemsize, int(lengths.sum())
    file.write(bytes(_filled(count * itemsize) - count * itemsize))
    if prompts is not None:
        file.write(prompts.data)
    file.write(to_offsets(lengths).data)
    footer = [_MAGIC, itemsize, count, len(lengths), int(prompts is not None)]
    file.write(np.array(footer, np.int64).data)


def _filled(size: int) -> int:
    return -(-size // 8) * 8


def _digest(tokenizer: Any, vocab_size: int) -> Any:
    fingerprint = "no tokenizer" if tokenizer is None else tokenizer.fingerprint
    return hashlib.sha256(f"{VERSION} {vocab_size} {fingerprint} ".encode())


def _digested(texts: Iterable[Any], digest: Any) -> Iterator[Any]:
    for index, text in enumerate(texts):
        _add_text(digest, text, index)
        yield text


def _add_text(digest: Any, text: Any, index: int) -> None:
    """Adds a text with its kind and length, so that no two lists of texts look alike."""
    if isinstance(text, Mapping):
        digest.update(b"prompt, completion ")
        for part in prompt_and_completion(text, index):
            _add_text(digest, part, index)
        return
    if isinstance(text, str):
        kind, data = "text", text.encode("utf-8", "surrogatepass")
    else:
        ids = np.asarray(text)
        whole = np.issubdtype(ids.dtype, np.integer)
        kind, data = ("ids", ids.astype(np.int64).tobytes()) if whole else ("other", repr(text).encode())
    digest.update(f"{kind} {len(data)} ".encode())
    digest.update(data)
