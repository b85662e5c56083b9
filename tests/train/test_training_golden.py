"""The training step beside torch's AdamW on transformers' GPT-2 in float64, from a file: needs neither of them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gpt2jax.model.config import GPT2Config
from gpt2jax.model.gpt2 import Params, hidden_states, lm_head_weight, output_logits
from gpt2jax.ops.cross_entropy import cross_entropy
from gpt2jax.ops.precision import FLOAT32
from gpt2jax.train.config import FinetuneConfig
from gpt2jax.train.optimizer import make_optimizer
from gpt2jax.train.step import init_state, make_train_step

FILE = Path(__file__).parents[1] / "golden" / "training.npz"
STEPS = 10


@pytest.fixture(scope="module")
def golden() -> dict[str, Any]:
    with np.load(FILE) as arrays:
        return {**arrays, **json.loads(str(arrays["about"]))}


@pytest.fixture(scope="module")
def config(golden) -> GPT2Config:
    return GPT2Config(**golden["config"])


@pytest.fixture(scope="module")
def run(golden, config) -> list[tuple[Params, dict[str, jax.Array]]]:
    """Parameters and metrics after each of the steps."""
    # a cosine that ends where it begins: torch's rate is constant
    settings = FinetuneConfig(**golden["training"], steps=STEPS, final_lr_ratio=1.0)
    optimizer = make_optimizer(settings, STEPS)
    step = make_train_step(config, optimizer, FLOAT32, max_grad_norm=settings.max_grad_norm)
    state = init_state(stacked(golden, "before"), optimizer, loss_scaling=False)
    done = []
    for index in range(STEPS):
        state, metrics = step(state, None, batch(golden, index))
        done.append((jax.tree.map(np.array, state["params"]), metrics))
    return done


def batch(golden: dict[str, Any], index: int) -> dict[str, np.ndarray]:
    names = {"tokens": "tokens", "targets": "targets", "loss_mask": "weights"}
    return {name: golden[in_file][index] for name, in_file in names.items()}


def stacked(golden: dict[str, Any], prefix: str) -> Params:
    """transformers' tensors under `prefix`, the blocks stacked and the leaves named as here."""
    layers: dict[str, dict[int, np.ndarray]] = {}
    for name, values in golden.items():
        if match := re.fullmatch(rf"{prefix}/transformer\.(?:h\.(\d+)\.)?(.+)", name):
            layers.setdefault(("h." if match[1] else "") + match[2], {})[int(match[1] or 0)] = values
    tree: Params = {}
    for name, by_layer in layers.items():
        *path, leaf = name.split(".")
        if leaf == "weight":
            leaf = {"w": "embedding", "l": "scale"}.get(path[-1][0], "kernel")
        at = tree
        for key in path:
            at = at.setdefault(key, {})
        values = [by_layer[index] for index in sorted(by_layer)]
        at[leaf] = jnp.asarray(np.stack(values) if path[0] == "h" else values[0])
    return tree


def assert_close(ours: Params, expected: Params, tolerance: float = 1e-5) -> None:
    """Each leaf within `tolerance` of the expected one, relative to that one's norm."""

    def compare(path, a, b):
        distance = np.linalg.norm(np.asarray(a, np.float64) - b)
        assert distance <= tolerance * np.linalg.norm(b), (jax.tree_util.keystr(path), distance)

    jax.tree_util.tree_map_with_path(compare, ours, expected)


@pytest.mark.slow
def test_logits(golden, config):
    params = stacked(golden, "before")
    hidden = hidden_states(params, config, jnp.asarray(golden["tokens"][0]))
    np.testing.assert_allclose(output_logits(hidden, lm_head_weight(params)), golden["logits"], atol=1e-5)


@pytest.mark.slow
def test_gradient_of_every_leaf(golden, config):
    tokens, targets, weights = batch(golden, 0).values()

    def loss(params):
        hidden = hidden_states(params, config, tokens)
        return cross_entropy(hidden, lm_head_weight(params), targets, weights)[0] / weights.sum()

    value, gradient = jax.jit(jax.value_and_grad(loss))(stacked(golden, "before"))
    np.testing.assert_allclose(value, golden["losses"][0], rtol=1e-6)
    assert_close(gradient, stacked(golden, "gradient"))


def _take_key_biases(params: Params) -> np.ndarray:
    """The biases [L, D] of the keys, which are zero afterwards."""
    part = params["h"]["attn"]["c_attn"]
    bias = np.array(part["bias"])
    width = bias.shape[-1] // 3
    found = bias[:, width : 2 * width].copy()
    bias[:, width : 2 * width] = 0
    part["bias"] = bias
    return found


@pytest.mark.slow
def test_one_step_of_clipping_and_adamw(golden, run):
    params, metrics = run[0]
    np.testing.assert_allclose(metrics["grad_norm"], golden["grad_norm"], rtol=1e-5)
    assert golden["grad_norm"] > golden["training"]["max_grad_norm"]  # or clipping would prove nothing
    before, after = stacked(golden, "before"), stacked(golden, "after")
    # a key's bias moves all of a row's scores alike: its gradient is zero, and what float32 leaves of it is rounding
    # that AdamW divides by itself
    keys = [_take_key_biases(tree) for tree in (params, before, after)]
    np.testing.assert_allclose(keys[0], keys[1], atol=2e-6)
    np.testing.assert_array_equal(keys[1], keys[2])
    assert_close(params, after, 1e-6)
    # the change is a hundredth of the values, so that float32 leaves it five digits
    change, expected = (jax.tree.map(np.subtract, tree, before) for tree in (params, after))
    assert_close(change, expected, 5e-5)


@pytest.mark.slow
def test_loss_curve(golden, run):
    losses = [float(metrics["loss"]) for _, metrics in run]
    np.testing.assert_allclose(losses, golden["losses"], rtol=1e-5)
    assert losses[-1] < losses[0] - 0.5
