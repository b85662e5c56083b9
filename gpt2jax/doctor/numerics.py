"""Logits and gradients of compiled programs beside float64: a compiler can be wrong without an error."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gpt2jax.doctor.findings import Finding
from gpt2jax.doctor.reference import reference_gradient, reference_logits
from gpt2jax.language_model import LanguageModel
from gpt2jax.model.config import GPT2Config
from gpt2jax.model.gpt2 import abstract_params, hidden_states, lm_head_weight
from gpt2jax.ops.cross_entropy import cross_entropy
from gpt2jax.ops.precision import Precision

_NO_DROPOUT: dict[str, Any] = {"embd_pdrop": 0.0, "attn_pdrop": 0.0, "resid_pdrop": 0.0}
# XLA takes other kernels for arrays of a real model than for small ones; (model, rows, tokens of a row)
CASES = {
    "small model": (
        GPT2Config(n_layer=2, n_head=2, n_embd=64, vocab_size=512, n_positions=64, **_NO_DROPOUT),
        4,
        64,
    ),
    "gpt2-wide model": (GPT2Config(n_layer=1, **_NO_DROPOUT), 2, 32),
}
# of the norm of the difference by that of the right values; some units of the last place of the operands (2^-24, 2^-8)
LIMITS = {"float32": 1e-5, "bfloat16": 3e-2}


def check_numerics(cases: dict[str, tuple[GPT2Config, int, int]] = CASES) -> Iterator[Finding]:
    """Hold logits, loss and the gradient of every parameter against float64."""
    for name, (config, rows, length) in cases.items():
        model, generator = _random_model(config), np.random.default_rng(1)
        ids = generator.integers(0, config.vocab_size, (rows, length + 1), dtype=np.int32)
        tokens, targets = ids[:, :-1], ids[:, 1:]
        right = reference_logits(model.params, config, tokens)
        yield _judge(f"{name}: logits", "float32", {"logits": relative_error(model.logits(tokens), right)})
        right_loss, right_gradient = reference_gradient(model.params, config, tokens, targets)
        for dtype in LIMITS:
            loss, gradient = _value_and_grad(
                model.params, config, tokens, targets, Precision.for_device(dtype)
            )
            errors = {"loss": abs(float(loss) / right_loss - 1)}
            found = jax.tree_util.tree_leaves_with_path(gradient)
            for (path, leaf), right_leaf in zip(found, jax.tree.leaves(right_gradient), strict=True):
                parameter = jax.tree_util.keystr(path, simple=True, separator=".")
                errors[parameter] = relative_error(leaf, right_leaf)
            yield _judge(f"{name}: loss and gradients", dtype, errors)


def relative_error(found: Any, right: np.ndarray) -> float:
    """Return the norm of the difference by the norm of the right values."""
    found = np.asarray(found, np.float64)
    return float(np.linalg.norm(found - right) / np.linalg.norm(right))


def _judge(subject: str, dtype: str, errors: dict[str, float]) -> Finding:
    limit = LIMITS[dtype]
    worst = max(errors, key=lambda name: np.nan_to_num(errors[name], nan=np.inf))
    is_right = errors[worst] <= limit  # not so for nan
    text = f"{dtype} differs from float64 by at most {errors[worst]:.1e} ({worst}); the limit is {limit:.0e}"
    return Finding(subject, "ok" if is_right else "failed", text)


def _random_model(config: GPT2Config) -> LanguageModel:
    """Return a model with noise on every parameter, so that biases and LayerNorms matter."""
    generator = np.random.default_rng(0)

    def draw(path: Any, leaf: Any) -> jax.Array:
        mean = 1 if path[-1].key == "scale" else 0
        return jnp.asarray(mean + 0.03 * generator.standard_normal(leaf.shape), jnp.float32)

    return LanguageModel(config, jax.tree_util.tree_map_with_path(draw, abstract_params(config)))


@functools.partial(jax.jit, static_argnames=("config", "precision"))
def _value_and_grad(params: Any, config: GPT2Config, tokens: Any, targets: Any, precision: Precision) -> Any:
    def loss(params: Any) -> jax.Array:
        hidden = hidden_states(params, config, tokens, precision=precision)
        weights = jnp.full(targets.shape, 1 / targets.size, jnp.float32)
        return cross_entropy(hidden, lm_head_weight(params), targets, weights, precision)[0]

    return jax.value_and_grad(loss)(params)
