"""The GPT-2: read this file and you know the model.

Modules are Flax NNX and hold parameters only: no caches, no random streams, no mutation. What varies between calls
(dropout key, LoRA adapters, key/value cache) is an argument. Outside of this file parameters are a plain nested dict
with the blocks stacked along a leading layer axis; `hidden_states` merges such a dict with the module structure.

Axis letters: B batch, T query length, S key length, N heads, H head dim, D model dim, F mlp dim, V vocabulary,
L layers, r adapter rank.

Source: Radford et al. 2019, "Language Models are Unsupervised Multitask Learners".
"""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from gpt2jax.model.config import GPT2Config
from gpt2jax.ops.attention import (
    MASKED,
    causal_mask,
    einsum_f32,
    memory_efficient_attention,
    supports_memory_efficient_attention,
)
from gpt2jax.ops.fused import gelu_tanh, layer_norm
from gpt2jax.ops.low_rank import apply_lora, attach_scales
from gpt2jax.ops.precision import FLOAT32, Precision, matmul
from gpt2jax.sharding import constrain_batch, constrain_embedding

Params = dict[str, Any]

# what a backward pass keeps of each block; all else it computes again
REMAT = ("none", "dots", "weights", "full")
_REMAT_POLICIES = {
    "dots": jax.checkpoint_policies.dots_saveable,
    "weights": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
}

# the tanh form in three spellings of the same
_TANH_GELUS = ("gelu_new", "gelu_pytorch_tanh", "gelu_fast")
_OTHER_ACTIVATIONS = {
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
    "swish": jax.nn.silu,
    "tanh": jnp.tanh,
}


def activation(name: str, x: jax.Array, call: ForwardContext) -> jax.Array:
    """The nonlinearity between the mlp's two products."""
    return gelu_tanh(x, call.precision.compute_dtype) if name in _TANH_GELUS else _OTHER_ACTIVATIONS[name](x)


def dropout(x: jax.Array, rate: float, key: jax.Array | None) -> jax.Array:
    """Zeroes a share `rate` of `x` and scales up the rest; without a key (inference) it does nothing."""
    if key is None or rate == 0.0:
        return x
    # 16 random bits an element: half the work of a float32 draw, and a rate exact to 1/65536
    dropped = min(round(rate * 65536), 65535)
    keep = jax.random.bits(key, x.shape, jnp.uint16) >= dropped
    return jnp.where(keep, x * (65536 / (65536 - dropped)), jnp.zeros((), x.dtype)).astype(x.dtype)


class Linear(nnx.Module):
    """y = x @ kernel + bias, kernel [in, out] as GPT-2's files have it, with an optional low-rank branch."""

    def __init__(self, in_dim: int, out_dim: int, *, layers: tuple[int, ...], std: float, rngs: nnx.Rngs):
        self.kernel = nnx.Param(
            std * jax.random.normal(rngs.params(), (*layers, in_dim, out_dim), jnp.float32)
        )
        self.bias = nnx.Param(jnp.zeros((*layers, out_dim), jnp.float32))

    def __call__(self, x: jax.Array, call: ForwardContext, adapter: Any = None, key: jax.Array | None = None):
        """x [B, T, in] -> [B, T, out]; `adapter` as `low_rank.apply_lora` takes it."""
        dtype, kernel = call.precision.compute_dtype, self.kernel.get_value()
        y = matmul(x, kernel, dtype)
        if adapter is not None:
            y = apply_lora(y, x, dropout(x, call.lora_dropout, key), kernel, adapter, dtype)
        return (y + self.bias[...]).astype(call.precision.activation_dtype)


class LayerNorm(nnx.Module):
    """Normalises the last axis, with float32 statistics."""

    def __init__(self, dim: int, *, layers: tuple[int, ...], epsilon: float):
        self.epsilon = epsilon
        self.scale = nnx.Param(jnp.ones((*layers, dim), jnp.float32))
        self.bias = nnx.Param(jnp.zeros((*layers, dim), jnp.float32))

    def __call__(self, x: jax.Array, call: ForwardContext) -> jax.Array:
        y: jax.Array = layer_norm(x, self.scale[...], self.bias[...], self.epsilon)
        return y.astype(call.precision.activation_dtype)


