"""The cache of tokenized texts: reused where nothing changed, whole at any time, never all in memory."""

from __future__ import annotations

import multiprocessing
import tracemalloc
from collections.abc import Iterator

import numpy as np
import pytest

import gpt2jax.data.encoding as documents_module
from gpt2jax.data.batches import Batches
from gpt2jax.data.token_cache import default_cache, read_tokens
from gpt2jax.data.tokenization import tokenize_documents
from gpt2jax.tokenizer.bpe import Tokenizer

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
    assert tokenizer.calls == calls and isinstance(again.tokens, np.memmap)
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


@pytest.mark.parametrize("damage", ["cut", "other", "empty"])
def test_a_damaged_file_is_made_anew(tmp_path, damage):
    tokenizer = Counting()
    expected = tokenize_documents(TEXTS, tokenizer, vocab_size=300, cache=tmp_path)
    expected = type(expected)(np.array(expected.tokens), expected.offsets)
    (path,) = tmp_path.iterdir()
    content = path.read_bytes()
    path.write_bytes({"cut": content[:-16], "other": b"x" * 64, "empty": b""}[damage])
    assert read_tokens(path) is None
    assert_same(tokenize_documents(TEXTS, tokenizer, vocab_size=300, cache=tmp_path), expected)


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
