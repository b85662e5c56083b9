"""LoRA adapters: initialization, merging. Adapters are a separate pytree beside frozen parameters.

An adapter of a linear layer with kernel [in, out] is {"lora_a": [in, r], "lora_b": [r, out]} and adds
`(x @ lora_a) @ lora_b * scale` to its output; `ops/low_rank.py` has the arithmetic. `lora_b` starts at zero, so a fresh
adapter changes nothing. Inside this folder adapters are {target: adapter}; everywhere else they are nested and stacked
as the parameters are (`nest_targets`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gpt2jax.lora.config import QKV_TARGETS, TARGETS, LoRAConfig, flatten_targets, nest_targets
from gpt2jax.model.config import GPT2Config
from gpt2jax.model.gpt2 import Params, abstract_params
from gpt2jax.ops.linear import bitcast_kernel, quantize_kernel
from gpt2jax.ops.low_rank import add_lora_delta, attach_scales, column_norms, merge_kernel, slice_outputs


def init_adapters(
    config: GPT2Config, lora: LoRAConfig, seed: int = 0, *, params: Params | None = None
) -> Params:
    """Return fresh float32 adapters, nested and stacked as the parameters are.

    `lora_a` [L, in, r] is uniform within +-1/sqrt(in) (the Kaiming rule with slope sqrt(5), as in PEFT), `lora_b`
    [L, r, out] is zero. Where a pattern gives blocks different ranks, r is the largest one; the rest of a smaller one
    is zero in both factors, which training leaves at zero. DoRA's `magnitude` [L, out] is the length of the kernel's
    columns.

    Args:
        config: of the model.
        lora: settings.
        seed: of `lora_a`.
        params: the parameters that the adapters are for; DoRA needs them.

    Raises:
        ValueError: DoRA without `params`.
    """
    blocks = abstract_params(config)["h"]
    key = jax.random.key(seed)
    adapters: dict[str, Any] = {}
    for index, target in enumerate((*TARGETS, *QKV_TARGETS)):
        if target not in lora.targets:
            continue
        layers, in_dim, out_dim = kernel_shape(blocks, target)
        ranks = np.asarray([lora.rank_of(layer, target) for layer in range(layers)])
        bound = 1.0 / math.sqrt(in_dim)
        # the key of a target does not depend on the other targets
        shape = (layers, in_dim, int(ranks.max()))
        lora_a = jax.random.uniform(jax.random.fold_in(key, index), shape, jnp.float32, -bound, bound)
        if ranks.min() < ranks.max():
            lora_a = jnp.where(np.arange(ranks.max()) < ranks[:, None, None], lora_a, 0.0)
        lora_b = jnp.zeros((layers, int(ranks.max()), out_dim), jnp.float32)
        adapters[target] = {"lora_a": lora_a, "lora_b": lora_b}
        if lora.use_dora:
            if params is None:
                raise ValueError(
                    "params must be the model's parameters for DoRA, got None; it starts at their lengths"
                )
            adapters[target]["magnitude"] = column_norms(kernel_of(params["h"], target))
    return nest_targets(adapters)


def cast_base(params: Params, dtype: str | None) -> Params:
    """Cast the frozen parameters on which adapters are trained.

    Args:
        params: plain parameters, which are not changed; arrays that need no cast are shared.
        dtype: one of `BASE_DTYPES`, of all matrices; biases and LayerNorms are float32. "int8" rounds the kernels of
            the blocks to `Int8Kernel`, and embeddings and the head to bfloat16. None: as the parameters are.
    """

    def convert(path, leaf):
        name, in_block = path[-1].key, path[0].key == "h"
        if dtype is not None:
            if name not in ("kernel", "embedding"):
                return jnp.asarray(leaf, "float32")
            if dtype == "int8" and in_block:
                return quantize_kernel(leaf)
            leaf = jnp.asarray(leaf, "bfloat16" if dtype == "int8" else dtype)
        is_16_bit = leaf.dtype.itemsize == 2
        return bitcast_kernel(leaf) if is_16_bit and in_block and name == "kernel" else leaf

    return jax.tree_util.tree_map_with_path(convert, params)


def merge_adapters(params: Params, adapters: Params, lora: LoRAConfig) -> Params:
    """Return plain parameters that compute what `params` with `adapters` compute; `params` is not changed.

    The product of the two factors is summed in float32 and added to the kernel in float32.
    """
    return _map_kernels(params, adapters, lora, merge_kernel)


def unmerge_adapters(params: Params, adapters: Params, lora: LoRAConfig) -> Params:
    """Undo `merge_adapters`, up to rounding.

    Raises:
        ValueError: DoRA, whose merging forgets how long the columns were.
    """
    if lora.use_dora:
        raise ValueError("merged DoRA adapters cannot be unmerged; keep the parameters from before")

    def subtract(kernel, adapter):
        return add_lora_delta(kernel, adapter, sign=-1.0).astype(kernel.dtype)

    return _map_kernels(params, adapters, lora, subtract)


def kernel_of(blocks: Params, target: str) -> Any:
    """Return the kernel [L, in, out] of a target; of attn.q, attn.k and attn.v that part of attn.c_attn's."""
    if target in QKV_TARGETS:
        kernel = blocks["attn"]["c_attn"]["kernel"]
        return slice_outputs(kernel, QKV_TARGETS.index(target), len(QKV_TARGETS))
    module, linear = target.split(".")
    return blocks[module][linear]["kernel"]


def kernel_shape(blocks: Params, target: str) -> tuple[int, ...]:
    """Return (L, in, out) of the kernel of a target; the parameters may be abstract."""
    return jax.eval_shape(lambda blocks: kernel_of(blocks, target), blocks).shape


def _map_kernels(
    params: Params, adapters: Params, lora: LoRAConfig, change: Callable[[jax.Array, Params], jax.Array]
) -> Params:
    """Return `params` with `change(kernel, adapter)` instead of each kernel that has an adapter."""
    blocks = {module: dict(linears) for module, linears in params["h"].items()}
    layers = len(jax.tree.leaves(params["h"])[0])
    scaled = attach_scales(adapters, lora.scales(layers), layers)
    for target, adapter in flatten_targets(scaled).items():
        kernel = change(kernel_of(blocks, target), adapter)
        module, linear = target.split(".")
        if target in QKV_TARGETS:
            linear = "c_attn"
            start = QKV_TARGETS.index(target) * kernel.shape[-1]
            full = blocks[module][linear]["kernel"]
            kernel = jax.lax.dynamic_update_slice_in_dim(full, kernel, start, axis=-1)
        blocks[module][linear] = {**blocks[module][linear], "kernel": kernel}
    return {**params, "h": blocks}
