from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest

from gpt2jax.tokenizer.bpe import BYTE_ORDER, END_TOKEN, Tokenizer
from gpt2jax.tokenizer.files import load_tokenizer, save_tokenizer
from gpt2jax.utils.notices import Notice

TEXTS = ["Hello world", "  def f(x):\n    return x\n", "naïve 日本 😀", f"a{END_TOKEN}b", "", "it's 1234"]


@pytest.fixture
def saved(tmp_path) -> Path:
    save_tokenizer(Tokenizer.gpt2(1000), tmp_path)
    return tmp_path


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def assert_same(tokenizer: Tokenizer, other: Tokenizer) -> None:
    assert tokenizer.fingerprint == other.fingerprint
    for text in TEXTS:
        assert tokenizer.encode(text) == other.encode(text)
        assert tokenizer.encode(text, allow_special=True) == other.encode(text, allow_special=True)


@pytest.mark.slow
@pytest.mark.parametrize("vocab_size", [257, 4096, 50257])
def test_save_tokenizer_round_trip(tmp_path, vocab_size):
    save_tokenizer(Tokenizer.gpt2(vocab_size), tmp_path)
    assert_same(load_tokenizer(tmp_path), Tokenizer.gpt2(vocab_size))
    (tmp_path / "tokenizer.json").unlink()
    assert_same(load_tokenizer(tmp_path), Tokenizer.gpt2(vocab_size))
    (tmp_path / "tokenizer_config.json").unlink()
    (tmp_path / "special_tokens_map.json").unlink()
    assert_same(load_tokenizer(str(tmp_path)), Tokenizer.gpt2(vocab_size))


def test_load_tokenizer_from_tokenizer_json_alone(saved):
    for file in saved.iterdir():
        if file.name != "tokenizer.json":
            file.unlink()
    assert_same(load_tokenizer(saved), Tokenizer.gpt2(1000))


def test_load_tokenizer_merges_as_pairs(saved):
    fast = json.loads((saved / "tokenizer.json").read_text())
    fast["model"]["merges"] = [merge.split(" ") for merge in fast["model"]["merges"]]
    (saved / "tokenizer.json").write_text(json.dumps(fast))
    assert_same(load_tokenizer(saved), Tokenizer.gpt2(1000))


@pytest.mark.parametrize(
    ("vocabulary", "merges"),
    [
        ("encoder.json", "vocab.bpe"),
        ("vocabulary.json", "merges.txt"),
        ("assets/tokenizer/vocabulary.json", "assets/tokenizer/merges.txt"),
    ],
)
def test_load_tokenizer_file_names_of_openai_and_keras(saved, tmp_path_factory, vocabulary, merges):
    folder = tmp_path_factory.mktemp("other")
    (folder / vocabulary).parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(saved / "vocab.json", folder / vocabulary)
    shutil.copy(saved / "merges.txt", folder / merges)
    # Keras has a file of this name that is something else.
    (folder / "tokenizer.json").write_text('{"class_name": "GPT2Tokenizer", "config": {}}')
    assert_same(load_tokenizer(folder), Tokenizer.gpt2(1000))


def test_load_tokenizer_windows_line_ends(saved):
    (saved / "tokenizer.json").unlink()
    merges = saved / "merges.txt"
    merges.write_bytes(merges.read_bytes().replace(b"\n", b"\r\n"))
    assert_same(load_tokenizer(saved), Tokenizer.gpt2(1000))


