"""Models of llm.c: one .bin file, a header of 256 int32 and then all parameters.

Source: `gpt2_build_from_checkpoint` in train_gpt2.cu and `write_model` in train_gpt2.py of github.com/karpathy/llm.c.
Its linears are [out, in], its GELU is the approximation by tanh, and the vocabulary may be padded for speed.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from gpt2jax.model.config import GPT2Config
from gpt2jax.utils.validation import must_be
from gpt2jax.weights import nanogpt
from gpt2jax.weights.mapping import LazyTensor, WeightSource, numpy_dtype

MAGIC, HEADER = 20240326, 1024  # of the first number; bytes of the header
DTYPES = {1: "float32", 3: "float32", 5: "bfloat16"}  # by the version; the first one has no padded vocabulary
# blocks are stacked in the file
BLOCK_TENSORS = (
    "ln_1.weight", "ln_1.bias", "attn.c_attn.weight", "attn.c_attn.bias", "attn.c_proj.weight", "attn.c_proj.bias",
    "ln_2.weight", "ln_2.bias", "mlp.c_fc.weight", "mlp.c_fc.bias", "mlp.c_proj.weight", "mlp.c_proj.bias",
)  # fmt: skip


def is_llmc(path: Path) -> bool:
    """Return True if a path is a model file of llm.c."""
    if path.suffix != ".bin" or not path.is_file():
        return False
    with open(path, "rb") as file:
        return file.read(4) == MAGIC.to_bytes(4, "little")


def open_llmc(path: Path) -> WeightSource:
    """Return the weights of a model file, no value read.

    Raises:
        ValueError: the file is cut short or damaged, or of an unknown version.
    """
    with open(path, "rb") as file:
        header = file.read(HEADER)
    if len(header) != HEADER:
        raise ValueError(f"{path} is cut short: its header must have {HEADER} bytes")
    version, length, vocab_size, layers, heads, width, padded = np.frombuffer(header, "<i4")[1:8].tolist()
    if version not in DTYPES:
        raise ValueError(must_be(f"{path}: the version", f"one of {', '.join(map(str, DTYPES))}", version))
    try:
        config = GPT2Config(
            vocab_size=vocab_size,
            n_positions=length,
            n_embd=width,
            n_layer=layers,
            n_head=heads,
            **GPT2Config.published_end_token(vocab_size),
        )
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: {error}") from None
    dtype, rows = DTYPES[version], vocab_size if version == 1 else padded
    size, expected = path.stat().st_size, HEADER
    count = (rows + length + 2) * width + layers * (12 * width * width + 13 * width)
    expected += count * numpy_dtype(dtype).itemsize
    if rows < vocab_size:
        raise ValueError(must_be(f"{path}: padded_vocab_size", f"at least vocab_size, {vocab_size}", rows))
    if size != expected:
        raise ValueError(
            f"{path} must have {expected} bytes by its header, got {size}; it is cut short or damaged"
        )
    return WeightSource(config, nanogpt.RULES, dict(_tensors(path, config, dtype, rows)), str(path))


def _tensors(path: Path, config: GPT2Config, dtype: str, rows: int) -> Iterator[tuple[str, LazyTensor]]:
    """Yield (name, tensor) in the order of the file."""
    position, itemsize, width = HEADER, numpy_dtype(dtype).itemsize, config.n_embd

    def take(*shape: int) -> LazyTensor:
        nonlocal position
        start, count = position, math.prod(shape)
        position += count * itemsize

        def read() -> np.ndarray:
            return np.fromfile(path, numpy_dtype(dtype), count, offset=start).reshape(shape)

        return LazyTensor(shape, dtype, read, str(path), start)

    table = take(rows, width)
    # the padding's rows come last: the table without them begins at the same place
    shape = (config.vocab_size, width)
    yield (
        "wte.weight",
        dataclasses.replace(table, shape=shape, read=lambda: table.read()[: config.vocab_size]),
    )
    yield "wpe.weight", take(config.n_positions, width)
    outs = {"c_attn": (3 * width, width), "c_fc": (4 * width, width), "mlp.c_proj": (width, 4 * width)}
    for name in BLOCK_TENSORS:
        shape = next((shape for part, shape in outs.items() if part in name), (width, width))
        shape = shape if name.endswith("weight") and "ln_" not in name else shape[:1]
        for layer in range(config.n_layer):
            yield f"h.{layer}.{name}", take(*shape)
    yield "ln_f.weight", take(width)
    yield "ln_f.bias", take(width)
