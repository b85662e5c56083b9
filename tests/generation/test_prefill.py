"""Prompts into the cache on an accelerator: whole prompts at once, with the attention that training uses."""

from __future__ import annotations

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_models import random_model

from gpt2jax.generation.cached_model import prepare_decoding_params, prepare_model
from gpt2jax.generation.decoding import DecoderSpec
from gpt2jax.generation.kv_cache import init_cache
from gpt2jax.generation.prefill import fill_cache, left_pad, prefill_empty
from gpt2jax.generation.requests import PromptState
from gpt2jax.model.config import PRESETS
from gpt2jax.model.gpt2 import abstract_params
from gpt2jax.ops.device import Device, Execution
from gpt2jax.ops.precision import FLOAT32, Precision

GPU = Execution.for_device(Device("cuda", (9, 0), 80 << 30), jnp.dtype("float32"), attention_block=8)
RAGGED = [[7] * 25, [3], list(range(9)), [5, 6] * 8, [1, 2]]
ALIKE = [[*range(20), 30], [*range(20), 31, 32]]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("prompts", "tokens", "runs"),
    [
        ([RAGGED[0]], 1 << 15, [(1, 32)]),
        (RAGGED, 1 << 15, [(8, 32)]),
        (RAGGED, 8 * 11, [(8, 8)]),  # the rest over the cache
        (RAGGED, 8, []),
        (ALIKE, 1 << 15, [(1, 32)]),
        ([[4]], 1 << 15, []),
    ],
    ids=["one", "ragged", "in-parts", "too-many-rows", "shared-beginning", "one-token"],
)
def test_fill_cache_of_an_accelerator_equals_that_of_a_cpu(prompts, tokens, runs, monkeypatch):
    model = random_model(0)
    params = prepare_model(model, jnp.dtype("float32"))
    padded = left_pad([PromptState("", ids, 1) for ids in prompts], 32)
    precision = dataclasses.replace(FLOAT32, execution=dataclasses.replace(GPU, prefill_tokens=tokens))
    seen = []

    def counted(spec, params, token_ids, *args):
        seen.append(token_ids.shape)
        return prefill_empty(spec, params, token_ids, *args)

    want = fill_cache(DecoderSpec(model.config, FLOAT32), params, padded)
    monkeypatch.setattr("gpt2jax.generation.prefill.prefill_empty", counted)
    got = fill_cache(DecoderSpec(model.config, precision), params, padded)
    assert seen == runs
    heads, filled = model.config.n_head, padded.length - 1
    for row, padding in enumerate(padded.padding[: len(prompts)]):
        rows, positions = slice(row * heads, (row + 1) * heads), slice(int(padding), filled)
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
            np.testing.assert_allclose(a[rows, positions], b[rows, positions], atol=2e-6)


@pytest.mark.parametrize("rows", [1, 4])
def test_prefill_empty_of_a_gpu_runs_the_fused_attention(rows, monkeypatch):
    """All layers run cuDNN's kernel, whose own lowering needs its library, and make no scores [T, S]."""
    calls = []

    def kernel(q, k, v, **settings):
        calls.append((q.shape, settings["implementation"], settings["is_causal"]))
        return q

    monkeypatch.setattr(jax.nn, "dot_product_attention", kernel)
    config = dataclasses.replace(PRESETS["gpt2"], n_layer=2, n_positions=640)
    precision = Precision.for_device("bfloat16", Device("cuda", (9, 0), 80 << 30))
    params = jax.eval_shape(
        lambda p: prepare_decoding_params(p, config, dtype="bfloat16"), abstract_params(config)
    )
    cache = jax.eval_shape(lambda: init_cache(config, rows, 512, jnp.bfloat16))
    ids, padding = jax.ShapeDtypeStruct((rows, 256), jnp.int32), jax.ShapeDtypeStruct((rows,), jnp.int32)
    program = prefill_empty.trace(DecoderSpec(config, precision), params, ids, cache, padding).jaxpr
    assert calls == [((rows, 256, 12, 64), "cudnn", True)]  # traced once for all layers
    assert not re.search(r"f(32|16)\[[\d,]*256,256\]", str(program))
