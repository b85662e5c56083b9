"""Cache of token ids: a file for each data set, from which later runs read the ids as they need them.

The name of a file is a digest of all that its content depends on: the texts, the tokenizer, the vocabulary size and
the version of this format. A file is written under another name, chunk by chunk, and renamed when it is complete. Runs
that tokenize the same texts at the same time therefore never see a half-written file; the last one to finish replaces
a file by an equal one.

Layout: ids, prompt lengths [n] int64 (if there are any), offsets [n + 1] int64, each part padded to 8 bytes; then a
footer of six int64: magic number, bytes of one id, number of ids, number of documents, 1 if there are prompts, CRC-32
of all bytes before it. A file with another checksum, or with ids that the vocabulary does not have, is made anew.
"""

from __future__ import annotations

import hashlib
import os
import pathlib
import uuid
import weakref
import zlib
from collections.abc import Iterable, Iterator
from typing import IO, Any

import numpy as np

from gpt2jax.data.documents import Documents, to_offsets, token_dtype
from gpt2jax.data.encoding import write_chunks
from gpt2jax.tokenizer.bpe import Tokenizer
from gpt2jax.utils.atomic_io import atomic_write
from gpt2jax.utils.cache_folder import cache_folder
from gpt2jax.utils.checksums import iter_chunks
from gpt2jax.utils.fingerprint import add_text
from gpt2jax.utils.notices import notice
from gpt2jax.utils.validation import check_path

