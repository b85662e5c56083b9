"""Learning rates, optimizers by name on plain nested dicts, clipping, and moments in bfloat16."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib

from gpt2jax.model.gpt2 import Params
from gpt2jax.train.config import FinetuneConfig

# the learning rate of an optimizer over that of AdamW
_RATE_FACTORS = {"lion": 0.2, "sgd": 100.0}
# by name, not by rank: stacked biases and LayerNorms have two axes as well
_DECAYED = {"kernel": True, "embedding": True, "lora_a": True, "lora_b": True, "bias": False, "scale": False}
_DECAYED["magnitude"] = False  # of DoRA: lengths, which have no reason to be short


def resolve_learning_rate(config: FinetuneConfig, num_parameters: int) -> FinetuneConfig:
    """Return the settings with a learning rate that suits the size of the model, if they have none.

    Source of the factor 10 for LoRA: Schulman et al. 2025, "LoRA Without Regret".
    """
    if config.learning_rate is not None:
        return config
    rate = (1e-3 if num_parameters < 20_000_000 else 1e-4) * _RATE_FACTORS.get(config.optimizer, 1.0)
    return dataclasses.replace(config, learning_rate=rate * (10 if config.lora else 1))


def make_schedule(config: FinetuneConfig, steps: int) -> optax.Schedule:
    """Build the learning rate by step: linear over `warmup_steps`, then `config.schedule` up to `steps`."""
    assert config.learning_rate is not None, "resolve_learning_rate comes first"
    peak, warmup_steps = config.learning_rate, min(config.warmup_steps, steps - 1)
    decay = _decay_schedule(config, peak, max(steps - warmup_steps, 1), steps)
    if warmup_steps == 0:
        return decay
    # the first step already learns: it counts as one of the warm-up's steps
    warmup = optax.linear_schedule(peak / (warmup_steps + 1), peak, warmup_steps)
    return optax.join_schedules([warmup, decay], [warmup_steps])


def have_equal_rates(config: FinetuneConfig, lengths: tuple[int, int], steps: int) -> bool:
    """Return whether runs of two lengths have the same learning rates in their first `steps` steps."""
    first, second = (jax.vmap(make_schedule(config, length))(jnp.arange(steps)) for length in lengths)
    return np.array_equal(first, second)


def _decay_schedule(config: FinetuneConfig, peak: float, length: int, steps: int) -> optax.Schedule:
    """Build what follows the warm-up: from `peak` over the last `length` of the run's `steps`."""
    low = peak * config.final_lr_ratio
    if config.schedule == "constant":
        return lambda count: jnp.asarray(peak, jnp.float32)
    if config.schedule == "linear":
        return optax.linear_schedule(peak, low, length)
    if config.schedule == "wsd":
        decay = min(max(round(config.decay_fraction * steps), 1), length)
        return optax.linear_schedule(peak, low, decay, transition_begin=length - decay)
    return optax.cosine_decay_schedule(peak, length, alpha=config.final_lr_ratio)


def make_optimizer(config: FinetuneConfig, steps: int) -> optax.GradientTransformation:
    """Build the optimizer for a run of `steps` steps; its gradients come clipped by `clip_scale`."""
    optimizer = _base_optimizer(config, make_schedule(config, steps))
    if config.moments_dtype == "bfloat16":
        optimizer = bfloat16_moments(optimizer, config.seed)
    if config.lora_plus_ratio != 1:
        optimizer = optax.chain(optimizer, _scale_lora_b(config.lora_plus_ratio))
    return optimizer


def _base_optimizer(config: FinetuneConfig, schedule: optax.Schedule) -> optax.GradientTransformation:
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
    """Return the axes of the matrices that Muon orthogonalises: those of the stacked kernels [L, in, out]."""
    axes = optax.contrib.MuonDimensionNumbers(reduction_axis=-2, output_axis=-1)

    def kernel_axes(path, leaf):
        return axes if path[-1].key == "kernel" and leaf.ndim == 3 else None

    return jax.tree_util.tree_map_with_path(kernel_axes, params)


def _scale_lora_b(ratio: float) -> optax.GradientTransformation:
    """Scale the updates of the factor that starts at zero. Source: Hayou et al. 2024, "LoRA+"."""

    def update(path, leaf):
        return leaf * ratio if path[-1].key == "lora_b" else leaf

    return optax.stateless(lambda updates, _: jax.tree_util.tree_map_with_path(update, updates))


class BFloat16MomentsState(NamedTuple):
    """An optimizer's state with moments in bfloat16, and the number of updates, which seeds the rounding."""

    inner: Any
    count: jax.Array  # pyright: ignore[reportIncompatibleMethodOverride]  # optax's name for it


def bfloat16_moments(optimizer: optax.GradientTransformation, seed: int = 0) -> optax.GradientTransformation:
    """Keep the float32 arrays of an optimizer's state in bfloat16; the optimizer itself computes in float32.

    They are rounded up or down at random, with the true value as mean. bfloat16 has eight bits, and the mean of
    squares changes by a thousandth a step: rounding to the nearest would drop every change.
    """

    def to_bfloat16(state, count):
        leaves, treedef = jax.tree.flatten(state)
        keys = jax.random.split(jax.random.fold_in(jax.random.key(seed), count), len(leaves))
        leaves = [
            stochastic_round(leaf, key) if _is_moment(leaf, jnp.float32) else leaf
            for leaf, key in zip(leaves, keys, strict=True)
        ]
        return BFloat16MomentsState(jax.tree.unflatten(treedef, leaves), count)

    def init(params):
        return to_bfloat16(optimizer.init(params), jnp.zeros((), jnp.int32))

    def update(updates, state, params=None):
        inner = jax.tree.map(
            lambda leaf: leaf.astype(jnp.float32) if _is_moment(leaf, jnp.bfloat16) else leaf, state.inner
        )
        updates, inner = optimizer.update(updates, inner, params)
        return updates, to_bfloat16(inner, state.count + 1)

    return optax.GradientTransformation(init, update)


def _is_moment(leaf: jax.Array, dtype: Any) -> bool:
    return leaf.ndim > 0 and leaf.dtype == dtype


def stochastic_round(x: jax.Array, key: jax.Array) -> jax.Array:
    """Round float32 to bfloat16: add 16 random bits below the bits that stay, then truncate."""
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    bits = bits + jax.random.bits(key, x.shape, jnp.uint16).astype(jnp.uint32)
    return jax.lax.bitcast_convert_type((bits >> 16).astype(jnp.uint16), jnp.bfloat16)


def decay_mask(params: Params) -> Params:
    """Return True for the leaves that weight decay acts on: matrices, not biases and LayerNorms.

    Raises:
        KeyError: a leaf has an unknown name.
    """
    return jax.tree_util.tree_map_with_path(lambda path, _: _DECAYED[path[-1].key], params)


def clip_scale(norm: jax.Array, max_norm: float | None) -> jax.Array:
    """Return the factor that brings gradients of global norm `norm` down to `max_norm`; 1 if they are below it."""
    if max_norm is None:
        return jnp.ones(())
    return jnp.minimum(1.0, max_norm / jnp.maximum(norm, 1e-12))
