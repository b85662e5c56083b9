from __future__ import annotations

import hashlib
import itertools
import json
import pickle
import random
import re
import time
from importlib import resources
from pathlib import Path

import numpy as np
import pytest
import regex

from gpt2jax.tokenizer import cutting
from gpt2jax.tokenizer.bpe import END_TOKEN, VOCAB_BPE_SHA256, Tokenizer, parse_merges
from gpt2jax.tokenizer.files import save_tokenizer
from gpt2jax.utils.notices import Notice

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "tokenizer.json").read_text())
# SHA-256 of OpenAI's encoder.json with sorted keys and no white space (tests/golden/make_tokenizer.py).
ENCODER_SHA256 = "e35d8b86ebd35ebd260d040aa455e09759f7e675f4dbb7f3d727516f27eca190"
ORIGINAL_PATTERN = regex.compile(
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
)
# Controls, spaces, combining marks, scripts, emoji, joiners, the last planes.
REGIONS = [
    (0x00, 0x20),
    (0x20, 0x7F),
    (0x7F, 0x100),
    (0x300, 0x370),
    (0x590, 0x700),
    (0x900, 0xA00),
    (0x1680, 0x1681),
    (0x2000, 0x2070),
    (0x2150, 0x2190),
    (0x3000, 0x3100),
    (0x4E00, 0x4F00),
    (0xAC00, 0xAD00),
    (0xE000, 0xE010),
    (0xFB00, 0xFF00),
    (0x1D400, 0x1D800),
    (0x1F300, 0x1F700),
    (0xE0000, 0xE0100),
    (0x10FF00, 0x110000),
]
SNIPPETS = [
    "'s",
    "'ll",
    "'RE",
    " ",
    "  ",
    "\n",
    "\r\n",
    "\t",
    "word",
    " word",
    "123",
    "...",
    END_TOKEN,
    "\u200d",
]


class SlowReference:
    """BPE from the file alone, merging all places of the best pair, one pair at a time."""

    def __init__(self):
        lines = (
            resources.files("gpt2jax").joinpath("assets", "vocab.bpe").read_text("utf-8").split("\n")[1:-1]
        )
        visible = [
            *range(ord("!"), ord("~") + 1),
            *range(ord("¡"), ord("¬") + 1),
            *range(ord("®"), ord("ÿ") + 1),
        ]
        self.char = {byte: chr(byte) for byte in visible}
        for byte in range(256):
            if byte not in self.char:
                self.char[byte] = chr(256 + len(self.char) - len(visible))
        self.rank = {tuple(line.split()): rank for rank, line in enumerate(lines)}
        names = [*self.char.values(), *("".join(line.split()) for line in lines), END_TOKEN]
        self.id = {name: id_ for id_, name in enumerate(names)}

    def encode(self, text: str) -> list[int]:
        ids = []
        for piece in ORIGINAL_PATTERN.findall(text):
            word = [self.char[byte] for byte in piece.encode()]
            while len(word) > 1:
                best = min(itertools.pairwise(word), key=lambda pair: self.rank.get(pair, 10**9))
                if best not in self.rank:
                    break
                merged, i = [], 0
                while i < len(word):
                    hit = tuple(word[i : i + 2]) == best
                    merged.append("".join(word[i : i + 1 + hit]))
                    i += 1 + hit
                word = merged
            ids += [self.id[part] for part in word]
        return ids


@pytest.fixture(scope="module")
def reference() -> SlowReference:
    return SlowReference()


def random_text(rng: random.Random) -> str:
    parts = []
    for _ in range(rng.randrange(1, 12)):
        if rng.random() < 0.4:
            parts.append(rng.choice(SNIPPETS) * rng.choice([1, 1, 1, 2, 5]))
        else:
            start, stop = rng.choice(REGIONS)
            parts.append("".join(chr(rng.randrange(start, stop)) for _ in range(rng.randrange(1, 8))))
    return "".join(parts)


@pytest.mark.parametrize("entry", GOLDEN, ids=lambda entry: repr(entry["text"][:20]))
def test_encode_gives_the_ids_of_transformers(entry):
    tokenizer = Tokenizer.gpt2()
    assert tokenizer.encode(entry["text"]) == entry["ids"]
    assert tokenizer.encode(entry["text"], allow_special=True) == entry["ids_with_special"]
    assert tokenizer.decode(entry["ids"]) == entry["text"]


def test_encode_known_ids():
    assert Tokenizer.gpt2().encode("Hello world") == [15496, 995]
    assert Tokenizer.gpt2().end_token_id == 50256
    assert Tokenizer.gpt2().decode([50256]) == END_TOKEN


