"""A tokenizer as files: the layouts of Hugging Face, OpenAI and Keras read, that of Hugging Face written."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gpt2jax.tokenizer.bpe import (
    BYTE_ORDER,
    END_TOKEN,
    Merge,
    Tokenizer,
    parse_merges,
    token_bytes,
    token_chars,
)
from gpt2jax.utils.atomic_io import atomic_write

# (vocabulary, merges) of Hugging Face, OpenAI's release, a Keras preset and its folder above.
VOCABULARY_FILES = (
    ("vocab.json", "merges.txt"),
    ("encoder.json", "vocab.bpe"),
    ("vocabulary.json", "merges.txt"),
    ("assets/tokenizer/vocabulary.json", "assets/tokenizer/merges.txt"),
)
ROLES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


def load_tokenizer(path: str | os.PathLike[str]) -> Tokenizer:
    """Load the tokenizer saved in a folder.

    Reads `tokenizer.json`, or `vocab.json` with `merges.txt` (also under the names that OpenAI and Keras
    give them), and the special tokens named beside them.

    Raises:
        FileNotFoundError: the folder has none of these; the message names them.
        ValueError: the files do not describe a byte-level BPE with GPT-2's pattern.
    """
    folder = Path(path)
    config = _read_json(folder / "tokenizer_config.json")
    roles = _read_roles(folder, config)
    fast = _read_json(folder / "tokenizer.json")
    if "model" in fast:  # Keras writes a tokenizer.json of another kind
        model = _check_fast(folder, fast)
        vocabulary, merges = model["vocab"], [_merge(folder, entry) for entry in model["merges"]]
        prefix_space = bool(fast["pre_tokenizer"].get("add_prefix_space", True))
    else:
        vocabulary, merges = _read_vocabulary(folder)
        prefix_space = bool(config.get("add_prefix_space", False))
    special, added = _whole_tokens(folder, fast, config, vocabulary, roles)
    end_token = roles.get("eos_token", END_TOKEN)
    if end_token not in special:
        raise ValueError(f"{folder}: the end token {end_token!r} has no id in the vocabulary")
    return _build(folder, vocabulary, merges, special, added, end_token, roles, prefix_space)


def save_tokenizer(
    tokenizer: Tokenizer, folder: str | os.PathLike[str], *, max_length: int | None = None
) -> None:
    """Write the files from which transformers, tokenizers and `load_tokenizer` make the same tokenizer.

    Args:
        tokenizer: what to write.
        folder: made if absent; `vocab.json`, `merges.txt`, `tokenizer.json`, `tokenizer_config.json` and
            `special_tokens_map.json` in it are replaced.
        max_length: the model's context in tokens, for readers that warn above it.
    """
    whole = {
        token: (id_, token in tokenizer.special_tokens)
        for token, id_ in {**tokenizer.special_tokens, **tokenizer.added_tokens}.items()
    }
    texts = {id_: token for token, (id_, _) in whole.items()}
    vocabulary = {texts.get(id_, token_chars(token)): id_ for id_, token in tokenizer.tokens()}
    merges = [f"{token_chars(left)} {token_chars(right)}" for left, right in tokenizer.merges]
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    config: dict[str, Any] = {
        "tokenizer_class": "GPT2Tokenizer",
        "add_prefix_space": tokenizer.add_prefix_space,
        "added_tokens_decoder": {
            str(id_): {"content": token, **flags, "special": special}
            for token, (id_, special) in whole.items()
        },
        "clean_up_tokenization_spaces": False,
        "errors": "replace",
        **tokenizer.roles,
    }
    if max_length is not None:
        config["model_max_length"] = max_length
    byte_level = {"type": "ByteLevel", "trim_offsets": True, "use_regex": True}
    fast = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": id_, "content": token, **flags, "special": special}
            for token, (id_, special) in sorted(whole.items(), key=lambda item: item[1])
        ],
        "normalizer": None,
        "pre_tokenizer": {**byte_level, "add_prefix_space": tokenizer.add_prefix_space},
        "post_processor": {**byte_level, "add_prefix_space": True, "trim_offsets": False},
        "decoder": {**byte_level, "add_prefix_space": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": "",
            "end_of_word_suffix": "",
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": vocabulary,
            "merges": merges,
        },
    }
    contents = {
        "vocab.json": json.dumps(vocabulary, ensure_ascii=False),
        "merges.txt": "\n".join(["#version: 0.2", *merges, ""]),
        "tokenizer.json": json.dumps(fast, ensure_ascii=False),
        "tokenizer_config.json": json.dumps(config, ensure_ascii=False, indent=2) + "\n",
        "special_tokens_map.json": json.dumps(tokenizer.roles, ensure_ascii=False, indent=2) + "\n",
    }
    for name, content in contents.items():
        with atomic_write(Path(folder) / name) as file:
            file.write(content)


def _read_json(path: Path) -> dict[str, Any]:
    """A JSON object, {} when there is no such file."""
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON in UTF-8: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds a {type(value).__name__} where an object is expected")
    return value


def _read_roles(folder: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """Special tokens by role; a token is written as its text, or as an object with its text in "content"."""
    named = {**_read_json(folder / "special_tokens_map.json"), **config}
    texts = {role: named[role] for role in ROLES if named.get(role)}
    return {role: text["content"] if isinstance(text, dict) else str(text) for role, text in texts.items()}


def _read_vocabulary(folder: Path) -> tuple[dict[str, int], list[Merge]]:
    for vocabulary, merges in VOCABULARY_FILES:
        if (folder / vocabulary).is_file() and (folder / merges).is_file():
            text = (folder / merges).read_text("utf-8")
            return _read_json(folder / vocabulary), parse_merges(text)
    pairs = ", ".join(" + ".join(pair) for pair in VOCABULARY_FILES)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is not a folder with a tokenizer in it")
    for pair in VOCABULARY_FILES:
        for here, other in (pair, pair[::-1]):
            if (folder / here).is_file():
                raise FileNotFoundError(f"{folder} has {here} but no {other}")
    raise FileNotFoundError(f"{folder} has no tokenizer: neither tokenizer.json nor one of {pairs}")


def _check_fast(folder: Path, fast: Mapping[str, Any]) -> Mapping[str, Any]:
    """The model of a tokenizer.json, when all around it is as in GPT-2's."""
    model, splitter = fast["model"], fast.get("pre_tokenizer") or {}
    wanted = {
        "model.type": (model.get("type", "BPE"), ("BPE",)),
        "model.dropout": (model.get("dropout"), (None, 0, 0.0)),
        "model.byte_fallback": (model.get("byte_fallback", False), (False,)),
        "model.continuing_subword_prefix": (model.get("continuing_subword_prefix"), (None, "")),
        "model.end_of_word_suffix": (model.get("end_of_word_suffix"), (None, "")),
        "normalizer": (fast.get("normalizer"), (None,)),
        "pre_tokenizer.type": (splitter.get("type"), ("ByteLevel",)),
        "pre_tokenizer.use_regex": (splitter.get("use_regex", True), (True,)),
    }
    for name, (value, legal) in wanted.items():
        if value not in legal:
            file = folder / "tokenizer.json"
            raise ValueError(f"{file}: {name} is {value!r}, where GPT-2's byte-level BPE has {legal[0]!r}")
    return model


