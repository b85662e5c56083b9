"""LoRA adapters of Keras: the *.lora.h5 files of keras-hub's `backbone.save_lora_weights`.

The files name layers by their number only. Per block keras-hub counts ten: the block, its LayerNorms, linears and
attention. Query, key and value have kernels [D, N, H] there, and factors [D, N, r] and [r, H]: one second factor for
all heads. As a matrix that is an update of rank N * r, block-diagonal in its second factor.

Source: keras_hub/src/models/backbone.py; keras/src/layers/core/einsum_dense.py (alpha is the rank unless it is given,
and the files do not say it: the scale is 1).
"""

from __future__ import annotations

import os
import re
from pathlib import Path

import jax
import numpy as np

from gpt2jax.lora.adapters import kernel_of
from gpt2jax.lora.config import QKV_TARGETS, LoRAConfig
from gpt2jax.model.config import GPT2Config
from gpt2jax.model.gpt2 import Params, abstract_params
from gpt2jax.weights.keras import read_h5
from gpt2jax.weights.mapping import FLOAT_DTYPES, LazyTensor, is_finite, listed

FIRST_BLOCK, LAYERS_OF_A_BLOCK = 2, 10  # layer 0 and 1 are the embeddings
LINEARS = {2: "mlp.c_proj", 3: "mlp.c_fc", 6: "attn.c_proj", 7: "attn.v", 8: "attn.k", 9: "attn.q"}
RANK = "lora/vars/rank"
NAME = re.compile(r"lora/(\d{1,6})/vars/lora_kernel_([ab])")


def load_keras_lora(path: str | os.PathLike[str], config: GPT2Config) -> tuple[LoRAConfig, Params]:
    """Reads a *.lora.h5 file.

    Args:
        path: the file.
        config: of the model that the adapters are for.

    Returns:
        (settings, adapters), stacked over the blocks; zero factors where a block has none.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no such file, damaged, or does not fit `config`; all tensors that do not fit are named.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no adapter file at {path}")
    tensors = read_h5(path)
    if RANK not in tensors or tensors[RANK].shape:
        raise ValueError(f"{path} is no file of save_lora_weights: it has no number {RANK}")
    rank = int(tensors.pop(RANK).read())
    shapes = _shapes(config, rank)
    problems = [
        f"{name}: unknown, {list(tensor.shape)}" for name, tensor in tensors.items() if name not in shapes
    ]
    for name, tensor in tensors.items():
        if name in shapes and tensor.shape != shapes[name]:
            problems.append(f"{name}: has shape {list(tensor.shape)}, expected {list(shapes[name])}")
        elif tensor.dtype not in FLOAT_DTYPES:
            problems.append(f"{name}: is {tensor.dtype}, expected one of {', '.join(FLOAT_DTYPES)}")
        other = name[:-1] + ("b" if name.endswith("a") else "a")
        if other not in tensors:
            problems.append(f"{other}: missing, though {name} is there")
    if problems or not tensors:
        raise ValueError(f"{path} does not fit the model: {listed(problems or ['it has no adapters'])}")
    return _fill(config, rank, tensors)


def _shapes(config: GPT2Config, rank: int) -> dict[str, tuple[int, ...]]:
    """The tensors that a file can have, and their shapes."""
    dim, heads = config.n_embd, (config.n_head, config.head_dim)
    kernels = {
        "attn.c_proj": (*heads, dim),
        "mlp.c_fc": (dim, config.mlp_dim),
        "mlp.c_proj": (config.mlp_dim, dim),
        **dict.fromkeys(QKV_TARGETS, (dim, *heads)),
    }
    shapes = {}
    for layer in range(config.n_layer):
        for number, target in LINEARS.items():
            root = f"lora/{FIRST_BLOCK + LAYERS_OF_A_BLOCK * layer + number}/vars/lora_kernel_"
            shapes[f"{root}a"] = (*kernels[target][:-1], rank)
            shapes[f"{root}b"] = (rank, kernels[target][-1])
    return shapes


def _fill(config: GPT2Config, rank: int, tensors: dict[str, LazyTensor]) -> tuple[LoRAConfig, Params]:
    blocks = abstract_params(config)["h"]
    factors: dict[str, dict[str, np.ndarray]] = {}
    for name, tensor in tensors.items():
        match = NAME.fullmatch(name)
        assert match is not None, name  # all names are of the table
        layer, number = divmod(int(match[1]) - FIRST_BLOCK, LAYERS_OF_A_BLOCK)
        target = LINEARS[number]
        layers, in_dim, out_dim = kernel_of(blocks, target).shape
        heads = config.n_head if target in QKV_TARGETS else 1
        if target not in factors:
            factors[target] = {
                "lora_a": np.zeros((layers, in_dim, heads * rank), np.float32),
                "lora_b": np.zeros((layers, heads * rank, out_dim), np.float32),
            }
        values = np.asarray(tensor.read(), np.float32)
        if not is_finite(values):
            raise ValueError(f"{tensor.file}: tensor {name} holds values that are not finite numbers")
        if match[2] == "b":
            factors[target]["lora_b"][layer] = np.kron(np.eye(heads, dtype=np.float32), values)
        else:
            factors[target]["lora_a"][layer] = values.reshape(in_dim, heads * rank)
    adapters: Params = {}
    for target, pair in factors.items():
        module, linear = target.split(".")
        adapters.setdefault(module, {})[linear] = jax.tree.map(jax.device_put, pair)
    wide = dict.fromkeys((target for target in factors if target in QKV_TARGETS), config.n_head * rank)
    lora = LoRAConfig(rank, float(rank), targets=tuple(factors), rank_pattern=wide, alpha_pattern=wide)
    return lora, {"h": adapters}
