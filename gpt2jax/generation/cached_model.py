"""The weights as decoding reads them, and the model over a key/value cache.

Training stacks the blocks and scans over them. Decoding reads every weight once a token, and reading them takes
nearly all of its time. So the weights are prepared once for a model: layers unstacked (a scan would copy each
layer's slice every token), adapters merged, and kernels in the dtype and layout that products with few rows read
fastest.

Rows of a batch are padded on the left, so that all rows write the same cache position: cache position s of row b
holds text position s - padding[b]. These numbers alone mark padding; a token id never does.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from gpt2jax.generation.config import DecoderModel
from gpt2jax.generation.kv_cache import Cache
from gpt2jax.model.config import GPT2Config
from gpt2jax.model.gpt2 import Params, block_graphdef, final_norm_graphdef, lm_head_weight
from gpt2jax.model.layers import ForwardContext
from gpt2jax.ops.attention import LayerCache
from gpt2jax.ops.device import Device
from gpt2jax.ops.linear import TransposedKernel, matmul, transpose_kernel
from gpt2jax.ops.precision import COMPUTE_DTYPES, Precision
from gpt2jax.utils.validation import check, one_of, optional

DecodingParams = dict[str, Any]
WEIGHT_DTYPES = (*COMPUTE_DTYPES, "int8")


def decoding_precision(dtype: str | None = None, *, device: Device | None = None) -> Precision:
    """Choose the dtypes to decode with.

    Args:
        dtype: of the weights, one of `WEIGHT_DTYPES`; None is float32 on a CPU (what training computes in) and
            bfloat16 on an accelerator. int8 weights leave all other dtypes at their defaults.
        device: what the program will run on; default: the first local device.

    Raises:
        ValueError: `dtype` is not one of `WEIGHT_DTYPES`.
    """
    check("dtype", dtype, optional(one_of(WEIGHT_DTYPES)))
    device = device or Device.of()
    if dtype is None or dtype == "int8":
        dtype = "float32" if device.platform == "cpu" else "bfloat16"
    # neither dropout nor segments: no trial of the kernel for them
    return Precision.for_device(dtype, device, masked_attention="blockwise")


def weight_dtype(dtype: str | None, precision: Precision) -> jnp.dtype:
    """Return the dtype of the weights in matrix products; `precision` is that of `decoding_precision(dtype)`."""
    return jnp.dtype(jnp.int8) if dtype == "int8" else precision.compute_dtype


# ---- the weights ----


def prepare_decoding_params(
    params: Params,
    config: GPT2Config,
    *,
    dtype,
    adapters: Params | None = None,
    lora=None,
    vocab_size: int | None = None,
) -> DecodingParams:
    """Convert parameters to the layout that decoding reads.

    Args:
        params: canonical parameters, blocks stacked.
        config: their configuration.
        dtype: of the weights in matrix products. Embeddings, biases and LayerNorms keep theirs.
        adapters, lora: LoRA adapters to merge in, and their settings.
        vocab_size: the head leaves out ids from this one on, which pad the vocabulary and have no text.

    Returns:
        {"wte": [V, D], "wpe": [P, D], "h": [L blocks as `Block` has them], "ln_f": ..., "head": ...}, where the
        kernels of the blocks and the head are `TransposedKernel`. Arrays that do not change are shared with `params`.
    """
    if adapters is not None and lora is not None:
        from gpt2jax.lora.adapters import merge_adapters

        params = merge_adapters(params, adapters, lora)
    dtype = jnp.dtype(dtype)
    embeddings = {name: params[name]["embedding"] for name in ("wte", "wpe")}
    blocks = [_block(params["h"], layer, dtype=dtype) for layer in range(config.n_layer)]
    head = lm_head_weight(params)
    vocab_size = vocab_size or config.vocab_size
    if head.dtype == dtype and len(head) == vocab_size:
        head = TransposedKernel(head)
    else:
        head = _head(head, dtype=dtype, vocab_size=vocab_size)
    return {**embeddings, "h": blocks, "ln_f": params["ln_f"], "head": head}


# one program for all layers: a program for each layer would make the first call wait
@functools.partial(jax.jit, static_argnames="dtype")
def _block(blocks: Params, layer: jax.Array | int, *, dtype: jnp.dtype) -> Params:
    """Take one of the stacked blocks."""

    def take(path, x):
        own = jax.lax.dynamic_index_in_dim(x, layer, keepdims=False)
        return transpose_kernel(own.T, dtype) if path[-1].key == "kernel" else own

    return jax.tree_util.tree_map_with_path(take, blocks)


@functools.partial(jax.jit, static_argnames=("dtype", "vocab_size"))
def _head(head: jax.Array, *, dtype: jnp.dtype, vocab_size: int) -> TransposedKernel:
    return transpose_kernel(head[:vocab_size], dtype)


def prepare_model(model: DecoderModel, dtype: jnp.dtype) -> DecodingParams:
    """Prepare the parameters of a model, without the ids that its tokenizer does not have."""
    vocab_size = model.config.vocab_size
    if model.tokenizer is not None:
        vocab_size = min(vocab_size, model.tokenizer.vocab_size)
    return prepare_decoding_params(
        model.params,
        model.config,
        dtype=dtype,
        adapters=model.adapters,
        lora=model.lora,
        vocab_size=vocab_size,
    )


# ---- the model over a cache ----


def forward_with_cache(
    params: DecodingParams,
    config: GPT2Config,
    token_ids: jax.Array,
    cache: Cache,
    cache_position: jax.Array | int,
    padding: jax.Array,
    precision: Precision,
    *,
    is_empty: bool = False,
) -> tuple[jax.Array, Cache]:
    """Run T tokens a row after those in the cache.

    Args:
        params: from `prepare_decoding_params`.
        config: their configuration.
        token_ids: [B, T] int.
        cache: L pairs [B * N, S, H]; the T positions from `cache_position` on are written, which must not exceed S.
        cache_position: scalar int, the first position to write.
        padding: [B] int, number of unused positions at the left of each row.
        precision: dtypes.
        is_empty: nothing is in the cache and no row has padding, which allows the attention that training uses.

    Returns:
        Hidden states [B, T, D] after the last LayerNorm, and the cache.
    """
    queries = cache_position + jnp.arange(token_ids.shape[1])
    # rows that are padding or have ended may point outside the table; what they compute is not read
    positions = jnp.clip(queries[None, :] - padding[:, None], 0, config.n_positions - 1)
    keys = jnp.arange(cache[0][0].shape[1])
    mask = (keys <= queries[:, None])[None] & (keys >= padding[:, None, None])  # [B, T, S]
    x = jnp.take(params["wte"], token_ids, axis=0, mode="clip").astype(jnp.float32)
    x = x + jnp.take(params["wpe"], positions, axis=0)
    x = x.astype(precision.activation_dtype)
    new_cache = []
    for index, (layer, layer_cache) in enumerate(zip(params["h"], cache, strict=True)):
        x, layer_cache = _apply_block(
            layer,
            layer_cache,
            x,
            index,
            mask[:, None],
            cache_position,
            config=config,
            precision=precision,
            is_empty=is_empty,
        )
        new_cache.append(layer_cache)
    norm = nnx.merge(final_norm_graphdef(config), params["ln_f"])
    return norm(x, ForwardContext(precision)), tuple(new_cache)


# jitted apart, it is traced once for all layers; the compiled program is the same without
@functools.partial(jax.jit, static_argnames=("config", "precision", "is_empty"))
def _apply_block(
    layer: Params,
    cache: LayerCache,
    x: jax.Array,
    index: jax.Array | int,
    mask: jax.Array,
    cache_position: jax.Array | int,
    *,
    config: GPT2Config,
    precision: Precision,
    is_empty: bool,
) -> tuple[jax.Array, LayerCache | None]:
    block = nnx.merge(block_graphdef(config), layer)
    ctx = ForwardContext(precision, mask, is_causal=is_empty, cache_position=cache_position)
    return block(x, ctx, layer_index=index, cache=cache)


def lm_head(params: DecodingParams, hidden: jax.Array, precision: Precision) -> jax.Array:
    """Compute logits [..., V] float32 from hidden states [..., D]."""
    # 8 bits of mantissa would make ties of the most probable tokens, and save no kernel
    exact = dataclasses.replace(precision.execution, has_narrow_results=False)
    return matmul(hidden, params["head"], precision.compute_dtype, exact)
