"""Presets of keras-hub, written: `keras_hub.models.GPT2CausalLM.from_preset(folder)` loads the folder as it is.

Source: keras_hub/src/utils/preset_utils.py (the JSON files); keras/src/saving/saving_lib.py (the h5 layout).
"""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from gpt2jax.model.config import GPT2Config
from gpt2jax.model.gpt2 import Params, count_parameters
from gpt2jax.tokenizer.bpe import Tokenizer
from gpt2jax.tokenizer.files import save_tokenizer
from gpt2jax.utils.atomic_io import atomic_folder
from gpt2jax.weights.hf import refuse_foreign_files
from gpt2jax.weights.keras import PRESET_WEIGHTS, RULES
from gpt2jax.weights.mapping import export_tensors

OURS = re.compile(r"(config|metadata|tokenizer)\.json|model\.weights\.h5|assets")
# what keras-hub's GPT-2 cannot be told, and so has to be as it is there
FIXED = {
    "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
    "layer_norm_epsilon": (1e-5,),
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "tie_word_embeddings": (True,),
}
LAYERS = {
    "attention_norm": "_self_attention_layer_norm",
    "query": "_self_attention_layer/query_dense",
    "key": "_self_attention_layer/key_dense",
    "value": "_self_attention_layer/value_dense",
    "attention_output": "_self_attention_layer/output_dense",
    "mlp_norm": "_feedforward_layer_norm",
    "mlp_in": "_feedforward_intermediate_dense",
    "mlp_out": "_feedforward_output_dense",
    "token_embedding": "reversible_embedding",
    "position_embedding": "position_embedding",
    "final_norm": "layer_normalization",
}
INDEX = {"embeddings": 0, "gamma": 0, "beta": 1, "kernel": 0, "bias": 1}


def save_keras(
    folder: str | os.PathLike[str], config: GPT2Config, params: Params, tokenizer: Tokenizer | None = None
) -> None:
    """Writes config.json, metadata.json, model.weights.h5 and the tokenizer's files.

    The folder appears whole or not at all. One that holds a preset is replaced, other content is not.

    Args:
        folder: the folder to make.
        config: the architecture.
        params: the parameters, blocks stacked; float32 in the file.
        tokenizer: written too where there is one.

    Raises:
        ValueError: the architecture has something that keras-hub's GPT-2 has not; the message names it.
        FileExistsError: the folder holds files that are not part of a preset.
    """
    import h5py

    for name, legal in FIXED.items():
        value = getattr(config, name)
        if value not in legal:
            raise ValueError(
                f"{name}={value!r} cannot be expressed in a Keras preset, which has {legal[0]!r}"
            )
    if len({config.embd_pdrop, config.attn_pdrop, config.resid_pdrop}) > 1:
        raise ValueError(
            "embd_pdrop, attn_pdrop and resid_pdrop differ; a Keras preset has one dropout for all"
        )
    refuse_foreign_files(Path(folder), OURS, "a Keras preset", folders=("assets",))
    with atomic_folder(folder, overwrite=True) as aside:
        _write_json(aside / "config.json", _backbone(config))
        about = {"parameter_count": count_parameters(params), "tasks": ["CausalLM"]}
        _write_json(aside / "metadata.json", about)
        with h5py.File(aside / PRESET_WEIGHTS, "w") as file:
            for name, values in export_tensors(config, RULES, params):
                file[_path(name)] = np.asarray(values, np.float32)
        if tokenizer is not None:
            _write_tokenizer(aside, tokenizer)


def _path(name: str) -> str:
    """Where keras-hub keeps what the table of rules calls `name`."""
    *block, layer, variable = name.split("/")
    number = int(block[0].removeprefix("block_")) if block else None
    decoder = "" if number is None else f"transformer_decoder{f'_{number}' if number else ''}/"
    return f"layers/{decoder}{LAYERS[layer]}/vars/{INDEX[variable]}"


def _backbone(config: GPT2Config) -> dict[str, Any]:
    settings = {
        "name": "gpt2_backbone",
        "trainable": True,
        "vocabulary_size": config.vocab_size,
        "num_layers": config.n_layer,
        "num_heads": config.n_head,
        "hidden_dim": config.n_embd,
        "intermediate_dim": config.mlp_dim,
        "dropout": config.resid_pdrop,
        "max_sequence_length": config.n_positions,
    }
    return _object("gpt2_backbone", "GPT2Backbone", settings)


def _write_tokenizer(folder: Path, tokenizer: Tokenizer) -> None:
    settings = {
        "name": "gpt2_tokenizer",
        "trainable": True,
        "dtype": "int32",
        "config_file": "tokenizer.json",
        "sequence_length": None,
        "add_prefix_space": tokenizer.add_prefix_space,
        "unsplittable_tokens": sorted(tokenizer.special_tokens),
    }
    _write_json(folder / "tokenizer.json", _object("gpt2_tokenizer", "GPT2Tokenizer", settings))
    assets = folder / "assets" / "tokenizer"
    assets.mkdir(parents=True)
    with tempfile.TemporaryDirectory() as saved:
        save_tokenizer(tokenizer, saved)
        shutil.copy(Path(saved) / "vocab.json", assets / "vocabulary.json")
        shutil.copy(Path(saved) / "merges.txt", assets / "merges.txt")


def _object(module: str, name: str, config: dict[str, Any]) -> dict[str, Any]:
    """An object as Keras writes it into JSON."""
    home = f"keras_hub.src.models.gpt2.{module}"
    return {"module": home, "class_name": name, "config": config, "registered_name": f"keras_hub>{name}"}


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=4) + "\n", "utf-8")
