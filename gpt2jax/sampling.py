"""From logits to a token: temperature, then top-k, then top-p, then min-p, then one draw.

Every setting but the size of the candidate window is an array, so changing it compiles nothing. With a top-k
of at most `WINDOW` only that many candidates are ever looked at; otherwise the whole vocabulary is, without
sorting it.

Sources: Fan et al. 2018 (top-k); Holtzman et al. 2020, "The Curious Case of Neural Text Degeneration"
(top-p); Nguyen et al. 2024, "Turning Up the Heat: Min-p Sampling" (min-p).
"""

from __future__ import annotations

import dataclasses
import math
import numbers
from typing import NamedTuple

import jax
import jax.numpy as jnp

WINDOW = 64
_BLOCK = 256
_SMALLEST = float(jnp.finfo(jnp.float32).tiny)  # a temperature below it would become 0 in float32


@dataclasses.dataclass(frozen=True)
class SamplingConfig:
    """How a token is chosen.

    The filters apply in the order of the fields: logits are divided by the temperature; the `top_k` most
    probable tokens stay (exactly that many: of equal ones, the lowest ids), and share all probability; of
    these the most probable stay until their sum reaches `top_p`, including the token that crosses it; of
    these, the ones with at least `min_p` times the probability of the most probable. The most probable token
    always stays.

    Attributes:
        temperature: above 0 flattens (> 1) or sharpens (< 1); 0 is greedy.
        top_k: number of tokens to choose among; None is all.
        top_p: 0 to 1, 1 is off.
        min_p: 0 to 1, 0 is off.
        do_sample: False always takes the most probable token (of equal ones, the lowest id).

    Raises:
        ValueError: a field has an impossible value.
    """

    temperature: float = 1.0
    top_k: int | None = 5
    top_p: float = 1.0
    min_p: float = 0.0
    do_sample: bool = True

    def __post_init__(self) -> None:
        if not _is_number(self.temperature) or not self.temperature >= 0:
            raise ValueError(f"temperature={self.temperature!r} must be a finite number, 0 (greedy) or above")
        if self.top_k is not None and (
            isinstance(self.top_k, bool) or not isinstance(self.top_k, numbers.Integral) or self.top_k < 1
        ):
            raise ValueError(
                f"top_k={self.top_k!r} must be a whole number of at least 1, or None for all tokens"
            )
        if not _is_number(self.top_p) or not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p!r} must be above 0 and at most 1 (1 is off)")
        if not _is_number(self.min_p) or not 0 <= self.min_p <= 1:
            raise ValueError(f"min_p={self.min_p!r} must be 0 (off) to 1")
        if not isinstance(self.do_sample, bool):
            raise ValueError(f"do_sample={self.do_sample!r} must be True or False")

    @property
    def greedy(self) -> bool:
        """Whether there is no chance in it."""
        return not self.do_sample or self.temperature == 0 or self.top_k == 1

    @property
    def window(self) -> int | None:
        """The number of candidates to compile for: `WINDOW`, or None for the whole vocabulary."""
        return WINDOW if self.greedy or (self.top_k is not None and self.top_k <= WINDOW) else None

    def filters(self) -> Filters:
        """The same as numbers for a compiled program."""
        if self.greedy:
            return Filters(1.0, 1, 1.0, 0.0)
        top_k = min(self.top_k or 2**31 - 1, 2**31 - 1)
        temperature = max(float(self.temperature), _SMALLEST)
        return Filters(temperature, int(top_k), float(self.top_p), float(self.min_p))


class Filters(NamedTuple):
    """The settings of `SamplingConfig` as a pytree of scalars (greedy is a top-k of 1)."""

    temperature: jax.Array | float
    top_k: jax.Array | int
    top_p: jax.Array | float
    min_p: jax.Array | float


def sample(
    logits: jax.Array, keys: jax.Array, filters: Filters, *, window: int | None
) -> tuple[jax.Array, jax.Array]:
    """Draws one token a row.

    Args:
        logits: [B, V] float32.
        keys: [B] random keys, one a row: what a row draws depends on its own logits and key only.
        filters: the settings.
        window: number of candidates that are looked at; at least `filters.top_k`. None: all of V.

    Returns:
        Token ids [B] int32, and their log-probabilities [B] float32 under softmax(logits): the model's own
        distribution, before temperature and filters.
    """

    def most_probable():
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)

    def drawn():
        uniforms = jax.vmap(lambda key: jax.random.uniform(key, (2,)))(keys)
        if window is None:
            return draw_from_all(full_weights(logits, filters), uniforms)
        values, ids = jax.lax.top_k(logits, min(window, logits.shape[-1]))
        return _pick(ids, draw(window_weights(values, filters), uniforms[:, 0]))

    tokens = jax.lax.cond(jnp.equal(filters.top_k, 1), most_probable, drawn)
    return tokens, _pick(logits, tokens) - jax.nn.logsumexp(logits, axis=-1)


def window_weights(values: jax.Array, filters: Filters) -> jax.Array:
    """Filtered probabilities, up to a factor a row, of candidates: descending logits [B, W] -> [B, W]."""
    weights = _tempered(values, filters.temperature)
    weights = jnp.where(jnp.arange(values.shape[-1]) < filters.top_k, weights, 0.0)
    before = jnp.cumsum(weights, axis=-1) - weights
    # the token that crosses top_p stays: what counts is the sum before it
    in_nucleus = (before < filters.top_p * weights.sum(-1, keepdims=True)) | (filters.top_p >= 1.0)
    return jnp.where(in_nucleus & (weights >= filters.min_p), weights, 0.0)


def full_weights(logits: jax.Array, filters: Filters) -> jax.Array:
    """Filtered probabilities, up to a factor a row, of the whole vocabulary: logits [B, V] -> [B, V]."""
    order = _ordered_bits(logits)
    weights = _tempered(logits, filters.temperature)

    def keep_top_k(weights):
        count = jnp.broadcast_to(jnp.asarray(filters.top_k, jnp.float32), weights.shape[:1])
        return jnp.where(_largest(order, jnp.ones_like(weights), count), weights, 0.0)

    def keep_nucleus(weights):
        return jnp.where(_largest(order, weights, filters.top_p * weights.sum(-1)), weights, 0.0)

    weights = jax.lax.cond(filters.top_k < logits.shape[-1], keep_top_k, lambda w: w, weights)
    weights = jax.lax.cond(filters.top_p < 1.0, keep_nucleus, lambda w: w, weights)
    return jnp.where(weights >= filters.min_p, weights, 0.0)


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
    """Marks the smallest set of entries, largest `order` first, whose mass reaches `target`.

    Of entries of equal order, the first ones.

    The border is found by bisection over the bits: 32 masked sums, a fraction of the time of a sort.

    Args:
        order: [B, V] uint32.
        mass: [B, V] float32, at least 0.
        target: [B] float32, at most the sum of the masses.
    """

    def narrow(step, border):
        trial = border | (jnp.uint32(1) << (31 - step).astype(jnp.uint32))
        reached = jnp.where(order >= trial[:, None], mass, 0.0).sum(-1) >= target
        return jnp.where(reached, trial, border)

    border = jax.lax.fori_loop(0, 32, narrow, jnp.zeros(order.shape[:1], jnp.uint32))[:, None]
    missing = target - jnp.where(order > border, mass, 0.0).sum(-1)
    equal = jnp.where(order == border, mass, 0.0)
    before = jnp.cumsum(equal, axis=-1) - equal
    return (order > border) | ((order == border) & (before < missing[:, None]))


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


def _is_number(value) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool) and math.isfinite(value)
