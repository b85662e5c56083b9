"""Embeddings in PEFT folders: whole ones (`modules_to_save`) and single rows (`trainable_token_indices`).

PEFT saves whole embeddings, too, if the vocabulary was resized. All of them replace parameters of the model.
Source: `ModulesToSaveWrapper` and `TrainableTokensLayer` of peft; the saved rows are the trained ones, not differences.
A whole token embedding unties a tied head, which keeps the old one; rows of it are rows of a tied head too.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from gpt2jax.model.config import GPT2Config
from gpt2jax.model.gpt2 import Params
from gpt2jax.utils.validation import is_integer, must_be
from gpt2jax.weights.mapping import LazyTensor, aligned_empty, read_all

# modules of transformers' GPT-2 that can be read -> (key in the parameters, key of the array)
MODULES = {"wte": ("wte", "embedding"), "wpe": ("wpe", "embedding"), "lm_head": ("lm_head", "kernel")}
# the names of an embedding after that of its module, the best one first; a resized vocabulary is saved under several
_WHOLE = (
    "modules_to_save.weight",
    "modules_to_save.default.weight",
    "weight",
    "token_adapter.base_layer.weight",
)
_ROWS, _OLD = "token_adapter.trainable_tokens_delta", "original_module.weight"
_NAME = re.compile(rf"({'|'.join(MODULES)})\.({'|'.join(map(re.escape, (*_WHOLE, _ROWS, _OLD)))})")

# what an adapter file holds: the ids of a module's trained rows, None for the whole module
Embeddings = Mapping[str, tuple[int, ...] | None]


def is_embedding(name: str) -> bool:
    """Return whether a tensor of an adapter file, named without wrappers, replaces an embedding or rows of one."""
    return bool(_NAME.fullmatch(name))


def check_modules(settings: Mapping[str, Any], path: Path) -> None:
    """Raise ValueError unless the settings name embeddings only."""
    modules = settings.get("modules_to_save") or []
    if not isinstance(modules, list) or not MODULES.keys() >= set(saved_modules(settings)):
        raise ValueError(
            must_be(f"{path}: modules_to_save", f"a list of some of {', '.join(MODULES)}", modules)
        )
    token_rows(settings, path)


def saved_modules(settings: Mapping[str, Any]) -> list[str]:
    """Return the modules of `modules_to_save`, by the last part of their names."""
    return [str(name).rpartition(".")[2] for name in settings.get("modules_to_save") or []]


def token_rows(settings: Mapping[str, Any], path: Path) -> dict[str, list[int]]:
    """Return `trainable_token_indices`: by module, the rows that were trained."""
    given = settings.get("trainable_token_indices") or {}
    rows = given if isinstance(given, dict) else {"wte": given}
    rows = {str(name).rpartition(".")[2]: ids for name, ids in rows.items()}
    is_legal = set(rows) <= {"wte", "lm_head"} and all(isinstance(ids, list) for ids in rows.values())
    if not is_legal or not all(is_integer(row) and row >= 0 for ids in rows.values() for row in ids):
        legal = "token ids, or those of wte and lm_head by their names"
        raise ValueError(must_be(f"{path}: trainable_token_indices", legal, given))
    return rows


def replace_embeddings(
    config: GPT2Config,
    params: Params,
    tensors: Mapping[str, LazyTensor],
    rows: Mapping[str, list[int]],
    file: Path,
) -> tuple[GPT2Config, Params, Embeddings]:
    """Return (config, params, what was replaced) with the embeddings of an adapter file.

    Args:
        config: of the model; the file may have another vocabulary.
        params: its parameters.
        tensors: those of the file that `is_embedding` accepts, by name without wrappers.
        rows: by module, the rows that a tensor of single rows holds.
        file: for messages.

    Raises:
        ValueError: a tensor does not fit the model.
    """
    tied = config.tie_word_embeddings
    tables = {
        module: np.asarray(params[key][leaf]) for module, (key, leaf) in MODULES.items() if key in params
    }
    before = {**tables, "lm_head": tables["wte"]} if tied else tables
    found: dict[str, np.ndarray] = {}
    replaced: dict[str, tuple[int, ...] | None] = {}
    for module, table in before.items():
        whole = next((f"{module}.{end}" for end in _WHOLE if f"{module}.{end}" in tensors), None)
        if whole is not None:
            table, replaced[module] = _read(tensors[whole], whole, table.dtype.name), None
        if (name := f"{module}.{_ROWS}") in tensors:
            ids = rows.get(module, rows.get("wte", []))
            table = _replace_rows(table, ids, tensors[name], name, file)
            replaced.setdefault(module, tuple(ids))
        if module in replaced:
            found[module] = table
    vocab_size = len(found.get("wte", before["wte"]))
    if vocab_size != config.vocab_size and "lm_head" not in found:
        raise ValueError(f"{file} has {vocab_size} tokens in wte, and no lm_head for as many")
    if tied and replaced.get("wte", ()) is None:
        found.setdefault("lm_head", before["lm_head"])
    wte, head = found.get("wte", before["wte"]), found.get("lm_head")
    tied = tied and (head is None or head.tobytes() == wte.tobytes())
    if tied:
        found.pop("lm_head", None)
    shapes = dict.fromkeys(MODULES, (vocab_size, config.n_embd)) | {
        "wpe": (config.n_positions, config.n_embd)
    }
    for module, array in found.items():
        if array.shape != shapes[module]:
            raise ValueError(
                f"{file}: {module}.weight has shape {list(array.shape)}, expected {list(shapes[module])}"
            )
    changed = {
        MODULES[module][0]: {MODULES[module][1]: jax.device_put(array)} for module, array in found.items()
    }
    config = dataclasses.replace(config, vocab_size=vocab_size, tie_word_embeddings=tied)
    return config, {**params, **changed}, replaced


def embedding_tensors(params: Params, embeddings: Embeddings) -> Iterator[tuple[str, np.ndarray]]:
    """Yield (name without wrappers, array) of the embeddings that an adapter file holds."""
    for module, ids in embeddings.items():
        key, leaf = MODULES[module]
        table = np.asarray(params[key][leaf] if key in params else params["wte"]["embedding"])
        yield (f"{module}.weight", table) if ids is None else (f"{module}.{_ROWS}", table[list(ids)])


def embedding_settings(embeddings: Embeddings) -> dict[str, Any]:
    """Return the settings of PEFT that name the embeddings of an adapter file."""
    rows = {module: list(ids) for module, ids in embeddings.items() if ids is not None}
    whole = [module for module, ids in embeddings.items() if ids is None]
    return {"modules_to_save": whole or None, "trainable_token_indices": rows or None}


def _replace_rows(table: np.ndarray, ids: list[int], tensor: LazyTensor, name: str, file: Path) -> np.ndarray:
    values, width = _read(tensor, name, table.dtype.name), table.shape[1]
    if outside := [row for row in ids if row >= len(table)]:
        raise ValueError(f"{file}: trainable_token_indices must be below {len(table)}, got {outside[0]}")
    if values.shape != (len(ids), width):
        raise ValueError(
            f"{file}: {name} has shape {list(values.shape)}, expected {[len(ids), width]} for the "
            f"{len(ids)} rows of trainable_token_indices"
        )
    table = np.array(table)
    table[ids] = values
    return table


def _read(tensor: LazyTensor, name: str, dtype: str) -> np.ndarray:
    array = aligned_empty(tensor.shape, dtype)
    read_all(tensor.file, {name: (array, tensor, "same")})
    return array
