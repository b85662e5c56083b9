"""The arithmetic of a low-rank adapter on one linear: `lora.py` has the settings, `model.py` the linears.

An adapter is {"lora_a": [in, r], "lora_b": [r, out], "scale": []} and makes kernel + scale * lora_a @ lora_b of a
kernel [in, out]. With "magnitude" [out] (DoRA) the columns of that sum are then brought to these lengths. All of it
may have leading layer axes.

Sources: Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models"; Liu et al. 2024, "DoRA:
Weight-Decomposed Low-Rank Adaptation".
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from gpt2jax.ops.bits import BitcastKernel
from gpt2jax.ops.precision import matmul
from gpt2jax.ops.quantized import Int8Kernel

Adapter = dict[str, jax.Array]
Kernel = jax.Array | Int8Kernel | BitcastKernel


def apply_lora(
    y: jax.Array,
    x: jax.Array,
    dropped: jax.Array,
    kernel: Kernel,
    adapter: Adapter | tuple[Adapter | None, ...],
    dtype: jnp.dtype,
) -> jax.Array:
    """The output of a linear with its adapter, before the bias.

    Args:
        y: [..., out], x @ kernel.
        x: [..., in].
        dropped: `x` after the adapter's dropout; `x` itself where there is none.
        kernel: [in, out].
        adapter: of the whole linear; or several, each of an equal part of the output or None for a plain part.
        dtype: of the products.
    """
    if isinstance(adapter, tuple):
        count = len(adapter)
        outputs = jnp.split(y, count, axis=-1)
        for index, own in enumerate(adapter):
            if own is not None:
                part = slice_outputs(kernel, index, count)
                outputs[index] = apply_lora(outputs[index], x, dropped, part, own, dtype)
        return jnp.concatenate(outputs, axis=-1)
    update = matmul(matmul(dropped, adapter["lora_a"], dtype), adapter["lora_b"], dtype) * adapter["scale"]
    if "magnitude" not in adapter:
        return y + update
    # a constant in the gradient, as the paper proposes in 4.3: it saves memory and costs no accuracy
    lengths = jax.lax.stop_gradient(column_norms(add_lora_delta(kernel, adapter)))
    ratio = adapter["magnitude"] / lengths
    plain = y if dropped is x else matmul(dropped, kernel, dtype)
    return y + (ratio - 1.0) * plain + ratio * update


def slice_outputs(kernel: Kernel, index: int, count: int) -> Any:
    """Of a kernel [..., in, out] the columns of one of `count` equal parts of the output."""

    def columns(z):
        width = z.shape[-1] // count
        return z[..., index * width : (index + 1) * width]

    return jax.tree.map(columns, kernel)  # every array of a kernel ends in the outputs


def merge_kernel(kernel: jax.Array, adapter: Adapter) -> jax.Array:
    """The kernel that computes what `kernel` with its adapter computes; summed in float32, in the kernel's dtype."""
    total = add_lora_delta(kernel, adapter)
    if "magnitude" in adapter:
        total = total * (adapter["magnitude"] / column_norms(total))[..., None, :]
    return total.astype(kernel.dtype)


def add_lora_delta(kernel: Kernel, adapter: Adapter, sign: float = 1.0) -> jax.Array:
    """kernel + scale * lora_a @ lora_b in float32."""
    factors = (adapter[name].astype(jnp.float32) for name in ("lora_a", "lora_b"))
    update = jnp.einsum("...ir,...ro->...io", *factors, precision=jax.lax.Precision.HIGHEST)
    return kernel.astype(jnp.float32) + sign * adapter["scale"][..., None, None] * update


def column_norms(kernel: Kernel) -> jax.Array:
    """[..., in, out] -> [..., out] float32: the Euclidean length of each output's weights."""
    return jnp.sqrt(jnp.square(kernel.astype(jnp.float32)).sum(axis=-2))


def attach_scales(adapters: Mapping[str, Any], scale: Any, layers: int) -> dict[str, Any]:
    """Adapters, however deeply nested, with "scale" [L] in each.

    Args:
        adapters: nested dicts, each innermost one an adapter stacked over the blocks.
        scale: a number for all, or numbers and arrays [L] nested as the adapters are.
        layers: L.
    """
    if "lora_a" in adapters:
        return {**adapters, "scale": jnp.broadcast_to(jnp.asarray(scale, jnp.float32), (layers,))}
    return {
        name: attach_scales(part, scale[name] if isinstance(scale, Mapping) else scale, layers)
        for name, part in adapters.items()
    }
