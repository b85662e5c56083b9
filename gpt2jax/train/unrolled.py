"""How the parameters of the blocks lie while they are trained: stacked, as everywhere else, or each layer apart.

A loop over stacked layers is compiled once for all of them; it pays with copies, of each layer's gradients into the
stack. With the layers apart, {"h": {0: {...}, 1: {...}, ...}}, and written out one after another there are none.
What leaves a run is stacked, its checkpoints too.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from gpt2jax.model.config import GPT2Config
from gpt2jax.train.config import FinetuneConfig

# these work number by number; others take sums or products over a whole array, which a stack changes
_ELEMENTWISE = ("adamw", "lion", "sgd")
# where there is no loop XLA keeps more for the backward pass: little for short rows that are few beside the weights
_LONGEST = 128


def should_unroll(model: GPT2Config, train: FinetuneConfig, length: int, backend: str, devices: int) -> bool:
    """Whether training is faster with the layers apart, in about the same memory.

    It is for all parameters in float32 on one CPU device and for small batches. Elsewhere these copies take little of
    the time, or what loops save in memory is worth more.

    Args:
        model: its configuration.
        train: settings.
        length: T, tokens of a row.
        backend: jax's name of it.
        devices: how many.
    """
    everything = train.lora is None and not train.freeze and train.remat == "none"
    in_float32 = train.compute_dtype == "float32" and train.optimizer in _ELEMENTWISE
    few = length <= _LONGEST and length * train.batch_size // train.accumulation <= 2 * model.n_embd
    return everything and in_float32 and few and backend == "cpu" and devices == 1


def unstack_layers(tree: Any) -> Any:
    """A training state or parameters with the layers apart."""

    def layers(blocks):
        count = jax.tree.leaves(blocks)[0].shape[0]
        return {i: jax.tree.map(lambda leaf, i=i: leaf[i], blocks) for i in range(count)}

    return _map_blocks(layers, tree)


def stack_layers(tree: Any) -> Any:
    """The same stacked: undoes `unstack_layers`, and leaves alone what is stacked."""

    def stack(blocks):
        if 0 not in blocks:
            return blocks
        return jax.tree.map(lambda *layers: jnp.stack(layers), *(blocks[i] for i in range(len(blocks))))

    return _map_blocks(stack, tree)


def _map_blocks(function: Callable[[Any], Any], tree: Any) -> Any:
    """Applies a function to what is at "h" in every dict that is nested as parameters are, moments for example."""

    def has_blocks(node):
        return isinstance(node, dict) and "h" in node

    def mapped(node):
        return {**node, "h": function(node["h"])} if has_blocks(node) else node

    return jax.tree.map(mapped, tree, is_leaf=has_blocks)
