"""Embeddings in PEFT folders: whole ones (`modules_to_save`) and single rows (`trainable_token_indices`).

PEFT saves whole embeddings, too, if the vocabulary was resized. They replace parameters of the model.
Source: `ModulesToSaveWrapper` and `TrainableTokensLayer` of peft; the saved rows are the trained ones, not differences.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from gpt2jax.model.config import GPT2Config
from gpt2jax.model.gpt2 import Params
from gpt2jax.utils.validation import is_integer, must_be
from gpt2jax.weights.mapping import LazyTensor, aligned_empty, read_into

# modules of transformers' GPT-2 that can be read -> (key in the parameters, key of the array)
MODULES = {"wte": ("wte", "embedding"), "wpe": ("wpe", "embedding"), "lm_head": ("lm_head", "kernel")}
_TABLE = re.compile(rf"({'|'.join(MODULES)})\.(modules_to_save\.(default\.)?|base_layer\.)?weight")
_ROWS = re.compile(r"wte\.(token_adapter\.)?trainable_tokens_delta")


def is_embedding(name: str) -> bool:
    """Return whether a tensor of an adapter file, named without wrappers, replaces an embedding or rows of one."""
    return bool(_TABLE.fullmatch(name) or _ROWS.fullmatch(name))


def check_modules(settings: Mapping[str, Any], path: Path) -> None:
    """Raise ValueError unless the settings name embeddings only."""
    modules = settings.get("modules_to_save") or []
    if not isinstance(modules, list) or any(str(name).rpartition(".")[2] not in MODULES for name in modules):
        raise ValueError(
            must_be(f"{path}: modules_to_save", f"a list of some of {', '.join(MODULES)}", modules)
        )
    token_rows(settings, path)


def token_rows(settings: Mapping[str, Any], path: Path) -> list[int]:
    """Return `trainable_token_indices`, the rows of the token embedding that were trained."""
    rows = settings.get("trainable_token_indices") or []
    if isinstance(rows, dict):
        names = {str(name).rpartition(".")[2] for name in rows}
        rows = next(iter(rows.values())) if names == {"wte"} and len(rows) == 1 else None
    if not isinstance(rows, list) or not all(is_integer(row) and row >= 0 for row in rows):
        given = settings["trainable_token_indices"]
        raise ValueError(
            must_be(f"{path}: trainable_token_indices", "token ids, or those of wte by its name", given)
        )
    return rows


def replace_embeddings(
    config: GPT2Config, params: Params, tensors: Mapping[str, LazyTensor], rows: list[int], file: Path
) -> tuple[GPT2Config, Params]:
    """Return (config, params) with the embeddings of an adapter file, which may have another vocabulary.

    Args:
        config: of the model.
        params: its parameters.
        tensors: those of the file that `is_embedding` accepts, by name without wrappers.
        rows: the rows that a tensor of single rows holds.
        file: for messages.

    Raises:
        ValueError: a tensor does not fit the model.
    """
    tables = {name.split(".")[0]: name for name in tensors if _TABLE.fullmatch(name)}
    found = {
        module: _read(tensors[name], name, params["wte"]["embedding"].dtype.name)
        for module, name in tables.items()
    }
    deltas = next((name for name in tensors if _ROWS.fullmatch(name)), None)
    if deltas is not None:
        table = np.array(found.get("wte", params["wte"]["embedding"]))
        values = _read(tensors[deltas], deltas, table.dtype.name)
        if values.shape != (len(rows), table.shape[1]) or any(row >= len(table) for row in rows):
            raise ValueError(
                f"{file}: {deltas} has shape {list(values.shape)}, expected {[len(rows), table.shape[1]]} for rows of "
                f"trainable_token_indices below {len(table)}"
            )
        table[rows] = values
        found["wte"] = table
    vocab_size = len(found["wte"]) if "wte" in found else config.vocab_size
    head = found.get("lm_head")
    is_tied = config.tie_word_embeddings and (
        head is None or head.tobytes() == np.asarray(found.get("wte", params["wte"]["embedding"])).tobytes()
    )
    if is_tied:
        found.pop("lm_head", None)
    shapes = {"wte": (vocab_size, config.n_embd), "wpe": (config.n_positions, config.n_embd)}
    shapes["lm_head"] = shapes["wte"]
    if not is_tied and head is None and vocab_size != config.vocab_size:
        raise ValueError(f"{file} has {vocab_size} tokens in wte and no lm_head, which the model has apart")
    for module, array in found.items():
        if array.shape != shapes[module]:
            raise ValueError(
                f"{file}: {module}.weight has shape {list(array.shape)}, expected {list(shapes[module])}"
            )
    replaced = {
        MODULES[module][0]: {MODULES[module][1]: jax.device_put(array)} for module, array in found.items()
    }
    config = dataclasses.replace(config, vocab_size=vocab_size, tie_word_embeddings=is_tied)
    return config, {**params, **replaced}


def _read(tensor: LazyTensor, name: str, dtype: str) -> np.ndarray:
    array = aligned_empty(tensor.shape, dtype)
    read_into(array, name, tensor)
    return array
