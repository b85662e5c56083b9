"""From logits to a token: temperature, then top-k, top-p, min-p and typical-p, then one draw.

Every value of a setting is an array, so changing it compiles nothing. Where all rows have a top-k of at most `WINDOW`
and no typical-p, only that many candidates are looked at; otherwise the whole vocabulary is, without sorting it.

`sample` decides that on the device, `sample_by` before compiling; both draw the same tokens.

Sources: Fan et al. 2018 (top-k); Holtzman et al. 2020, "The Curious Case of Neural Text Degeneration"
(top-p); Nguyen et al. 2024, "Turning Up the Heat: Min-p Sampling" (min-p); Meister et al. 2022, "Locally Typical
Sampling" (typical-p).
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32, Int, Int32, Key, UInt32

from gpt2jax.generation.config import GenerationConfig, is_greedy
from gpt2jax.generation.stages import SMALL_WINDOW, WINDOW, Stages, apply_stage

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
    if is_greedy(config):
        return Filters(1.0, 1, 1.0, 0.0, 1.0)
    top_k = min(config.top_k or 2**31 - 1, 2**31 - 1)
    temperature = max(config.temperature, _SMALLEST)
    return Filters(temperature, top_k, config.top_p, config.min_p, config.typical_p)


def sample(logits: Float32[Array, "B V"], keys: Key[Array, " B"], filters: Filters) -> Int32[Array, " B"]:
    """Draw one token a row, by what the settings are when the program runs.

    Args:
        logits: the scores of all tokens.
        keys: one a row: what a row draws depends on its own logits, filters and key only.
        filters: the settings, scalars or one a row.
    """
    top_k = jnp.broadcast_to(filters.top_k, logits.shape[:1])
    in_window = _is_in_window(top_k, filters)

    def most_probable():
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)

    def drawn():
        uniforms = make_uniforms(keys)
        values, ids = jax.lax.top_k(logits, min(WINDOW, logits.shape[-1]))
        tokens = _pick(ids, draw(window_weights(values, filters), uniforms[:, 0]))

        def beyond_the_window():
            # a row in the window draws as it does alone
            return jnp.where(in_window, tokens, draw_from_all(full_weights(logits, filters), uniforms))

        return jax.lax.cond(jnp.all(in_window), lambda: tokens, beyond_the_window)

    return jax.lax.cond(jnp.all(top_k == 1), most_probable, drawn)


def sample_by(
    stages: Stages,
    logits: Float32[Array, "B V"],
    uniforms: Float32[Array, "B 2"] | None,
    filters: Filters,
) -> tuple[Int32[Array, " B"], Float32[Array, "B 1"] | None]:
    """Draw the tokens of `sample` by a program without conditionals.

    Args:
        stages: what the rows ask for.
        logits: the scores of all tokens.
        uniforms: `make_uniforms` of the keys; None if all rows are greedy.
        filters: the settings, scalars or one a row.

    Returns:
        The tokens, and the largest logit of each row if it was found on the way.
    """
    if stages.is_greedy:
        tokens = jnp.argmax(logits, axis=-1).astype(jnp.int32)
        return tokens, _column(_pick(logits, tokens))
    assert uniforms is not None
    tokens = largest = None
    if stages.window:
        values, ids = top_candidates(logits, SMALL_WINDOW if stages.window == 1 else stages.window)
        tokens, largest = _pick(ids, draw(window_weights(values, filters), uniforms[:, 0])), values[:, :1]
    if stages.has_vocabulary:
        drawn = draw_from_all(full_weights(logits, filters, stages), uniforms)
        in_window = _is_in_window(jnp.broadcast_to(filters.top_k, logits.shape[:1]), filters)
        tokens = drawn if tokens is None else jnp.where(in_window, tokens, drawn)
    assert tokens is not None
    return tokens, largest


def make_uniforms(keys: Key[Array, "*axes"]) -> Float32[Array, "*axes 2"]:
    """Return the two random numbers of each draw."""
    flat = jax.vmap(lambda key: jax.random.uniform(key, (2,), jnp.float32))(keys.reshape(-1))
    return flat.reshape(*keys.shape, 2)


def top_candidates(
    logits: Float32[Array, "B V"], count: int
) -> tuple[Float32[Array, "B K"], Int32[Array, "B K"]]:
    """Return `jax.lax.top_k` of up to `count`, in rounds that XLA's own top-k kernel can take on a GPU."""
    count = min(count, logits.shape[-1])
    place = jnp.arange(logits.shape[-1], dtype=jnp.int32)
    found: list[tuple[jax.Array, jax.Array]] = []
    while count > 0:
        values, ids = jax.lax.top_k(logits, min(count, SMALL_WINDOW))
        found.append((values, ids))
        count -= values.shape[-1]
        last, at = values[:, -1:], ids[:, -1:]
        logits = jnp.where((logits > last) | ((logits == last) & (place <= at)), -jnp.inf, logits)
    values, ids = (jnp.concatenate(parts, axis=-1) for parts in zip(*found, strict=True))
    return values, ids


