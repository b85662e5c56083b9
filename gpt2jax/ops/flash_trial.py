"""The kernels of `flash_attention` beside plain operations with the same mask: before they are used, and in tests."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from gpt2jax.ops.attention import MASKED, block_mask
from gpt2jax.ops.counter_dropout import dropout_mask
from gpt2jax.ops.flash_attention import MAX_HEAD_DIM, FlashForm, flash_attention

# of the norm of the output or a gradient: some units of the last place of the operands (2^-24, 2^-11, 2^-8)
LIMITS = {"float32": 1e-5, "float16": 5e-3, "bfloat16": 3e-2}


def plain_attention(q, k, v, segment_ids, key, form: FlashForm) -> jax.Array:
    """Return what `flash_attention` computes, by plain operations in float32 that hold all scores."""
    q, k, v = (x.astype(form.dtype).astype(jnp.float32) for x in (q, k, v))
    scores = jnp.einsum("bnth,bnsh->bnts", q, k, precision="highest")
    p = jax.nn.softmax(jnp.where(block_mask(0, q.shape[2], segment_ids), scores, MASKED), axis=-1)
    if key is not None:
        p = jnp.where(dropout_mask(key, q.shape[:3], form.dropout_rate), p * form.keep_scale, 0.0)
    return jnp.einsum("bnts,bnsh->bnth", p, v, precision="highest")


def kernel_errors(
    form: FlashForm, shape: tuple[int, int, int, int] = (2, 2, 150, 64), num_segments: int = 3
) -> dict[str, float]:
    """Return how far output and gradients of the kernels are off, each relative to its norm.

    Args:
        form: of the kernels, with the rate of dropout.
        shape: (B, N, T, H).
        num_segments: of each row; 1: without segment ids.
    """
    batch, _, length, head_dim = shape
    *keys, dropout_key = jax.random.split(jax.random.key(0), 5)
    arrays = [jax.random.normal(key, shape).astype(form.dtype) for key in keys]
    ids = (jnp.arange(length) * num_segments // length + jnp.zeros((batch, 1), jnp.int32)).astype(jnp.int32)
    ids = ids if num_segments > 1 else None
    key = dropout_key if form.dropout_rate else None

    def compute(function, q, k, v, g, ids, key):
        def values(q, k, v):
            return function(q * head_dim**-0.5, k, v, ids, key, form).astype(jnp.float32)

        y, pull = jax.vjp(values, *(x.astype(jnp.float32) for x in (q, k, v)))
        return y, *pull(g.astype(jnp.float32))

    found, right = (
        jax.jit(compute, static_argnums=0)(function, *arrays, ids, key)
        for function in (flash_attention, plain_attention)
    )
    off = [
        jnp.linalg.norm((a - b).ravel()) / jnp.linalg.norm(b.ravel())
        for a, b in zip(found, right, strict=True)
    ]
    return dict(zip(("output", "dq", "dk", "dv"), map(float, off), strict=True))


def check_kernels(dtype: str) -> None:
    """Run the kernels on the device of this process, with dropout and segments, for both choices of blocks.

    Raises:
        ValueError: the output or a gradient is off by more than the rounding of the operands explains.
    """
    for head_dim in (64, MAX_HEAD_DIM):
        for name, off in kernel_errors(FlashForm(jnp.dtype(dtype), 0.1), (2, 2, 150, head_dim)).items():
            if not off <= LIMITS[dtype]:  # not so for nan
                text = f"{name} for heads of {head_dim} dimensions is off by {off:.1e} of its norm"
                raise ValueError(f"{text}; at most {LIMITS[dtype]:.0e} is rounding")
