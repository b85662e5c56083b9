"""Special and added tokens: where they are found in a text, and how they are kept in files."""

from __future__ import annotations

import dataclasses
import json
import warnings
from typing import Any

import pytest

from gpt2jax.tokenizer.added_tokens import TokenFinder, TokenFlags
from gpt2jax.tokenizer.bpe import END_TOKEN, Tokenizer
from gpt2jax.tokenizer.files import load_tokenizer, save_tokenizer

BASE = Tokenizer.gpt2(300)


def split(text: str, parse_special: bool = True, special: tuple[str, ...] = (), **flags: Any) -> list[str]:
    """Return the parts, tokens in brackets."""
    parts = TokenFinder(flags, special).split(text, parse_special=parse_special)
    return [f"[{part}]" if is_token else part for part, is_token in parts]


def tokenizer_with(**flags: TokenFlags) -> Tokenizer:
    ids = {token: 300 + number for number, token in enumerate(flags)}
    return Tokenizer(BASE.merges, special_tokens={END_TOKEN: 299}, added_tokens=ids, token_flags=flags)


@pytest.mark.parametrize(
    ("flags", "text", "parts"),
    [
        ({}, "a  X  b", ["a  ", "[X]", "  b"]),
        ({"lstrip": True}, "a \n X  b", ["a", "[X]", "  b"]),
        ({"rstrip": True}, "a  X \u3000b", ["a  ", "[X]", "b"]),
        ({"rstrip": True}, "X\x1cb", ["[X]", "\x1cb"]),
        ({"lstrip": True, "rstrip": True}, "X  X  ", ["[X]", "[X]"]),
        ({"single_word": True}, "aX X Xb X_ (X) X²", ["aX ", "[X]", " Xb X_ (", "[X]", ") ", "[X]", "²"]),
        ({"single_word": True}, "X\u0301 X\u200d", ["X\u0301 X\u200d"]),
    ],
)
def test_token_finder_follows_flags(flags, text, parts):
    assert split(text, X=TokenFlags(**flags)) == parts


@pytest.mark.parametrize(
    ("flags", "parts"),
    [
        ({}, ["[X]", "[ ]", "[ ]", "b"]),
        ({"rstrip": True}, ["[X]", "[ ]", "[ ]", "b"]),
        ({"lstrip": True, "rstrip": True}, ["[X]", "b"]),
    ],
)
def test_token_finder_shares_white_space_as_tokenizers_does(flags, parts):
    tokens: dict[str, Any] = {"X": TokenFlags(rstrip=True), " ": TokenFlags(**flags)}
    assert split("X  b", **tokens) == parts


def test_token_finder_longest_token_first():
    plain = TokenFlags()
    assert split("newwordnewwordsne", new=plain, newwords=plain, newword=plain) == [
        "[newword]",
        "[newwords]",
        "ne",
    ]
    normalized = TokenFlags(normalized=True)
    assert split("abc", bc=plain, abc=normalized) == ["a", "[bc]"]


def test_token_finder_leaves_special_tokens_as_text():
    flags: dict[str, Any] = {"<s>": TokenFlags(), "word": TokenFlags()}
    assert split("a<s>word", special=("<s>",), parse_special=False, **flags) == ["a<s>", "[word]"]
    assert split("a<s>word", special=("<s>",), **flags) == ["a", "[<s>]", "[word]"]
    finder = TokenFinder(flags, ("<s>",))
    assert finder.find_special("x<s>") == "<s>" and finder.find_special("word") is None
    assert TokenFinder({}, ()).find_special("x") is None


def test_encode_parses_special_tokens_if_asked():
    text = f"a{END_TOKEN}b"
    assert BASE.encode(text) == BASE.encode(text, allow_special=False)
    parsing = BASE.with_special_tokens("parse")
    assert parsing.encode(text) == BASE.encode(text, allow_special=True) == [64, 299, 65]
    assert parsing.encode_batch([text]) == [[64, 299, 65]]
    assert parsing.fingerprint != BASE.fingerprint == parsing.with_special_tokens("text").fingerprint
    with pytest.raises(ValueError, match="special_tokens must be one of text, parse, got 'yes'"):
        BASE.with_special_tokens("yes")  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("encode", ["encode", "encode_batch"])
def test_encode_says_once_that_a_special_token_is_read_as_text(encode):
    text = f"a{END_TOKEN}b"
    texts = [text] if encode == "encode_batch" else text
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        for _ in range(3):
            getattr(BASE, encode)(texts)
    assert [str(one.message) for one in caught] == [
        "a text holds the special token '<|endoftext|>', which is read as plain characters; "
        'special_tokens="parse" (--special-tokens parse) reads it as the token'
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        BASE.encode(text, allow_special=False)
        BASE.encode("<|end")
        getattr(BASE.with_special_tokens("parse"), encode)(texts)


def test_encode_prefix_space_after_each_token():
    tokenizer = Tokenizer(BASE.merges, added_tokens={"X": 300}, add_prefix_space=True)
    assert tokenizer.encode("aXb") == [*BASE.encode(" a"), 300, *BASE.encode(" b")]


def test_save_tokenizer_keeps_flags(tmp_path):
    fields = [field.name for field in dataclasses.fields(TokenFlags)]
    tokenizer = tokenizer_with(**{f"tok{i}": TokenFlags(**{name: True}) for i, name in enumerate(fields)})
    save_tokenizer(tokenizer, tmp_path)
    assert load_tokenizer(tmp_path).token_flags == tokenizer.token_flags
    (tmp_path / "tokenizer.json").unlink()
    again = load_tokenizer(tmp_path)
    assert again.token_flags == tokenizer.token_flags and again.fingerprint == tokenizer.fingerprint


def test_load_tokenizer_tokens_of_older_files(tmp_path):
    """Tokens of added_tokens.json have no flags; those with a role are special."""
    save_tokenizer(BASE, tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).unlink()
    (tmp_path / "added_tokens.json").write_text('{"<pad>": 300, "new": 301}')
    roles = {"eos_token": END_TOKEN, "pad_token": {"content": "<pad>", "lstrip": True}}
    (tmp_path / "special_tokens_map.json").write_text(json.dumps(roles))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.special_tokens == {END_TOKEN: 299, "<pad>": 300}
    assert tokenizer.added_tokens == {"new": 301}
    assert tokenizer.token_flags["<pad>"] == TokenFlags()
    assert tokenizer.token_flags["new"] == TokenFlags(normalized=True)
