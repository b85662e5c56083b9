"""Weights that transformers' TensorFlow models saved: tf_model.h5.

Source: `TFGPT2LMHeadModel.save_pretrained` of transformers 4. Its linears, "TFConv1D", have kernels [in, out] and
biases [1, out]. Its head is always tied, whatever the configuration says. Its embeddings were called `weight` in older
versions, and `embeddings` later.
"""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

from gpt2jax.weights import hf
from gpt2jax.weights.h5_reader import read_h5
from gpt2jax.weights.mapping import LazyTensor, WeightSource

FILE = "tf_model.h5"
_NAME = re.compile(
    r"(?:.*?/)?(?:h_\._(?P<layer>\d+)/)?(?P<module>wte|wpe|ln_[12f]|(?:attn|mlp)/c_\w+)/(?P<variable>\w+)(?::0)?"
)
_VARIABLES = {
    "gamma": "weight", "beta": "bias", "embeddings": "weight", "weight": "weight", "bias": "bias",
}  # fmt: skip


def is_tf_h5(path: Path) -> bool:
    """Return True if a path looks like TensorFlow weights of transformers, or a folder with them."""
    return path.name == FILE or (path / FILE).is_file()


def open_tf_h5(path: Path) -> WeightSource:
    """Return the weights of a tf_model.h5, or of the folder with one, no value read.

    Raises:
        ValueError: the file is damaged, or config.json is missing or does not fit.
    """
    file = path / FILE if path.is_dir() else path
    config = dataclasses.replace(hf.read_config(file.parent), tie_word_embeddings=True)
    tensors: dict[str, LazyTensor] = {}
    for full, tensor in read_h5(file).items():
        match = _NAME.fullmatch(full)
        name = full
        if match and match["variable"] in _VARIABLES:
            block = "" if match["layer"] is None else f"h.{int(match['layer'])}."
            name = f"{block}{match['module'].replace('/', '.')}.{_VARIABLES[match['variable']]}"
        if name in tensors:
            raise ValueError(f"{file} has tensor {name} twice, once as {full}")
        tensors[name] = _without_leading_one(tensor) if name.endswith(".bias") else tensor
    return WeightSource(config, hf.RULES, tensors, str(file))


def _without_leading_one(tensor: LazyTensor) -> LazyTensor:
    if len(tensor.shape) != 2 or tensor.shape[0] != 1:
        return tensor
    return dataclasses.replace(tensor, shape=tensor.shape[1:], read=lambda: tensor.read().reshape(-1))
