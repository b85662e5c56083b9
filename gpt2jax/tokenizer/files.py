"""Tokenizer files: the layouts of Hugging Face, OpenAI and Keras are read; that of Hugging Face is written."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import NoneType
from typing import Any

from gpt2jax.tokenizer.added_tokens import TokenFlags
from gpt2jax.tokenizer.bpe import (
    BYTE_ORDER,
    END_TOKEN,
    Merge,
    Tokenizer,
    token_bytes,
    token_chars,
)
from gpt2jax.tokenizer.vocabulary import (
    VOCABULARY_FILES,
    check_complete,
    check_merges,
    check_tokens,
    read_fast,
    read_vocabulary,
)
from gpt2jax.utils.atomic_io import atomic_write
from gpt2jax.utils.json_files import Kind, read_json
from gpt2jax.utils.notices import notice
from gpt2jax.utils.validation import check, int_in_range, must_be

MAX_ID = 10_000_000  # a damaged id must not ask for memory
ROLES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
EXTRA_ROLES = ("additional_special_tokens", "extra_special_tokens")  # lists, in old and new files
CHAT_TEMPLATE = "chat_template.jinja"
# what `save_tokenizer` writes itself, and names of files and classes that are not written
_OWN_SETTINGS = {
    *(
        "tokenizer_class",
        "add_prefix_space",
        "added_tokens_decoder",
        "clean_up_tokenization_spaces",
        "errors",
    ),
    *("model_max_length", "auto_map", "name_or_path", "tokenizer_file", "vocab_file", "merges_file"),
    *("special_tokens_map_file", "backend", "is_local", "local_files_only", *ROLES),
}


def load_tokenizer(path: str | os.PathLike[str], *, end_token: str | int | None = None) -> Tokenizer:
    """Load the tokenizer saved in a folder, or in a file of one.

    Reads `tokenizer.json`, or `vocab.json` with `merges.txt` (also under the names that OpenAI and Keras
    give them), and the special tokens named beside them. If none of these ends a text, the tokenizer has no end token,
    and a notice says so.

    Args:
        path: a folder; a tokenizer.json under any name; or a vocabulary or merges file beside its other half.
        end_token: text or id of the token that ends a text, see `Tokenizer.with_end_token`. Default: the files' own.

    Raises:
        FileNotFoundError: nothing lies there, or a file is missing; the message names it.
        ValueError: the files do not describe a byte-level BPE with GPT-2's pattern.
    """
    folder, fast_file = _find_files(Path(path))
    config = _read_optional(folder / "tokenizer_config.json", {"added_tokens_decoder": dict})
    roles = _read_roles(folder, config)
    kinds = {"model": dict, "added_tokens": list, "pre_tokenizer": (dict, NoneType)}
    fast = _read_optional(fast_file, kinds)
    if "model" in fast:  # Keras writes a tokenizer.json of another kind
        vocabulary, merges = read_fast(fast_file, fast)
        prefix_space = bool(fast["pre_tokenizer"].get("add_prefix_space", True))
    else:
        vocabulary, merges = read_vocabulary(folder)
        prefix_space = bool(config.get("add_prefix_space", False))
    if config.get("add_bos_token") or not _adds_nothing(fast.get("post_processor")):
        notice(
            f"{folder}: the tokenizer's files put tokens before or behind each text (add_bos_token, post_processor); "
            "here none are added"
        )
    if not vocabulary:
        raise ValueError(f"{folder}: the vocabulary of the tokenizer is empty")
    unsplit = _read_unsplit_tokens(folder, fast, config, vocabulary, roles)
    legal_id = int_in_range(0, MAX_ID)
    for token, id_ in (*vocabulary.items(), *((token, entry.id) for token, entry in unsplit.items())):
        if type(id_) is not int or not 0 <= id_ <= MAX_ID:
            check(f"{folder}: the id of {token!r:.60}", id_, legal_id)
    own_end = roles.get("eos_token", END_TOKEN)
    if own_end not in unsplit:
        if end_token is None:
            count = 1 + max((*vocabulary.values(), *(entry.id for entry in unsplit.values())))
            notice(
                f"{folder}: the tokenizer has no end token: {own_end!r} has no id in its vocabulary "
                f"(transformers would add it as id {count}); name one with end_token=... (--end-token)"
            )
        own_end = None
    check_tokens(folder, (*vocabulary, *unsplit), merges)
    check_merges(folder, merges)
    try:
        tokenizer = _build(vocabulary, merges, unsplit, own_end, roles, prefix_space)
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from None
    tokenizer.extras |= _read_extras(folder, config)
    return tokenizer if end_token is None else tokenizer.with_end_token(end_token)


def _adds_nothing(post_processor: Any) -> bool:
    """Return whether what a tokenizer.json does behind the encoding leaves the ids of a text as they are."""
    if not isinstance(post_processor, dict):
        return True
    if isinstance(parts := post_processor.get("processors"), list):
        return all(map(_adds_nothing, parts))
    single = post_processor.get("single")
    return post_processor.get("type") == "ByteLevel" or (isinstance(single, list) and len(single) == 1)


def _find_files(path: Path) -> tuple[Path, Path]:
    """Return the folder of a tokenizer, and the tokenizer.json in it, which need not exist."""
    if not path.is_file():
        return path, path / "tokenizer.json"
    halves = {Path(name).name for pair in VOCABULARY_FILES for name in pair}
    if path.name in halves:
        return path.parent, path.parent / "tokenizer.json"
    if path.suffix != ".json" or "model" not in read_json(path):
        known = ", ".join(["tokenizer.json", *sorted(halves)])
        raise ValueError(f"{path} is not a tokenizer; expected a folder with one, or a file such as {known}")
    return path.parent, path


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
        str(id_): {
            "content": token,
            **dataclasses.asdict(tokenizer.token_flags[token]),
            "special": token in tokenizer.special_tokens,
        }
        for token, id_ in {**tokenizer.special_tokens, **tokenizer.added_tokens}.items()
    }
    vocabulary = {
        unsplit[str(id_)]["content"] if str(id_) in unsplit else token_chars(token): id_
        for id_, token in tokenizer.tokens()
    }
    merges = [f"{token_chars(left)} {token_chars(right)}" for left, right in tokenizer.merges]
    extras = dict(tokenizer.extras)
    template = extras.pop(CHAT_TEMPLATE, None)
    config = extras | _config(tokenizer, unsplit, max_length)
    contents = {
        "vocab.json": json.dumps(vocabulary, ensure_ascii=False),
        "merges.txt": "\n".join(["#version: 0.2", *merges, ""]),
        "tokenizer.json": json.dumps(_fast(tokenizer, unsplit, vocabulary, merges), ensure_ascii=False),
        "tokenizer_config.json": _indented(config),
        "special_tokens_map.json": _indented(tokenizer.roles),
        **({} if template is None else {CHAT_TEMPLATE: str(template)}),
    }
    for name, content in contents.items():
        with atomic_write(Path(folder) / name) as file:
            file.write(content)


def _indented(content: Mapping[str, Any]) -> str:
    return json.dumps(content, ensure_ascii=False, indent=2) + "\n"


def _config(tokenizer: Tokenizer, unsplit: Mapping[str, Any], max_length: int | None) -> dict[str, Any]:
    """Return the content of tokenizer_config.json; `unsplit` is its entries of tokens, by id."""
    return {
        "tokenizer_class": "GPT2Tokenizer",
        "add_prefix_space": tokenizer.add_prefix_space,
        "added_tokens_decoder": unsplit,
        "clean_up_tokenization_spaces": False,
        "errors": "replace",
        # without this, transformers adds an end token to a vocabulary that has none
        **(dict.fromkeys(("bos_token", "eos_token", "unk_token")) if tokenizer.end_token is None else {}),
        **tokenizer.roles,
        **({} if max_length is None else {"model_max_length": max_length}),
    }


def _fast(
    tokenizer: Tokenizer,
    unsplit: Mapping[str, Any],
    vocabulary: Mapping[str, int],
    merges: Sequence[str],
) -> dict[str, Any]:
    """Return the content of tokenizer.json; `unsplit` is its entries of tokens, by id."""
    byte_level = {"type": "ByteLevel", "trim_offsets": True, "use_regex": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": id_, **unsplit[str(id_)]} for id_ in sorted(map(int, unsplit))],
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
    texts = {}
    for role in ROLES:
        value = named.get(role)
        text = value.get("content") if isinstance(value, dict) else value
        if value and not isinstance(text, str):
            legal = 'a text, or an object with its text in "content"'
            raise ValueError(must_be(f"{folder}: {role} of the tokenizer's settings", legal, value))
        if text:
            texts[role] = text
    return texts


@dataclasses.dataclass(frozen=True)
class UnsplitToken:
    """A token that is found in a text before it is split: its id, whether it is special, and its flags."""

    id: int
    special: bool
    flags: TokenFlags


def _read_unsplit_tokens(
    folder: Path,
    fast: Mapping[str, Any],
    config: Mapping[str, Any],
    vocabulary: Mapping[str, int],
    roles: Mapping[str, str],
) -> dict[str, UnsplitToken]:
    """Return special and added tokens by their text, from all files that name them; a later file wins."""
    found: dict[str, UnsplitToken] = {}

    def add(token: str, id_: Any, entry: Mapping[str, Any]) -> None:
        special = bool(entry.get("special"))
        found[token] = UnsplitToken(id_, special, TokenFlags.read(entry, special=special))

    described = dict(_special_entries(folder, config))
    special = dict.fromkeys((*roles.values(), END_TOKEN, *described))
    for token, id_ in _read_optional(folder / "added_tokens.json").items():
        add(token, id_, {"special": token in special})  # their flags are not in the files
    try:
        for entry in fast.get("added_tokens", []):
            add(str(entry["content"]), int(entry["id"]), entry)
        for id_, entry in config.get("added_tokens_decoder", {}).items():
            add(str(entry["content"]), int(id_), entry)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{folder}: an added token is damaged: {error!r:.100}") from None
    for token in special:
        if token in found:
            found[token] = dataclasses.replace(found[token], special=True)
        elif token in vocabulary:
            add(token, vocabulary[token], {**described.get(token, {}), "special": True})
    return found


def _special_entries(folder: Path, config: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the text of each token that has a role, and its entry with flags, {} if it is given as a text."""
    for named in (config, _read_optional(folder / "special_tokens_map.json")):
        values = [named.get(role) for role in ROLES]
        for role in EXTRA_ROLES:
            extra = named.get(role) or []
            values += extra.values() if isinstance(extra, dict) else extra if isinstance(extra, list) else []
        for value in values:
            entry = value if isinstance(value, dict) else {}
            token = entry.get("content", value)
            if isinstance(token, str) and token:
                yield token, entry


