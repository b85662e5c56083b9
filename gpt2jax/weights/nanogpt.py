"""Checkpoints of nanoGPT's train.py: ckpt.pt, with the configuration inside.

Source: model.py and train.py of github.com/karpathy/nanoGPT. Its linears are [out, in], its GELU is the exact one, its
LayerNorms and linears may have no biases, and its vocabulary may be padded for speed. Versions without `bias`, and
build-nanogpt, whose configuration is an object under `config`, approximate the GELU by tanh; the first ones also
trained the head apart from the embedding.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from gpt2jax.model.config import GPT2Config
from gpt2jax.model.gpt2 import Params
from gpt2jax.weights import hf
from gpt2jax.weights.mapping import LazyTensor, WeightSource, file_shapes
from gpt2jax.weights.torch_reader import PickledObject, check_state_dict, read_torch

# the names are Hugging Face's; only the kernels are transposed
RULES = tuple(
    dataclasses.replace(rule, layout="transposed")
    if rule.path.startswith("h.") and "kernel" in rule.path
    else rule
    for rule in hf.RULES
)
MODEL_ARGS = {"n_layer", "n_head", "n_embd", "block_size", "bias", "vocab_size", "dropout", "flash"}
# the rows of the embedding after the 50257 tokens are padding that is never trained
PADDED_VOCAB_SIZE, VOCAB_SIZE = 50304, 50257


def load_nanogpt(path: str | os.PathLike[str]) -> tuple[GPT2Config, Params]:
    """Load a ckpt.pt, or the folder with one.

    Absent biases become zeros, which is the same model. A vocabulary of 50304 is truncated to GPT-2's 50257 tokens.

    Returns:
        (config, params), blocks stacked.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is not of nanoGPT, or damaged; the message names it and all tensors that do not fit.
    """
    return open_nanogpt(path).load()


def open_nanogpt(path: str | os.PathLike[str]) -> WeightSource:
    """Return the weights that `load_nanogpt` loads, no value read; raises as it does, except about values."""
    path = Path(path) / "ckpt.pt" if Path(path).is_dir() else Path(path)
    content = read_torch(path)
    if isinstance(content, dict) and isinstance(content.get("config"), PickledObject):
        content = {**content, "model_args": content["config"].fields}  # of build-nanogpt
    parts = ("model", "model_args")
    if not isinstance(content, dict) or not all(isinstance(content.get(part), dict) for part in parts):
        raise ValueError(f"{path} is not a checkpoint of nanoGPT; expected `model` and `model_args` in it")
    arguments = content["model_args"]
    saved = hf.strip_wrappers(check_state_dict(content["model"], f"{path}: model"), str(path))
    is_old = "bias" not in arguments
    if is_old:
        arguments = {**arguments, "bias": any(name.endswith("attn.c_attn.bias") for name in saved)}
    config = _read_config(path, arguments, is_old=is_old, is_tied=_is_tied(saved))
    tensors = hf.tie_head(config, saved, str(path))
    if arguments["vocab_size"] == PADDED_VOCAB_SIZE:
        tables = ("wte.weight", "lm_head.weight")
        tensors = {name: _drop_padding(t) if name in tables else t for name, t in tensors.items()}
    if not arguments["bias"] and config.n_layer <= len(
        tensors
    ):  # else n_layer is damaged, which is reported later
        tensors = {**_zero_biases(config), **tensors}
    return WeightSource(config, RULES, tensors, str(path))


def is_nanogpt(path: Path) -> bool:
    """Return True if a path looks like a checkpoint of nanoGPT, or a folder with one."""
    return path.suffix == ".pt" or (path / "ckpt.pt").is_file()


def _is_tied(tensors: Mapping[str, LazyTensor]) -> bool:
    """Return whether the head is the embedding; the first versions of nanoGPT trained both."""
    head, table = tensors.get("lm_head.weight"), tensors.get("wte.weight")
    if head is None or table is None or head.shape != table.shape:
        return True
    return head.read().tobytes() == table.read().tobytes()


def _read_config(path: Path, arguments: Mapping[Any, Any], *, is_old: bool, is_tied: bool) -> GPT2Config:
    unknown, missing = set(arguments) - MODEL_ARGS, MODEL_ARGS - {"dropout", "flash"} - set(arguments)
    if unknown or missing:
        names = ", ".join(sorted(map(str, unknown or missing)))
        raise ValueError(f"{path}: model_args has {'unknown' if unknown else 'no'} {names:.200}")
    vocab_size, dropout = arguments["vocab_size"], arguments.get("dropout", 0.0)
    try:
        return GPT2Config(
            vocab_size=VOCAB_SIZE if vocab_size == PADDED_VOCAB_SIZE else vocab_size,
            n_positions=arguments["block_size"],
            n_embd=arguments["n_embd"],
            n_layer=arguments["n_layer"],
            n_head=arguments["n_head"],
            activation_function="gelu_new" if is_old else "gelu",
            tie_word_embeddings=is_tied,
            embd_pdrop=dropout,
            attn_pdrop=dropout,
            resid_pdrop=dropout,
            **GPT2Config.published_end_token(vocab_size),
        )
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: model_args: {error}") from None


def _drop_padding(table: LazyTensor) -> LazyTensor:
    if table.shape[:1] != (PADDED_VOCAB_SIZE,):
        return table
    shape = (VOCAB_SIZE, *table.shape[1:])
    return dataclasses.replace(table, shape=shape, read=lambda: table.read()[:VOCAB_SIZE])


def _zero_biases(config: GPT2Config) -> dict[str, LazyTensor]:
    def zeros(shape: tuple[int, ...]) -> LazyTensor:
        return LazyTensor(shape, "float32", lambda: np.zeros(shape, np.float32), file="")

    shapes = file_shapes(config, RULES).items()
    return {name: zeros(shape) for name, shape in shapes if name.endswith(".bias")}
