"""The cache of tokenized texts: reused where nothing changed, whole at any time, never all in memory."""

from __future__ import annotations

import contextlib
import errno
import io
import multiprocessing
import os
import tracemalloc
import warnings
from collections.abc import Iterator

import numpy as np
import pytest
from killing import kill_at_each_call

import gpt2jax.data.encoding as documents_module
import gpt2jax.utils.atomic_io as atomic_io
from gpt2jax.data.batches import Batches
from gpt2jax.data.token_cache import TokenFile, default_cache, read_tokens
from gpt2jax.data.tokenization import tokenize_documents
from gpt2jax.tokenizer.bpe import Tokenizer
from gpt2jax.utils.notices import Notice

TEXTS = ["one text", "", "another\ud800 text", "ein dritter, länger"]


class Counting(Tokenizer):
    """A tokenizer that counts what it encodes."""

    calls = 0

    def __init__(self, vocab_size: int = 300):
        super().__init__(Tokenizer.gpt2(vocab_size).merges)

    def encode_batch(self, texts, **options):
        self.calls += 1
        return super().encode_batch(texts, **options)


def assert_same(a, b) -> None:
    np.testing.assert_array_equal(a.tokens, b.tokens)
    np.testing.assert_array_equal(a.offsets, b.offsets)
    assert a.tokens.dtype == b.tokens.dtype and (a.prompts is None) == (b.prompts is None)
    if a.prompts is not None:
        np.testing.assert_array_equal(a.prompts, b.prompts)


@pytest.mark.parametrize(
    ("texts", "vocab_size"),
    [
        (TEXTS, 300),
        ([{"prompt": "a b", "completion": " c"}, "plain"], 300),
        ([[1, 2, 3], np.array([70000])], 70001),
    ],
)
def test_cached_is_what_is_not_cached(tmp_path, monkeypatch, texts, vocab_size):
    monkeypatch.setattr(documents_module, "CHUNK_SIZE", 10)  # several pieces
    tokenizer = Counting()
    expected = tokenize_documents(texts, tokenizer, vocab_size=vocab_size)
    first = tokenize_documents(texts, tokenizer, vocab_size=vocab_size, cache=tmp_path)
    calls = tokenizer.calls
    again = tokenize_documents(texts, tokenizer, vocab_size=vocab_size, cache=tmp_path)
    assert tokenizer.calls == calls and isinstance(again.tokens, TokenFile)
    assert_same(first, expected)
    assert_same(again, expected)
    assert len(list(tmp_path.iterdir())) == 1
    # an iterator can be read once only, and ends in the same file
    assert_same(tokenize_documents(iter(texts), tokenizer, vocab_size=vocab_size, cache=tmp_path), expected)
    assert len(list(tmp_path.iterdir())) == 1


def test_what_makes_another_file(tmp_path):
    def files(texts, tokenizer, vocab_size) -> int:
        tokenize_documents(texts, tokenizer, vocab_size=vocab_size, cache=tmp_path)
        return len(list(tmp_path.iterdir()))

    assert files(["ab", "c"], Counting(), 300) == 1
    assert files(["a", "bc"], Counting(), 300) == 2
    assert files(["ab", "c"], Counting(400), 400) == 3
    assert files(["ab", "c"], Counting(), 70000) == 4
    assert files([{"prompt": "ab", "completion": "c"}], Counting(), 300) == 5
    assert files(["ab", "c"], Counting(), 300) == 5
    with pytest.raises(ValueError, match="neither a string nor"):
        files([[1.5, 2]], None, 300)
    with pytest.raises(ValueError, match="there are no texts"):
        files([], None, 300)
    assert len(list(tmp_path.iterdir())) == 5


def test_texts_that_say_where_they_come_from_are_read_once(tmp_path):
    class Stream:
        """Texts that never change under their name."""

        reads = 0

        def __init__(self, name: str | None):
            self.fingerprint = name

        def __iter__(self) -> Iterator[str]:
            Stream.reads += 1
            yield from TEXTS

    def documents(name):
        before = Stream.reads
        found = tokenize_documents(Stream(name), Counting(), vocab_size=300, cache=tmp_path)
        assert_same(found, tokenize_documents(TEXTS, Counting(), vocab_size=300))
        return Stream.reads - before

    assert [documents("data at commit a") for _ in range(2)] == [1, 0]
    assert documents("data at commit b") == 1  # whatever it holds
    assert [documents(None) for _ in range(2)] == [2, 1]
    assert len(list(tmp_path.iterdir())) == 3


