from __future__ import annotations

import random

import pytest

from gpt2jax.comparison import overlap
from gpt2jax.comparison.overlap import SHINGLE, text_overlap

LETTERS = "abcdefghijklmnopqrstuvwxyz"


def words(seed: int, count: int) -> list[str]:
    draw = random.Random(seed)
    return ["".join(draw.choices(LETTERS, k=draw.randint(2, 9))) for _ in range(count)]


def resemblance(one: str, other: str) -> float:
    a, b = ({text[i : i + SHINGLE] for i in range(len(text) - SHINGLE + 1)} for text in (one, other))
    return len(a & b) / len(a | b)


def test_exact_near_and_contained():
    base = words(0, 200)
    changed = [*base[:195], "other", *base[196:]]
    texts = [
        " ".join(base).upper() + "!!\n",  # the first training text in other dress
        " ".join(changed),
        " ".join(base[:60] + words(1, 20)),  # most of it is a part of the first
        " ".join(words(2, 100)),
        "short",
        "",
    ]
    training = [" ".join(base), " ".join(words(3, 50)), "Short.", " ".join(words(4, 10))]
    found = text_overlap(iter(training), texts)
    assert (found["training_documents"], found["documents"], found["sampled"]) == (4, 6, 1)
    assert (found["exact"], found["near"], found["mostly_contained"]) == (2, 3, 4)
    listed = {entry["document"]: entry for entry in found["listed"]}
    assert set(listed) == {0, 1, 2, 4}
    assert listed[0]["contained"] == listed[0]["resemblance"] == 1.0 and listed[4]["training_document"] == 2
    assert listed[1]["resemblance"] == pytest.approx(resemblance("".join(base), "".join(changed)))
    part = "".join(base[:60])
    assert listed[2]["contained"] == pytest.approx(
        (len(part) - SHINGLE + 1) / (len(texts[2].replace(" ", "")) - SHINGLE + 1)
    )
    assert 0.5 < found["contained"] < 1


def test_a_text_spread_over_several_training_texts_is_contained_without_a_near_duplicate():
    base = words(5, 300)
    training = [" ".join(base[i : i + 60]) for i in range(0, 300, 50)]
    (entry,) = text_overlap(training, [" ".join(base)])["listed"]
    assert entry["contained"] > 0.99 and entry["resemblance"] < 0.3


def test_sampled_figures_are_close(monkeypatch):
    base = words(6, 3000)
    texts = [" ".join(base[:2000] + words(7, 1000)), " ".join(words(8, 3000))]
    exact = text_overlap([" ".join(base)], texts)
    monkeypatch.setattr(overlap, "MAX_SHINGLES", 2000)
    sampled = text_overlap([" ".join(base)], texts)
    assert exact["sampled"] == 1 and sampled["sampled"] > 10
    assert sampled["contained"] == pytest.approx(exact["contained"], abs=0.05)
    assert sampled["listed"][0]["resemblance"] == pytest.approx(exact["listed"][0]["resemblance"], abs=0.05)


def test_token_ids_and_nothing():
    assert text_overlap([[1, 2, 3]], [[1, 2, 3], [4]])["exact"] == 1
    nothing = text_overlap([], ["a text of some length, longer than a shingle is"])
    assert nothing["listed"] == [] and nothing["contained"] == 0.0 and nothing["training_documents"] == 0