def test_load_tokenizer_names_missing_files(saved, tmp_path_factory):
    (saved / "tokenizer.json").unlink()
    (saved / "merges.txt").unlink()
    with pytest.raises(FileNotFoundError, match="has vocab.json but no merges.txt"):
        load_tokenizer(saved)
    with pytest.raises(
        FileNotFoundError, match=r"neither tokenizer.json nor one of vocab.json \+ merges.txt"
    ):
        load_tokenizer(tmp_path_factory.mktemp("empty"))
    with pytest.raises(FileNotFoundError, match="not a folder"):
        load_tokenizer(saved / "absent")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"normalizer": {"type": "NFC"}}, "normalizer must be None.*NFC"),
        ({"pre_tokenizer": {"type": "Whitespace"}}, "pre_tokenizer.type must be 'ByteLevel'.*'Whitespace'"),
        ({"pre_tokenizer": None}, "pre_tokenizer.type must be .*got None"),
        ({"model": {"vocab": [], "merges": []}}, "model.vocab must be a dict"),
        ({"model": {"vocab": {}, "merges": [["a"]]}}, "a merge must be a pair"),
        ({"model": {"vocab": {"a": 10**12}, "merges": []}}, "the id of 'a' must be a whole number from 0"),
        ({"model": []}, "model must be an object"),
        ({"added_tokens": [5]}, "an added token is damaged"),
        ({"model": {"type": "WordPiece", "vocab": {}}}, "model.type must be 'BPE'.*'WordPiece'"),
    ],
)
def test_load_tokenizer_refuses_other_kinds(saved, change, message):
    edit(saved / "tokenizer.json", **change)
    with pytest.raises(ValueError, match=message):
        load_tokenizer(saved)


def test_load_tokenizer_damaged_json(saved):
    (saved / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match="tokenizer.json is damaged: it is not JSON"):
        load_tokenizer(saved)


def test_load_tokenizer_end_token_without_id(saved, tmp_path_factory):
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        edit(saved / name, eos_token="<stop>")
    with pytest.warns(Notice, match="'<stop>' has no id.*transformers would add it as id 1000.*--end-token"):
        tokenizer = load_tokenizer(saved)
    assert tokenizer.end_token is None and tokenizer.end_token_id is None
    named = load_tokenizer(saved, end_token="<stop>")
    assert named.end_token_id == 1000 and named.vocab_size == 1001
    assert named.encode("a<stop>", allow_special=True)[-1] == 1000
    again = tmp_path_factory.mktemp("again")
    save_tokenizer(named, again)
    assert load_tokenizer(again).fingerprint == named.fingerprint
    assert load_tokenizer(saved, end_token=" t").end_token_id == tokenizer.encode(" t")[0]
    assert load_tokenizer(saved, end_token=5).end_token == "&"
    with pytest.raises(ValueError, match="end_token must be a whole number from 0 to 999, got 1000"):
        load_tokenizer(saved, end_token=1000)


def test_load_tokenizer_reads_a_file(saved, tmp_path_factory):
    plain = Tokenizer.gpt2(1000)
    for name in ("tokenizer.json", "vocab.json", "merges.txt"):
        assert_same(load_tokenizer(saved / name), plain)
    shutil.copy(saved / "tokenizer.json", saved / "mine.json")
    assert_same(load_tokenizer(saved / "mine.json"), plain)
    with pytest.raises(ValueError, match=r"tokenizer_config.json is not a tokenizer; expected a folder"):
        load_tokenizer(saved / "tokenizer_config.json")


def test_load_tokenizer_refuses_merges_cut_off(saved):
    (saved / "tokenizer.json").unlink()
    merges = (saved / "merges.txt").read_text("utf-8").split("\n")
    for kept in (18, 700):
        (saved / "merges.txt").write_text("\n".join(merges[:kept]), "utf-8")
        with pytest.raises(
            ValueError, match=f"the merges are cut off after {kept - 1}: .*no merge makes, first"
        ):
            load_tokenizer(saved)


def test_load_tokenizer_refuses_a_huge_id(saved):
    fast = json.loads((saved / "tokenizer.json").read_text())
    fast["model"]["vocab"]["&"] = 800_000_000
    (saved / "tokenizer.json").write_text(json.dumps(fast))
    with pytest.raises(ValueError, match="the id of '&' must be a whole number from 0 to .*, got 800000000"):
        load_tokenizer(saved)