def flip(content: bytes, bit: int) -> bytes:
    changed = bytearray(content)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


@pytest.mark.parametrize("damage", ["cut", "other", "empty", "flipped", "longer", "a folder", "unreadable"])
def test_a_damaged_file_is_made_anew(tmp_path, monkeypatch, damage):
    tokenizer = Counting()
    expected = tokenize_documents(TEXTS, tokenizer, vocab_size=300)
    tokenize_documents(TEXTS, tokenizer, vocab_size=300, cache=tmp_path)
    (path,) = tmp_path.iterdir()
    content = path.read_bytes()
    changed = {"cut": content[:-16], "other": b"x" * 64, "empty": b"", "longer": content + bytes(8)}
    with monkeypatch.context() as context:
        if damage == "unreadable":  # by other users than root
            context.setattr("builtins.open", failing_open(path))
        elif damage == "a folder":
            path.unlink()
            path.mkdir()
        else:
            path.write_bytes(changed.get(damage, flip(content, 3)))
        with pytest.warns(
            Notice, match=f"{path.name} (is damaged|can't be read) .*the texts are tokenized again"
        ):
            assert read_tokens(path, 300) is None
    with pytest.warns(Notice) if damage != "unreadable" else contextlib.nullcontext():
        assert_same(tokenize_documents(TEXTS, tokenizer, vocab_size=300, cache=tmp_path), expected)
    if damage != "a folder":
        assert path.read_bytes() == content


def failing_open(path):
    def failing(name, *args, **named):
        if name == path:
            raise PermissionError(errno.EACCES, "Permission denied")
        return open(name, *args, **named)

    return failing


@pytest.mark.parametrize("texts", [TEXTS, [{"prompt": "a b", "completion": " c"}, "plain"]])
def test_read_tokens_tells_flipped_bits_of_every_byte(tmp_path, texts):
    tokenize_documents(texts, Counting(), vocab_size=300, cache=tmp_path)
    (path,) = tmp_path.iterdir()
    content = path.read_bytes()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Notice)
        for bit in range(0, 8 * len(content), 5):
            path.write_bytes(flip(content, bit))
            assert read_tokens(path, 300) is None, bit
    path.write_bytes(content)
    assert read_tokens(path, 300) is not None


def test_read_tokens_refuses_ids_above_the_vocabulary(tmp_path):
    tokenize_documents([[1, 299]], None, vocab_size=300, cache=tmp_path)
    (path,) = tmp_path.iterdir()
    with pytest.warns(Notice, match="has an id that a vocabulary of 299 does not have"):
        assert read_tokens(path, 299) is None


@pytest.mark.parametrize("damage", ["cut", "replaced"])
def test_a_file_that_is_cut_while_it_is_used(tmp_path, damage):
    texts = [list(range(50)), list(range(60))]
    documents = tokenize_documents(texts, None, vocab_size=300, cache=tmp_path)
    batches = Batches(documents, "padded", 64, 2, 299, 0)
    (path,) = tmp_path.iterdir()
    if damage == "cut":
        os.truncate(path, 80)
        with pytest.raises(ValueError, match=f"{path.name} was cut while it was in use; start again"):
            batches.batch(0)
    else:
        path.unlink()
        assert batches.batch(0)["tokens"].max() == 299 and documents[1].tolist() == texts[1]


