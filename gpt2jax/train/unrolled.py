"""Unrolled layers: train on parameters of each layer instead of stacked ones, if that is faster.

`lax.scan` over stacked layers compiles one layer but copies every layer's gradients into the stack. Unrolled layers,
{"h": {0: {...}, 1: {...}, ...}}, avoid these copies. What leaves a run is stacked, its checkpoints too.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from gpt2jax.model.config import GPT2Config
from gpt2jax.train.config import FinetuneConfig

# these are elementwise; others take sums or products over a whole array, which a stack changes
_ELEMENTWISE = ("adamw", "lion", "sgd")
# without a loop XLA keeps more for the backward pass: little for short rows that are few compared to the weights
_MAX_LENGTH = 128


def should_unroll(model: GPT2Config, train: FinetuneConfig, length: int, backend: str, devices: int) -> bool:
    """Return True if training is faster with unrolled layers, in about the same memory.

    That holds for all parameters in float32, on one CPU device and for small batches. Otherwise the copies take
    little of the time, or what the scan saves in memory is worth more.

    Args:
        model: configuration of the model.
        train: settings of the run.
        length: T, tokens of a row.
        backend: jax's name of the backend, such as "cpu".
        devices: number of devices.
    """
    trains_all = train.lora is None and not train.freeze and train.remat == "none"
    in_float32 = train.compute_dtype == "float32" and train.optimizer in _ELEMENTWISE
    tokens = length * train.batch_size // train.gradient_accumulation_steps
    is_small = length <= _MAX_LENGTH and tokens <= 2 * model.n_embd
    return trains_all and in_float32 and is_small and backend == "cpu" and devices == 1


def unstack_layers(tree: Any) -> Any:
    """Unroll the layers of a training state or of parameters."""

    def layers(blocks):
        count = jax.tree.leaves(blocks)[0].shape[0]
        return {i: jax.tree.map(lambda leaf, i=i: leaf[i], blocks) for i in range(count)}

    return _map_blocks(layers, tree)


def stack_layers(tree: Any) -> Any:
    """Undo `unstack_layers`; stacked layers stay as they are."""

    def stack(blocks):
        if 0 not in blocks:
            return blocks
        return jax.tree.map(lambda *layers: jnp.stack(layers), *(blocks[i] for i in range(len(blocks))))

    return _map_blocks(stack, tree)


def _map_blocks(function: Callable[[Any], Any], tree: Any) -> Any:
    """Apply a function to "h" of every dict that is nested as parameters are, such as moments."""

    def has_blocks(node):
        return isinstance(node, dict) and "h" in node

    def apply(node):
        return {**node, "h": function(node["h"])} if has_blocks(node) else node

    return jax.tree.map(apply, tree, is_leaf=has_blocks)
