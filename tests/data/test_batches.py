"""Batches: every token once an epoch, a pure function of seed and step."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from gpt2jax.data.batches import Batches, ConcatRows, sequential_batches
from gpt2jax.data.documents import Documents
from gpt2jax.data.tokenization import tokenize_documents
from gpt2jax.tokenizer.bpe import Tokenizer

END = 99


@pytest.fixture(scope="module")
def documents() -> Documents:
    generator = np.random.default_rng(0)
    rows = [generator.integers(0, 90, size) for size in (5, 40, 1, 17, 0, 33, 2)]
    return tokenize_documents(rows, None, vocab_size=100)


def join_documents(documents: Documents, end: int) -> np.ndarray:
    """All documents with an end token before each and after the last."""
    return np.concatenate([[end], *(part for i in range(len(documents)) for part in (documents[i], [end]))])


def make(documents, packing="concat", seed=0, length=8, batch=3):
    return Batches(documents, packing, length, batch, END, seed)


def rows_of_epoch(batches, epoch):
    rows = []
    for index in range(epoch * batches.rows, (epoch + 1) * batches.rows):
        batch = batches.batch(index // batches.batch_size)
        rows.append({name: value[index % batches.batch_size] for name, value in batch.items()})
    return rows


@pytest.mark.parametrize("epoch", [0, 1, 5])
def test_batches_concat_has_every_token_as_label_once_an_epoch(documents, epoch):
    stream = join_documents(documents, END)
    pairs = []
    for row in rows_of_epoch(make(documents), epoch):
        real = row["loss_mask"] == 1
        pairs += list(zip(row["tokens"][real], row["targets"][real], strict=True))
    assert sorted(pairs) == sorted(itertools.pairwise(stream))


def test_concat_rows_stream_has_end_tokens_around_documents(documents):
    rows, stream = ConcatRows(documents, 8, END), join_documents(documents, END)
    assert rows.total == len(stream)
    for begin in range(len(stream)):
        for end in range(begin, len(stream) + 1):
            np.testing.assert_array_equal(rows.stream(begin, end), stream[begin:end])


def test_batches_are_a_function_of_seed_and_step(documents):
    first, again, other = make(documents), make(documents), make(documents, seed=1)
    for step in (7, 0, 3):
        for name, value in first.batch(step).items():
            np.testing.assert_array_equal(value, again.batch(step)[name])
    assert any((first.batch(step)["tokens"] != other.batch(step)["tokens"]).any() for step in range(3))


def test_batches_differ_between_epochs(documents):
    batches = make(documents)
    first, second = ([row["tokens"].tolist() for row in rows_of_epoch(batches, epoch)] for epoch in (0, 1))
    assert sorted(first) != sorted(second)  # another shift, not only another order


def test_batches_padded_rows(documents):
    rows = rows_of_epoch(make(documents, packing="padded"), 0)
    labels = sorted(row["targets"][row["loss_mask"] == 1].tolist() for row in rows)
    assert labels == sorted([*documents[i][:7].tolist(), END] for i in range(len(documents)))
    assert all(row["tokens"][0] == END for row in rows)


def test_batches_packed_rows_have_every_label_once(documents):
    batches = make(documents, packing="packed")
    rows = rows_of_epoch(batches, 3)
    segments = []
    for row in rows:
        real = row["loss_mask"] == 1
        np.testing.assert_array_equal(real, row["segment_ids"] > 0)
        for segment in range(1, row["segment_ids"].max() + 1):
            inside = row["segment_ids"] == segment
            assert (np.diff(np.flatnonzero(inside)) == 1).all()
            segments.append((row["tokens"][inside].tolist(), row["targets"][inside].tolist()))
    expected = []
    for index in range(len(documents)):
        whole = [END, *documents[index].tolist(), END]
        for begin in range(0, len(whole) - 1, 8):
            piece = whole[begin : begin + 9]
            expected.append((piece[:-1], piece[1:]))
    assert sorted(segments) == sorted(expected)
    # 105 labels: 14 rows would be needed if pieces could be cut anywhere
    assert len(rows) == batches.rows == 14
    again = make(documents, packing="packed").batch(9)
    np.testing.assert_array_equal(batches.batch(9)["tokens"], again["tokens"])


def test_pack_documents_leaves_little_room():
    generator = np.random.default_rng(1)
    rows = [np.zeros(size, int) for size in generator.integers(1, 200, 500)]
    batches = make(tokenize_documents(rows, None, vocab_size=100), packing="packed", length=128)
    labels = sum(len(row) + 1 for row in rows)
    assert batches.rows <= 1.01 * labels / 128 + 1


@pytest.mark.parametrize("packing", ["concat", "padded", "packed"])
def test_batches_mask_prompts(packing):
    rows = [{"prompt": [1, 2, 3], "completion": [4, 5]}, {"prompt": [], "completion": [6]}, [7, 8, 9]]
    documents = tokenize_documents(rows, None, vocab_size=100)
    batches = make(documents, packing=packing, length=16 if packing == "padded" else 4)
    labels = []
    for row in rows_of_epoch(batches, 0):
        labels += row["targets"][row["loss_mask"] == 1].tolist()
    assert sorted(labels) == sorted([4, 5, END, 6, END, 7, 8, 9, END])


@pytest.mark.parametrize("packing", ["concat", "padded", "packed"])
def test_batches_documents_of(documents, packing):
    batches = make(documents, packing=packing)
    ids = [set(documents[i].tolist()) | {END} for i in range(len(documents))]
    for step in range(6):
        batch = batches.batch(step)
        named = batches.documents_of(step)
        labels = set(batch["targets"][batch["loss_mask"] == 1].tolist())
        assert named == sorted(set(named)) and labels <= set().union(*(ids[i] for i in named))
    assert make(tokenize_documents([[1, 2], [3, 4]], None, vocab_size=9), packing, 0, 16, 3).documents_of(
        0
    ) == [
        0,
        1,
    ]


@pytest.mark.parametrize("packing", ["concat", "padded"])
def test_sequential_batches_have_all_rows_once_and_in_order(documents, packing):
    batches = list(
        sequential_batches(documents, packing=packing, sequence_length=8, batch_size=4, end_token_id=END)
    )
    assert all(batch["tokens"].shape == (4, 8) for batch in batches)
    labels = np.concatenate([b["targets"][b["loss_mask"] == 1] for b in batches])
    if packing == "concat":
        np.testing.assert_array_equal(labels, join_documents(documents, END)[1:])
    else:
        np.testing.assert_array_equal(
            labels, np.concatenate([[*documents[i][:7], END] for i in range(len(documents))])
        )


def test_tokenize_documents():
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
        ([{"prompt": [1]}], "text 0 has the columns 'prompt'; expected 'prompt' and 'completion'"),
    ],
)
def test_tokenize_documents_names_wrong_texts(texts, message):
    with pytest.raises(ValueError, match=message):
        tokenize_documents(texts, None, vocab_size=100)


def test_batches_refuse_texts_that_are_too_short():
    with pytest.raises(ValueError, match="all 2 texts are shorter than two tokens"):
        make(tokenize_documents([[1], []], None, vocab_size=100))


def test_tokenize_documents_refuses_one_string():
    with pytest.raises(TypeError, match="texts must be a list of texts, got one string"):
        tokenize_documents("a text", None, vocab_size=100)


@pytest.mark.parametrize("texts", [None, 5, {"train": ["a text"]}])
def test_tokenize_documents_refuses_what_is_not_a_list(texts):
    """The names of columns or splits are no texts."""
    with pytest.raises(TypeError, match="texts must be a list of texts, got"):
        tokenize_documents(texts, None, vocab_size=100)
