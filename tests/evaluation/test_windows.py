from __future__ import annotations

import numpy as np
import pytest

from gpt2jax.data.documents import Documents
from gpt2jax.evaluation.windows import (
    cut_documents,
    encode_beginnings,
    plan_windows,
    row_batches,
    study_row,
    window_row,
)
from gpt2jax.tokenizer.bpe import Tokenizer

END = 99


def make_documents(lengths):
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    return Documents(np.arange(offsets[-1], dtype=np.uint16) % 90, offsets)


@pytest.mark.parametrize("stride", [1, 3, 8])
def test_every_label_is_scored_once_with_the_promised_context(stride):
    length = 8
    documents = make_documents([0, 1, 6, 7, 8, 9, 15, 16, 17, 40])
    windows = plan_windows(documents, length, stride)
    scored = [np.zeros(n + 1, int) for n in documents.lengths]
    for document, begin, end, score in zip(
        windows.document, windows.begin, windows.end, windows.score, strict=True
    ):
        assert end - begin <= length and score < end
        assert begin == 0 or score - begin >= length - stride
        scored[document][score:end] += 1
    assert all((counts == 1).all() for counts in scored)
    assert windows.offsets[-1] == documents.lengths.sum() + len(documents)


def test_positions_count_the_context():
    windows = plan_windows(make_documents([5]), 4, 2)
    assert windows.positions().tolist() == [0, 1, 2, 3, 2, 3]


def test_rows():
    documents = make_documents([5])  # tokens 0 to 4
    windows = plan_windows(documents, 4, 2)
    first, second = (window_row(documents, windows, index, 4, END) for index in range(2))
    assert first["tokens"].tolist() == [END, 0, 1, 2] and first["targets"].tolist() == [0, 1, 2, 3]
    assert first["loss_mask"].tolist() == [1, 1, 1, 1]
    assert second["tokens"].tolist() == [1, 2, 3, 4] and second["targets"].tolist() == [2, 3, 4, END]
    assert second["loss_mask"].tolist() == [0, 0, 1, 1]


@pytest.mark.parametrize(
    ("ids", "tokens", "targets", "weights", "mask"),
    [
        # n=5, L=8: the example in keras-nlp's own test of its preprocessor
        (
            [1, 3, 4, 2, 5],
            [6, 1, 3, 4, 2, 5, 6, 0],
            [1, 3, 4, 2, 5, 6, 0, 0],
            [1] * 6 + [0] * 2,
            [1] * 7 + [0],
        ),
        ([], [6, 6] + [0] * 6, [6] + [0] * 7, [1] + [0] * 7, [1, 1] + [0] * 6),
        ([1] * 7, [6] + [1] * 7, [1] * 7 + [6], [1] * 8, [1] * 8),
        ([1] * 6, [6] + [1] * 6 + [6], [1] * 6 + [6, 0], [1] * 7 + [0], [1] * 8),
        ([1] * 20, [6] + [1] * 7, [1] * 7 + [6], [1] * 8, [1] * 8),
    ],
)
def test_study_rows(ids, tokens, targets, weights, mask):
    row = study_row(np.array(ids, np.uint16), 8, 6)
    assert row["tokens"].tolist() == tokens and row["targets"].tolist() == targets
    assert row["loss_mask"].tolist() == weights and row["mask"].tolist() == mask


def test_cut_documents():
    documents = make_documents([3, 0, 5])
    cut = cut_documents(documents, 2)
    assert [cut[i].tolist() for i in range(3)] == [[0, 1], [], [3, 4]]
    assert cut.tokens.dtype == documents.tokens.dtype


def test_batches_hold_every_row_once_in_few_shapes():
    rng = np.random.default_rng(0)
    documents = make_documents(rng.integers(0, 100, size=57))
    windows = plan_windows(documents, 32, 16)
    batches = list(row_batches(documents, windows, sequence_length=32, batch_size=4, end_token_id=END))
    chosen = np.concatenate([rows for rows, _ in batches])
    assert sorted(chosen) == list(range(len(windows)))
    assert {batch["tokens"].shape for _, batch in batches} <= {(4, width) for width in (16, 32)}
    assert len({batch["tokens"].shape for _, batch in batches}) > 1


@pytest.mark.parametrize("count", [1, 2, 7, 40])
def test_beginnings_are_the_first_tokens_of_the_whole(count):
    rng = np.random.default_rng(count)
    alphabet = [
        *"abAB12.,!'-<é東🙂",
        " ",
        " ",
        " ",
        "  ",
        "\n",
        "\t",
        "\xa0",
        "\x1c",
        "'s",
        " the",
        "<|endoftext|>",
        "word ",
    ]
    texts = ["".join(rng.choice(alphabet, size=rng.integers(0, 900))) for _ in range(300)]
    texts += ["", "a" * 5000, " " * 5000 + "a b", "a b" + " " * 5000, "\n".join("abc" * 1000)]
    tokenizer = Tokenizer.gpt2(1000)
    assert encode_beginnings(tokenizer, texts, count) == [tokenizer.encode(text)[:count] for text in texts]


def test_beginnings_do_not_read_the_whole():
    class Counting:
        characters = 0

        def encode_batch(self, texts):
            self.characters += sum(map(len, texts))
            return Tokenizer.gpt2(1000).encode_batch(texts)

    tokenizer = Counting()
    encode_beginnings(tokenizer, ["a few words of text " * 10_000] * 3, 100)  # type: ignore[arg-type]
    assert tokenizer.characters < 3 * 1000
