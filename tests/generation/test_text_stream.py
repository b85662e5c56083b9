"""Text as it comes: streams, characters of several tokens, and stop strings."""

from __future__ import annotations

import numpy as np
import pytest
from generation_models import TOKENIZER, speller, steep_model

from gpt2jax.generation.generate import generate, stream
from gpt2jax.generation.text_stream import IncrementalDetokenizer


@pytest.fixture(scope="module")
def model():
    return steep_model()


TEXT = "naïve 日本語 text…\n\nend. 🙂🙂 done"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stops", "want"),
    [
        ("end", "naïve 日本語 text…\n\n"),
        (["本"], "naïve 日"),
        (["🙂 d", "zzz"], "naïve 日本語 text…\n\nend. 🙂"),
        (["\n\n", "ve 日"], "naï"),
        (["n"], ""),
        (["absent", "done!"], TEXT),
        (["done"], TEXT[:-4]),
        ([TEXT], ""),
        (("…", "text…"), "naïve 日本語 "),
        ([], TEXT),
    ],
    ids=str,
)
def test_stop_strings_cut_exactly(stops, want):
    """Whatever the borders of tokens: each of these characters is several tokens, and the stops span them."""
    ids = TOKENIZER.encode(TEXT)
    assert len(ids) > 30
    model = speller(ids)
    settings = {"max_new_tokens": len(ids), "stop_strings": stops, "do_sample": False}
    (output,) = generate(model, [[1]], **settings)
    assert output.text == want
    assert output.finish_reason == ("length" if want == TEXT else "stop")
    assert len(output.logprobs) == len(output.token_ids)
    # the tokens are as few as hold the text
    assert TOKENIZER.decode_bytes(output.token_ids).startswith(want.encode())
    assert not output.token_ids or len(TOKENIZER.decode_bytes(output.token_ids[:-1])) < len(want.encode())
    pieces = list(stream(model, [1], **settings))
    assert "".join(pieces) == want
    assert all(pieces)


@pytest.mark.slow
def test_stop_strings_in_a_batch():
    ids = TOKENIZER.encode("abc def ghi jkl mno pqr")
    model = speller(ids, prompt_length=2)
    outputs = generate(
        model, [[1] * 2, [1] * 3, [1] * 6], max_new_tokens=12, do_sample=False, stop_strings=["f", "kl"]
    )
    for output, start in zip(outputs, (0, 1, 4), strict=True):
        whole = TOKENIZER.decode(ids[start : start + 12])
        ends = [whole.index(stop) for stop in ("f", "kl") if stop in whole]
        assert output.text == whole[: min(ends, default=None)]
        assert output.finish_reason == ("stop" if ends else "length")


@pytest.mark.parametrize("settings", [{"do_sample": False}, {}, {"top_k": None, "temperature": 1.5}], ids=str)
def test_stream_gives_the_text_of_generate(model, settings):
    """Random tokens of a byte-level vocabulary: much of it is no UTF-8 at all."""
    settings = {"max_new_tokens": 40, "seed": 11, "stop_token_ids": [], **settings}
    (output,) = generate(model, "hello", **settings)
    pieces = stream(model, "hello", **settings)
    assert pieces.generation is None
    assert "".join(pieces) == output.text
    assert pieces.generation == output


@pytest.mark.slow
def test_stream_cuts_between_characters():
    ids = TOKENIZER.encode("日本語 🙂 é")
    pieces = list(stream(speller(ids), [1], max_new_tokens=len(ids), do_sample=False))
    assert pieces == ["日", "本", "語", " ", "🙂", " ", "é"]


def test_stream_of_a_cut_character():
    ids = TOKENIZER.encode("a🙂")
    pieces = list(stream(speller(ids), [1], max_new_tokens=len(ids) - 1, do_sample=False))
    assert "".join(pieces) == TOKENIZER.decode(ids[:-1]) == "a\ufffd"


def test_stream_shows_no_beginning_of_a_stop_string():
    ids = TOKENIZER.encode("one STO two STOP three")
    pieces = list(stream(speller(ids), [1], max_new_tokens=len(ids), do_sample=False, stop_strings=["STOP"]))
    assert "".join(pieces) == "one STO two "
    shown = ["".join(pieces[: i + 1]) for i in range(len(pieces))]
    assert not any(text.endswith(("S", "ST", "STO")) for text in shown)


def test_stream_raises_at_the_call(model):
    with pytest.raises(ValueError, match="^temperature"):
        stream(model, "a", temperature=-1)
    with pytest.raises(ValueError, match="one prompt, got 2"):
        stream(model, ["a", "b"])  # type: ignore[arg-type]


def test_text_stream_equals_one_shot_decoding():
    """Any bytes in any pieces, valid UTF-8 or not."""
    rng = np.random.default_rng(0)
    alphabet = [
        b"a",
        b"\xe2",
        b"\x82",
        b"\xac",
        b"\xf0",
        b"\x9f",
        b"\x99",
        b"\xc3",
        b"\xa9",
        b"\xff",
        "é".encode(),
    ]
    for _ in range(500):
        tokens = [alphabet[i] for i in rng.integers(0, len(alphabet), rng.integers(0, 12))]
        text, pieces = IncrementalDetokenizer(), []
        for token in tokens:
            text.add(token)
            pieces.append(text.flush())
        pieces.append(text.flush(last=True))
        assert "".join(pieces) == b"".join(tokens).decode("utf-8", errors="replace")
        assert text.tokens == len(tokens)