def test_save_tokenizer_keeps_what_it_does_not_use(saved, tmp_path_factory):
    edit(saved / "tokenizer_config.json", chat_template="{{ x }}", padding_side="left")
    (saved / "chat_template.jinja").write_text("{{ y }}")
    again = tmp_path_factory.mktemp("again")
    save_tokenizer(load_tokenizer(saved), again)
    config = json.loads((again / "tokenizer_config.json").read_text())
    assert config["chat_template"] == "{{ x }}" and config["padding_side"] == "left"
    assert (again / "chat_template.jinja").read_text() == "{{ y }}"


def test_save_tokenizer_keeps_special_and_added_tokens(saved, tmp_path_factory):
    fast = json.loads((saved / "tokenizer.json").read_text())
    flags = {"lstrip": False, "rstrip": False, "single_word": False, "normalized": False}
    fast["added_tokens"] += [
        {"id": 1000, "content": "<pad>", "special": True, **flags},
        {"id": 1001, "content": "newword", "special": False, **flags},
    ]
    (saved / "tokenizer.json").write_text(json.dumps(fast))
    edit(saved / "tokenizer_config.json", pad_token={"content": "<pad>"})
    tokenizer = load_tokenizer(saved)
    assert tokenizer.vocab_size == 1002
    assert tokenizer.roles["pad_token"] == "<pad>"
    assert tokenizer.special_tokens == {END_TOKEN: 999, "<pad>": 1000}
    assert tokenizer.encode("<pad>", allow_special=True) == [1000]
    assert 1000 not in tokenizer.encode("<pad>")
    assert 1001 in tokenizer.encode("a newword!")
    again = tmp_path_factory.mktemp("again")
    save_tokenizer(tokenizer, again)
    assert_same(load_tokenizer(again), tokenizer)
    assert load_tokenizer(again).roles == tokenizer.roles
    (again / "tokenizer.json").unlink()
    assert_same(load_tokenizer(again), tokenizer)


def write_pair(folder: Path, vocabulary: dict[str, int], merges: list[str]) -> Path:
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n")
    return folder


def test_load_tokenizer_ids_that_are_not_ranks(saved):
    """Vocabularies made by others begin with the special tokens, or are in another order."""
    (saved / "tokenizer.json").unlink()
    vocabulary = json.loads((saved / "vocab.json").read_text())
    order = list(range(1000))
    random.Random(0).shuffle(order)
    edit(saved / "tokenizer_config.json", added_tokens_decoder={})
    (saved / "vocab.json").write_text(json.dumps({token: order[id_] for token, id_ in vocabulary.items()}))
    shuffled, plain = load_tokenizer(saved), Tokenizer.gpt2(1000)
    for text in TEXTS:
        assert shuffled.encode(text) == [order[id_] for id_ in plain.encode(text)]
        assert shuffled.encode(text, True) == [order[id_] for id_ in plain.encode(text, True)]
        assert shuffled.decode(shuffled.encode(text)) == text
    assert shuffled.end_token_id == order[999]


def test_encode_leaves_out_bytes_that_the_vocabulary_lacks(tmp_path):
    vocabulary = {"<s>": 0, "a": 1, "b": 2, "ab": 3, "unreachable": 4, "名": 5, END_TOKEN: 6}
    tokenizer = load_tokenizer(write_pair(tmp_path, vocabulary, ["a b"]))
    assert tokenizer.encode("abcba") == [3, 2, 1]
    assert tokenizer.decode([4, 5, 3]) == "unreachable名ab"
    assert tokenizer.vocab_size == 7


def test_load_tokenizer_refuses_merges_not_learned(tmp_path):
    vocabulary = {token: id_ for id_, token in enumerate(["a", "b", "c", "ab", "bc", "abc", END_TOKEN])}
    # "abc" comes down to a + bc by the earlier merges: the pair listed for it never meets.
    write_pair(tmp_path, vocabulary, ["b c", "a b", "ab c"])
    with pytest.raises(ValueError, match="not those of a learned byte-pair encoding: b'abc'"):
        load_tokenizer(tmp_path)
    write_pair(tmp_path, vocabulary, ["b c", "a b", "a bc"])
    assert load_tokenizer(tmp_path).encode("abc") == [5]