@pytest.mark.parametrize("reads_once", [False, True])
@pytest.mark.parametrize("room", ["no file", 0, 20, 90, "no sync"])
def test_a_cache_that_cannot_be_written_ends_nothing(tmp_path, monkeypatch, room, reads_once):
    """The disk has room for nothing, some of the ids, all of them, or fails at the end."""
    monkeypatch.setattr(documents_module, "CHUNK_SIZE", 10)  # several pieces
    texts = TEXTS + TEXTS
    expected = tokenize_documents(texts, Counting(), vocab_size=300)
    cache = tmp_path / "cache"
    cache.mkdir()

    def fail(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    class FullDisk(io.FileIO):
        def write(self, data):
            space = room - self.tell()
            return super().write(bytes(data)[:space]) if space > 0 else fail()

    if room == "no file":
        monkeypatch.setattr("tempfile.mkstemp", fail)
    elif room == "no sync":
        monkeypatch.setattr("os.fsync", fail)
    else:
        full = lambda path, mode: io.BufferedWriter(FullDisk(path, mode))  # noqa: E731
        monkeypatch.setattr(atomic_io, "open", full, raising=False)
    given = iter(texts) if reads_once else texts
    with pytest.warns(Notice, match="cache can't keep token ids .No space left on device.: they stay in mem"):
        documents = tokenize_documents(given, Counting(), vocab_size=300, cache=cache)
    assert_same(documents, expected)
    assert not list(cache.iterdir())


KILLED = """
from gpt2jax.data.tokenization import tokenize_documents
IDS = {"old": [[1, 2], [3]], "new": [[4], [5, 6, 7]]}

def write(text):  # the next command writes anew
    for path in target.glob("*.tokens"):
        path.unlink()
    tokenize_documents(IDS[text], None, vocab_size=300, cache=target)
    assert len(list(target.iterdir())) == 1, list(target.iterdir())

def read():
    warnings.simplefilter("error")
    found = [path for path in target.iterdir() if path.suffix == ".tokens"]
    for text, ids in IDS.items():
        documents = tokenize_documents(ids, None, vocab_size=300, cache=target)
        assert [document.tolist() for document in documents] == ids
    return "new" if found and read_again(found[0]) == [4] else "old"

def read_again(path):
    from gpt2jax.data.token_cache import read_tokens
    return read_tokens(path, 300)[0].tolist()
"""


@pytest.mark.slow
def test_a_cache_killed_at_each_system_call(tmp_path):
    """What is under its name is whole, what is not there is made anew, and nothing is left."""
    kills, recovered = kill_at_each_call(KILLED, tmp_path)
    assert kills > 10 and recovered == 0


def test_errors_of_the_texts_are_no_errors_of_the_cache(tmp_path):
    def texts() -> Iterator[str]:
        yield "one"
        raise OSError("the texts can't be read")

    with pytest.raises(OSError, match="the texts can't be read"):
        tokenize_documents(texts(), Counting(), vocab_size=300, cache=tmp_path)
    assert not list(tmp_path.iterdir())


def _tokenize(folder, barrier, results) -> None:
    barrier.wait()
    documents = tokenize_documents(["a text of words"] * 2000, Counting(), vocab_size=300, cache=folder)
    results.put((len(documents), documents.sha256))


@pytest.mark.slow
def test_two_runs_at_once(tmp_path):
    # spawned: a fork of a process with the threads of jax may hang
    context = multiprocessing.get_context("spawn")
    barrier, results = context.Barrier(2), context.Queue()
    writers = [context.Process(target=_tokenize, args=(tmp_path, barrier, results)) for _ in range(2)]
    for writer in writers:
        writer.start()
    seen = [results.get(timeout=60) for _ in writers]
    for writer in writers:
        writer.join()
    assert seen[0] == seen[1] and seen[0][0] == 2000
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.slow
@pytest.mark.thorough
def test_more_than_the_memory(tmp_path, monkeypatch):
    """Texts of 24 MB, tokenized and cut into batches with less than 6 MB at once."""
    monkeypatch.setattr(documents_module, "CHUNK_SIZE", 1 << 16)
    ids = np.arange(1000) % 250

    def texts() -> Iterator[np.ndarray]:
        for shift in range(3000):
            yield (ids + shift) % 250

    tracemalloc.start()
    documents = tokenize_documents(texts(), None, vocab_size=300, cache=tmp_path)
    batch = Batches(documents, "concat", 64, 8, 299, 0).batch(5)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert batch["tokens"].shape == (8, 64) and documents.offsets[-1] == 3_000_000
    assert peak < 6e6


def test_no_cache_in_a_home_that_cannot_be_written_to(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "~/cache")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("GPT2JAX_CACHE")
    assert default_cache() == tmp_path / "cache" / "gpt2jax" / "tokens"
    monkeypatch.setattr("os.access", lambda path, mode: path != tmp_path)
    assert default_cache() is None
    monkeypatch.setattr("os.path.expanduser", lambda path: path)  # as for a user without a home
    assert default_cache() is None
    monkeypatch.setenv("GPT2JAX_CACHE", str(tmp_path / "mine"))
    assert default_cache() == tmp_path / "mine" / "tokens"
