"""The optimizers, their schedules and what they decay: beside the formulas."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_models import random_params

from gpt2jax.lora.config import LoRAConfig
from gpt2jax.train.config import FinetuneConfig
from gpt2jax.train.optimizer import (
    bfloat16_moments,
    clip_scale,
    decay_mask,
    make_optimizer,
    make_schedule,
    resolve_learning_rate,
)


def test_decay_mask_is_true_for_matrices_only():
    mask = decay_mask(random_params())
    assert mask["h"]["attn"]["c_attn"] == {"kernel": True, "bias": False}
    assert mask["h"]["ln_1"] == mask["ln_f"] == {"scale": False, "bias": False}
    assert mask["wte"] == {"embedding": True}
    with pytest.raises(KeyError):
        decay_mask({"strange": jnp.zeros(3)})


def test_make_schedule_warms_up():
    config = FinetuneConfig(learning_rate=2.0, warmup_steps=3, final_lr_ratio=0.1)
    schedule: Any = make_schedule(config, 13)
    np.testing.assert_allclose([schedule(s) for s in range(4)], [0.5, 1.0, 1.5, 2.0])
    np.testing.assert_allclose(schedule(8), 2.0 * (0.1 + 0.9 * 0.5), rtol=1e-6)
    np.testing.assert_allclose(schedule(13), 0.2, rtol=1e-6)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("constant", [2.0, 2.0, 2.0, 2.0]),
        ("linear", [2.0, 1.6, 1.2, 0.4]),
        ("wsd", [2.0, 2.0, 2.0, 0.4]),
        ("cosine", [2.0, 1.765685, 1.2, 0.4]),
    ],
)
def test_make_schedule_by_name(name, expected):
    """At the beginning, after a quarter, a half, and at the end of what follows the warm-up."""
    config = FinetuneConfig(
        learning_rate=2.0, warmup_steps=4, final_lr_ratio=0.2, schedule=name, decay_fraction=0.4
    )
    schedule: Any = make_schedule(config, 20)
    np.testing.assert_allclose([schedule(step) for step in (4, 8, 12, 20)], expected, rtol=1e-5)
    np.testing.assert_allclose([schedule(step) for step in range(4)], [0.4, 0.8, 1.2, 1.6], rtol=1e-6)
    if name == "wsd":  # the last eight steps, of which the sixteenth is the middle
        np.testing.assert_allclose(schedule(16), 1.2, rtol=1e-6)


def test_clip_scale():
    assert clip_scale(jnp.float32(4), 1.0) == 0.25 and clip_scale(jnp.float32(0.5), 1.0) == 1
    assert clip_scale(jnp.float32(4), None) == 1 and clip_scale(jnp.float32(0), 1.0) == 1


def test_resolve_learning_rate_by_size():
    config = FinetuneConfig()
    assert resolve_learning_rate(config, 4_000_000).learning_rate == 1e-3
    assert resolve_learning_rate(config, 124_000_000).learning_rate == 1e-4
    assert resolve_learning_rate(FinetuneConfig(lora=LoRAConfig()), 124_000_000).learning_rate == 1e-3
    assert resolve_learning_rate(FinetuneConfig(learning_rate=3e-3), 1).learning_rate == 3e-3


@pytest.mark.slow
@pytest.mark.parametrize("name", ["adamw", "adafactor", "lion", "sgd"])
def test_make_optimizer_equals_the_formulas(name):
    """Three updates of a matrix and a bias, from the papers' formulas in NumPy."""
    config = FinetuneConfig(
        optimizer=name, learning_rate=0.1, weight_decay=0.2, schedule="constant", beta2=0.9
    )
    optimizer: Any = make_optimizer(config, 3)
    generator = np.random.default_rng(0)
    shapes = {"kernel": (3, 4), "bias": (4,)}
    params: dict[str, Any] = {
        key: generator.normal(size=shape).astype(np.float32) for key, shape in shapes.items()
    }
    expected = {key: value.astype(np.float64) for key, value in params.items()}
    m = {key: np.zeros(shape) for key, shape in shapes.items()}
    v = {key: np.zeros(shape) for key, shape in shapes.items()}
    state = optimizer.init(params)
    for t in range(1, 4):
        gradient = {key: generator.normal(size=shape).astype(np.float32) for key, shape in shapes.items()}
        updates, state = optimizer.update(gradient, state, params)
        params = {key: params[key] + np.asarray(updates[key]) for key in params}
        for key, g in gradient.items():
            if name == "adamw":
                m[key], v[key] = 0.9 * m[key] + 0.1 * g, 0.9 * v[key] + 0.1 * g**2
                u = m[key] / (1 - 0.9**t) / (np.sqrt(v[key] / (1 - 0.9**t)) + 1e-8)
            elif name == "lion":
                u = np.sign(0.9 * m[key] + 0.1 * g)
                m[key] = 0.9 * m[key] + 0.1 * g
            elif name == "sgd":
                u = m[key] = 0.9 * m[key] + g
            else:  # under 128 rows and columns nothing is factored
                beta = 1 - float(t) ** -0.8
                v[key] = beta * v[key] + (1 - beta) * (g**2 + 1e-30)
                u = g / np.sqrt(v[key])
                u /= max(1.0, np.sqrt(np.mean(u**2)))
            decay = 0.2 if key == "kernel" else 0.0
            expected[key] = expected[key] - 0.1 * (u + decay * expected[key])
    for key in params:
        np.testing.assert_allclose(params[key], expected[key], rtol=1e-4)


@pytest.mark.slow
def test_bfloat16_moments_keep_what_small_changes_add_up_to():
    config = FinetuneConfig(learning_rate=1e-2, moments_dtype="bfloat16", beta2=0.999)
    narrow, wide = (
        make_optimizer(config, 10),
        make_optimizer(dataclasses.replace(config, moments_dtype="float32"), 10),
    )
    params = {"kernel": jnp.zeros((1, 32, 32))}
    states = [narrow.init(params), wide.init(params)]
    arrays = [leaf for leaf in jax.tree.leaves(states[0]) if leaf.ndim]
    assert [leaf.dtype for leaf in arrays] == [jnp.bfloat16] * 2

    @jax.jit
    def many(states):
        def one(states, _):
            return tuple(
                o.update(params_of_ones, s, params)[1] for o, s in zip((narrow, wide), states, strict=True)
            ), None

        return jax.lax.scan(one, states, None, length=400)[0]

    params_of_ones = {"kernel": jnp.ones((1, 32, 32))}
    moments = [
        sorted(float(leaf.astype(jnp.float32).mean()) for leaf in jax.tree.leaves(state) if leaf.ndim)
        for state in many(tuple(states))
    ]
    np.testing.assert_allclose(moments[0], moments[1], rtol=0.01)
    assert moments[1][0] == pytest.approx(1 - 0.999**400, rel=1e-3)
    again = bfloat16_moments(wide, seed=0)
    jax.tree.map(np.testing.assert_array_equal, again.init(params), states[0])
