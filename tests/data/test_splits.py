from __future__ import annotations

import zipfile
from typing import Any

import pytest
from sample_files import TEXTS, json_lines, write

from gpt2jax.data.docs_corpus import SPLITS
from gpt2jax.data.sources import load_texts
from gpt2jax.data.splits import split_by_content, split_of_file
from gpt2jax.utils.notices import Notice

pytestmark = pytest.mark.usefixtures("empty_folder")


@pytest.mark.parametrize(
    "names",
    [
        ("train.jsonl", "validation.jsonl", "test.jsonl"),
        ("train.txt", "val.txt", "test.txt"),
        ("wiki.train.tokens", "wiki.valid.tokens", "wiki.test.tokens"),
        ("TRAIN_0.jsonl.gz", "dev.0.jsonl", "test-00000-of-00001-0123456789abcdef.json"),
        ("train-00000-of-00001.json", "valid-00000-of-00001.json", "test-00000-of-00001.json"),
        ("train/a.jsonl", "valid/a.jsonl", "test/a.jsonl"),
        ("data/Training/a.jsonl", "data/eval/a.jsonl", "data/testing/a.jsonl"),
    ],
)
@pytest.mark.parametrize("packed", [False, True])
def test_splits_by_name(tmp_path, names, packed):
    folder = tmp_path / "papers"
    for name, split in zip(names, SPLITS, strict=True):
        write(
            folder / name,
            json_lines([split, split + " 2"]) if ".tokens" not in name else f"{split}<|endoftext|>{split} 2",
        )
    write(folder / "vocab", "ignored")
    write(folder / "notes.jsonl", json_lines(["belongs to no split"]))
    write(folder / ".hidden" / "train.jsonl", json_lines(["hidden"]))
    source = folder
    if packed:
        source = tmp_path / "papers.zip"
        with zipfile.ZipFile(source, "w") as archive:
            for file in folder.rglob("*.*"):
                if file.is_file():
                    archive.write(file, file.relative_to(tmp_path))
            archive.writestr("__MACOSX/papers/._train.jsonl", b"\x00")
    for split in SPLITS:
        assert load_texts(source, split=split) == [split, split + " 2"]
    assert load_texts(source, split="all", limit=3) == ["train", "train 2", "validation"]


def test_files_are_read_in_order_of_their_names(tmp_path):
    for number in (2, 0, 1):
        write(tmp_path / "c" / f"train-0000{number}-of-00003.jsonl", json_lines([str(number)]))
    assert load_texts(tmp_path / "c", "all") == ["0", "1", "2"]


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (("train.jsonl",), {"train": 90, "validation": 5, "test": 5}),
        (("train.jsonl", "test.jsonl"), {"train": 95, "validation": 5, "test": 100}),
        (("training.jsonl", "dev.jsonl"), {"train": 95, "validation": 100, "test": 5}),
    ],
)
def test_splits_that_are_absent_are_held_out_of_the_training_texts(tmp_path, names, expected):
    for name in names:
        write(tmp_path / "c" / name, json_lines([f"{name} {i}" for i in range(100)]))
    source = tmp_path / "c" if len(names) > 1 else tmp_path / "c" / names[0]
    with pytest.warns(Notice) as given:
        parts = {split: load_texts(source, split) for split in SPLITS}
    assert {split: len(part) for split, part in parts.items()} == expected
    assert not set(parts["train"]) & {*parts["validation"], *parts["test"]}
    assert len(load_texts(source, "all")) == 100 * len(names)
    (message,) = {str(one.message) for one in given}
    assert f"{source} has no " in message and "split by content, 5% for" in message


def test_only_a_test_split_trains_nothing(tmp_path):
    write(tmp_path / "c" / "test.jsonl", json_lines(TEXTS))
    assert load_texts(tmp_path / "c", split="test") == TEXTS
    with pytest.raises(ValueError, match="c: there is no split 'train'; known: test, all"):
        load_texts(tmp_path / "c")


def test_a_single_training_text_is_cut_by_position(tmp_path):
    book = "".join(f"This is line {i} of the book.\n" for i in range(200))
    write(tmp_path / "c" / "train.txt", book)
    write(tmp_path / "c" / "test.txt", "The end.")
    train, validation = load_texts(tmp_path / "c"), load_texts(tmp_path / "c", "validation")
    assert train[0] + validation[0] == book and len(validation[0]) < 0.06 * len(book)


@pytest.mark.parametrize(
    "name",
    [
        "contest.jsonl",
        "training_of_dogs.jsonl",
        "latest-test-of-x.jsonl",
        "the final test.txt",
        "my-test.jsonl",
        "a.b.test.txt",
    ],
)
def test_words_inside_a_name_tell_nothing(tmp_path, name):
    assert split_of_file(f"chapters/{name}") is None
    write(tmp_path / "c" / name, json_lines([f"text {i}" for i in range(20)]))
    write(tmp_path / "c" / "other.jsonl", json_lines([f"other {i}" for i in range(20)]))
    assert len(load_texts(tmp_path / "c")) == 36 and len(load_texts(tmp_path / "c", "all")) == 40


def test_files_of_no_split_are_named(tmp_path):
    for name in ("train", "test", "dev", "notes"):
        write(tmp_path / "c" / f"{name}.jsonl", json_lines([name]))
    with pytest.warns(Notice, match="/c: passed over files of no split: notes.jsonl$"):
        assert load_texts(tmp_path / "c") == ["train"]


