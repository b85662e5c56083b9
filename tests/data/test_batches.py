"""Batches: every token once an epoch, a pure function of seed and step."""

from __future__ import annotations

import numpy as np
import pytest

from gpt2jax.data.batches import Batches, join_documents, sequential_batches
from gpt2jax.data.documents import Documents, tokenize_documents
from gpt2jax.tokenizer import Tokenizer

END = 99


@pytest.fixture(scope="module")
def documents() -> Documents:
    generator = np.random.default_rng(0)
    rows = [generator.integers(0, 90, size) for size in (5, 40, 1, 17, 0, 33, 2)]
    return tokenize_documents(rows, None, vocab_size=100)


def make(documents, layout="windows", seed=0, length=8, batch=3):
    return Batches(documents, layout, length, batch, END, seed)


def rows_of_epoch(batches, epoch):
    rows = []
    for index in range(epoch * batches.rows, (epoch + 1) * batches.rows):
        batch = batches.batch(index // batches.batch_size)
        rows.append({name: value[index % batches.batch_size] for name, value in batch.items()})
    return rows


@pytest.mark.parametrize("epoch", [0, 1, 5])
def test_every_token_is_a_label_once_an_epoch(documents, epoch):
    stream = join_documents(documents, END)
    pairs = []
    for row in rows_of_epoch(make(documents), epoch):
        real = row["weights"] == 1
        pairs += list(zip(row["tokens"][real], row["targets"][real], strict=True))
    assert sorted(pairs) == sorted(zip(stream[:-1], stream[1:], strict=True))


def test_stream_has_end_tokens_around_documents(documents):
    stream = join_documents(documents, END)
    parts = [[END, *documents[i]] for i in range(len(documents))]
    np.testing.assert_array_equal(stream, np.concatenate([*parts, [END]]))


def test_function_of_seed_and_step(documents):
    first, again, other = make(documents), make(documents), make(documents, seed=1)
    for step in (7, 0, 3):
        for name, value in first.batch(step).items():
            np.testing.assert_array_equal(value, again.batch(step)[name])
    assert any((first.batch(step)["tokens"] != other.batch(step)["tokens"]).any() for step in range(3))


def test_epochs_differ(documents):
    batches = make(documents)
    first, second = ([row["tokens"].tolist() for row in rows_of_epoch(batches, epoch)] for epoch in (0, 1))
    assert sorted(first) != sorted(second)  # another shift, not only another order


def test_rows_of_the_study(documents):
    rows = rows_of_epoch(make(documents, layout="documents"), 0)
    labels = sorted(row["targets"][row["weights"] == 1].tolist() for row in rows)
    assert labels == sorted([*documents[i][:7].tolist(), END] for i in range(len(documents)))
    assert all(row["tokens"][0] == END for row in rows)


@pytest.mark.parametrize("layout", ["windows", "documents"])
def test_validation_rows_come_once_and_in_order(documents, layout):
    batches = list(
        sequential_batches(documents, layout=layout, sequence_length=8, batch_size=4, end_token_id=END)
    )
    assert all(batch["tokens"].shape == (4, 8) for batch in batches)
    labels = np.concatenate([b["targets"][b["weights"] == 1] for b in batches])
    if layout == "windows":
        np.testing.assert_array_equal(labels, join_documents(documents, END)[1:])
    else:
        np.testing.assert_array_equal(
            labels, np.concatenate([[*documents[i][:7], END] for i in range(len(documents))])
        )


def test_tokenizing():
    tokenizer = Tokenizer.gpt2(300)
    documents = tokenize_documents(["ab", "", "c"], tokenizer, vocab_size=300)
    assert [documents[i].tolist() for i in range(3)] == [tokenizer.encode(t) for t in ("ab", "", "c")]
    assert documents.tokens.dtype == np.uint16
    assert tokenize_documents([[1, 70000]], None, vocab_size=70001).tokens.dtype == np.int32


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ([], "there are no texts"),
        (["a"], "no tokenizer"),
        ([[5, 100]], "text 0 has token id 100"),
        ([[1], [-2]], "text 1 has token id -2"),
        ([[1.5]], "neither a string nor"),
    ],
)
def test_wrong_texts(texts, message):
    with pytest.raises(ValueError, match=message):
        tokenize_documents(texts, None, vocab_size=100)


def test_texts_that_are_too_short():
    with pytest.raises(ValueError, match="all 2 texts are shorter than two tokens"):
        make(tokenize_documents([[1], []], None, vocab_size=100))
