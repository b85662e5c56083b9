"""The saved files, read by transformers and by tokenizers themselves."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from gpt2jax.tokenizer.added_tokens import TokenFlags
from gpt2jax.tokenizer.bpe import END_TOKEN, Tokenizer
from gpt2jax.tokenizer.files import load_tokenizer, save_tokenizer
from gpt2jax.utils.notices import Notice

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
        assert ours.encode(text, allow_special=True) == theirs.encode(text).ids
    save_tokenizer(ours, tmp_path / "again")
    assert load_tokenizer(tmp_path / "again").fingerprint == ours.fingerprint


# no white space alone: after a token with rstrip their library panics over it ("AddedVocabulary bad split")
SPELLINGS = [
    *("<mask>", "[X]", "new", "newword", "words", "ab", "\u00e9t\u00e9", "_u", "\u65e5\u672c", "<|im_end|>"),
    *("b c", "1", "in", "\u0301", "don't", "new words", "a|b", ".*", "(x)", "[^a]", "\\d", "$", "a+", "x{2}"),
]
FLAGS = ("lstrip", "rstrip", "single_word", "normalized")


def flagged_tokenizer(folder: Path, seed: int) -> tuple[list[str], Any]:
    """Save a tokenizer with random tokens of random flags by transformers; return their texts and theirs."""
    rng = random.Random(seed)
    save_tokenizer(Tokenizer.gpt2(400), folder / "plain")
    theirs = transformers.GPT2TokenizerFast.from_pretrained(
        str(folder / "plain"), add_prefix_space=bool(seed % 5 == 4)
    )
    chosen = rng.sample(SPELLINGS, 6)
    for text in chosen:
        flags = {name: rng.random() < 0.4 for name in FLAGS}
        special = rng.random() < 0.5
        theirs.add_tokens([tokenizers.AddedToken(text, special=special, **flags)], special_tokens=special)
    if seed % 2:
        theirs.add_special_tokens({"pad_token": tokenizers.AddedToken("<pad>", rstrip=seed % 4 == 1)})
        chosen.append("<pad>")
    theirs.save_pretrained(str(folder))
    return chosen, theirs


def texts_with(tokens: list[str], seed: int) -> list[str]:
    rng = random.Random(seed)
    between = [
        *(
            "",
            " ",
            "  ",
            "\n",
            "\u3000 ",
            "a",
            "_",
            "\u00e9",
            "\u0301",
            "\u200d",
            "\u00b2",
            "\x1c",
            ".",
            " b",
        ),
        *(END_TOKEN, "nEw", "ab", "\u24b6", "\u2160", "\u203f", "\u0967"),
    ]
    pools = [tokens, between]
    return ["".join(rng.choice(rng.choice(pools)) for _ in range(rng.randrange(1, 12))) for _ in range(200)]


@pytest.mark.parametrize("fast_file", [True, False])
@pytest.mark.parametrize("seed", range(20))
def test_added_tokens_are_found_as_transformers_finds_them(tmp_path, seed, fast_file):
    tokens, theirs = flagged_tokenizer(tmp_path, seed)
    if not fast_file:  # the files of the class without tokenizer.json
        save_tokenizer(load_tokenizer(tmp_path), tmp_path / "slow")
        (tmp_path / "slow" / "tokenizer.json").unlink()
        tmp_path /= "slow"
        theirs = transformers.GPT2Tokenizer.from_pretrained(str(tmp_path))
    ours = load_tokenizer(tmp_path)
    for text in [*texts_with(tokens, seed), *TEXTS]:
        assert ours.encode(text, allow_special=True) == theirs.encode(text), (text, ours.token_flags)
    plain = type(theirs).from_pretrained(str(tmp_path), split_special_tokens=True)
    for text in texts_with(tokens, seed + 100):
        assert ours.encode(text) == plain.encode(text), (text, ours.token_flags)


@pytest.mark.parametrize("seed", range(10))
def test_tokens_of_older_files_are_found_as_transformers_finds_them(tmp_path, seed):
    """Tokens in vocab.json, added_tokens.json and special_tokens_map.json, as version 4 wrote them without others."""
    rng = random.Random(seed)
    save_tokenizer(Tokenizer.gpt2(400), tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    vocabulary = json.loads((tmp_path / "vocab.json").read_text())
    chosen = rng.sample([text for text in SPELLINGS if text not in vocabulary], 6)
    roles: dict[str, Any] = {"eos_token": END_TOKEN, "bos_token": END_TOKEN, "unk_token": END_TOKEN}
    for role, text in zip(("pad_token", "sep_token", "mask_token"), chosen, strict=False):
        flags = {name: rng.random() < 0.4 for name in FLAGS}
        roles[role] = rng.choice([text, {"content": text, **flags}])
    in_vocabulary = rng.randrange(4)
    vocabulary |= {text: 400 + number for number, text in enumerate(chosen[:in_vocabulary])}
    added = {text: 400 + number for number, text in enumerate(chosen) if number >= in_vocabulary}
    contents = {
        "vocab": vocabulary,
        "added_tokens": added,
        "special_tokens_map": roles,
        "tokenizer_config": {},
    }
    for name, content in contents.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    theirs, ours = transformers.GPT2Tokenizer.from_pretrained(str(tmp_path)), load_tokenizer(tmp_path)
    for text in [*texts_with(chosen, seed), *TEXTS]:
        assert ours.encode(text, allow_special=True) == theirs.encode(text), (text, ours.token_flags)


class SlowTokenizer(transformers.PythonBackend):
    """transformers' class in Python, which finds the tokens; between them ours encodes."""

    def __init__(self, base: Tokenizer, **kwargs: Any):
        self.base = base
        super().__init__(**kwargs)

    @property
    def vocab_size(self) -> int:
        return self.base.vocab_size

    def get_vocab(self) -> dict[str, int]:
        return {f"#{i}": i for i in range(self.base.vocab_size)} | self.added_tokens_encoder

    def _tokenize(self, text: str, **kwargs: Any) -> list[str]:
        return [f"#{i}" for i in self.base.encode(text)]

    def _convert_token_to_id(self, token: str) -> int:
        return int(token[1:])