class Embed(nnx.Module):
    """A table of vectors, looked up by id."""

    def __init__(self, rows: int, dim: int, *, std: float, rngs: nnx.Rngs):
        self.embedding = nnx.Param(std * jax.random.normal(rngs.params(), (rows, dim), jnp.float32))

    def __call__(self, ids: jax.Array) -> jax.Array:
        # ids are checked on the host; "clip" only spares the kernel that fills out-of-range rows with NaN
        return jnp.take(self.embedding[...], ids, axis=0, mode="clip").astype(jnp.float32)


class Attention(nnx.Module):
    """Causal self-attention with all heads' query, key and value from one product."""

    def __init__(self, config: GPT2Config, *, layers: tuple[int, ...], rngs: nnx.Rngs):
        self.config = config
        dim, std = config.n_embd, config.initializer_range
        self.c_attn = Linear(dim, 3 * dim, layers=layers, std=std, rngs=rngs)
        self.c_proj = Linear(dim, dim, layers=layers, std=std / math.sqrt(2 * config.n_layer), rngs=rngs)

    def __call__(
        self,
        x,
        call: ForwardContext,
        *,
        layer_index,
        mask,
        cache=None,
        cache_index: Any = None,
        adapters=None,
        key=None,
    ):
        """x [B, T, D], mask [B or 1, 1, T, S] or None for causal alone -> ([B, T, D], cache).

        With a cache (keys, values), each [B * N, S, H], the new keys and values are written at `cache_index`, and
        attention reads the whole of it in its dtype: casting it each step would cost more than narrow products save.
        """
        adapters = adapters or {}
        keys = split_key(key, 4)
        slices = tuple(adapters.get(name) for name in "qkv")
        qkv = self.c_attn(x, call, slices if any(slices) else adapters.get("c_attn"), keys[0])
        q, k, v = (self._split_heads(part) for part in jnp.split(qkv, 3, axis=-1))  # each [B, N, T, H]
        q, heads, dtype = q * self._scale(layer_index), q.shape[:2], call.precision.compute_dtype
        if cache is not None:
            # XLA updates a cache in place only if the products read just what was written: axes that it would
            # drop or merge for them (a batch of one) cost copies of the whole cache, so there is one axis of both
            dtype = cache[0].dtype
            q, k, v = (part.reshape(-1, *part.shape[2:]) for part in (q, k, v))
            k = jax.lax.dynamic_update_slice_in_dim(cache[0], k.astype(dtype), cache_index, axis=1)
            v = jax.lax.dynamic_update_slice_in_dim(cache[1], v.astype(dtype), cache_index, axis=1)
            cache = (k, v)
        kind = call.precision.attention
        drops = keys[1] is not None and self.config.attn_pdrop > 0
        if (
            mask is None
            and cache is None
            and supports_memory_efficient_attention(kind, self.config.head_dim, drops=drops)
        ):
            y = memory_efficient_attention(q, k, v, call.causal, dtype, kind)
        else:
            mask = call.causal if mask is None else mask
            scores = einsum_f32("...th,...sh->...ts", q, k, dtype)
            scores = scores.reshape(*heads, *scores.shape[-2:])
            probabilities = jax.nn.softmax(jnp.where(mask, scores, MASKED), axis=-1)  # float32
            probabilities = dropout(probabilities, self.config.attn_pdrop, keys[1])
            probabilities = probabilities.reshape(*k.shape[:-2], *scores.shape[-2:])
            y = einsum_f32("...ts,...sh->...th", probabilities, v, dtype)
        y = y.reshape(*heads, *y.shape[-2:]).swapaxes(1, 2).reshape(x.shape)
        y = self.c_proj(y.astype(call.precision.activation_dtype), call, adapters.get("c_proj"), keys[2])
        return dropout(y, self.config.resid_pdrop, keys[3]), cache

    def _split_heads(self, x: jax.Array) -> jax.Array:
        batch, length, _ = x.shape
        return x.reshape(batch, length, self.config.n_head, self.config.head_dim).swapaxes(1, 2)

    def _scale(self, layer_index) -> jax.Array | float:
        scale = 1.0 / math.sqrt(self.config.head_dim) if self.config.scale_attn_weights else 1.0
        return scale / (layer_index + 1.0) if self.config.scale_attn_by_inverse_layer_idx else scale


