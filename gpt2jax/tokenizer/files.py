"""Tokenizer files: the layouts of Hugging Face, OpenAI and Keras are read; that of Hugging Face is written."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import NoneType
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
from gpt2jax.utils.json_files import Kind, read_json
from gpt2jax.utils.validation import check, int_in_range, must_be

# (vocabulary, merges) of Hugging Face, OpenAI's release, a Keras preset and its folder above.
VOCABULARY_FILES = (
    ("vocab.json", "merges.txt"),
    ("encoder.json", "vocab.bpe"),
    ("vocabulary.json", "merges.txt"),
    ("assets/tokenizer/vocabulary.json", "assets/tokenizer/merges.txt"),
)
# how readers look for an unsplit token in a text
FLAGS = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
MAX_ID = 10_000_000  # a damaged id must not ask for memory
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
    config = _read_optional(folder / "tokenizer_config.json", {"added_tokens_decoder": dict})
    roles = _read_roles(folder, config)
    kinds = {"model": dict, "added_tokens": list, "pre_tokenizer": (dict, NoneType)}
    fast = _read_optional(folder / "tokenizer.json", kinds)
    if "model" in fast:  # Keras writes a tokenizer.json of another kind
        vocabulary, merges = _read_fast(folder / "tokenizer.json", fast)
        prefix_space = bool(fast["pre_tokenizer"].get("add_prefix_space", True))
    else:
        vocabulary, merges = _read_vocabulary(folder)
        prefix_space = bool(config.get("add_prefix_space", False))
    special, added = _read_unsplit_tokens(folder, fast, config, vocabulary, roles)
    end_token = roles.get("eos_token", END_TOKEN)
    if end_token not in special:
        raise ValueError(f"{folder}: the end token {end_token!r} has no id in the vocabulary")
    _check_merges(folder, merges)
    try:
        return _build(vocabulary, merges, special, added, end_token, roles, prefix_space)
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from None


def save_tokenizer(
    tokenizer: Tokenizer, folder: str | os.PathLike[str], *, max_length: int | None = None
) -> None:
    """Write the files from which transformers, tokenizers and `load_tokenizer` make the same tokenizer.

    Args:
        tokenizer: the tokenizer.
        folder: made if absent; `vocab.json`, `merges.txt`, `tokenizer.json`, `tokenizer_config.json` and
            `special_tokens_map.json` in it are replaced.
        max_length: the model's context in tokens, for readers that warn above it.
    """
    unsplit = {
        token: (id_, token in tokenizer.special_tokens)
        for token, id_ in {**tokenizer.special_tokens, **tokenizer.added_tokens}.items()
    }
    texts = {id_: token for token, (id_, _) in unsplit.items()}
    vocabulary = {texts.get(id_, token_chars(token)): id_ for id_, token in tokenizer.tokens()}
    merges = [f"{token_chars(left)} {token_chars(right)}" for left, right in tokenizer.merges]
    contents = {
        "vocab.json": json.dumps(vocabulary, ensure_ascii=False),
        "merges.txt": "\n".join(["#version: 0.2", *merges, ""]),
        "tokenizer.json": json.dumps(_fast(tokenizer, unsplit, vocabulary, merges), ensure_ascii=False),
        "tokenizer_config.json": _indented(_config(tokenizer, unsplit, max_length)),
        "special_tokens_map.json": _indented(tokenizer.roles),
    }
    for name, content in contents.items():
        with atomic_write(Path(folder) / name) as file:
            file.write(content)


def _indented(content: Mapping[str, Any]) -> str:
    return json.dumps(content, ensure_ascii=False, indent=2) + "\n"


def _config(
    tokenizer: Tokenizer, unsplit: Mapping[str, tuple[int, bool]], max_length: int | None
) -> dict[str, Any]:
    """Return the content of tokenizer_config.json; `unsplit` is text -> (id, whether it is special)."""
    return {
        "tokenizer_class": "GPT2Tokenizer",
        "add_prefix_space": tokenizer.add_prefix_space,
        "added_tokens_decoder": {
            str(id_): {"content": token, **FLAGS, "special": special}
            for token, (id_, special) in unsplit.items()
        },
        "clean_up_tokenization_spaces": False,
        "errors": "replace",
        **tokenizer.roles,
        **({} if max_length is None else {"model_max_length": max_length}),
    }


def _fast(
    tokenizer: Tokenizer,
    unsplit: Mapping[str, tuple[int, bool]],
    vocabulary: Mapping[str, int],
    merges: Sequence[str],
) -> dict[str, Any]:
    """Return the content of tokenizer.json; `unsplit` is text -> (id, whether it is special)."""
    byte_level = {"type": "ByteLevel", "trim_offsets": True, "use_regex": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": id_, "content": token, **FLAGS, "special": special}
            for token, (id_, special) in sorted(unsplit.items(), key=lambda item: item[1])
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


def _read_optional(path: Path, kinds: Mapping[str, Kind] | None = None) -> dict[str, Any]:
    """Return a JSON object, {} if there is no such file; `kinds` as `optional` of `read_json`."""
    return read_json(path, optional=kinds) if path.is_file() else {}


def _read_roles(folder: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """Return special tokens by role; in the files a token is its text, or an object with its text in "content"."""
    named = {**_read_optional(folder / "special_tokens_map.json"), **config}
    texts = {role: named[role] for role in ROLES if named.get(role)}
    return {role: str(text["content"] if isinstance(text, dict) else text) for role, text in texts.items()}


def _read_vocabulary(folder: Path) -> tuple[dict[str, int], list[Merge]]:
    for vocabulary, merges in VOCABULARY_FILES:
        if (folder / vocabulary).is_file() and (folder / merges).is_file():
            try:
                return read_json(folder / vocabulary), parse_merges((folder / merges).read_text("utf-8"))
            except ValueError as error:
                raise ValueError(
                    str(error) if str(folder) in str(error) else f"{folder / merges}: {error}"
                ) from None
    pairs = ", ".join(" + ".join(pair) for pair in VOCABULARY_FILES)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is not a folder with a tokenizer in it")
    for pair in VOCABULARY_FILES:
        for here, other in (pair, pair[::-1]):
            if (folder / here).is_file():
                raise FileNotFoundError(f"{folder} has {here} but no {other}")
    raise FileNotFoundError(f"{folder} has no tokenizer: neither tokenizer.json nor one of {pairs}")


def _read_fast(file: Path, fast: Mapping[str, Any]) -> tuple[dict[str, int], list[Merge]]:
    """Return (vocabulary, merges) of a tokenizer.json; raise ValueError unless the rest of it is as in GPT-2's."""
    model, splitter = fast["model"], fast.get("pre_tokenizer") or {}
    supported = {
        "model.type": (model.get("type", "BPE"), ("BPE",)),
        "model.dropout": (model.get("dropout"), (None, 0, 0.0)),
        "model.byte_fallback": (model.get("byte_fallback", False), (False,)),
        "model.continuing_subword_prefix": (model.get("continuing_subword_prefix"), (None, "")),
        "model.end_of_word_suffix": (model.get("end_of_word_suffix"), (None, "")),
        "normalizer": (fast.get("normalizer"), (None,)),
        "pre_tokenizer.type": (splitter.get("type"), ("ByteLevel",)),
        "pre_tokenizer.use_regex": (splitter.get("use_regex", True), (True,)),
    }
    for name, (value, legal) in supported.items():
        if value not in legal:
            raise ValueError(must_be(f"{file}: {name}", f"{legal[0]!r} as in GPT-2's byte-level BPE", value))
    for name, kind in (("vocab", dict), ("merges", list)):
        if not isinstance(model.get(name), kind):
            raise ValueError(must_be(f"{file}: model.{name}", f"a {kind.__name__}", model.get(name)))
    return model["vocab"], [_parse_merge(file, entry) for entry in model["merges"]]