def log_probability(
    logits: Float32[Array, "B V"],
    tokens: Int[Array, " B"],
    largest: Float32[Array, "B 1"] | None = None,
) -> Float32[Array, " B"]:
    """Return the log-probability of one token a row under softmax(logits); `largest` spares the search for it."""
    if largest is None:
        return _pick(logits, tokens) - jax.nn.logsumexp(logits, axis=-1)
    return _pick(logits - largest, tokens) - jnp.log(jnp.exp(logits - largest).sum(-1))


def _is_in_window(top_k: jax.Array, filters: Filters) -> jax.Array:
    """Return which rows draw from a window of candidates."""
    return (top_k <= WINDOW) & (jnp.asarray(filters.typical_p) >= 1.0)


def window_weights(values: Float32[Array, "B W"], filters: Filters) -> Float32[Array, "B W"]:
    """Filter the probabilities of candidates, given as descending logits, as `full_weights` without typical-p."""
    temperature, top_k, top_p, min_p, _ = _columns(filters)
    weights = _tempered(values, temperature)
    weights = jnp.where(jnp.arange(values.shape[-1]) < top_k, weights, 0.0)
    before = jnp.cumsum(weights, axis=-1) - weights
    # the token that crosses top_p stays: what counts is the sum before it
    in_nucleus = (before < top_p * weights.sum(-1, keepdims=True)) | (top_p >= 1.0)
    return jnp.where(in_nucleus & (weights >= min_p), weights, 0.0)


def full_weights(
    logits: Float32[Array, "B V"], filters: Filters, stages: Stages | None = None
) -> Float32[Array, "B V"]:
    """Filter the probabilities of the whole vocabulary; the weights are not normalized."""
    temperature, top_k, top_p, min_p, _ = _columns(filters)
    order = _ordered_bits(logits)
    weights = _tempered(logits, temperature)

    def keep_top_k(weights):
        count = jnp.broadcast_to(filters.top_k, weights.shape[:1]).astype(jnp.float32)
        target = jnp.minimum(count, float(logits.shape[-1]))
        kept = _largest(order, jnp.ones_like(weights), target, stages)
        return jnp.where(kept | (top_k >= logits.shape[-1]), weights, 0.0)

    def keep_nucleus(weights):
        kept = _largest(order, weights, filters.top_p * weights.sum(-1), stages)
        return jnp.where(kept | (top_p >= 1.0), weights, 0.0)

    has_top_k, has_top_p = (stages.has_top_k, stages.has_top_p) if stages else (None, None)
    weights = apply_stage(has_top_k, lambda: jnp.any(top_k < logits.shape[-1]), keep_top_k, weights)
    weights = apply_stage(has_top_p, lambda: jnp.any(top_p < 1.0), keep_nucleus, weights)
    return _only_typical(jnp.where(weights >= min_p, weights, 0.0), filters.typical_p, stages)