def test_load_tokenizer_merge_without_id(tmp_path):
    write_pair(tmp_path, {"a": 0, "b": 1, END_TOKEN: 2}, ["a b"])
    with pytest.raises(ValueError, match="1 merges make tokens without an id, first b'ab'"):
        load_tokenizer(tmp_path)


def test_encode_prefix_space(saved):
    fast = json.loads((saved / "tokenizer.json").read_text())
    fast["pre_tokenizer"]["add_prefix_space"] = True
    (saved / "tokenizer.json").write_text(json.dumps(fast))
    tokenizer, plain = load_tokenizer(saved), Tokenizer.gpt2(1000)
    assert tokenizer.encode("the end") == plain.encode(" the end")
    assert tokenizer.encode(" the end") == plain.encode(" the end")
    assert tokenizer.encode("\nthe") == plain.encode(" \nthe")
    assert tokenizer.fingerprint != plain.fingerprint


def test_tokenizer_refuses_clashing_definitions():
    with pytest.raises(ValueError, match="token id 5 is given to both"):
        Tokenizer([], special_tokens={END_TOKEN: 5})
    with pytest.raises(ValueError, match="two merges make the same token"):
        Tokenizer([(b"a", b"b"), (b"ab", b"c"), (b"b", b"c"), (b"a", b"bc")])
    with pytest.raises(ValueError, match="token_ids must be 256 ids, .*got 3"):
        Tokenizer([], token_ids=[1, 2, 3])
    with pytest.raises(ValueError, match="end_token must be one of .*got '<x>'"):
        Tokenizer([], special_tokens={END_TOKEN: 256}, end_token="<x>")
    assert Tokenizer([]).encode("!") == [BYTE_ORDER.index(b"!")]


def test_save_tokenizer_max_length(tmp_path):
    save_tokenizer(Tokenizer.gpt2(300), tmp_path, max_length=64)
    assert json.loads((tmp_path / "tokenizer_config.json").read_text())["model_max_length"] == 64


@pytest.mark.parametrize("value", [{"a": 1}, {"content": 5}, 5, ["<s>"], True])
def test_load_tokenizer_with_a_damaged_role(saved, value):
    edit(saved / "tokenizer_config.json", bos_token=value)
    with pytest.raises(
        ValueError, match="bos_token of the tokenizer's settings must be a text, or an object"
    ):
        load_tokenizer(saved)


def test_load_tokenizer_names_a_pointer_to_the_merges(saved):
    (saved / "tokenizer.json").unlink()
    (saved / "merges.txt").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 3\n")
    with pytest.raises(ValueError, match=r"merges.txt is a Git LFS pointer: fetch the file itself"):
        load_tokenizer(saved)


def test_load_tokenizer_without_tokens(saved):
    (saved / "tokenizer.json").unlink()
    (saved / "vocab.json").write_text("{}")
    (saved / "merges.txt").write_text("#version: 0.2\n")
    with pytest.raises(ValueError, match=f"^{saved}: the vocabulary of the tokenizer is empty"):
        load_tokenizer(saved)


def test_load_tokenizer_reads_merges_with_line_ends_of_windows(saved):
    (saved / "tokenizer.json").unlink()
    expected = load_tokenizer(saved)
    merges = (saved / "merges.txt").read_bytes()
    (saved / "merges.txt").write_bytes(merges.replace(b"\n", b"\r\n"))
    assert_same(load_tokenizer(saved), expected)


@pytest.mark.parametrize(
    "post_processor",
    [
        {
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": END_TOKEN}}, {"Sequence": {"id": "A"}}],
        },
        {"type": "Sequence", "processors": [{"type": "ByteLevel"}, {"type": "RobertaProcessing"}]},
        None,
    ],
)
def test_load_tokenizer_says_which_tokens_are_not_added(saved, post_processor):
    if post_processor is None:
        edit(saved / "tokenizer_config.json", add_bos_token=True)
    else:
        edit(saved / "tokenizer.json", post_processor=post_processor)
    with pytest.warns(Notice, match="put tokens before or behind each text .*; here none are added"):
        assert load_tokenizer(saved).encode("a") == [64]
