"""The GPT-2: read this file, and `layers.py` for what it is made of, and you know the model.

Modules are Flax NNX and hold parameters only: no caches, no random streams, no mutation. What varies between calls
(dropout key, LoRA adapters, key/value cache) is an argument. Outside this file parameters are a plain nested dict with
the blocks stacked along a leading layer axis; `hidden_states` merges such a dict with the module structure.

Axis letters: B batch, T query length, S key length, N heads, H head dim, D model dim, F MLP dim, V vocabulary,
P positions, L layers, r adapter rank.

Source: Radford et al. 2019, "Language Models are Unsupervised Multitask Learners".
"""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Float32, Int

from gpt2jax.model.config import GPT2Config
from gpt2jax.model.layers import Embed, ForwardContext, Ids, LayerNorm, Linear, activate
from gpt2jax.ops.attention import LayerCache, attention, block_mask
from gpt2jax.ops.dropout import dropout, split_key
from gpt2jax.ops.linear import matmul
from gpt2jax.ops.low_rank import attach_scales
from gpt2jax.ops.precision import FLOAT32, Precision
from gpt2jax.sharding import constrain_batch, constrain_embedding

Params = dict[str, Any]

# Rematerialization: which residuals of a block are saved for the backward pass; it recomputes the others.
_REMAT_POLICIES = {
    "none": None,  # saves all
    "dots": jax.checkpoint_policies.dots_saveable,  # saves the results of matrix products
    "weights": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,  # of products with weights
    "full": jax.checkpoint_policies.nothing_saveable,
}
REMAT = tuple(_REMAT_POLICIES)


class Attention(nnx.Module):
    """Causal self-attention; one product computes query, key and value of all heads."""

    def __init__(self, config: GPT2Config, *, layers: tuple[int, ...], rngs: nnx.Rngs):
        self.config = config
        dim, std = config.n_embd, config.initializer_range
        self.c_attn = Linear(dim, 3 * dim, layers=layers, std=std, rngs=rngs)
        self.c_proj = Linear(dim, dim, layers=layers, std=std / math.sqrt(2 * config.n_layer), rngs=rngs)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        ctx: ForwardContext,
        *,
        layer_index: jax.Array | int,
        cache: LayerCache | None = None,
        adapters: Params | None = None,
        key: jax.Array | None = None,
    ) -> tuple[Float[Array, "B T D"], LayerCache | None]:
        """Attend; the new keys and values are added to a cache, of which attention reads all that `ctx.mask` allows.

        With `ctx.is_causal` the cache must be empty: attention reads the new keys and values alone.
        """
        adapters = adapters or {}
        keys = split_key(key, 4)
        q, k, v = self._project_qkv(x, ctx, adapters, keys[0])
        dtype = ctx.precision.compute_dtype
        if cache is not None:
            assert ctx.cache_position is not None
            cache = cache.update(k, v, ctx.cache_position)
            # read in its own dtype: casting all of it at each step would cost more than 16-bit products save
            dtype = cache.keys.dtype
            if not ctx.is_causal:
                k, v = cache
        assert ctx.mask is not None
        y = attention(
            q,
            k,
            v,
            ctx.mask,
            dtype=dtype,
            scale=self._scale(layer_index),
            is_causal=ctx.is_causal,
            segment_ids=ctx.segment_ids,
            execution=ctx.precision.execution,
            dropout_rate=self.config.attn_pdrop,
            dropout_key=keys[1],
        )
        y = y.swapaxes(1, 2).reshape(x.shape)
        y = self.c_proj(y.astype(ctx.precision.activation_dtype), ctx, adapters.get("c_proj"), keys[2])
        return dropout(y, self.config.resid_pdrop, keys[3]), cache

    def _project_qkv(self, x, ctx: ForwardContext, adapters: Params, key) -> list[Float[Array, "B N T H"]]:
        parts = tuple(adapters.get(name) for name in "qkv")
        qkv = self.c_attn(x, ctx, parts if any(parts) else adapters.get("c_attn"), key)
        shape = (*x.shape[:2], self.config.n_head, self.config.head_dim)
        return [part.reshape(shape).swapaxes(1, 2) for part in jnp.split(qkv, 3, axis=-1)]

    def _scale(self, layer_index: jax.Array | int) -> jax.Array | float:
        scale = 1.0 / math.sqrt(self.config.head_dim) if self.config.scale_attn_weights else 1.0
        return scale / (layer_index + 1.0) if self.config.scale_attn_by_inverse_layer_idx else scale