VERSION = 4  # of reading, digest, tokenizing and layout: with another number all files are written anew
_MAGIC = 0x6770_7432_6A61_7831
_FOOTER = 6 * 8


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
    """Return the documents of `texts`, read from a file in the folder `cache`, which is written if it is new.

    The texts are read once for their digest and, if they are new, once more for their ids. Texts with a `fingerprint`
    (a str that names their origin, if its content never changes) are not read for the digest. An iterator, which can
    be read only once, is always tokenized. If the file can't be written, the ids stay in memory and a notice says so.

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
        if found := read_tokens(path, vocab_size):
            return found
    else:
        texts = _digested(texts, digest)
        # its name is known when all texts are read
        path = check_path("cache", cache) / f"{uuid.uuid4().hex}.tokens"
    sink = None
    try:
        with atomic_write(path, "wb") as file:
            sink = _Sink(file)
            sink.fill(texts, tokenizer, vocab_size, progress=progress)
            if sink.error is not None:
                raise sink.error
    except OSError as error:
        if sink is not None and sink.error is None:  # of reading the texts
            raise
        reason = os.strerror(error.errno) if error.errno else error
        notice(
            f"{path.parent} can't keep token ids ({reason}): they stay in memory, the next run tokenizes again"
        )
        if sink is None:
            sink = _Sink(None)
            sink.fill(texts, tokenizer, vocab_size, progress=progress)
        return sink.documents()
    if reads_once:
        path = path.replace(path.with_name(f"{digest.hexdigest()}.tokens"))
    documents = read_tokens(path, vocab_size)
    if documents is None:
        raise ValueError(
            f"{path} can't be read back after it was written; choose another folder for the token cache"
        )
    return documents


class TokenFile:
    """The ids of a cache file, as an array that is read slice by slice.

    It is no memory map: if the file is cut while it is used, a map ends the process with SIGBUS.

    Args:
        file: open for reading, without a buffer.
        dtype: of the ids.
        size: number of ids.
    """

    def __init__(self, file: Any, dtype: np.dtype, size: int):
        self._file, self.dtype, self._size = file, dtype, size
        weakref.finalize(self, file.close)

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, places: slice) -> np.ndarray:
        begin, end, step = places.indices(self._size)
        size = max(end - begin, 0) * self.dtype.itemsize
        content = _read_at(self._file.fileno(), size, begin * self.dtype.itemsize)
        if len(content) < size:
            raise ValueError(
                f"{self._file.name} was cut while it was in use; start again, which makes it anew"
            )
        return np.frombuffer(content, self.dtype)[::step]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return self[:] if dtype is None else self[:].astype(dtype)


class _Sink:
    """Takes token ids into a file; into memory from the first write that fails, with all that came before.

    Attributes:
        error: of that write.
    """

    def __init__(self, file: IO[bytes] | None):
        self._file, self._crc, self._dtype, self._size = file, 0, np.dtype(np.uint16), 0
        self.error: OSError | None = None
        self._chunks: list[np.ndarray] = []  # the ids, if they are not in the file

    def fill(self, texts: Any, tokenizer: Tokenizer | None, vocab_size: int, *, progress: bool) -> None:
        """Encode the texts and write the whole file, as far as it can be written."""
        self._dtype = token_dtype(vocab_size)
        self._lengths, self._prompts = write_chunks(
            texts, tokenizer, vocab_size, self._add, progress=progress
        )
        if self._file is None or self.error is not None:
            return
        prompts = self._prompts
        padding = _padded(self._size * self._dtype.itemsize) - self._size * self._dtype.itemsize
        footer = [_MAGIC, self._dtype.itemsize, self._size, len(self._lengths), int(prompts is not None)]
        parts = [np.zeros(padding, np.uint8), *([] if prompts is None else [prompts])]
        parts += [to_offsets(self._lengths), np.array(footer, np.int64)]
        if all(self._write(part) for part in parts):
            self._write(np.array([self._crc], np.int64), sync=True)

    def documents(self) -> Documents:
        """Return the documents with their ids in memory."""
        return Documents(np.concatenate(self._chunks), to_offsets(self._lengths), self._prompts)

    def _add(self, ids: np.ndarray) -> None:
        if self._file is None or self.error is not None or not self._write(ids):
            self._chunks.append(ids)
        else:
            self._size += ids.size

    def _write(self, values: np.ndarray, *, sync: bool = False) -> bool:
        """Write values; if that fails, read back the ids that are in the file and return False."""
        assert self._file is not None
        try:
            self._file.write(values.data)
            self._file.flush()
            if sync:
                os.fsync(self._file.fileno())
        except OSError as error:
            self.error = error
            with open(self._file.name, "rb") as file:
                content = _read_at(file.fileno(), self._size * self._dtype.itemsize, 0)
            self._chunks.append(np.frombuffer(content, self._dtype))
            return False
        self._crc = zlib.crc32(values.data, self._crc)
        return True


def _read_at(handle: int, size: int, offset: int) -> bytes:
    """Read from a place of an open file; the result is shorter if the file ends before."""
    chunks, end = [], offset + size
    while offset < end:  # a system reads at most 2 GiB at once
        if hasattr(os, "pread"):
            chunk = os.pread(handle, end - offset, offset)
        else:  # Windows
            os.lseek(handle, offset, os.SEEK_SET)
            chunk = os.read(handle, end - offset)
        if not chunk:
            break
        chunks.append(chunk)
        offset += len(chunk)
    return chunks[0] if len(chunks) == 1 else b"".join(chunks)


def read_tokens(path: str | os.PathLike[str], vocab_size: int) -> Documents | None:
    """Return the documents of a file of this format; None if it does not exist, or, with a notice, is damaged."""
    try:
        file = open(path, "rb", buffering=0)  # noqa: SIM115, the documents keep it open
    except FileNotFoundError:
        return None
    except OSError as error:
        notice(f"{path} can't be read ({error.strerror}): the texts are tokenized again")
        return None
    try:
        return _read_documents(file, vocab_size)
    except (OSError, ValueError) as error:
        file.close()
        notice(f"{path} is damaged ({error}): the texts are tokenized again")
        return None


def _read_documents(file: Any, vocab_size: int) -> Documents:
    """Read and check a whole file, of which only the ids do not stay in memory."""
    size, dtype = os.fstat(file.fileno()).st_size, token_dtype(vocab_size)
    footer = _read_at(file.fileno(), _FOOTER, max(size - _FOOTER, 0))
    if len(footer) < _FOOTER:
        raise ValueError("it is cut short")
    magic, itemsize, tokens, documents, has_prompts, expected = np.frombuffer(footer, np.int64).tolist()
    rest = 8 * (documents * has_prompts + documents + 1)
    if (magic, itemsize) != (_MAGIC, dtype.itemsize) or min(tokens, documents, has_prompts) < 0:
        raise ValueError("it has no legal footer")
    if _padded(tokens * itemsize) + rest + _FOOTER != size:
        raise ValueError(f"{tokens} ids of {documents} documents can't have {size} bytes")
    crc = 0
    for chunk in iter_chunks(file, tokens * itemsize):
        crc, ids = zlib.crc32(chunk, crc), np.frombuffer(chunk, dtype)
        if ids.min() < 0 or ids.max() >= vocab_size:
            raise ValueError(f"it has an id that a vocabulary of {vocab_size} does not have")
    padding = file.read(_padded(tokens * itemsize) - tokens * itemsize)
    arrays = b"".join(iter_chunks(file, rest))
    for part in (padding, arrays, footer[:-8]):
        crc = zlib.crc32(part, crc)
    if crc != expected:
        raise ValueError("its checksum is another one")
    numbers = np.frombuffer(arrays, np.int64)
    prompts = numbers[: documents * has_prompts] if has_prompts else None
    ids: Any = TokenFile(file, dtype, tokens)
    return Documents(ids, numbers[documents * has_prompts :], prompts)


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
