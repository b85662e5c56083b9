"""GPT-2 and its gradient in float64 NumPy, written by hand: what the compiled programs are held against.

Each function returns its result and a function that takes the gradient of the result to those of the inputs.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jaxtyping import Float64, Int

from gpt2jax.model.config import GPT2Config

Tree = dict[str, Any]
Differentiable = tuple[np.ndarray, Callable[[np.ndarray], Any]]


def reference_logits(
    params: Tree, config: GPT2Config, tokens: Int[np.ndarray, "*B T"], key_mask: np.ndarray | None = None
) -> Float64[np.ndarray, "*B T V"]:
    """Return the logits of a model with tied embeddings and the settings of OpenAI's models.

    Args:
        params: the parameter dict.
        config: its configuration.
        tokens: token ids; every one has a position.
        key_mask: [*B, T], 1 for tokens that others may attend to; -1e9 is added to the scores of the others, as in
            Keras. None: all.
    """
    return _forward(to_float64(params), config, tokens, key_mask)[0]


def reference_gradient(
    params: Tree, config: GPT2Config, tokens: Int[np.ndarray, "B T"], targets: Int[np.ndarray, "B T"]
) -> tuple[float, Tree]:
    """Return the mean cross-entropy of the targets and its gradient, in the structure of `params`."""
    logits, backward = _forward(to_float64(params), config, tokens, None)
    shifted = logits - logits.max(-1, keepdims=True)
    log_probs = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    at = targets[..., None]
    picked = np.take_along_axis(log_probs, at, -1)
    d_logits = np.exp(log_probs)
    np.put_along_axis(d_logits, at, np.take_along_axis(d_logits, at, -1) - 1, -1)
    return -float(picked.mean()), backward(d_logits / targets.size)


def to_float64(params: Tree) -> Tree:
    """Return parameters as float64 arrays of NumPy."""
    return jax.tree.map(lambda x: np.asarray(x, np.float64), params)


def _forward(params: Tree, config: GPT2Config, tokens: np.ndarray, key_mask: np.ndarray | None) -> Any:
    length, table = tokens.shape[-1], params["wte"]["embedding"]
    visible = np.tri(length) if key_mask is None else np.tri(length) * key_mask[..., None, :]
    hidden, pullbacks = table[tokens] + params["wpe"]["embedding"][:length], []
    for index in range(config.n_layer):
        layer = jax.tree.map(lambda x, i=index: x[i], params["h"])
        hidden, pullback = _block(hidden, layer, config, visible)
        pullbacks.append(pullback)
    final, norm_back = _norm(hidden, params["ln_f"], config)

    def backward(d_logits: np.ndarray) -> Tree:
        d_table = np.einsum("...v,...d->vd", d_logits, final, optimize=True)
        d_hidden, d_final = norm_back(d_logits @ table)
        layers = []
        for pullback in reversed(pullbacks):
            d_hidden, d_layer = pullback(d_hidden)
            layers.append(d_layer)
        np.add.at(d_table, tokens, d_hidden)
        d_positions = np.zeros_like(params["wpe"]["embedding"])
        d_positions[:length] = d_hidden.sum(tuple(range(d_hidden.ndim - 2)))
        stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *reversed(layers))
        tables = {"wte": {"embedding": d_table}, "wpe": {"embedding": d_positions}}
        return tables | {"h": stacked, "ln_f": d_final}

    return final @ table.T, backward


def _block(x: np.ndarray, layer: Tree, config: GPT2Config, visible: np.ndarray) -> Differentiable:
    a, ln_1_back = _norm(x, layer["ln_1"], config)
    qkv, c_attn_back = _linear(a, layer["attn"]["c_attn"])
    y, attend_back = _attend(qkv, config.n_head, visible)
    y, attn_back = _linear(y, layer["attn"]["c_proj"])
    m, ln_2_back = _norm(x + y, layer["ln_2"], config)
    m, c_fc_back = _linear(m, layer["mlp"]["c_fc"])
    m, gelu_back = _gelu(m)
    m, mlp_back = _linear(m, layer["mlp"]["c_proj"])

    def backward(d: np.ndarray) -> Any:
        d_m, mlp = mlp_back(d)
        d_m, c_fc = c_fc_back(gelu_back(d_m))
        d_m, ln_2 = ln_2_back(d_m)
        d = d + d_m
        d_y, attn = attn_back(d)
        d_y, c_attn = c_attn_back(attend_back(d_y))
        d_y, ln_1 = ln_1_back(d_y)
        attention, perceptron = {"c_attn": c_attn, "c_proj": attn}, {"c_fc": c_fc, "c_proj": mlp}
        return d + d_y, {"ln_1": ln_1, "attn": attention, "ln_2": ln_2, "mlp": perceptron}

    return x + y + m, backward


def _norm(x: np.ndarray, p: Tree, config: GPT2Config) -> Differentiable:
    centred = x - x.mean(-1, keepdims=True)
    inverse = 1 / np.sqrt((centred**2).mean(-1, keepdims=True) + config.layer_norm_epsilon)
    normal = centred * inverse

    def backward(d: np.ndarray) -> Any:
        rows = tuple(range(d.ndim - 1))
        scaled = d * p["scale"]
        along = normal * (scaled * normal).mean(-1, keepdims=True)
        d_x = inverse * (scaled - scaled.mean(-1, keepdims=True) - along)
        return d_x, {"scale": (d * normal).sum(rows), "bias": d.sum(rows)}

    return normal * p["scale"] + p["bias"], backward


def _linear(x: np.ndarray, p: Tree) -> Differentiable:
    def backward(d: np.ndarray) -> Any:
        kernel = np.einsum("...i,...o->io", x, d, optimize=True)
        return d @ p["kernel"].T, {"kernel": kernel, "bias": d.sum(tuple(range(d.ndim - 1)))}

    return x @ p["kernel"] + p["bias"], backward


def _gelu(x: np.ndarray) -> Differentiable:
    root = math.sqrt(2 / math.pi)
    tanh = np.tanh(root * (x + 0.044715 * x**3))
    slope = 0.5 * (1 + tanh) + 0.5 * x * (1 - tanh**2) * root * (1 + 3 * 0.044715 * x**2)
    return 0.5 * x * (1 + tanh), lambda d: d * slope


def _attend(qkv: np.ndarray, heads: int, visible: np.ndarray) -> Differentiable:
    """[..., T, 3 D] -> [..., T, D]; `visible` is [..., T, S]."""

    def split(x: np.ndarray) -> np.ndarray:
        return x.reshape(*x.shape[:-1], heads, -1).swapaxes(-2, -3)

    def join(x: np.ndarray) -> np.ndarray:
        return x.swapaxes(-2, -3).reshape(*x.shape[:-3], x.shape[-2], -1)

    q, k, v = map(split, np.split(qkv, 3, -1))
    root = math.sqrt(q.shape[-1])
    scores = q @ k.swapaxes(-1, -2) / root - 1e9 * (1 - visible[..., None, :, :])
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)

    def backward(d: np.ndarray) -> np.ndarray:
        d = split(d)
        d_weights = d @ v.swapaxes(-1, -2)
        d_scores = weights * (d_weights - (d_weights * weights).sum(-1, keepdims=True)) / root
        parts = (d_scores @ k, d_scores.swapaxes(-1, -2) @ q, weights.swapaxes(-1, -2) @ d)
        return np.concatenate([join(part) for part in parts], -1)

    return join(weights @ v), backward