class MLP(nnx.Module):
    """Two linear layers with a nonlinearity between them."""

    def __init__(self, config: GPT2Config, *, layers: tuple[int, ...], rngs: nnx.Rngs):
        self.config = config
        dim, std = config.n_embd, config.initializer_range
        self.c_fc = Linear(dim, config.mlp_dim, layers=layers, std=std, rngs=rngs)
        self.c_proj = Linear(
            config.mlp_dim, dim, layers=layers, std=std / math.sqrt(2 * config.n_layer), rngs=rngs
        )

    def __call__(
        self,
        x: Float[Array, "B T D"],
        ctx: ForwardContext,
        *,
        adapters: Params | None = None,
        key: jax.Array | None = None,
    ) -> Float[Array, "B T D"]:
        """Apply the MLP."""
        adapters = adapters or {}
        keys = split_key(key, 3)
        activation = functools.partial(activate, self.config.activation_function, ctx)
        x = self.c_fc(x, ctx, adapters.get("c_fc"), keys[0], activation)
        x = self.c_proj(x, ctx, adapters.get("c_proj"), keys[1])
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
        x: Float[Array, "B T D"],
        ctx: ForwardContext,
        *,
        layer_index: jax.Array | int,
        cache: LayerCache | None = None,
        adapters: Params | None = None,
        key: jax.Array | None = None,
    ) -> tuple[Float[Array, "B T D"], LayerCache | None]:
        """Apply the block; for the cache see `Attention`."""
        adapters = adapters or {}
        keys = split_key(key, 2)
        y, cache = self.attn(
            self.ln_1(x, ctx),
            ctx,
            layer_index=layer_index,
            cache=cache,
            adapters=adapters.get("attn"),
            key=keys[0],
        )
        x = x + y
        return x + self.mlp(self.ln_2(x, ctx), ctx, adapters=adapters.get("mlp"), key=keys[1]), cache


class LMHead(nnx.Module):
    """The output head [V, D] of a model whose head is not the token embedding."""

    def __init__(self, config: GPT2Config, *, rngs: nnx.Rngs):
        shape = (config.vocab_size, config.n_embd)
        normal = jax.random.normal(rngs.params(), shape, jnp.float32)
        self.kernel = nnx.Param(config.initializer_range * normal)


