"""The arithmetic of a low-rank adapter on one linear layer; `lora/` has its settings, `model/` the linear layers.

An adapter is {"lora_a": [in, r], "lora_b": [r, out], "scale": []} and changes a kernel [in, out] to
kernel + scale * lora_a @ lora_b. With "magnitude" [out] (DoRA) the columns of that sum are rescaled to these lengths.
All of these arrays may have leading layer axes.

Sources: Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models"; Liu et al. 2024, "DoRA:
Weight-Decomposed Low-Rank Adaptation".
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32

from gpt2jax.ops.device import CPU, Execution
from gpt2jax.ops.linear import Kernel, dequantize, matmul

Adapter = dict[str, Any]  # arrays of JAX or NumPy


def apply_lora(
    y: Float[Array, "*B out"],
    x: Float[Array, "*B in"],
    dropped: Float[Array, "*B in"],
    kernel: Kernel,
    adapter: Adapter | tuple[Adapter | None, ...],
    dtype: jnp.dtype,
    execution: Execution = CPU,
) -> Float[Array, "*B out"]:
    """Add an adapter to the output of a linear layer, before the bias.

    Args:
        y: x @ kernel.
        x: input of the layer.
        dropped: `x` after the adapter's dropout; `x` itself without dropout.
        kernel: [in, out].
        adapter: of the whole layer; or a tuple with one for each equal part of the output, None for a plain part.
        dtype: of the operands of the products.
        execution: of the device.
    """
    if isinstance(adapter, tuple):
        count = len(adapter)
        outputs = jnp.split(y, count, axis=-1)
        for index, own in enumerate(adapter):
            if own is not None:
                part = slice_outputs(kernel, index, count)
                outputs[index] = apply_lora(outputs[index], x, dropped, part, own, dtype, execution)
        return jnp.concatenate(outputs, axis=-1)
    inner = matmul(dropped, adapter["lora_a"], dtype, execution)
    update = matmul(inner, adapter["lora_b"], dtype, execution) * adapter["scale"].astype(y.dtype)
    if "magnitude" not in adapter:
        return y + update
    # constant in the gradient, as section 4.3 of the paper proposes: it saves memory and costs no accuracy
    lengths = jax.lax.stop_gradient(column_norms(add_lora_delta(kernel, adapter)))
    ratio = adapter["magnitude"] / lengths
    plain = y if dropped is x else matmul(dropped, kernel, dtype, execution)
    return y + (ratio - 1.0) * plain + ratio * update


def slice_outputs(kernel: Kernel, index: int, count: int) -> Any:
    """Return the columns of one of `count` equal parts of the output of a kernel [..., in, out]."""

    def take_columns(z):
        width = z.shape[-1] // count
        return z[..., index * width : (index + 1) * width]

    return jax.tree.map(take_columns, kernel)  # every array of a kernel ends in the outputs


def merge_kernel(kernel: Float[Array, "*L in out"], adapter: Adapter) -> Float[Array, "*L in out"]:
    """Return the kernel that equals `kernel` with its adapter; summed in float32, in the dtype of `kernel`."""
    total = add_lora_delta(kernel, adapter)
    if "magnitude" in adapter:
        total = total * (adapter["magnitude"] / column_norms(total))[..., None, :]
    return total.astype(kernel.dtype)


def add_lora_delta(kernel: Kernel, adapter: Adapter, sign: float = 1.0) -> Float32[Array, "*L in out"]:
    """Return kernel + sign * scale * lora_a @ lora_b in float32."""
    factors = (adapter[name].astype(jnp.float32) for name in ("lora_a", "lora_b"))
    update = jnp.einsum("...ir,...ro->...io", *factors, precision=jax.lax.Precision.HIGHEST)
    return dequantize(kernel) + sign * adapter["scale"][..., None, None] * update


def column_norms(kernel: Kernel) -> Float32[Array, "*L out"]:
    """Return the Euclidean length of each output's weights in a kernel [..., in, out]."""
    return jnp.sqrt(jnp.square(dequantize(kernel)).sum(axis=-2))


def attach_scales(adapters: Mapping[str, Any], scale: Any, layers: int) -> dict[str, Any]:
    """Return adapters with "scale" [L] in each.

    Args:
        adapters: dicts nested to any depth, each innermost one an adapter stacked over the blocks.
        scale: a number for all adapters, or numbers and arrays [L] nested as the adapters are.
        layers: L.
    """
    if "lora_a" in adapters:
        return {**adapters, "scale": jnp.broadcast_to(jnp.asarray(scale, jnp.float32), (layers,))}
    return {
        name: attach_scales(part, scale[name] if isinstance(scale, Mapping) else scale, layers)
        for name, part in adapters.items()
    }
