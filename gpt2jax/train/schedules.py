"""Learning rates: a linear rise, then one of four courses, as functions of the number of updates done."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import optax

from gpt2jax.train.config import FinetuneConfig

# how much larger or smaller a learning rate an optimizer wants than AdamW
_SHARE = {"lion": 0.2, "sgd": 100.0}


def resolve_learning_rate(config: FinetuneConfig, parameters: int) -> FinetuneConfig:
    """The settings with a learning rate that suits a model of so many parameters, where none was given.

    Source of the factor for LoRA: Schulman et al. 2025, "LoRA Without Regret".
    """
    if config.learning_rate is not None:
        return config
    rate = (1e-3 if parameters < 20_000_000 else 1e-4) * _SHARE.get(config.optimizer, 1.0)
    return dataclasses.replace(config, learning_rate=rate * (10 if config.lora else 1))


def make_schedule(config: FinetuneConfig, steps: int) -> optax.Schedule:
    """Learning rate by step: a linear rise over `warmup_steps`, then `config.schedule` up to `steps`."""
    assert config.learning_rate is not None, "resolve_learning_rate comes first"
    peak, warmup = config.learning_rate, min(config.warmup_steps, steps - 1)
    course = _course(config, peak, max(steps - warmup, 1), steps)
    if warmup == 0:
        return course
    # the first step already learns: it counts as one of the warm-up's steps
    rise = optax.linear_schedule(peak / (warmup + 1), peak, warmup)
    return optax.join_schedules([rise, course], [warmup])


def _course(config: FinetuneConfig, peak: float, length: int, steps: int) -> optax.Schedule:
    """What follows the warm-up, from `peak`, over `length` of the run's `steps`."""
    low = peak * config.final_learning_rate
    if config.schedule == "constant":
        return lambda count: jnp.asarray(peak, jnp.float32)
    if config.schedule == "linear":
        return optax.linear_schedule(peak, low, length)
    if config.schedule == "wsd":
        decay = min(max(round(config.decay_share * steps), 1), length)
        return optax.linear_schedule(peak, low, decay, transition_begin=length - decay)
    return optax.cosine_decay_schedule(peak, length, alpha=config.final_learning_rate)