@pytest.mark.parametrize("seed", range(20))
def test_added_tokens_are_found_as_the_slow_class_finds_them(seed):
    """Without single_word and normalized, of which the slow class knows other rules than all fast ones."""
    rng = random.Random(seed)
    base = Tokenizer.gpt2(400)
    theirs = SlowTokenizer(base)
    chosen = rng.sample(SPELLINGS, 6)
    flags = {text: TokenFlags(lstrip=rng.random() < 0.4, rstrip=rng.random() < 0.4) for text in chosen}
    special = set(rng.sample(chosen, 3))
    for text, value in flags.items():
        token = tokenizers.AddedToken(text, special=text in special, normalized=False, **_strips(value))
        theirs.add_tokens([token], special_tokens=text in special)
    ids = theirs.added_tokens_encoder
    ours = Tokenizer(
        base.merges,
        special_tokens={END_TOKEN: 399} | {text: ids[text] for text in chosen if text in special},
        added_tokens={text: ids[text] for text in chosen if text not in special},
        token_flags=flags,
    )
    for text in texts_with(chosen, seed):
        text = text.replace("\x1c", "").replace(
            END_TOKEN, ""
        )  # white space only of Python; not a token of theirs
        theirs_ids = theirs.convert_tokens_to_ids(theirs.tokenize(text))
        assert ours.encode(text, allow_special=True) == theirs_ids, (text, flags)


def _strips(flags: TokenFlags) -> dict[str, bool]:
    return {"lstrip": flags.lstrip, "rstrip": flags.rstrip}


def test_end_token_that_transformers_adds(tmp_path):
    """What the notice says of a vocabulary without an end token, and that an option does the same."""
    save_tokenizer(Tokenizer(Tokenizer.gpt2(400).merges, end_token=None), tmp_path)
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        (tmp_path / name).unlink()
    theirs = transformers.GPT2Tokenizer.from_pretrained(str(tmp_path))
    with pytest.warns(Notice, match=f"transformers would add it as id {theirs.eos_token_id}"):
        assert load_tokenizer(tmp_path).end_token_id is None
    assert load_tokenizer(tmp_path, end_token=END_TOKEN).end_token_id == theirs.eos_token_id == 399


def test_chat_template_and_padding_survive(tmp_path):
    theirs = transformers.GPT2TokenizerFast.from_pretrained(str(_saved(tmp_path / "plain")))
    theirs.chat_template = "{{ messages[0].content }}"
    theirs.save_pretrained(str(tmp_path))
    save_tokenizer(load_tokenizer(tmp_path), tmp_path / "again")
    again = transformers.AutoTokenizer.from_pretrained(str(tmp_path / "again"))
    assert again.chat_template == theirs.chat_template


def _saved(folder: Path) -> Path:
    save_tokenizer(Tokenizer.gpt2(400), folder)
    return folder
