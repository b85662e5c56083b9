"""From logits to a token: temperature, then top-k, top-p, min-p and typical-p, then one draw.

Every setting is an array, so changing it compiles nothing. Where all rows have a top-k of at most `WINDOW` and no
typical-p, only that many candidates are looked at; otherwise the whole vocabulary is, without sorting it.

Sources: Fan et al. 2018 (top-k); Holtzman et al. 2020, "The Curious Case of Neural Text Degeneration"
(top-p); Nguyen et al. 2024, "Turning Up the Heat: Min-p Sampling" (min-p); Meister et al. 2022, "Locally Typical
Sampling" (typical-p).
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from gpt2jax.generation.config import GenerationConfig

WINDOW = 64
_BLOCK = 256
_SMALLEST = float(jnp.finfo(jnp.float32).tiny)  # a temperature below it would become 0 in float32


class Filters(NamedTuple):
    """The filters of `GenerationConfig` as a pytree of scalars or of arrays [B]; greedy is a top-k of 1."""

    temperature: jax.Array | float
    top_k: jax.Array | int
    top_p: jax.Array | float
    min_p: jax.Array | float
    typical_p: jax.Array | float


def make_filters(config: GenerationConfig) -> Filters:
    """Return the filters of one row as numbers for a compiled program."""
    if not config.do_sample or config.temperature == 0 or config.top_k == 1:
        return Filters(1.0, 1, 1.0, 0.0, 1.0)
    top_k = min(config.top_k or 2**31 - 1, 2**31 - 1)
    temperature = max(config.temperature, _SMALLEST)
    return Filters(temperature, top_k, config.top_p, config.min_p, config.typical_p)


def sample(logits: jax.Array, keys: jax.Array, filters: Filters) -> jax.Array:
    """Draws one token a row.

    Args:
        logits: [B, V] float32.
        keys: [B] random keys, one a row: what a row draws depends on its own logits, filters and key only.
        filters: the settings, scalars or one a row.

    Returns:
        Token ids [B] int32.
    """
    top_k = jnp.broadcast_to(filters.top_k, logits.shape[:1])
    in_window = (top_k <= WINDOW) & (jnp.asarray(filters.typical_p) >= 1.0)

    def most_probable():
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)

    def drawn():
        uniforms = jax.vmap(lambda key: jax.random.uniform(key, (2,), jnp.float32))(keys)
        values, ids = jax.lax.top_k(logits, min(WINDOW, logits.shape[-1]))
        tokens = _pick(ids, draw(window_weights(values, filters), uniforms[:, 0]))

        def beyond_the_window():
            # a row in the window draws as it does alone
            return jnp.where(in_window, tokens, draw_from_all(full_weights(logits, filters), uniforms))

        return jax.lax.cond(jnp.all(in_window), lambda: tokens, beyond_the_window)

    return jax.lax.cond(jnp.all(top_k == 1), most_probable, drawn)


def log_probability(logits: jax.Array, tokens: jax.Array) -> jax.Array:
    """Return the log-probability [B] float32 of one token [B] a row under softmax(logits [B, V])."""
    return _pick(logits, tokens) - jax.nn.logsumexp(logits, axis=-1)


def window_weights(values: jax.Array, filters: Filters) -> jax.Array:
    """As `full_weights` without typical-p, of candidates: descending logits [B, W] -> [B, W]."""
    temperature, top_k, top_p, min_p, _ = _columns(filters)
    weights = _tempered(values, temperature)
    weights = jnp.where(jnp.arange(values.shape[-1]) < top_k, weights, 0.0)
    before = jnp.cumsum(weights, axis=-1) - weights
    # the token that crosses top_p stays: what counts is the sum before it
    in_nucleus = (before < top_p * weights.sum(-1, keepdims=True)) | (top_p >= 1.0)
    return jnp.where(in_nucleus & (weights >= min_p), weights, 0.0)


def full_weights(logits: jax.Array, filters: Filters) -> jax.Array:
    """Filter the probabilities of the whole vocabulary: logits [B, V] -> weights [B, V], not normalized."""
    temperature, top_k, top_p, min_p, _ = _columns(filters)
    order = _ordered_bits(logits)
    weights = _tempered(logits, temperature)

    def keep_top_k(weights):
        count = jnp.broadcast_to(filters.top_k, weights.shape[:1]).astype(jnp.float32)
        kept = _largest(order, jnp.ones_like(weights), jnp.minimum(count, float(logits.shape[-1])))
        return jnp.where(kept | (top_k >= logits.shape[-1]), weights, 0.0)

    def keep_nucleus(weights):
        kept = _largest(order, weights, filters.top_p * weights.sum(-1))
        return jnp.where(kept | (top_p >= 1.0), weights, 0.0)

    weights = jax.lax.cond(jnp.any(top_k < logits.shape[-1]), keep_top_k, lambda w: w, weights)
    weights = jax.lax.cond(jnp.any(top_p < 1.0), keep_nucleus, lambda w: w, weights)
    return _only_typical(jnp.where(weights >= min_p, weights, 0.0), filters.typical_p)


def _only_typical(weights: jax.Array, typical_p: jax.Array | float) -> jax.Array:
    """Of weights [B, V] those whose information is nearest to their entropy, up to the mass `typical_p`."""

    def keep(weights):
        total = weights.sum(-1, keepdims=True)
        information = jnp.log(total) - jnp.log(jnp.where(weights > 0, weights, 1.0))
        entropy = (weights * information).sum(-1, keepdims=True) / total
        distance = jnp.where(weights > 0, jnp.abs(information - entropy), jnp.inf)
        kept = _largest(~_ordered_bits(distance), weights, typical_p * total[..., 0])
        return jnp.where(kept | (_column(typical_p) >= 1.0), weights, 0.0)

    return jax.lax.cond(jnp.any(jnp.asarray(typical_p) < 1.0), keep, lambda w: w, weights)


def draw(weights: jax.Array, uniforms: jax.Array) -> jax.Array:
    """Index [B] drawn in proportion to weights [B, W], by inversion: uniforms [B] in [0, 1)."""
    sums = jnp.where(weights > 0, jnp.cumsum(weights, axis=-1), 0.0)  # an index of weight 0 is never drawn
    passed = sums > uniforms[:, None] * sums.max(-1, keepdims=True)
    return jnp.argmax(passed, axis=-1).astype(jnp.int32)


def draw_from_all(weights: jax.Array, uniforms: jax.Array) -> jax.Array:
    """As `draw`, for weights [B, V] of a whole vocabulary: uniforms [B, 2], first for a block, then in it.

    Two short cumulative sums in place of one long one, and twice the random bits: one uniform float has steps
    of 1e-7, which is much in the tail of a vocabulary.
    """
    batch, vocab_size = weights.shape
    blocks = -(-vocab_size // _BLOCK)
    weights = jnp.pad(weights, ((0, 0), (0, blocks * _BLOCK - vocab_size))).reshape(batch, blocks, _BLOCK)
    block = draw(weights.sum(-1), uniforms[:, 0])
    inside = draw(jnp.take_along_axis(weights, block[:, None, None], axis=1)[:, 0], uniforms[:, 1])
    return block * _BLOCK + inside


def _largest(order: jax.Array, mass: jax.Array, target: jax.Array) -> jax.Array:
    """Mark the smallest set of entries, largest `order` first, whose mass reaches `target`.

    Of entries of equal order, the first ones.

    The last one of them is found by bisection, over the bits of its order and then of its place: some fifty masked
    sums, a fraction of the time of a sort.

    Args:
        order: [B, V] uint32.
        mass: [B, V] float32, at least 0.
        target: [B] float32, at most the sum of the masses.
    """
    vocab_size = order.shape[-1]
    from_end = jnp.uint32(vocab_size - 1) - jnp.arange(vocab_size, dtype=jnp.uint32)
    bits = vocab_size.bit_length()

    def reach(border, place):
        return (order > border[:, None]) | ((order == border[:, None]) & (from_end >= place[:, None]))

    def narrow(step, last):
        border, place = last
        trial = (
            jnp.where(step < 32, border | (jnp.uint32(1) << (31 - step).astype(jnp.uint32)), border),
            jnp.where(step < 32, place, place | (jnp.uint32(1) << (31 + bits - step).astype(jnp.uint32))),
        )
        reached = jnp.where(reach(*trial), mass, 0.0).sum(-1) >= target
        return tuple(jnp.where(reached, new, old) for new, old in zip(trial, last, strict=True))

    nothing = jnp.zeros(order.shape[:1], jnp.uint32)
    return reach(*jax.lax.fori_loop(0, 32 + bits, narrow, (nothing, nothing)))


def _ordered_bits(x: jax.Array) -> jax.Array:
    """float32 -> uint32 of the same order."""
    bits = jax.lax.bitcast_convert_type(jnp.where(x == 0, 0.0, x), jnp.uint32)  # -0.0 equals 0.0
    negative = bits >> 31 == 1
    return jnp.where(negative, ~bits, bits | jnp.uint32(1 << 31))


def _tempered(logits: jax.Array, temperature: jax.Array | float) -> jax.Array:
    """exp((logits - max) / temperature): probabilities relative to the most probable token."""
    return jnp.exp((logits - logits.max(-1, keepdims=True)) / temperature)


def _pick(x: jax.Array, index: jax.Array) -> jax.Array:
    """x [B, W], index [B] -> [B]."""
    return jnp.take_along_axis(x, index[:, None], axis=1)[:, 0]


def _columns(filters: Filters) -> list[jax.Array]:
    return [_column(value) for value in filters]


def _column(value: jax.Array | float) -> jax.Array:
    """Add an axis to a scalar or [B], to broadcast against [B, V]."""
    return jnp.asarray(value)[..., None]
