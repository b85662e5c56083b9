"""Checkpoints of nanoGPT's train.py: ckpt.pt, with the configuration inside.

Source: model.py and train.py of github.com/karpathy/nanoGPT. Its linears are [out, in], its GELU is the exact one, its
LayerNorms and linears may have no biases, and its vocabulary may be padded for speed.
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
from gpt2jax.weights.mapping import LazyTensor, WeightSource
from gpt2jax.weights.torch_reader import read_torch

# the names are Hugging Face's; only the kernels lie the other way
RULES = tuple(
    dataclasses.replace(rule, layout="transposed")
    if rule.path.startswith("h.") and "kernel" in rule.path
    else rule
    for rule in hf.RULES
)
FIELDS = {"n_layer", "n_head", "n_embd", "block_size", "bias", "vocab_size", "dropout"}
PADDED, REAL = 50304, 50257  # the rows of the embedding over the 50257 tokens are never trained


def load_nanogpt(path: str | os.PathLike[str]) -> tuple[GPT2Config, Params]:
    """Reads a ckpt.pt, or the folder with one.

    Absent biases become zeros, which is the same model. A vocabulary of 50304 is cut to GPT-2's 50257 tokens.

    Returns:
        (config, params), blocks stacked.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is not of nanoGPT, or damaged; the message names it and all tensors that do not fit.
    """
    return open_nanogpt(path).load()


def open_nanogpt(path: str | os.PathLike[str]) -> WeightSource:
    """The weights that `load_nanogpt` reads; raises ValueError as it does, but for values."""
    path = Path(path) / "ckpt.pt" if Path(path).is_dir() else Path(path)
    content = read_torch(path)
    if not isinstance(content, dict) or not all(
        isinstance(content.get(k), dict) for k in ("model", "model_args")
    ):
        raise ValueError(f"{path} is no checkpoint of nanoGPT: expected `model` and `model_args` in it")
    saved, arguments = content["model"], content["model_args"]
    strange = [
        name
        for name, value in saved.items()
        if not isinstance(name, str) or not isinstance(value, LazyTensor)
    ]
    if strange:
        raise ValueError(f"{path}: {strange[0]!s:.100} in `model` is not a tensor with a name")
    config = _config(path, arguments)
    tensors = hf.tie(config, hf.plain_names(saved, str(path)), str(path))
    if config.vocab_size == REAL and arguments["vocab_size"] == PADDED:
        tensors = {name: _cut(tensor) if name == "wte.weight" else tensor for name, tensor in tensors.items()}
    if not arguments["bias"]:
        tensors = {**_zero_biases(config), **tensors}
    return WeightSource(config, RULES, tensors, str(path))


def is_nanogpt(path: Path) -> bool:
    """Whether a path looks like such a file, or a folder with one."""
    return path.suffix == ".pt" or (path / "ckpt.pt").is_file()


def _config(path: Path, arguments: Mapping[Any, Any]) -> GPT2Config:
    unknown, missing = set(arguments) - FIELDS, FIELDS - {"dropout"} - set(arguments)
    if unknown or missing:
        names = ", ".join(sorted(map(str, unknown or missing)))
        raise ValueError(f"{path}: model_args has {'unknown' if unknown else 'no'} {names:.200}")
    vocab_size, dropout = arguments["vocab_size"], arguments.get("dropout", 0.0)
    try:
        return GPT2Config(
            vocab_size=REAL if vocab_size == PADDED else vocab_size,
            n_positions=arguments["block_size"],
            n_embd=arguments["n_embd"],
            n_layer=arguments["n_layer"],
            n_head=arguments["n_head"],
            activation_function="gelu",
            embd_pdrop=dropout,
            attn_pdrop=dropout,
            resid_pdrop=dropout,
        )
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: model_args: {error}") from None


def _cut(tensor: LazyTensor) -> LazyTensor:
    if tensor.shape[:1] != (PADDED,):
        return tensor
    return dataclasses.replace(tensor, shape=(REAL, *tensor.shape[1:]), read=lambda: tensor.read()[:REAL])


def _zero_biases(config: GPT2Config) -> dict[str, LazyTensor]:
    dim, wide = config.n_embd, config.mlp_dim
    widths = {
        "ln_1": dim,
        "attn.c_attn": 3 * dim,
        "attn.c_proj": dim,
        "ln_2": dim,
        "mlp.c_fc": wide,
        "mlp.c_proj": dim,
    }

    def zeros(width: int) -> LazyTensor:
        return LazyTensor((width,), "float32", lambda: np.zeros(width, np.float32), file="")

    blocks = {
        f"h.{layer}.{name}.bias": zeros(width)
        for layer in range(min(config.n_layer, 10_000))  # a damaged number is reported with the tensors
        for name, width in widths.items()
    }
    return {**blocks, "ln_f.bias": zeros(dim)}
