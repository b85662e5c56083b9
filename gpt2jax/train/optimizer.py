"""AdamW or Muon, with warm-up and cosine, on plain nested dicts."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax
import optax.contrib

from gpt2jax.model import Params
from gpt2jax.train.config import FinetuneConfig

# by name, not by rank: stacked biases and LayerNorms have two axes as well
_DECAYED = {
    "kernel": True,
    "embedding": True,
    "lora_a": True,
    "lora_b": True,
    "magnitude": False,  # of DoRA
    "bias": False,
    "scale": False,
}


def resolve_learning_rate(config: FinetuneConfig, parameters: int) -> FinetuneConfig:
    """The settings with a learning rate that suits a model of so many parameters, where none was given."""
    if config.learning_rate is not None:
        return config
    rate = 1e-3 if parameters < 20_000_000 else 1e-4
    return dataclasses.replace(config, learning_rate=rate * (5 if config.lora else 1))


def make_optimizer(config: FinetuneConfig, steps: int) -> optax.GradientTransformation:
    """The optimizer for a run of `steps` steps; gradients are to be clipped by `clip_scale` before."""
    schedule = make_schedule(config, steps)
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


def make_schedule(config: FinetuneConfig, steps: int) -> optax.Schedule:
    """Learning rate by step: a linear rise over `warmup_steps`, then a cosine to the final share at `steps`."""
    assert config.learning_rate is not None, "resolve_learning_rate comes first"
    peak, warmup = config.learning_rate, min(config.warmup_steps, steps - 1)
    cosine = optax.cosine_decay_schedule(peak, max(steps - warmup, 1), alpha=config.final_learning_rate)
    if warmup == 0:
        return cosine
    # the first step already learns: it counts as one of the warm-up's steps
    rise = optax.linear_schedule(peak / (warmup + 1), peak, warmup)
    return optax.join_schedules([rise, cosine], [warmup])


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