@pytest.mark.slow
@pytest.mark.parametrize("number", [3, 19, 100, 399, 400, 5000])
def test_split_by_hash_is_a_partition(number):
    texts = [f"text {i}" for i in range(number)]
    parts: dict[str, list[Any]] = {split: list(split_by_content(iter(texts), split)) for split in SPLITS}
    assert sorted(sum(parts.values(), [])) == sorted(texts)
    for split, fraction in (("train", 0.9), ("validation", 0.05), ("test", 0.05)):
        assert parts[split]
        assert abs(len(parts[split]) - fraction * number) <= max(2, 0.02 * number)
        assert parts[split] == [text for text in texts if text in set(parts[split])]  # order kept
    if number >= 400:  # a text's split is a matter of the text alone
        fewer = list(split_by_content(texts[: number - 1] + ["other"] * 10, "test"))
        assert set(parts["test"]) - set(fewer) <= {texts[-1]}


@pytest.mark.parametrize("number", [10, 600])
def test_equal_texts_are_in_one_split(number):
    texts = [f"text {i % (number // 2)}" for i in range(number)]
    parts = [set(split_by_content(iter(texts), split)) for split in SPLITS]
    assert all(parts)
    assert not (parts[0] & parts[1] or parts[0] & parts[2] or parts[1] & parts[2])


def test_a_book_is_cut_by_position(tmp_path):
    book = "".join(f"This is line {i} of the book.\n" for i in range(1000))
    path = write(tmp_path / "book.txt", book)
    parts = [load_texts(path, split=split) for split in SPLITS]
    assert [len(part) for part in parts] == [1, 1, 1]
    assert "".join(part[0] for part in parts) == book
    assert all(part[0].endswith(".\n") for part in parts)
    assert len(parts[0][0]) == pytest.approx(0.9 * len(book), rel=0.01)
    assert len(parts[1][0]) == pytest.approx(0.05 * len(book), rel=0.05)


@pytest.mark.parametrize("text", ["word " * 1000, "x" * 1000, "ab"])
def test_cuts_lose_nothing(text):
    assert "".join(str(part) for split in SPLITS for part in split_by_content([text], split)) == text


@pytest.mark.parametrize("held_out", [("validation", "test"), ("validation",)])
def test_a_short_text_leaves_no_split_empty(held_out):
    text = "A line that is longer than a twentieth of all.\n" * 12
    parts = [list(split_by_content([text], split, held_out)) for split in ("train", *held_out)]
    assert all(parts) and "".join(str(part) for (part,) in parts) == text


# The syntax of `datasets`


def numbered(number: int) -> list[str]:
    return [f"text {i}" for i in range(number)]


def test_split_syntax_slices_files(tmp_path):
    texts = numbered(20)
    write(tmp_path / "c" / "train.jsonl", json_lines(texts))
    write(tmp_path / "c" / "test.jsonl", json_lines(["a test"]))
    write(tmp_path / "c" / "test.jsonl.", "not a known format")
    write(tmp_path / "c" / "dev.csv", "text\na\nb\n")
    found = {
        split: load_texts(tmp_path / "c", split)
        for split in (
            "train[:50%]",
            "train[25%:75%]",
            "train[-10%:]",
            "train[:3]",
            "train[-3:]",
            "train[5:7]",
        )
    }
    assert list(found.values()) == [texts[:10], texts[5:15], texts[18:], texts[:3], texts[-3:], texts[5:7]]
    assert load_texts(tmp_path / "c", "train[:2]+validation") == ["text 0", "text 1", "a", "b"]
    assert load_texts(tmp_path / "c", "validation + train[19:]") == ["a", "b", "text 19"]
    assert load_texts(tmp_path / "c", "all[20:]") == ["a", "b", "a test"]
    assert load_texts(tmp_path / "c", "train[15:100]") == texts[15:]  # as many as there are
    assert load_texts(tmp_path / "c", "train[:50%]", limit=2) == texts[:2]


@pytest.mark.slow
@pytest.mark.parametrize("number", [40, 500])
def test_split_syntax_slices_splits_by_content(tmp_path, number):
    path = write(tmp_path / "a.jsonl", json_lines(numbered(number)))
    train, test = load_texts(path), load_texts(path, "test")
    assert load_texts(path, "train[:50%]") == train[: round(len(train) / 2)]
    assert load_texts(path, "train[50%:]") == train[round(len(train) / 2) :]
    assert load_texts(path, "train+test") == train + test
    assert load_texts("python-docs", "test[:2]") == load_texts("python-docs", "test")[:2]


def test_split_syntax_reads_no_more_than_it_needs(tmp_path):
    path = tmp_path
    write(tmp_path / "train.jsonl", json_lines(TEXTS) + "broken\n")
    for name in ("validation.jsonl", "test.jsonl"):
        write(tmp_path / name, json_lines(TEXTS))
    assert load_texts(path, "train[:3]") == TEXTS[:3]
    assert load_texts(path, "train[1:2]+train[:1]") == [TEXTS[1], TEXTS[0]]
    with pytest.raises(ValueError, match="line 6 is not JSON"):
        load_texts(path, "train[:50%]")  # needs the length


@pytest.mark.parametrize("split", ["train[", "train[:150%]", "train[50]", "", "tr ain", None, 3])
def test_split_syntax_errors_are_one_line(tmp_path, split):
    with pytest.raises(ValueError, match="split must be a split such as train, .* got ") as caught:
        load_texts(write(tmp_path / "a.jsonl", json_lines(TEXTS)), split)
    assert "\n" not in str(caught.value)


def test_unknown_or_empty_split_is_named(tmp_path):
    path = write(tmp_path / "test.jsonl", json_lines(TEXTS))
    with pytest.raises(ValueError, match="there is no split 'tset'; did you mean 'test'"):
        load_texts(path, "tset")
    with pytest.raises(ValueError, match="there is no split 'train'; known: test, all"):
        load_texts(path, "train+test")
    with pytest.raises(ValueError, match=r"has no texts in its test\[:0\] split"):
        load_texts(path, "test[:0]")
