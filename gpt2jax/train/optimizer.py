"""Optimizers by name, on plain nested dicts, and what is done to their gradients, moments and updates."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
import optax.contrib

from gpt2jax.model.gpt2 import Params
from gpt2jax.train.config import FinetuneConfig
from gpt2jax.train.schedules import make_schedule

# by name, not by rank: stacked biases and LayerNorms have two axes as well
_DECAYED = {"kernel": True, "embedding": True, "lora_a": True, "lora_b": True, "bias": False, "scale": False}
_DECAYED["magnitude"] = False  # of DoRA: lengths, which have no reason to be short


def make_optimizer(config: FinetuneConfig, steps: int) -> optax.GradientTransformation:
    """The optimizer for a run of `steps` steps; gradients are to be clipped by `clip_scale` before."""
    optimizer = _by_name(config, make_schedule(config, steps))
    if config.moments_dtype == "bfloat16":
        optimizer = with_narrow_moments(optimizer, config.seed)
    if config.lora_plus_ratio != 1:
        optimizer = optax.chain(optimizer, _scale_lora_b(config.lora_plus_ratio))
    return optimizer


def _by_name(config: FinetuneConfig, schedule: optax.Schedule) -> optax.GradientTransformation:
    decay = optax.add_decayed_weights(config.weight_decay, decay_mask)
    if config.optimizer == "muon":
        return optax.contrib.muon(
            schedule,
            weight_decay=config.weight_decay,
            adam_b1=config.beta1,
            adam_b2=config.beta2,
            eps=config.epsilon,
            muon_weight_dimension_numbers=_muon_axes,
            consistent_rms=0.2,  # updates as large as AdamW's, so that one learning rate serves both
        )
    if config.optimizer == "sgd":
        return optax.chain(optax.trace(config.beta1), decay, optax.scale_by_learning_rate(schedule))
    if config.optimizer == "lion":
        lion = optax.scale_by_lion(config.beta1, min(config.beta2, 0.99))
        return optax.chain(lion, decay, optax.scale_by_learning_rate(schedule))
    if config.optimizer == "adafactor":
        # updates of size one, as AdamW's, so that one learning rate serves both; Shazeer and Stern 2018, section 8
        factored = optax.chain(optax.scale_by_factored_rms(), optax.clip_by_block_rms(1.0))
        return optax.chain(factored, decay, optax.scale_by_learning_rate(schedule))
    return optax.adamw(
        schedule,
        b1=config.beta1,
        b2=config.beta2,
        eps=config.epsilon,
        weight_decay=config.weight_decay,
        mask=decay_mask,
    )


def _muon_axes(params: Any) -> Any:
    """The axes of the matrices that Muon orthogonalises: the stacked kernels [L, in, out], nothing else."""
    axes = optax.contrib.MuonDimensionNumbers(reduction_axis=-2, output_axis=-1)

    def kernel_axes(path, leaf):
        return axes if path[-1].key == "kernel" and leaf.ndim == 3 else None

    return jax.tree_util.tree_map_with_path(kernel_axes, params)


def _scale_lora_b(ratio: float) -> optax.GradientTransformation:
    """LoRA+: another learning rate for the factor that starts at zero. Source: Hayou et al. 2024, "LoRA+"."""

    def update(path, leaf):
        return leaf * ratio if path[-1].key == "lora_b" else leaf

    return optax.stateless(lambda updates, _: jax.tree_util.tree_map_with_path(update, updates))


class NarrowState(NamedTuple):
    """Moments in bfloat16 and the number of updates, which the random rounding follows from."""

    inner: Any
    count: jax.Array


def with_narrow_moments(
    optimizer: optax.GradientTransformation, seed: int = 0
) -> optax.GradientTransformation:
    """Keeps the float32 arrays of an optimizer's state in bfloat16; it computes in float32 as before.

    They are rounded up or down at random, with the true value as mean: bfloat16 has eight bits, and the mean of
    squares changes by a thousandth a step, which rounding to the nearest would never let through.
    """

    def narrow(state, count):
        leaves, structure = jax.tree.flatten(state)
        keys = jax.random.split(jax.random.fold_in(jax.random.key(seed), count), len(leaves))
        leaves = [
            _round_at_random(leaf, key) if _is_moment(leaf, jnp.float32) else leaf
            for leaf, key in zip(leaves, keys, strict=True)
        ]
        return NarrowState(jax.tree.unflatten(structure, leaves), count)

    def init(params):
        return narrow(optimizer.init(params), jnp.zeros((), jnp.int32))

    def update(updates, state, params=None):
        wide = jax.tree.map(
            lambda leaf: leaf.astype(jnp.float32) if _is_moment(leaf, jnp.bfloat16) else leaf, state.inner
        )
        updates, wide = optimizer.update(updates, wide, params)
        return updates, narrow(wide, state.count + 1)

    return optax.GradientTransformation(init, update)


def _is_moment(leaf: jax.Array, dtype: Any) -> bool:
    return leaf.ndim > 0 and leaf.dtype == dtype


def _round_at_random(x: jax.Array, key: jax.Array) -> jax.Array:
    """float32 -> bfloat16: a random number of 16 bits is added below the bits that are kept."""
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    bits = bits + jax.random.bits(key, x.shape, jnp.uint16).astype(jnp.uint32)
    kept = (bits >> 16).astype(jnp.uint16)
    return jax.lax.bitcast_convert_type(kept, jnp.bfloat16)


def decay_mask(params: Params) -> Params:
    """True for the leaves that weight decay acts on: matrices, not biases and LayerNorms.

    Raises:
        KeyError: a leaf of a kind that is not known here.
    """
    return jax.tree_util.tree_map_with_path(lambda path, _: _DECAYED[path[-1].key], params)


def global_norm(gradients: Params) -> jax.Array:
    """Euclidean norm of all gradients together, float32."""
    squares = [jnp.sum(jnp.square(leaf.astype(jnp.float32))) for leaf in jax.tree.leaves(gradients)]
    return jnp.sqrt(jnp.sum(jnp.stack(squares)))


def clip_scale(norm: jax.Array, max_norm: float | None) -> jax.Array:
    """What to multiply gradients of global norm `norm` by so that it is `max_norm` at most."""
    if max_norm is None:
        return jnp.ones(())
    return jnp.minimum(1.0, max_norm / jnp.maximum(norm, 1e-12))
