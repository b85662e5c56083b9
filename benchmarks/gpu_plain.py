"""A plain GPT-2 in JAX without anything clever: what benchmarks/gpu.py holds gpt2jax's speed against.

Layers are written out, 16-bit products have 16-bit results, the logits of all rows exist at once, and optax updates the
parameters. Axis letters as in gpt2jax: B T S N H D F V L.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from gpt2jax.model.config import GPT2Config

Params = dict[str, Any]


def init(config: GPT2Config) -> Params:
    """Random parameters, float32; a dict for each layer."""
    key = iter(jax.random.split(jax.random.key(0), 4 * config.n_layer + 2))
    D, F = config.n_embd, config.mlp_dim

    def kernel(*shape: int) -> jax.Array:
        return 0.02 * jax.random.normal(next(key), shape)

    def norm() -> Params:
        return {"scale": jnp.ones(D), "bias": jnp.zeros(D)}

    def linear(rows: int, columns: int) -> Params:
        return {"kernel": kernel(rows, columns), "bias": jnp.zeros(columns)}

    layers = [
        {
            "ln_1": norm(),
            "qkv": linear(D, 3 * D),
            "out": linear(D, D),
            "ln_2": norm(),
            "up": linear(D, F),
            "down": linear(F, D),
        }
        for _ in range(config.n_layer)
    ]
    return {
        "wte": kernel(config.vocab_size, D),
        "wpe": kernel(config.n_positions, D),
        "layers": layers,
        "ln_f": norm(),
    }


def layer_norm(x: jax.Array, p: Params) -> jax.Array:
    x32 = x.astype(jnp.float32)
    centred = x32 - x32.mean(-1, keepdims=True)
    scaled = centred * jax.lax.rsqrt((centred**2).mean(-1, keepdims=True) + 1e-5)
    return (scaled * p["scale"] + p["bias"]).astype(x.dtype)


def linear(x: jax.Array, p: Params) -> jax.Array:
    return x @ p["kernel"].astype(x.dtype) + p["bias"].astype(x.dtype)


def mlp(x: jax.Array, p: Params) -> jax.Array:
    return linear(jax.nn.gelu(linear(layer_norm(x, p["ln_2"]), p["up"])), p["down"])


def hidden(params: Params, tokens: jax.Array, heads: int, dtype: Any, kernel: Any) -> jax.Array:
    """[B, T] -> [B, T, D] in `dtype`; `kernel` is an implementation of jax.nn.dot_product_attention."""
    B, T = tokens.shape
    x = (params["wte"][tokens] + params["wpe"][:T]).astype(dtype)
    for p in params["layers"]:
        qkv = linear(layer_norm(x, p["ln_1"]), p["qkv"]).reshape(B, T, 3, heads, -1)
        y = jax.nn.dot_product_attention(
            qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2], is_causal=True, implementation=kernel
        )
        x = x + linear(y.reshape(B, T, -1), p["out"])
        x = x + mlp(x, p)
    return layer_norm(x, params["ln_f"])


# ---- training and evaluation ----


@jax.custom_vjp
def loss_sum(x: jax.Array, head: jax.Array, targets: jax.Array) -> jax.Array:
    """The sum of the cross-entropy of rows [R, D]; the softmax is computed again for the gradient, in 16 bits."""
    return _loss_forward(x, head, targets)[0]


def _loss_forward(x, head, targets):
    logits = x @ head.T
    log_z = jax.nn.logsumexp(logits.astype(jnp.float32), axis=-1)
    own = jnp.take_along_axis(logits, targets[:, None], axis=-1)[:, 0].astype(jnp.float32)
    return (log_z - own).sum(), (x, head, targets, logits, log_z)


def _loss_backward(saved, g):
    x, head, targets, logits, log_z = saved
    softmax = jnp.exp(logits.astype(jnp.float32) - log_z[:, None])
    one_hot = jnp.arange(logits.shape[-1]) == targets[:, None]
    d = ((softmax - one_hot) * g).astype(x.dtype)
    return d @ head, d.T @ x, None


loss_sum.defvjp(_loss_forward, _loss_backward)


def mean_loss(params: Params, tokens: jax.Array, targets: jax.Array, heads: int, dtype: Any, kernel: str):
    x = hidden(params, tokens, heads, dtype, kernel)
    rows = x.reshape(-1, x.shape[-1])
    return loss_sum(rows, params["wte"].astype(dtype), targets.reshape(-1)) / targets.size


@functools.partial(jax.jit, static_argnums=(4, 5, 6), donate_argnums=(0, 1))
def train_step(params, moments, tokens, targets, heads, dtype, kernel):
    """AdamW with clipping, without dropout: (params, moments, loss)."""
    scale = 2.0**15 if dtype == jnp.float16 else 1.0

    def scaled(params):
        return scale * mean_loss(params, tokens, targets, heads, dtype, kernel)

    loss, gradients = jax.value_and_grad(scaled)(params)
    gradients = jax.tree.map(lambda g: g / scale, gradients)
    updates, moments = optimizer().update(gradients, moments, params)
    return optax.apply_updates(params, updates), moments, loss / scale


def optimizer() -> optax.GradientTransformation:
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-5))


@functools.partial(jax.jit, static_argnums=(3, 4, 5))
def evaluate(params, tokens, targets, heads, dtype, kernel):
    """(loss, right predictions) of a batch, from the logits of all rows at once."""
    x = hidden(params, tokens, heads, dtype, kernel)
    logits = (x @ params["wte"].astype(dtype).T).astype(jnp.float32)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
    return losses.sum(), (logits.argmax(-1) == targets).sum()


# ---- decoding ----


@functools.partial(jax.jit, static_argnums=(2, 3, 4))
def generate(params, prompts, new_tokens, heads, top_k):
    """[B, T] -> [B, T + new_tokens]: the prompt at once, then a token at a time, drawn from the `top_k` likeliest."""
    B, T = prompts.shape
    S, H = T + new_tokens, params["wte"].shape[1] // heads
    tokens = jnp.pad(prompts, ((0, 0), (0, new_tokens)))
    empty = jnp.zeros((B, S, heads, H), params["wte"].dtype)
    cache = [(empty, empty)] * len(params["layers"])

    def forward(cache, ids, start):
        x = params["wte"][ids] + jax.lax.dynamic_slice_in_dim(params["wpe"], start, ids.shape[1])
        visible = jnp.arange(S) <= start + jnp.arange(ids.shape[1])[:, None]
        new = []
        for p, (keys, values) in zip(params["layers"], cache, strict=True):
            qkv = linear(layer_norm(x, p["ln_1"]), p["qkv"]).reshape(*ids.shape, 3, heads, H)
            keys = jax.lax.dynamic_update_slice_in_dim(keys, qkv[:, :, 1], start, 1)
            values = jax.lax.dynamic_update_slice_in_dim(values, qkv[:, :, 2], start, 1)
            scores = jnp.einsum("btnh,bsnh->bnts", qkv[:, :, 0], keys, preferred_element_type=jnp.float32)
            weights = jax.nn.softmax(jnp.where(visible, scores / np.sqrt(H), -1e30)).astype(x.dtype)
            y = jnp.einsum("bnts,bsnh->btnh", weights, values)
            x = x + linear(y.reshape(x.shape), p["out"])
            x = x + mlp(x, p)
            new.append((keys, values))
        return new, layer_norm(x[:, -1], params["ln_f"])

    def draw(last, key):
        logits = jnp.einsum("bd,vd->bv", last, params["wte"], preferred_element_type=jnp.float32)
        best, ids = jax.lax.top_k(logits, top_k)
        return jnp.take_along_axis(ids, jax.random.categorical(key, best)[:, None], 1)

    def write(tokens, new, position):
        return jax.lax.dynamic_update_slice_in_dim(tokens, new.astype(tokens.dtype), position, 1)

    def body(position, carry):
        cache, tokens = carry
        ids = jax.lax.dynamic_slice_in_dim(tokens, position, 1, 1)
        cache, last = forward(cache, ids, position)
        return cache, write(tokens, draw(last, jax.random.fold_in(jax.random.key(0), position)), position + 1)

    cache, last = forward(cache, prompts, 0)
    tokens = write(tokens, draw(last, jax.random.key(0)), T)
    return jax.lax.fori_loop(T, S - 1, body, (cache, tokens))[1]