class GPT2(nnx.Module):
    """Token and position embedding, the blocks, the final LayerNorm.

    The blocks are stacked, one module with a leading layer axis that a scan runs over; or `unrolled`, one module for
    each layer.
    """

    def __init__(self, config: GPT2Config, *, unrolled: bool = False, rngs: nnx.Rngs):
        self.config = config
        std = config.initializer_range
        self.wte = Embed(config.vocab_size, config.n_embd, std=std, rngs=rngs)
        self.wpe = Embed(config.n_positions, config.n_embd, std=std, rngs=rngs)
        if unrolled:
            self.h = nnx.List([Block(config, rngs=rngs) for _ in range(config.n_layer)])
        else:
            self.h = Block(config, layers=(config.n_layer,), rngs=rngs)
        self.ln_f = LayerNorm(config.n_embd, layers=(), epsilon=config.layer_norm_epsilon)
        if not config.tie_word_embeddings:
            self.lm_head = LMHead(config, rngs=rngs)

    def embed(
        self,
        tokens: Ids | Float[Array, "B T D"],
        positions: Ids,
        ctx: ForwardContext,
        key: jax.Array | None = None,
    ) -> Float[Array, "B T D"]:
        """Sum the embeddings of tokens (ids, or their embeddings) and positions."""
        embedded = self.wte(tokens) if tokens.ndim == 2 else jnp.asarray(tokens)
        x = constrain_embedding(embedded + self.wpe(positions))
        return dropout(x, self.config.embd_pdrop, key).astype(ctx.precision.activation_dtype)

    def __call__(
        self,
        tokens: Ids | Float[Array, "B T D"],
        positions: Ids,
        ctx: ForwardContext,
        *,
        adapters: Params | None = None,
        key: jax.Array | None = None,
    ) -> Float[Array, "B T D"]:
        """Return the hidden states of tokens (ids, or their embeddings) after the final LayerNorm."""
        embed_key, blocks_key = split_key(key, 2)
        x = constrain_batch(self.embed(tokens, positions, ctx, embed_key))
        keys = None if blocks_key is None else jax.random.split(blocks_key, self.config.n_layer)
        unrolled = list(self.h) if isinstance(self.h, nnx.List) else None
        graphdef, params = nnx.split(unrolled[0] if unrolled else self.h)
        is_loop = unrolled is None and not ctx.precision.execution.has_unrolled_layers

        def block(x, layer):
            params, adapters, key, index = layer
            module = nnx.merge(graphdef, params)
            x, cache = module(x, ctx, layer_index=index, adapters=adapters, key=key)
            return constrain_batch(x), cache

        if ctx.remat != "none":
            # a scan needs no guard against common subexpressions: its body is not merged with the backward pass
            block = jax.checkpoint(block, policy=_REMAT_POLICIES[ctx.remat], prevent_cse=not is_loop)
        adapters = (adapters or {}).get("h")
        if is_loop:
            x, _ = jax.lax.scan(block, x, (params, adapters, keys, jnp.arange(self.config.n_layer)))
            return self.ln_f(x, ctx)
        count = self.config.n_layer
        layers = [nnx.state(module) for module in unrolled] if unrolled else _split_layers(params, count)
        for index, layer in enumerate(zip(layers, _split_layers(adapters, count), strict=True)):
            x, _ = block(x, (*layer, None if keys is None else keys[index], index))
        return self.ln_f(x, ctx)


def _split_layers(blocks: Any, count: int) -> list[Any]:
    """Take the layers of stacked arrays apart.

    The gradient of a split is one concatenation; that of a slice is a whole stack, most of it zeros.
    """
    leaves, treedef = jax.tree.flatten(blocks)
    parts = [jax.lax.split(jnp.asarray(leaf), [1] * count) for leaf in leaves]
    return [
        jax.tree.unflatten(treedef, [jnp.squeeze(part[index], 0) for part in parts]) for index in range(count)
    ]


# ---- the functions that the rest of the library calls: plain dicts in, arrays out ----


@functools.lru_cache(maxsize=64)
def graphdef(config: GPT2Config, unrolled: bool = False) -> nnx.GraphDef:
    """Return the module structure of a configuration; `nnx.merge` makes a `GPT2` of it and parameters."""
    return nnx.split(nnx.eval_shape(lambda: GPT2(config, unrolled=unrolled, rngs=nnx.Rngs(0))))[0]


@functools.lru_cache(maxsize=64)
def block_graphdef(config: GPT2Config) -> nnx.GraphDef:
    """Return the module structure of one block, for callers that loop over the layers themselves."""
    return nnx.split(nnx.eval_shape(lambda: Block(config, rngs=nnx.Rngs(0))))[0]


@functools.lru_cache(maxsize=64)
def final_norm_graphdef(config: GPT2Config) -> nnx.GraphDef:
    """Return the module structure of the final LayerNorm, for the same callers."""
    epsilon = config.layer_norm_epsilon
    return nnx.split(nnx.eval_shape(lambda: LayerNorm(config.n_embd, layers=(), epsilon=epsilon)))[0]


def abstract_params(config: GPT2Config) -> Params:
    """Return shapes and dtypes of all parameters, without allocating them."""
    return _to_params(nnx.eval_shape(lambda: GPT2(config, rngs=nnx.Rngs(0))))


def init_params(config: GPT2Config, seed: int = 0) -> Params:
    """Return random float32 parameters: normal with `initializer_range`, residual projections times 1/sqrt(2L)."""
    return _init_params(config, jax.random.key(seed))


@functools.partial(jax.jit, static_argnums=0)
def _init_params(config: GPT2Config, key: jax.Array) -> Params:
    return _to_params(GPT2(config, rngs=nnx.Rngs(params=key)))


def _to_params(module: nnx.Module) -> Params:
    return nnx.to_pure_dict(nnx.state(module, nnx.Param))