def test_encode_equals_the_reference_on_random_unicode(reference):
    tokenizer = Tokenizer.gpt2()
    rng = random.Random(0)
    for _ in range(3000):
        text = random_text(rng)
        ids = tokenizer.encode(text)
        assert ids == reference.encode(text), text
        assert tokenizer.decode_bytes(ids) == text.encode()


def test_encode_equals_the_reference_on_every_white_space(reference):
    tokenizer = Tokenizer.gpt2()
    spaces = [chr(code) for code in range(0x3001) if chr(code).isspace() or regex.match(r"\s", chr(code))]
    assert len(spaces) >= 25
    for space in spaces:
        for text in (space, space * 3, f"a{space}b", f"a{space * 2}b", f"{space} {space}x", f"x {space}"):
            assert tokenizer.encode(text) == reference.encode(text), text


def test_gpt2_vocabulary_is_that_of_openai(tmp_path):
    save_tokenizer(Tokenizer.gpt2(), tmp_path)
    vocabulary = json.loads((tmp_path / "vocab.json").read_text())
    canonical = json.dumps(vocabulary, sort_keys=True, separators=(",", ":"))
    assert hashlib.sha256(canonical.encode()).hexdigest() == ENCODER_SHA256
    assert len(vocabulary) == 50257


@pytest.mark.parametrize("vocab_size", [257, 300, 4096, 50256])
def test_gpt2_smaller_vocabulary_is_a_prefix(vocab_size):
    small, full = Tokenizer.gpt2(vocab_size), Tokenizer.gpt2()
    assert small.vocab_size == vocab_size
    assert small.end_token_id == vocab_size - 1
    rng = random.Random(1)
    for text in [random_text(rng) for _ in range(200)]:
        ids = small.encode(text)
        assert all(id_ < vocab_size - 1 for id_ in ids)
        assert small.decode_bytes(ids) == text.encode()
    assert [small.decode_bytes([id_]) for id_ in range(vocab_size - 1)] == [
        full.decode_bytes([id_]) for id_ in range(vocab_size - 1)
    ]


def test_gpt2_smallest_vocabulary_gives_bytes():
    assert len(Tokenizer.gpt2(257).encode("日本")) == 6


@pytest.mark.parametrize("vocab_size", [0, 256, 50258])
def test_gpt2_refuses_other_vocabulary_sizes(vocab_size):
    with pytest.raises(ValueError, match=f"vocab_size must be .*257 to 50257, got {vocab_size}"):
        Tokenizer.gpt2(vocab_size)


def test_gpt2_refuses_damaged_merges(monkeypatch, tmp_path):
    data = resources.files("gpt2jax").joinpath("assets", "vocab.bpe").read_bytes()
    assert hashlib.sha256(data).hexdigest() == VOCAB_BPE_SHA256
    (tmp_path / "assets").mkdir()
    (tmp_path / "assets" / "vocab.bpe").write_bytes(data[:1000] + b"x" + data[1001:])
    monkeypatch.setattr("gpt2jax.tokenizer.bpe.resources.files", lambda package: tmp_path)
    with pytest.raises(ValueError, match="vocab.bpe is damaged"):
        Tokenizer.gpt2.__wrapped__(300)


def test_encode_replaces_lone_surrogates():
    tokenizer = Tokenizer.gpt2()
    assert tokenizer.decode(tokenizer.encode("a\ud800b\udfff")) == "a\ufffdb\ufffd"
    assert tokenizer.decode(tokenizer.encode("\ud83d\ude00")) == "😀"
    assert tokenizer.encode("\ud800", allow_special=True) == tokenizer.encode("\ufffd")


@pytest.mark.parametrize(
    "text",
    [
        " " * 100_000,
        " " * 1_200_000 + "x",
        "\n" * 100_000 + "x",
        "a" * 100_000,
        "1" * 100_000,
        "é" * 100_000,
        "!" * 100_000,
    ],
    ids=lambda text: f"{len(text)}x{text[0]!r}",
)
def test_encode_long_runs_are_fast(text):
    tokenizer = Tokenizer.gpt2()
    start = time.process_time()
    ids = tokenizer.encode(text)
    assert time.process_time() - start < 3
    assert tokenizer.decode(ids) == text