def _merge(folder: Path, entry: str | Sequence[str]) -> Merge:
    """A merge of a tokenizer.json: "a b" in older files, ["a", "b"] in newer ones."""
    pair = [token_bytes(token) for token in (entry.split(" ") if isinstance(entry, str) else entry)]
    if len(pair) != 2 or not pair[0] or not pair[1]:
        raise ValueError(
            f"{folder / 'tokenizer.json'}: a merge is not a pair of byte-level tokens: {entry!r}"
        )
    return pair[0], pair[1]


def _whole_tokens(
    folder: Path,
    fast: Mapping[str, Any],
    config: Mapping[str, Any],
    vocabulary: Mapping[str, int],
    roles: Mapping[str, str],
) -> tuple[dict[str, int], dict[str, int]]:
    """(special, other) tokens that are never split, text to id, from all places that name them."""
    special: dict[str, int] = {}
    added: dict[str, int] = dict(_read_json(folder / "added_tokens.json"))
    entries = [
        *((entry, int(entry["id"])) for entry in fast.get("added_tokens", [])),
        *((entry, int(id_)) for id_, entry in config.get("added_tokens_decoder", {}).items()),
    ]
    for entry, id_ in entries:
        (special if entry.get("special") else added)[entry["content"]] = id_
    for token in (*roles.values(), END_TOKEN):
        if token in vocabulary:
            special[token] = vocabulary[token]
        elif token in added:
            special[token] = added[token]
    return special, {token: id_ for token, id_ in added.items() if token not in special}


def _build(
    folder: Path,
    vocabulary: Mapping[str, int],
    merges: Sequence[Merge],
    special: Mapping[str, int],
    added: Mapping[str, int],
    end_token: str,
    roles: Mapping[str, str],
    prefix_space: bool,
) -> Tokenizer:
    plain = {token: id_ for token, id_ in vocabulary.items() if token not in special and token not in added}
    id_of: dict[bytes, int] = {}
    unreachable: dict[int, bytes] = {}
    for token, id_ in plain.items():
        written = token_bytes(token)
        if written is None:  # a name put there by hand
            unreachable[id_] = token.encode()
        else:
            id_of[written] = id_
    lacking = [left + right for left, right in merges if left + right not in id_of]
    if lacking:
        raise ValueError(f"{folder}: {len(lacking)} merges make tokens without an id, first {lacking[0]!r}")
    _check_merges(folder, merges)
    names = [bytes([byte]) for byte in BYTE_ORDER] + [left + right for left, right in merges]
    unreachable.update((id_of[token], token) for token in id_of.keys() - set(names))
    try:
        return Tokenizer(
            merges,
            token_ids=[id_of.get(token, -1) for token in names],
            special_tokens=special,
            added_tokens=added,
            unreachable_tokens=unreachable,
            end_token=end_token,
            roles=roles,
            add_prefix_space=prefix_space,
        )
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from None


def _check_merges(folder: Path, merges: Sequence[Merge]) -> None:
    """Refuse merges of which tiktoken would make something else.

    A merges file allows the pairs it lists; tiktoken joins any two neighbours whose bytes are a token. That
    is the same if each token's bytes, merged by the earlier merges alone, come down to the pair listed for
    it. It is so for merges that were learned from a text, not for lists put together by hand.
    """
    known = Tokenizer.gpt2().merges
    same = 0
    while same < min(len(known), len(merges)) and merges[same] == known[same]:
        same += 1
    ranks = {left + right: rank for rank, (left, right) in enumerate(merges)}
    for rank, (left, right) in enumerate(merges[same:], start=same):
        parts = [bytes([byte]) for byte in left + right]
        while len(parts) > 2:
            best, at = min((ranks.get(parts[i] + parts[i + 1], rank), i) for i in range(len(parts) - 1))
            if best >= rank:
                break
            parts[at : at + 2] = [parts[at] + parts[at + 1]]
        if parts != [left, right]:
            raise ValueError(
                f"{folder}: the merges are not those of a learned byte-pair encoding: {left + right!r} is "
                f"listed as {left!r} + {right!r}, but the merges before it give {parts!r}"
            )
