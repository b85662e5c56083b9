"""The frozen base of adapters in other dtypes: rounded once, and then exactly its dequantized weights."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, PartitionSpec
from tiny_models import TINY, random_params

import gpt2jax
from gpt2jax.language_model import LanguageModel
from gpt2jax.lora.adapters import cast_base, init_adapters, kernel_of
from gpt2jax.lora.config import BASE_DTYPES, LoRAConfig
from gpt2jax.model.gpt2 import hidden_states, init_params
from gpt2jax.ops.linear import StoredKernel, dequantize
from gpt2jax.ops.precision import Precision
from gpt2jax.sharding import AXES, shardings

KINDS = {
    "LoRA": LoRAConfig(rank=4, targets=("attn.q", "attn.v", "mlp.*")),
    "DoRA": LoRAConfig(rank=4, targets=("attn.k", "mlp.c_fc", "*.c_proj"), use_dora=True, dropout=0.2),
}


@pytest.fixture(scope="module")
def params():
    return random_params()


def dequantize_base(tree):
    """Return all parameters as float32 arrays."""
    return jax.tree.map(dequantize, tree, is_leaf=lambda leaf: isinstance(leaf, StoredKernel))


def add_noise(adapters):
    leaves, structure = jax.tree.flatten(adapters)
    keys = jax.random.split(jax.random.key(2), len(leaves))
    shaken = [x + 0.1 * jax.random.normal(key, x.shape) for x, key in zip(leaves, keys, strict=True)]
    return jax.tree.unflatten(structure, shaken)


@pytest.mark.slow
@pytest.mark.parametrize("lora", KINDS.values(), ids=KINDS.keys())
def test_int8_base_equals_its_dequantized_weights(params, lora):
    base = cast_base(params, "int8")
    ids = np.arange(40).reshape(2, 20) % TINY.vocab_size

    @jax.jit
    def run(adapters, base):
        def loss(adapters):
            hidden = hidden_states(
                base,
                TINY,
                ids,
                adapters=adapters,
                lora_scale=2.0,
                lora_dropout=lora.dropout,
                dropout_key=jax.random.key(3) if lora.dropout else None,
                remat="full" if lora.use_dora else "none",
            )
            return jnp.square(hidden).sum(), hidden

        return jax.grad(loss, has_aux=True)(adapters)

    dense = dequantize_base(base)
    ours, hidden = run(add_noise(init_adapters(TINY, lora, params=base)), base)
    expected, dense_hidden = run(add_noise(init_adapters(TINY, lora, params=dense)), dense)
    np.testing.assert_allclose(hidden, dense_hidden, atol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5 * np.abs(b).max()), ours, expected)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", BASE_DTYPES)
def test_cast_base_casts_matrices_only(params, dtype):
    base = cast_base(jax.tree.map(lambda x: x.astype(jnp.bfloat16), params), dtype)
    block = base["h"]["mlp"]["c_fc"]
    assert (
        base["ln_f"]["scale"].dtype == base["h"]["ln_1"]["bias"].dtype == block["bias"].dtype == jnp.float32
    )
    assert base["wte"]["embedding"].dtype == ("float32" if dtype == "float32" else "bfloat16")
    assert block["kernel"].values.dtype == "int8" if dtype == "int8" else block["kernel"].dtype == dtype
    same = cast_base(params, "float32")
    assert all(a is b for a, b in zip(jax.tree.leaves(same), jax.tree.leaves(params), strict=True))
    as_it_is = jax.tree.leaves(cast_base(params, None))
    assert all(a is b for a, b in zip(as_it_is, jax.tree.leaves(params), strict=True))


def test_base_dtype_unknown_or_without_lora():
    cases: tuple[tuple[dict[str, Any], str], ...] = (
        (
            {"base_dtype": "int4", "lora": LoRAConfig()},
            "base_dtype must be one of float32, bfloat16, int8, or None, got 'int4'",
        ),
        ({"base_dtype": "bfloat16"}, "base_dtype must be None without lora, got 'bfloat16'"),
    )
    for settings, named in cases:
        with pytest.raises(ValueError, match=named):
            gpt2jax.FinetuneConfig(**settings)


@pytest.mark.slow
def test_int8_base_is_never_dequantized_as_a_whole():
    """Neither by the forward pass for the backward pass, nor by XLA ahead of the loop over the layers."""
    config = dataclasses.replace(TINY, n_layer=3)  # so that no other array has the shapes of the kernels
    precision, ids = Precision.for_device("bfloat16"), np.zeros((2, 10), np.int32)
    params = jax.eval_shape(lambda: init_params(config))
    base = jax.eval_shape(lambda p: cast_base(p, "int8"), params)
    lora = LoRAConfig(rank=4, targets=("mlp.*",), use_dora=True)
    adapters = jax.eval_shape(lambda p: init_adapters(config, lora, params=p), base)

    def loss(adapters, base):
        return jnp.square(hidden_states(base, config, ids, adapters=adapters, precision=precision)).sum()

    text = jax.jit(jax.grad(loss)).lower(adapters, base).compile().as_text()
    assert text is not None
    for name in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"):
        shape = re.escape(str(list(kernel_of(params["h"], name).shape)).replace(" ", ""))
        assert re.search(f"s8{shape}", text) and not re.search(f"(f32|bf16){shape}", text)


def test_int8_kernel_is_sharded_as_the_array(params):
    mesh: Any = AbstractMesh((2, 2, 2), AXES)
    ours, expected = (
        jax.tree.map(lambda sharding: sharding.spec, shardings(base, mesh))
        for base in (cast_base(params, "int8"), params)
    )
    for module, linear in (("attn", "c_attn"), ("attn", "c_proj"), ("mlp", "c_fc"), ("mlp", "c_proj")):
        int8, array = ours["h"][module][linear], expected["h"][module][linear]
        assert int8["kernel"].values == array["kernel"] and len(array["kernel"]) == 3
        # the scale as the outputs that it multiplies
        assert int8["kernel"].scale == PartitionSpec(None, None, array["kernel"][-1])
        assert int8["bias"] == array["bias"]


@pytest.mark.slow
def test_finetune_on_int8_base_learns_as_on_float32():
    """The result is the given model with adapters, in its own weights."""
    model = LanguageModel(TINY, random_params())
    texts = [[(start + i) % 8 for i in range(31)] for start in range(8)]
    gains = {}
    for dtype in (None, "int8"):
        config = gpt2jax.FinetuneConfig(
            steps=20,
            batch_size=8,
            sequence_length=32,
            packing="padded",
            learning_rate=2e-2,
            lora=LoRAConfig(rank=4, targets=("*",)),
            base_dtype=dtype,
        )
        run = gpt2jax.finetune(model, texts, config, validation_texts=texts[:4], progress=False)
        assert run.model.params is model.params
        gains[dtype] = loss_of(model, texts[:4]) - loss_of(run.model, texts[:4])
        trained = dataclasses.replace(run.model, params=cast_base(model.params, dtype))
        assert run.history[-1]["validation_loss"] == pytest.approx(loss_of(trained, texts[:4]), abs=1e-4)
    assert gains[None] > 1 and gains["int8"] == pytest.approx(gains[None], rel=0.05)


def loss_of(model, texts) -> float:
    """As packing "padded" has the texts: between two end tokens."""
    ids = np.pad(np.asarray(texts), ((0, 0), (1, 1)), constant_values=model.end_token_id)
    logprobs = jax.nn.log_softmax(model.logits(ids[:, :-1]))
    return -float(np.take_along_axis(np.asarray(logprobs), ids[:, 1:, None], axis=-1).mean())