@pytest.mark.parametrize("tail", ["", "x", "!x", "\n", "\u3000y"])
@pytest.mark.parametrize("space", [" ", "\n", "\u3000", " \n"])
def test_encode_splits_long_runs_as_the_pattern_does(space, tail, monkeypatch):
    text = "begin" + space * 3000 + tail + space * 2999 + "end"
    whole = Tokenizer.gpt2().encode(text)
    monkeypatch.setattr("gpt2jax.tokenizer.cutting.LONG_RUN", 1000)
    pattern = regex.compile(r"(?<!\s)\s{1000,}+(?=\S)")
    monkeypatch.setattr("gpt2jax.tokenizer.cutting.LONG_SPACE", pattern)
    assert len(pattern.findall(text)) >= 1
    assert Tokenizer.gpt2().encode(text) == whole


def test_encode_batch_equals_encode():
    tokenizer = Tokenizer.gpt2(4096)
    rng = random.Random(2)
    texts = [random_text(rng) for _ in range(500)]
    assert tokenizer.encode_batch(texts) == [tokenizer.encode(text) for text in texts]
    assert tokenizer.encode_batch(iter(texts), num_threads=3) == tokenizer.encode_batch(texts, num_threads=1)
    assert tokenizer.encode_batch([]) == []


def test_encode_names_wrong_types():
    tokenizer = Tokenizer.gpt2()
    with pytest.raises(TypeError, match="text must be a str, got 3"):
        tokenizer.encode(3)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="got None"):
        tokenizer.encode_batch(["a", None])  # type: ignore[list-item]
    with pytest.raises(TypeError, match="use encode"):
        tokenizer.encode_batch("text")


@pytest.mark.parametrize("id_", [-1, 4096, 10**12])
def test_decode_names_an_id_out_of_range(id_):
    with pytest.raises(ValueError, match=f"token id must be in the vocabulary, 0 to 4095, got {id_}"):
        Tokenizer.gpt2(4096).decode([5, id_])


def test_decode_takes_arrays_and_parts_of_characters():
    tokenizer = Tokenizer.gpt2()
    ids = np.asarray(tokenizer.encode("日本語"), np.uint16)
    assert tokenizer.decode(ids) == "日本語"
    assert "\ufffd" in tokenizer.decode(tokenizer.encode("😀")[:1])
    assert tokenizer.decode([]) == ""


def test_fingerprint_differs_between_tokenizers():
    sizes = [257, 4096, 50257]
    assert len({Tokenizer.gpt2(size).fingerprint for size in sizes}) == 3
    assert pickle.loads(pickle.dumps(Tokenizer.gpt2(300))).fingerprint == Tokenizer.gpt2(300).fingerprint


def test_gpt2_loads_fast():
    start = time.process_time()
    Tokenizer.gpt2.__wrapped__()
    assert time.process_time() - start < 1.5  # 0.1 s on an idle machine


@pytest.mark.parametrize("text", ["a b\nc", "a  b", "a\u3042 b"])
def test_parse_merges_names_the_line(text):
    with pytest.raises(ValueError, match="line [12] of the merges"):
        parse_merges(text + "\n")


@pytest.mark.parametrize(
    "unit",
    ["a", " b a", "-'s", "''", "ACGT", "ab", "日本語", "😀", "it's 1--é\n", "word and ", "\n", " "],
    ids=ascii,
)
def test_encode_cuts_long_words_without_a_change(monkeypatch, unit):
    tokenizer, generator = Tokenizer.gpt2(), random.Random(0)
    texts = ["b " + unit * (4000 // len(unit)) + unit[0] * 3000 + "'s z"]
    texts.append("".join(generator.choice(unit) for _ in range(9000)).replace(" ", "a"))
    texts.append("".join(generator.choice(unit) for _ in range(9000)))
    expected = [tokenizer.encode(text) for text in texts]
    monkeypatch.setattr(cutting, "LONG_RUN", 500)
    monkeypatch.setattr(cutting, "WINDOW", 1000)
    monkeypatch.setattr(cutting, "LONG_WORD", re.compile(r"\S{1000,}+|\s{1000,}+"))
    assert [tokenizer.encode(text) for text in texts] == expected
    assert all(
        len(cutting.find_cuts(text, tokenizer._encoding.encode_ordinary, tokenizer._lengths)) > 2
        for text in texts
    )


def test_with_end_token_says_that_a_text_becomes_a_token():
    with pytest.warns(Notice, match="'<end>' is not a token yet: it becomes one, with the id 300"):
        assert Tokenizer.gpt2(300).with_end_token("<end>").end_token_id == 300


@pytest.mark.parametrize("end_token", ["", "\ud800", 2**70, -1, None])
def test_with_end_token_refuses_what_is_no_token(end_token):
    with pytest.raises(ValueError, match="end_token must be"):
        Tokenizer.gpt2(300).with_end_token(end_token)
