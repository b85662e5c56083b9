"""Causal attention with dropout of the probabilities and segments, as fused kernels for NVIDIA GPUs.

One kernel computes the output and the log-sum-exp of each row, one the gradient of the queries, one those of keys and
values. Each computes the scores of a tile anew, so that nothing of size T * T leaves the chip. The kernels are written
in Pallas and compiled by Triton; tests let JAX interpret them on a CPU.

Dropout needs the same mask in all three: `counter_dropout` makes it tile by tile. `flash_trial` compares the kernels
with plain operations.

Axis letters: B batch, N heads, T queries, S keys, H head dim.

Source: Dao 2023, "FlashAttention-2".
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton
from jaxtyping import Array, Float

from gpt2jax.ops.attention import MASKED
from gpt2jax.ops.counter_dropout import MAX_LENGTH, dropout_seed, kept_scale, kept_tile
from gpt2jax.ops.precision import Dtype

LOG2_E = math.log2(math.e)
MAX_HEAD_DIM = 128
# of a program. Compiled for an H100, heads of 64 dimensions need 45 to 58 KB of shared memory and 128 to 241 registers
# a thread, so that two programs or more share a multiprocessor
NUM_WARPS = 4
NUM_STAGES = 2


@dataclasses.dataclass(frozen=True)
class FlashForm:
    """What the kernels are compiled for.

    Attributes:
        dtype: of the operands of the products, and of the output.
        dropout_rate: of the probabilities; a key comes with it.
        blocks: queries or keys that a program computes results for, and those that it reads at a time: powers of two
            from 16. None: chosen by the head dim.
        is_interpreted: run by JAX on any device, for tests.
    """

    dtype: jnp.dtype
    dropout_rate: float = 0.0
    blocks: tuple[int, int] | None = None
    is_interpreted: bool = False

    @property
    def keep_scale(self) -> float:
        """What elements that are kept are multiplied by."""
        return kept_scale(self.dropout_rate)

    def blocks_of(self, head_dim: int) -> tuple[int, int]:
        """Return `blocks`; with 64 x 64, heads of 128 dimensions need 107 KB of shared memory, a RTX 4090 has 101."""
        return self.blocks or ((64, 64) if head_dim <= 64 else (64, 32))


def supports_flash(length: int, head_dim: int) -> bool:
    """Return whether the kernels take rows of this many tokens and heads of this many dimensions."""
    return length <= MAX_LENGTH and head_dim <= MAX_HEAD_DIM


# ---- kernels: their refs hold one head of one row ----


class Operands(NamedTuple):
    """What every kernel reads: arrays [B, T, N, H] as the model makes them, padded to whole blocks."""

    q: Any
    k: Any
    v: Any
    segment_ids: Any  # [B, T] or None
    seed: Any  # [2] or None


def _product(a, b, contracted: tuple[int, int]):
    # float32 operands, which only tests have, must not become TF32
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    axes = (((contracted[0],), (contracted[1],)), ((), ()))
    return jax.lax.dot_general(a, b, axes, precision=precision, preferred_element_type=jnp.float32)


class _Head:
    """Makes the tiles of scores of one head, which begin at a query and a key."""

    def __init__(self, refs: Operands, form: FlashForm, shape: tuple[int, int]):
        self.refs, self.form, self.shape = refs, form, shape
        # interpreted, a loop does not know the program
        self.number = pl.program_id(2) * pl.num_programs(1) + pl.program_id(1)

    def scores(self, q, k, query, key):
        """Return masked scores in units of log 2."""
        queries = query + jax.lax.broadcasted_iota(jnp.int32, self.shape, 0)
        keys = key + jax.lax.broadcasted_iota(jnp.int32, self.shape, 1)
        mask = queries >= keys
        if (ids := self.refs.segment_ids) is not None:
            of_queries, of_keys = ids[pl.ds(query, self.shape[0])], ids[pl.ds(key, self.shape[1])]
            mask = mask & (of_queries[:, None] == of_keys[None, :])
        return jnp.where(mask, _product(q, k, (1, 1)) * LOG2_E, MASKED)

    def drop(self, query, key, *tiles):
        """Drop the same elements of tiles; what is kept is not scaled."""
        if (seed := self.refs.seed) is None:
            return tiles
        kept = kept_tile((seed[0], seed[1]), self.number, query, key, self.shape, self.form.dropout_rate)
        return tuple(jnp.where(kept, tile, 0.0) for tile in tiles)


def _queries_of_program(size: int):
    # the longest rows first, so that none of them runs alone at the end
    return (pl.num_programs(0) - 1 - pl.program_id(0)) * size


def flash_attention_forward(refs: Operands, y_ref, lse_ref, *, form: FlashForm):
    """Compute the output and the log-sum-exp (base 2) of a block of queries."""
    rows, columns = form.blocks_of(refs.q.shape[-1])
    head, query, q = _Head(refs, form, (rows, columns)), _queries_of_program(rows), refs.q[...]

    def add_keys(block, carry):
        y, highest, total = carry
        key, keys = block * columns, pl.ds(block * columns, columns)
        scores = head.scores(q, refs.k[keys, :], query, key)
        new_highest = jnp.maximum(highest, scores.max(axis=1))
        shrink, p = jnp.exp2(highest - new_highest), jnp.exp2(scores - new_highest[:, None])
        total = total * shrink + p.sum(axis=1)
        (p,) = head.drop(query, key, p)
        y = y * shrink[:, None] + _product(p.astype(form.dtype), refs.v[keys, :], (1, 0))
        return y, new_highest, total

    start = (
        jnp.zeros(q.shape, jnp.float32),
        jnp.full(rows, MASKED, jnp.float32),
        jnp.zeros(rows, jnp.float32),
    )
    y, highest, total = jax.lax.fori_loop(0, pl.cdiv(query + rows, columns), add_keys, start)
    y_ref[...] = (y * (form.keep_scale / total)[:, None]).astype(form.dtype)
    lse_ref[...] = highest + jnp.log2(total)


def flash_attention_query_gradient(refs: Operands, g_ref, lse_ref, delta_ref, dq_ref, *, form: FlashForm):
    """Compute the gradient of a block of queries."""
    rows, columns = form.blocks_of(refs.q.shape[-1])
    head, query = _Head(refs, form, (rows, columns)), _queries_of_program(rows)
    q, g, lse, delta = refs.q[...], g_ref[...], lse_ref[...], delta_ref[...]

    def add_keys(block, dq):
        key, keys = block * columns, pl.ds(block * columns, columns)
        k = refs.k[keys, :]
        p = jnp.exp2(head.scores(q, k, query, key) - lse[:, None])
        (dp,) = head.drop(query, key, _product(g, refs.v[keys, :], (1, 1)) * form.keep_scale)
        ds = p * (dp - delta[:, None])
        return dq + _product(ds.astype(form.dtype), k, (1, 0))

    start = jnp.zeros(q.shape, jnp.float32)
    dq = jax.lax.fori_loop(0, pl.cdiv(query + rows, columns), add_keys, start)
    dq_ref[...] = dq.astype(form.dtype)


def flash_attention_key_gradient(
    refs: Operands, g_ref, lse_ref, delta_ref, dk_ref, dv_ref, *, form: FlashForm
):
    """Compute the gradients of a block of keys and their values."""
    columns, rows = form.blocks_of(refs.q.shape[-1])
    head, key = _Head(refs, form, (rows, columns)), pl.program_id(0) * columns
    k, v = refs.k[...], refs.v[...]

    def add_queries(block, carry):
        dk, dv = carry
        query, queries = block * rows, pl.ds(block * rows, rows)
        q, g = refs.q[queries, :], g_ref[queries, :]
        p = jnp.exp2(head.scores(q, k, query, key) - lse_ref[queries][:, None])
        dropped, dp = head.drop(query, key, p, _product(g, v, (1, 1)) * form.keep_scale)
        ds = p * (dp - delta_ref[queries][:, None])
        dv = dv + _product(dropped.astype(form.dtype), g, (0, 0))
        dk = dk + _product(ds.astype(form.dtype), q, (0, 0))
        return dk, dv

    zeros = jnp.zeros(k.shape, jnp.float32)
    dk, dv = jax.lax.fori_loop(key // rows, refs.q.shape[0] // rows, add_queries, (zeros, zeros))
    dk_ref[...] = dk.astype(form.dtype)
    dv_ref[...] = (dv * form.keep_scale).astype(form.dtype)


# ---- from the model's arrays to the kernels and back ----


def _call(
    kernel: Callable[..., None],
    results: Sequence[Any],
    operands: Operands,
    others: Sequence[Any],
    form: FlashForm,
):
    """Run a kernel for every block of every head.

    Args:
        kernel: to run; that of the keys' gradient goes by blocks of keys, the others by blocks of queries.
        results: shapes and dtypes of what it writes, by blocks.
        operands: what every kernel reads.
        others: further arrays [B, T, N, H] or [B, N, T], by queries.
        form: what it is compiled for.
    """
    batch, length, heads, head_dim = operands.q.shape
    size, _ = form.blocks_of(head_dim)
    count, is_by_keys = length // size, kernel is flash_attention_key_gradient

    def spec(x, is_in_blocks: bool):
        def place(i, n, b):
            block = (i if is_by_keys else count - 1 - i) if is_in_blocks else 0
            return (b, block, n, 0) if x.ndim == 4 else (b, n, block)

        part = size if is_in_blocks else length
        return pl.BlockSpec((None, part, None, head_dim) if x.ndim == 4 else (None, None, part), place)

    of_queries = [spec(x, not is_by_keys) for x in (operands.q, *others)]
    specs = Operands(
        of_queries[0],
        spec(operands.k, is_by_keys),
        spec(operands.v, is_by_keys),
        None if operands.segment_ids is None else pl.BlockSpec((None, length), lambda i, n, b: (b, 0)),
        None if operands.seed is None else pl.BlockSpec((2,), lambda i, n, b: (0,)),
    )

    def run(*refs):
        kernel(*refs, form=form)

    run.__name__ = kernel.__name__  # what profiles show
    return pl.pallas_call(
        run,
        out_shape=results,
        grid=(count, heads, batch),
        in_specs=[specs, *of_queries[1:]],
        out_specs=[spec(x, True) for x in results],
        compiler_params=triton.CompilerParams(num_warps=NUM_WARPS, num_stages=NUM_STAGES),
        interpret=form.is_interpreted,
        name=kernel.__name__,
    )(operands, *others)


def _to_kernel(x: Float[Array, "B N T H"], form: FlashForm) -> Float[Array, "B t N h"]:
    """Cast, exchange axes, and pad with zeros to whole blocks and a power of two of dims."""
    x = x.astype(form.dtype).swapaxes(1, 2)
    length, head_dim = -x.shape[1] % max(form.blocks_of(x.shape[3])), pl.next_power_of_2(x.shape[3])
    return jnp.pad(x, ((0, 0), (0, length), (0, 0), (0, head_dim - x.shape[3])))


def _from_kernel(x: Float[Array, "B t N h"], shape: Sequence[int]) -> Float[Array, "B N T H"]:
    return x[:, : shape[2], :, : shape[3]].swapaxes(1, 2)


def _attend_forward(q, k, v, segment_ids, key, form: FlashForm):
    shape, dtypes = q.shape, [Dtype(x.dtype) for x in (q, k, v)]
    q, k, v = (_to_kernel(x, form) for x in (q, k, v))
    batch, length, heads, _ = q.shape
    if segment_ids is not None:
        segment_ids = jnp.pad(jnp.asarray(segment_ids, jnp.int32), ((0, 0), (0, length - shape[2])))
    operands = Operands(q, k, v, segment_ids, None if key is None else dropout_seed(key))
    row = jax.ShapeDtypeStruct((batch, heads, length), jnp.float32)
    results = [jax.ShapeDtypeStruct(q.shape, form.dtype), row]
    y, lse = _call(flash_attention_forward, results, operands, (), form)
    return _from_kernel(y, shape), (operands, y, lse, *dtypes)


def _attend_backward(form: FlashForm, residuals, g):
    operands, y, lse, *dtypes = residuals
    shape, g = g.shape, _to_kernel(g, form)
    delta = (y.astype(jnp.float32) * g.astype(jnp.float32)).sum(-1).swapaxes(1, 2)
    like, others = jax.ShapeDtypeStruct(y.shape, form.dtype), (g, lse, delta)
    dq = _call(flash_attention_query_gradient, [like], operands, others, form)
    dk_dv = _call(flash_attention_key_gradient, [like, like], operands, others, form)
    gradients = (_from_kernel(x, shape) for x in (*dq, *dk_dv))
    return *(x.astype(dtype.dtype) for x, dtype in zip(gradients, dtypes, strict=True)), None, None


def _attend(q, k, v, segment_ids, key, form: FlashForm):
    return _attend_forward(q, k, v, segment_ids, key, form)[0]


flash_attention = jax.custom_vjp(_attend, nondiff_argnums=(5,))
flash_attention.__doc__ = """Return softmax(q k^T) v of causal attention, differentiable with respect to q, k and v.

Args:
    q, k, v: [B, N, T, H], as `supports_flash` allows; q is scaled.
    segment_ids: [B, T] or None; tokens attend only within their own segment.
    key: of dropout, or None.
    form: a `FlashForm`.

Returns:
    [B, N, T, H] of `form.dtype`.
"""
flash_attention.defvjp(_attend_forward, _attend_backward)