def _read_extras(folder: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    """Return what is saved with a tokenizer although nothing here uses it."""
    template = folder / CHAT_TEMPLATE
    extras = {name: value for name, value in config.items() if name not in _OWN_SETTINGS}
    return extras | ({CHAT_TEMPLATE: template.read_text("utf-8")} if template.is_file() else {})


def _build(
    vocabulary: Mapping[str, int],
    merges: Sequence[Merge],
    unsplit: Mapping[str, UnsplitToken],
    end_token: str | None,
    roles: Mapping[str, str],
    prefix_space: bool,
) -> Tokenizer:
    id_of: dict[bytes, int] = {}
    unreachable: dict[int, bytes] = {}
    made = {left + right for left, right in merges}
    for token, id_ in vocabulary.items():
        written = token_bytes(token)
        if token in unsplit and written not in made and len(written or "  ") > 1:
            continue
        if written is None:  # a name that was added by hand
            unreachable[id_] = token.encode()
        else:
            id_of[written] = id_
    lacking = [left + right for left, right in merges if left + right not in id_of]
    if lacking:
        raise ValueError(f"{len(lacking)} merges make tokens without an id, first {lacking[0]!r}")
    names = [bytes([byte]) for byte in BYTE_ORDER] + [left + right for left, right in merges]
    unreachable.update((id_of[token], token) for token in id_of.keys() - set(names))
    check_complete(id_of, merges, unreachable)
    return Tokenizer(
        merges,
        token_ids=[id_of.get(token, -1) for token in names],
        special_tokens={token: entry.id for token, entry in unsplit.items() if entry.special},
        added_tokens={token: entry.id for token, entry in unsplit.items() if not entry.special},
        token_flags={token: entry.flags for token, entry in unsplit.items()},
        unreachable_tokens=unreachable,
        end_token=end_token,
        roles=roles,
        add_prefix_space=prefix_space,
    )
