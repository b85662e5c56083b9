"""LoRA adapters of Keras, read: the *.lora.h5 files of keras-hub's `backbone.save_lora_weights`.

The files name layers by their number only. Per block keras-hub counts ten: the block, its LayerNorms, linears and
attention. Query, key and value have kernels [D, N, H] there, and factors [D, N, r] and [r, H]: all heads share the
second factor. As a matrix that is an update of rank N * r, block-diagonal in its second factor.

Source: keras_hub/src/models/backbone.py; keras/src/layers/core/einsum_dense.py (alpha is the rank unless it is given,
and the files do not say it: the scale is 1).
"""

from __future__ import annotations

import os
from pathlib import Path

import jax
import numpy as np

from gpt2jax.lora.adapters import kernel_shape
from gpt2jax.lora.config import QKV_TARGETS, LoRAConfig, nest_targets
from gpt2jax.model.config import GPT2Config
from gpt2jax.model.gpt2 import Params, abstract_params
from gpt2jax.weights.h5_reader import read_h5
from gpt2jax.weights.mapping import Shape, check_tensors, read_all
from gpt2jax.weights.peft import FlatAdapters

FIRST_BLOCK, LAYERS_PER_BLOCK = 2, 10  # layers 0 and 1 are the embeddings
LINEARS = {2: "mlp.c_proj", 3: "mlp.c_fc", 6: "attn.c_proj", 7: "attn.v", 8: "attn.k", 9: "attn.q"}
RANK = "lora/vars/rank"


def load_keras_lora(path: str | os.PathLike[str], config: GPT2Config) -> tuple[LoRAConfig, Params]:
    """Load a *.lora.h5 file.

    Args:
        path: the file.
        config: of the model that the adapters are for.

    Returns:
        (settings, adapters), stacked over the blocks; zero factors in blocks without an adapter.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is of another kind, damaged, or does not fit `config`; all tensors that do not fit are
            named.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no adapter file at {path}")
    tensors = read_h5(path)
    if RANK not in tensors or tensors[RANK].shape:
        raise ValueError(f"{path} is not a file of save_lora_weights: it has no number {RANK}")
    rank = int(tensors.pop(RANK).read())
    if not tensors:
        raise ValueError(f"{path} has no adapters")
    roots = {
        f"lora/{FIRST_BLOCK + LAYERS_PER_BLOCK * layer + number}/vars/lora_kernel_": (layer, target)
        for layer in range(config.n_layer)
        for number, target in LINEARS.items()
    }
    shapes = {
        f"{root}{letter}": shape
        for root, (_, target) in roots.items()
        for letter, shape in zip("ab", _factor_shapes(config, target, rank), strict=True)
    }
    both = [f"{name[:-1]}{letter}" for name in tensors if name in shapes for letter in "ab"]
    check_tensors(f"{path} does not fit the model", tensors, shapes, required=both)
    adapters: FlatAdapters = {}
    arrays = {name: np.empty(tensor.shape, np.float32) for name, tensor in tensors.items()}
    read_all(str(path), {name: (arrays[name], tensor, "same") for name, tensor in tensors.items()})
    for name, values in arrays.items():
        layer, target = roots[name[:-1]]
        if target not in adapters:
            adapters[target] = _zero_factors(config, target, rank)
        _set_factor(adapters[target], name, values, layer)
    wide = {target: config.n_head * rank for target in adapters if target in QKV_TARGETS}
    lora = LoRAConfig(rank, float(rank), targets=tuple(adapters), rank_pattern=wide, alpha_pattern=wide)
    return lora, jax.tree.map(jax.device_put, nest_targets(adapters))


def _factor_shapes(config: GPT2Config, target: str, rank: int) -> tuple[Shape, Shape]:
    """Return the shapes in a file of a linear's two factors."""
    heads, dim = (config.n_head, config.head_dim), config.n_embd
    kernels = {
        "attn.c_proj": (*heads, dim),
        "mlp.c_fc": (dim, config.mlp_dim),
        "mlp.c_proj": (config.mlp_dim, dim),
    }
    *ins, out = kernels.get(target, (dim, *heads))
    return (*ins, rank), (rank, out)


def _zero_factors(config: GPT2Config, target: str, rank: int) -> dict[str, np.ndarray]:
    layers, in_dim, out_dim = kernel_shape(abstract_params(config)["h"], target)
    rank *= config.n_head if target in QKV_TARGETS else 1
    return {
        "lora_a": np.zeros((layers, in_dim, rank), np.float32),
        "lora_b": np.zeros((layers, rank, out_dim), np.float32),
    }


def _set_factor(factors: dict[str, np.ndarray], name: str, values: np.ndarray, layer: int) -> None:
    """Put the values of one tensor into their place in a linear's factors."""
    if name.endswith("a"):
        factors["lora_a"][layer] = values.reshape(factors["lora_a"][layer].shape)
        return
    target = factors["lora_b"][layer]
    heads = np.eye(len(target) // len(values), dtype=np.float32)  # one head outside of query, key and value
    target[...] = np.kron(heads, values)