class MLP(nnx.Module):
    """Widen, activate, narrow."""

    def __init__(self, config: GPT2Config, *, layers: tuple[int, ...], rngs: nnx.Rngs):
        self.config = config
        dim, std = config.n_embd, config.initializer_range
        self.c_fc = Linear(dim, config.mlp_dim, layers=layers, std=std, rngs=rngs)
        self.c_proj = Linear(
            config.mlp_dim, dim, layers=layers, std=std / math.sqrt(2 * config.n_layer), rngs=rngs
        )

    def __call__(self, x: jax.Array, call: ForwardContext, *, adapters=None, key=None) -> jax.Array:
        adapters = adapters or {}
        keys = split_key(key, 3)
        x = self.c_fc(x, call, adapters.get("c_fc"), keys[0])
        x = activation(self.config.activation_function, x, call)
        x = self.c_proj(x, call, adapters.get("c_proj"), keys[1])
        return dropout(x, self.config.resid_pdrop, keys[2])


class Block(nnx.Module):
    """Pre-LayerNorm block: x + attention(ln_1(x)), then x + mlp(ln_2(x)).

    `layers=(L,)` gives every parameter a leading axis of that length: the stack of all blocks as one module.
    """

    def __init__(self, config: GPT2Config, *, layers: tuple[int, ...] = (), rngs: nnx.Rngs):
        epsilon = config.layer_norm_epsilon
        self.ln_1 = LayerNorm(config.n_embd, layers=layers, epsilon=epsilon)
        self.attn = Attention(config, layers=layers, rngs=rngs)
        self.ln_2 = LayerNorm(config.n_embd, layers=layers, epsilon=epsilon)
        self.mlp = MLP(config, layers=layers, rngs=rngs)

    def __call__(
        self,
        x,
        call: ForwardContext,
        *,
        layer_index,
        mask,
        cache=None,
        cache_index: Any = None,
        adapters=None,
        key=None,
    ):
        """x [B, T, D] -> ([B, T, D], cache); see `Attention`."""
        adapters = adapters or {}
        keys = split_key(key, 2)
        y, cache = self.attn(
            self.ln_1(x, call),
            call,
            layer_index=layer_index,
            mask=mask,
            cache=cache,
            cache_index=cache_index,
            adapters=adapters.get("attn"),
            key=keys[0],
        )
        x = x + y
        return x + self.mlp(self.ln_2(x, call), call, adapters=adapters.get("mlp"), key=keys[1]), cache


class LMHead(nnx.Module):
    """The output head of a model whose head is not the token embedding."""

    def __init__(self, config: GPT2Config, *, rngs: nnx.Rngs):
        shape = (config.vocab_size, config.n_embd)
        normal = jax.random.normal(rngs.params(), shape, jnp.float32)
        self.kernel = nnx.Param(config.initializer_range * normal)


