"""The saved files, read by transformers and by tokenizers themselves."""

from __future__ import annotations

import random

import pytest

from gpt2jax.tokenizer.bpe import END_TOKEN, Tokenizer
from gpt2jax.tokenizer.files import load_tokenizer, save_tokenizer

transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")

TEXTS = [
    "Hello world",
    "",
    "  it's\n\n  naïve 日本 😀 123  ",
    f"a {END_TOKEN} b",
    "x\r\n\ty",
    "\u3000 \x85\x1c.",
]


def random_texts() -> list[str]:
    rng = random.Random(3)
    pools = ["abc ABC'st .,!?\n\t", "  \n\u00a0\u3000x", "äöüßéñ çα ж я", "日本語한국 عربي", "😀👨‍👩‍👧 1²½"]
    return ["".join(rng.choice(rng.choice(pools)) for _ in range(rng.randrange(1, 60))) for _ in range(300)]


@pytest.mark.parametrize("vocab_size", [300, 4096, 50257])
@pytest.mark.parametrize("fast_file", [True, False])
def test_transformers_reads_what_we_save(tmp_path, vocab_size, fast_file):
    ours = Tokenizer.gpt2(vocab_size)
    save_tokenizer(ours, tmp_path, max_length=77)
    if not fast_file:
        (tmp_path / "tokenizer.json").unlink()
    for kind in (transformers.GPT2TokenizerFast, transformers.AutoTokenizer):
        theirs = kind.from_pretrained(str(tmp_path))
        assert len(theirs) == vocab_size
        assert theirs.eos_token_id == theirs.bos_token_id == ours.end_token_id
        assert theirs.model_max_length == 77
        for text in TEXTS + random_texts():
            ids = theirs.encode(text)
            assert ids == ours.encode(text, allow_special=True), text
            assert theirs.decode(ids, clean_up_tokenization_spaces=False) == ours.decode(ids)


def test_tokenizers_reads_what_we_save(tmp_path):
    ours = Tokenizer.gpt2(4096)
    save_tokenizer(ours, tmp_path)
    theirs = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    for text in TEXTS + random_texts():
        assert theirs.encode(text).ids == ours.encode(text, allow_special=True)


@pytest.mark.parametrize("prefix_space", [True, False])
def test_we_read_what_tokenizers_trains(tmp_path, prefix_space):
    """A vocabulary in another order, special tokens first, learned by another program."""
    theirs = tokenizers.ByteLevelBPETokenizer(add_prefix_space=prefix_space)
    corpus = TEXTS + random_texts() + [transformers.__doc__ or "", tokenizers.__doc__ or ""]
    theirs.train_from_iterator(corpus, 1500, 2, special_tokens=["<s>", "<pad>", END_TOKEN, "<mask>"])
    theirs.save(str(tmp_path / "tokenizer.json"))
    ours = load_tokenizer(tmp_path)
    for text in corpus:
        if prefix_space and END_TOKEN in text:
            continue  # theirs puts a space after a special token, too
        assert ours.encode(text, allow_special=True) == theirs.encode(text).ids
    save_tokenizer(ours, tmp_path / "again")
    assert load_tokenizer(tmp_path / "again").fingerprint == ours.fingerprint
