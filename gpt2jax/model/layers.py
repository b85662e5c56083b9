"""The layers that the model is made of: linear layer, LayerNorm, embedding, and what all of them are told.

Axis letters: B batch, T query length, D model dim, F MLP dim.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Float32, Int

from gpt2jax.ops.dropout import dropout
from gpt2jax.ops.fused import gelu_tanh, layer_norm
from gpt2jax.ops.linear import add_bias, matmul
from gpt2jax.ops.low_rank import apply_lora
from gpt2jax.ops.precision import Precision

Ids = Int[Array | np.ndarray, "B T"]

# three names of the tanh approximation of GELU
_TANH_GELUS = ("gelu_new", "gelu_pytorch_tanh", "gelu_fast")
_OTHER_ACTIVATIONS = {
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
    "swish": jax.nn.silu,
    "tanh": jnp.tanh,
}


@dataclasses.dataclass(frozen=True)
class ForwardContext:
    """What is the same for every layer of one forward pass.

    Attributes:
        precision: dtypes.
        mask: [B or 1, 1, T, S], True = attend.
        is_causal: tokens attend to themselves and to all before them in their segment.
        segment_ids: [B, T], the segments of rows that hold several documents.
        cache_position: where the new keys and values go in a `LayerCache`.
        lora_dropout: dropout of the input of adapters.
        remat: one of `REMAT`.
    """

    precision: Precision
    mask: jax.Array | None = None
    is_causal: bool = False
    segment_ids: Ids | None = None
    cache_position: jax.Array | int | None = None
    lora_dropout: float = 0.0
    remat: str = "none"


def activate(name: str, ctx: ForwardContext, x: Float[Array, "B T F"]) -> Float[Array, "B T F"]:
    """Apply the nonlinearity between the two products of the MLP."""
    if name not in _TANH_GELUS:
        return _OTHER_ACTIVATIONS[name](x)
    return gelu_tanh(x, ctx.precision.compute_dtype, ctx.precision.execution)


class Linear(nnx.Module):
    """y = x @ kernel + bias, kernel [in, out] as in GPT-2's files, with an optional low-rank branch."""

    def __init__(self, in_dim: int, out_dim: int, *, layers: tuple[int, ...], std: float, rngs: nnx.Rngs):
        self.kernel = nnx.Param(
            std * jax.random.normal(rngs.params(), (*layers, in_dim, out_dim), jnp.float32)
        )
        self.bias = nnx.Param(jnp.zeros((*layers, out_dim), jnp.float32))

    def __call__(
        self,
        x: Float[Array, "B T in"],
        ctx: ForwardContext,
        adapter: Any = None,
        key: jax.Array | None = None,
        activation: Callable[[jax.Array], jax.Array] = lambda y: y,
    ) -> Float[Array, "B T out"]:
        """Apply the layer, then `activation`; for `adapter` see `low_rank.apply_lora`."""
        form = (ctx.precision.compute_dtype, ctx.precision.execution)
        kernel = self.kernel.get_value()
        y = matmul(x, kernel, *form)
        if adapter is not None:
            y = apply_lora(y, x, dropout(x, ctx.lora_dropout, key), kernel, adapter, *form)
        dtype = ctx.precision.activation_dtype
        if not ctx.precision.execution.has_narrow_results:
            return activation((y + self.bias[...]).astype(dtype))

        # the product is saved, the rest computed again: 1.2 GB of the 58 that a step of gpt2 moves, 16 x 1,024 tokens
        @jax.checkpoint
        def finish(y, bias):
            return activation(add_bias(y, bias, dtype))

        return finish(y, self.bias[...])


class LayerNorm(nnx.Module):
    """Normalization of the last axis, with float32 statistics."""

    def __init__(self, dim: int, *, layers: tuple[int, ...], epsilon: float):
        self.epsilon = epsilon
        self.scale = nnx.Param(jnp.ones((*layers, dim), jnp.float32))
        self.bias = nnx.Param(jnp.zeros((*layers, dim), jnp.float32))

    def __call__(self, x: Float[Array, "B T D"], ctx: ForwardContext) -> Float[Array, "B T D"]:
        if x.size == x.shape[-1] and not ctx.precision.execution.has_cpu_shapes:
            return self._normalize_one(x, ctx)
        scale, bias = self.scale[...], self.bias[...]
        y: jax.Array = layer_norm(x, scale, bias, self.epsilon, ctx.precision.execution)
        return y.astype(ctx.precision.activation_dtype)

    def _normalize_one(self, x: Float[Array, "1 1 D"], ctx: ForwardContext) -> Float[Array, "1 1 D"]:
        """Normalize one row as two that are the same.

        XLA fuses two rows with the product that follows. One row would lose its axis, so that mean, variance and
        result are three kernels: 197 of a token of gpt2 instead of 137, compiled for an H100.
        """
        rows = jax.lax.optimization_barrier(jnp.broadcast_to(x, (2, *x.shape[1:])))
        return self(rows, ctx)[:1]


class Embed(nnx.Module):
    """A table of vectors, looked up by id."""

    def __init__(self, rows: int, dim: int, *, std: float, rngs: nnx.Rngs):
        self.embedding = nnx.Param(std * jax.random.normal(rngs.params(), (rows, dim), jnp.float32))

    def __call__(self, ids: Ids) -> Float32[Array, "B T D"]:
        # ids are checked on the host; "clip" only spares the kernel that fills out-of-range rows with NaN
        return jnp.take(self.embedding[...], ids, axis=0, mode="clip").astype(jnp.float32)