class GPT2(nnx.Module):
    """Token and position embedding, the blocks, the final LayerNorm.

    The blocks are stacked, one module with a leading layer axis that a loop runs over; or `apart`, a module for each,
    written out one after another.
    """

    def __init__(self, config: GPT2Config, *, apart: bool = False, rngs: nnx.Rngs):
        self.config = config
        std = config.initializer_range
        self.wte = Embed(config.vocab_size, config.n_embd, std=std, rngs=rngs)
        self.wpe = Embed(config.n_positions, config.n_embd, std=std, rngs=rngs)
        if apart:
            self.h = nnx.List([Block(config, rngs=rngs) for _ in range(config.n_layer)])
        else:
            self.h = Block(config, layers=(config.n_layer,), rngs=rngs)
        self.ln_f = LayerNorm(config.n_embd, layers=(), epsilon=config.layer_norm_epsilon)
        if not config.tie_word_embeddings:
            self.lm_head = LMHead(config, rngs=rngs)

    def embed(self, tokens: jax.Array, positions: jax.Array, call: ForwardContext, key=None) -> jax.Array:
        """Ids [B, T] or their embeddings [B, T, D], positions [B, T] -> [B, T, D]."""
        x = self.wte(tokens) if tokens.ndim == 2 else tokens
        x = constrain_embedding(x + self.wpe(positions))
        return dropout(x, self.config.embd_pdrop, key).astype(call.precision.activation_dtype)

    def __call__(
        self, tokens, positions, mask, call: ForwardContext, *, adapters=None, key=None
    ) -> jax.Array:
        """Ids [B, T] or embeddings [B, T, D], positions [B, T], mask [B or 1, 1, T, T] or None -> hidden states.

        They are [B, T, D], after the last LayerNorm.
        """
        embed_key, blocks_key = split_key(key, 2)
        x = constrain_batch(self.embed(tokens, positions, call, embed_key))
        keys = None if blocks_key is None else jax.random.split(blocks_key, self.config.n_layer)
        apart = list(self.h) if isinstance(self.h, nnx.List) else None
        graphdef, params = nnx.split(apart[0] if apart else self.h)

        def block(x, layer):
            params, adapters, key, index = layer
            module = nnx.merge(graphdef, params)
            x, cache = module(x, call, layer_index=index, mask=mask, adapters=adapters, key=key)
            return constrain_batch(x), cache

        if call.remat != "none":
            # a scan needs no guard against common subexpressions: its body is not merged with the backward pass
            block = jax.checkpoint(block, policy=_REMAT_POLICIES[call.remat], prevent_cse=apart is not None)
        others = ((adapters or {}).get("h"), keys, jnp.arange(self.config.n_layer))
        if apart is None:
            x, _ = jax.lax.scan(block, x, (params, *others))
            return self.ln_f(x, call)
        for index, module in enumerate(apart):
            x, _ = block(x, (nnx.state(module), *jax.tree.map(lambda leaf, i=index: leaf[i], others)))
        return self.ln_f(x, call)


class ForwardContext:
    """What is the same for every layer of one call; modules take it, whoever walks the layers makes it."""

    def __init__(
        self, precision: Precision, *, causal: Any = None, lora_dropout: float = 0.0, remat: str = "none"
    ):
        self.precision = precision
        self.causal = causal  # [1, 1, T, T], for layers that are given no other mask
        self.lora_dropout = lora_dropout
        self.remat = remat


def split_key(key: jax.Array | None, n: int):
    """n keys out of one, or n times None where there is none."""
    return [None] * n if key is None else list(jax.random.split(key, n))


# ---- the functions that the rest of the library calls: plain dicts in, arrays out ----


@functools.lru_cache(maxsize=64)
def graphdef(config: GPT2Config, apart: bool = False) -> nnx.GraphDef:
    """The module structure of a configuration; with parameters it makes a `GPT2` by `nnx.merge`."""
    return nnx.split(nnx.eval_shape(lambda: GPT2(config, apart=apart, rngs=nnx.Rngs(0))))[0]


@functools.lru_cache(maxsize=64)
def block_graphdef(config: GPT2Config) -> nnx.GraphDef:
    """The module structure of one block, for callers that walk the layers themselves."""
    return nnx.split(nnx.eval_shape(lambda: Block(config, rngs=nnx.Rngs(0))))[0]


@functools.lru_cache(maxsize=64)
def final_norm_graphdef(config: GPT2Config) -> nnx.GraphDef:
    """The module structure of the last LayerNorm, for the same callers."""
    epsilon = config.layer_norm_epsilon
    return nnx.split(nnx.eval_shape(lambda: LayerNorm(config.n_embd, layers=(), epsilon=epsilon)))[0]


def abstract_params(config: GPT2Config) -> Params:
    """Shapes and dtypes of all parameters, without making one."""
    return _pure(nnx.eval_shape(lambda: GPT2(config, rngs=nnx.Rngs(0))))


def init_params(config: GPT2Config, seed: int = 0) -> Params:
    """Random float32 parameters: normal with `initializer_range`, residual projections scaled by 1/sqrt(2L)."""
    return _init_params(config, jax.random.key(seed))


@functools.partial(jax.jit, static_argnums=0)
def _init_params(config: GPT2Config, key: jax.Array) -> Params:
    return _pure(GPT2(config, rngs=nnx.Rngs(params=key)))