def _only_typical(weights: jax.Array, typical_p: jax.Array | float, stages: Stages | None) -> jax.Array:
    """Of weights [B, V] those whose information is nearest to their entropy, up to the mass `typical_p`."""

    def keep(weights):
        total = weights.sum(-1, keepdims=True)
        information = jnp.log(total) - jnp.log(jnp.where(weights > 0, weights, 1.0))
        entropy = (weights * information).sum(-1, keepdims=True) / total
        distance = jnp.where(weights > 0, jnp.abs(information - entropy), jnp.inf)
        kept = _largest(~_ordered_bits(distance), weights, typical_p * total[..., 0], stages)
        return jnp.where(kept | (_column(typical_p) >= 1.0), weights, 0.0)

    is_on = stages.has_typical_p if stages else None
    return apply_stage(is_on, lambda: jnp.any(jnp.asarray(typical_p) < 1.0), keep, weights)


def draw(weights: Float[Array, "B W"], uniforms: Float[Array, " B"]) -> Int32[Array, " B"]:
    """Draw an index in proportion to weights, by inversion: uniforms in [0, 1)."""
    sums = jnp.where(weights > 0, jnp.cumsum(weights, axis=-1), 0.0)  # an index of weight 0 is never drawn
    passed = sums > uniforms[:, None] * sums.max(-1, keepdims=True)
    return jnp.argmax(passed, axis=-1).astype(jnp.int32)


def draw_from_all(weights: Float[Array, "B V"], uniforms: Float[Array, "B 2"]) -> Int32[Array, " B"]:
    """Draw as `draw` from the weights of a whole vocabulary: uniforms first for a block, then in it.

    Two short cumulative sums instead of one long one, and twice the random bits: one uniform float has steps
    of 1e-7, which is much in the tail of a vocabulary.
    """
    batch, vocab_size = weights.shape
    blocks = -(-vocab_size // _BLOCK)
    weights = jnp.pad(weights, ((0, 0), (0, blocks * _BLOCK - vocab_size))).reshape(batch, blocks, _BLOCK)
    block = draw(weights.sum(-1), uniforms[:, 0])
    inside = draw(jnp.take_along_axis(weights, block[:, None, None], axis=1)[:, 0], uniforms[:, 1])
    return block * _BLOCK + inside


def _largest(
    order: UInt32[Array, "B V"],
    mass: Float32[Array, "B V"],
    target: Float32[Array, " B"],
    stages: Stages | None,
) -> Bool[Array, "B V"]:
    """Mark the smallest set of entries, largest `order` first, whose mass reaches `target`.

    Of entries of equal order, the first ones.

    The last one of them is found by bisection, over the bits of its order and then of its place: some fifty masked
    sums, a fraction of the time of a sort. With `stages`, on an accelerator, a round tries the values of four bits at
    once: compiled for an H100, top-p adds 46 kernels to a token of top-k, where fifty rounds added 150.

    Args:
        order: what to sort by.
        mass: at least 0.
        target: at most the sum of the masses.
        stages: of the program; None if it decides on the device.
    """
    if stages is not None:
        return _largest_by_digits(order, mass, target)
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


def _largest_by_digits(order: jax.Array, mass: jax.Array, target: jax.Array) -> jax.Array:
    """Compute `_largest` in rounds of four bits, without a loop."""
    vocab_size = order.shape[-1]
    from_end = jnp.uint32(vocab_size - 1) - jnp.arange(vocab_size, dtype=jnp.uint32)
    digits = jnp.arange(1, 16, dtype=jnp.uint32)

    def narrow(values, base, bits):
        """Return the largest number [B] so that `base` and the values from it on reach the target."""
        found = jnp.zeros(target.shape, jnp.uint32)
        for shift in reversed(range(0, bits, 4)):
            trials = found[:, None] | (digits << shift)  # [B, 15]
            inside = base[:, None] | (values[:, None] >= trials[..., None])
            reached = jnp.where(inside, mass[:, None], 0.0).sum(-1) >= target[:, None]
            found |= reached.sum(-1, dtype=jnp.uint32) << shift
        return found

    border = narrow(order, jnp.zeros(order.shape, bool), 32)[:, None]
    # at the border, the entries before the first that is needed have an order of 0: they are never inside
    place = jnp.where(order == border, from_end + 1, 0)
    last = narrow(place, order > border, (vocab_size + 1).bit_length())[:, None]
    return (order > border) | ((order == border) & (place >= last))


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


def _column(value: jax.Array | float | int) -> jax.Array:
    """Add an axis to a scalar or [B], to broadcast against [B, V]."""
    return jnp.asarray(value)[..., None]