def count_parameters(params: Params) -> int:
    """Return the number of scalars in a parameter dict; a tied head counts once."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))


def hidden_states(
    params: Params,
    config: GPT2Config,
    token_ids: Ids,
    *,
    token_embeddings: Float[Array, "B T D"] | None = None,
    positions: Ids | None = None,
    attention_mask: Bool[Array | np.ndarray, "B T"] | Int[Array | np.ndarray, "B T"] | None = None,
    segment_ids: Ids | None = None,
    precision: Precision = FLOAT32,
    dropout_key: jax.Array | None = None,
    adapters: Params | None = None,
    lora_scale: Any = 1.0,
    lora_dropout: float = 0.0,
    remat: str = "none",
) -> Float[Array, "B T D"]:
    """Run the model up to the final LayerNorm.

    Args:
        params: parameters, blocks stacked; or unrolled, {0: {...}, 1: {...}, ...} instead of the stack.
        config: their configuration.
        token_ids: tokens.
        token_embeddings: the embeddings of `token_ids`, for a caller who differentiates by them.
        positions: rows of the position table. Default: 0, 1, ... counted over real tokens, and anew in each segment.
        attention_mask: False = padding (left or right), which no token attends to.
        segment_ids: tokens attend only within their own segment.
        precision: dtypes; the result has `precision.activation_dtype`.
        dropout_key: switches dropout on.
        adapters: LoRA adapters, nested as `params`.
        lora_scale: factor of their output, `LoRAConfig.scales`.
        lora_dropout: dropout of their input.
        remat: one of `REMAT`: what the backward pass recomputes, for less memory and the same result.

    Raises:
        ValueError: T is longer than the context, or `token_ids` has other axes.
    """
    _check_ids(token_ids, config)
    if positions is None:
        positions = _default_positions(token_ids.shape, attention_mask, segment_ids)
    # made here and not in the layers, where XLA would keep it for every head of every row
    mask = block_mask(0, token_ids.shape[1], segment_ids)
    if attention_mask is not None:
        mask = mask & attention_mask.astype(bool)[:, None, None, :]
    ctx = ForwardContext(
        precision,
        mask,
        is_causal=attention_mask is None,
        segment_ids=segment_ids,
        lora_dropout=lora_dropout,
        remat=remat,
    )
    if adapters is not None:
        adapters = attach_scales(adapters, lora_scale, config.n_layer)
    module = nnx.merge(graphdef(config, unrolled=0 in params["h"]), params)
    tokens = token_ids if token_embeddings is None else token_embeddings
    return module(tokens, positions, ctx, adapters=adapters, key=dropout_key)


def _check_ids(token_ids: Any, config: GPT2Config) -> None:
    if token_ids.ndim != 2:
        raise ValueError(f"token_ids must be [B, T], got shape {token_ids.shape}")
    if token_ids.shape[1] > config.n_positions:
        legal = f"at most {config.n_positions} long (the context)"
        raise ValueError(f"token_ids must be {legal}, got {token_ids.shape[1]} tokens")


def _default_positions(shape, attention_mask, segment_ids) -> Int[Array, "B T"]:
    real = jnp.ones(shape, jnp.int32) if attention_mask is None else attention_mask.astype(jnp.int32)
    before = jnp.cumsum(real, axis=1) - real  # real tokens to the left
    if segment_ids is not None:
        begins = segment_ids[:, 1:] != segment_ids[:, :-1]
        begins = jnp.pad(begins, ((0, 0), (1, 0)), constant_values=True)
        before = before - jax.lax.cummax(jnp.where(begins, before, 0), axis=1)
    return before


def lm_head_weight(params: Params) -> jax.Array:
    """Return the output head: the token embedding unless the model has its own head."""
    return params["lm_head"]["kernel"] if "lm_head" in params else params["wte"]["embedding"]


def output_logits(
    hidden: Float[Array, "*B D"], head: Float[Array, "V D"], precision: Precision = FLOAT32
) -> Float32[Array, "*B V"]:
    """Multiply hidden states by the output head."""
    # float32 logits on every device
    return matmul(hidden, head.T, precision.compute_dtype).astype(jnp.float32)