def _pure(module: nnx.Module) -> Params:
    return nnx.to_pure_dict(nnx.state(module, nnx.Param))


def count_parameters(params: Params) -> int:
    """Number of scalars in a parameter dict; a tied head counts once."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))


def hidden_states(
    params: Params,
    config: GPT2Config,
    token_ids: jax.Array,
    *,
    token_embeddings: jax.Array | None = None,
    positions: jax.Array | None = None,
    attention_mask: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
    precision: Precision = FLOAT32,
    dropout_key: jax.Array | None = None,
    adapters: Params | None = None,
    lora_scale: float | Params = 1.0,
    lora_dropout: float = 0.0,
    remat: str = "none",
) -> jax.Array:
    """The model up to the last LayerNorm.

    Args:
        params: parameters, blocks stacked; or apart, {0: {...}, 1: {...}, ...} in the place of the stack.
        config: their configuration.
        token_ids: [B, T] int.
        token_embeddings: [B, T, D], their rows of the embedding, for a caller who differentiates by these.
        positions: [B, T] int, rows of the position table. Default: 0, 1, ... counted over real tokens, and anew in
            each segment.
        attention_mask: [B, T] bool, False = padding (left or right), which no token attends to.
        segment_ids: [B, T] int; tokens attend only within their own segment (several documents in one row).
        precision: dtypes.
        dropout_key: switches dropout on.
        adapters: LoRA adapters, nested as `params`.
        lora_scale: of their output, `LoRAConfig.scales`; `lora_dropout` is that of their input.
        remat: one of `REMAT`: what the backward pass computes again, for less memory and the same result.

    Returns:
        [B, T, D] in `precision.activation_dtype`.

    Raises:
        ValueError: T is longer than the context, or an array has the wrong shape.
    """
    length = token_ids.shape[-1]
    if token_ids.ndim != 2:
        raise ValueError(f"token_ids has shape {token_ids.shape}; expected [B, T]")
    if length > config.n_positions:
        raise ValueError(f"a sequence of {length} tokens is longer than the context of {config.n_positions}")
    if positions is None:
        positions = _default_positions(token_ids.shape, attention_mask, segment_ids)
    # made here and not in the layers, where XLA would keep it for every head of every row
    causal = causal_mask(length)
    mask = None  # causal alone, for which there are kernels
    if attention_mask is not None:
        mask = causal & attention_mask.astype(bool)[:, None, None, :]
    if segment_ids is not None:
        mask = (causal if mask is None else mask) & (
            segment_ids[:, None, :, None] == segment_ids[:, None, None, :]
        )
    call = ForwardContext(precision, causal=causal, lora_dropout=lora_dropout, remat=remat)
    if adapters is not None:
        adapters = attach_scales(adapters, lora_scale, config.n_layer)
    module = nnx.merge(graphdef(config, apart=0 in params["h"]), params)
    tokens = token_ids if token_embeddings is None else token_embeddings
    return module(tokens, positions, mask, call, adapters=adapters, key=dropout_key)


def _default_positions(shape, attention_mask, segment_ids) -> jax.Array:
    real = jnp.ones(shape, jnp.int32) if attention_mask is None else attention_mask.astype(jnp.int32)
    before = jnp.cumsum(real, axis=1) - real  # real tokens to the left
    if segment_ids is not None:
        begins = segment_ids[:, 1:] != segment_ids[:, :-1]
        begins = jnp.pad(begins, ((0, 0), (1, 0)), constant_values=True)
        before = before - jax.lax.cummax(jnp.where(begins, before, 0), axis=1)
    return before


def lm_head_weight(params: Params) -> jax.Array:
    """The output head [V, D]: the token embedding unless the model has a head of its own."""
    return params["lm_head"]["kernel"] if "lm_head" in params else params["wte"]["embedding"]


def output_logits(hidden: jax.Array, head: jax.Array, precision: Precision = FLOAT32) -> jax.Array:
    """Hidden states [..., D] and head [V, D] -> logits [..., V] float32."""
    return matmul(hidden, head.T, precision.compute_dtype)