def _parse_merge(file: Path, entry: Any) -> Merge:
    """Return a merge of a tokenizer.json, which is "a b" in older files, ["a", "b"] in newer ones."""
    texts = entry.split(" ") if isinstance(entry, str) else entry
    if isinstance(texts, list) and len(texts) == 2 and all(isinstance(text, str) for text in texts):
        left, right = map(token_bytes, texts)
        if left and right:
            return left, right
    raise ValueError(must_be(f"{file}: a merge", "a pair of byte-level tokens", entry))


def _read_unsplit_tokens(
    folder: Path,
    fast: Mapping[str, Any],
    config: Mapping[str, Any],
    vocabulary: Mapping[str, int],
    roles: Mapping[str, str],
) -> tuple[dict[str, int], dict[str, int]]:
    """Return (special, added) tokens, text to id, from all files that name them."""
    special: dict[str, int] = {}
    added: dict[str, int] = dict(_read_optional(folder / "added_tokens.json"))
    try:
        entries = [
            *((entry, int(entry["id"])) for entry in fast.get("added_tokens", [])),
            *((entry, int(id_)) for id_, entry in config.get("added_tokens_decoder", {}).items()),
        ]
        for entry, id_ in entries:
            (special if entry.get("special") else added)[str(entry["content"])] = id_
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{folder}: an added token is damaged: {error!r:.100}") from None
    for token in (*roles.values(), END_TOKEN):
        if token in vocabulary:
            special[token] = vocabulary[token]
        elif token in added:
            special[token] = added[token]
    return special, {token: id_ for token, id_ in added.items() if token not in special}


def _build(
    vocabulary: Mapping[str, int],
    merges: Sequence[Merge],
    special: Mapping[str, int],
    added: Mapping[str, int],
    end_token: str,
    roles: Mapping[str, str],
    prefix_space: bool,
) -> Tokenizer:
    for token, id_ in (*vocabulary.items(), *special.items(), *added.items()):
        check(f"the id of {token!r:.60}", id_, int_in_range(0, MAX_ID))
    id_of: dict[bytes, int] = {}
    unreachable: dict[int, bytes] = {}
    for token, id_ in vocabulary.items():
        if token in special or token in added:
            continue
        written = token_bytes(token)
        if written is None:  # a name that was added by hand
            unreachable[id_] = token.encode()
        else:
            id_of[written] = id_
    lacking = [left + right for left, right in merges if left + right not in id_of]
    if lacking:
        raise ValueError(f"{len(lacking)} merges make tokens without an id, first {lacking[0]!r}")
    names = [bytes([byte]) for byte in BYTE_ORDER] + [left + right for left, right in merges]
    unreachable.update((id_of[token], token) for token in id_of.keys() - set(names))
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


def _check_merges(folder: Path, merges: Sequence[Merge]) -> None:
    """Raise ValueError for merges that tiktoken would apply in another way.

    A merges file allows the pairs that it lists; tiktoken joins any two neighbours whose bytes are a token. Both
    agree if the earlier merges alone turn each token's bytes into the pair listed for it. That is so for merges
    that were learned from a text, but not for all lists that were made by hand.
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
