"""The frozen base of adapters in other dtypes: one rounding, and from there on all as with plain weights."""

from __future__ import annotations

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, PartitionSpec
from tiny_models import TINY, random_params

import gpt2jax
from gpt2jax.language_model import LanguageModel
from gpt2jax.lora.adapters import BASE_DTYPES, LoRAConfig, cast_base, init_adapters, kernel_of
from gpt2jax.model.gpt2 import hidden_states, init_params
from gpt2jax.ops.precision import COMPUTE_DTYPES, Precision, matmul
from gpt2jax.ops.quantized import Int8Kernel, quantize_kernel
from gpt2jax.sharding import AXES, shardings

KINDS = {
    "LoRA": LoRAConfig(rank=4, targets=("attn.q", "attn.v", "mlp.*")),
    "DoRA": LoRAConfig(rank=4, targets=("attn.k", "mlp.c_fc", "*.c_proj"), use_dora=True, dropout=0.2),
}


@pytest.fixture(scope="module")
def params():
    return random_params()


def plain(tree):
    """Rounded kernels as float32 ones, and all else in float32."""
    is_kernel = lambda leaf: isinstance(leaf, Int8Kernel)  # noqa: E731
    return jax.tree.map(lambda leaf: leaf.astype(jnp.float32), tree, is_leaf=is_kernel)


def noisy(adapters):
    leaves, structure = jax.tree.flatten(adapters)
    keys = jax.random.split(jax.random.key(2), len(leaves))
    shaken = [x + 0.1 * jax.random.normal(key, x.shape) for x, key in zip(leaves, keys, strict=True)]
    return jax.tree.unflatten(structure, shaken)


def test_every_channel_of_every_layer_is_rounded_within_half_a_step():
    generator = np.random.default_rng(0)
    kernel = generator.normal(0, [[0.01, 1.0, 30.0, 0.0]], (3, 50, 4)).astype(np.float32)
    found = quantize_kernel(jnp.asarray(kernel))
    assert found.values.dtype == jnp.int8 and found.scale.shape == (3, 4)
    back = np.asarray(found.astype(jnp.float32), np.float64)
    assert (np.abs(back - kernel) <= np.asarray(found.scale)[:, None] * 0.5001).all()
    np.testing.assert_allclose(np.abs(back).max(1), np.abs(kernel).max(1), rtol=1e-6)
    np.testing.assert_allclose(found.scale[..., :3], np.abs(kernel).max(1)[:, :3] / 127, rtol=1e-6)


@pytest.mark.parametrize("dtype", COMPUTE_DTYPES)
def test_products_and_their_gradient_round_operands_and_nothing_else(dtype):
    generator = np.random.default_rng(1)
    x, kernel, g = (
        jnp.asarray(generator.normal(0, size, shape), jnp.float32)
        for size, shape in ((3, (2, 5, 64)), (0.1, (64, 40)), (1e-4, (2, 5, 40)))
    )
    weight, operand = quantize_kernel(kernel), jnp.dtype(dtype)
    y, pull = jax.vjp(lambda x: matmul(x, weight, operand), x)
    (dx,) = jax.jit(pull)(g)
    wide = np.asarray(weight.values, np.float64) * np.asarray(weight.scale)
    exact = np.asarray(x.astype(operand), np.float64) @ wide
    np.testing.assert_allclose(y, exact, atol=1e-6 * np.abs(exact).max())
    assert y.dtype == dx.dtype == jnp.float32
    # the cotangent is rounded once more; in float16 the smallest would be zeros in units of the weights' own
    exact = np.asarray(g, np.float64) @ wide.T
    tolerance = {"float32": 1e-6, "bfloat16": 5e-3, "float16": 3e-3}[dtype]
    np.testing.assert_allclose(dx, exact, atol=tolerance * np.abs(exact).max())


@pytest.mark.parametrize("lora", KINDS.values(), ids=KINDS.keys())
def test_hidden_states_and_gradients_are_those_of_the_same_weights_in_float32(params, lora):
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

    fresh = init_adapters(TINY, lora, params=base)
    ours, hidden = run(noisy(fresh), base)
    expected, wide_hidden = run(noisy(init_adapters(TINY, lora, params=plain(base))), plain(base))
    np.testing.assert_allclose(hidden, wide_hidden, atol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5 * np.abs(b).max()), ours, expected)


@pytest.mark.parametrize("dtype", BASE_DTYPES)
def test_what_is_rounded_and_what_is_not(params, dtype):
    base = cast_base(jax.tree.map(lambda x: x.astype(jnp.bfloat16), params), dtype)
    block = base["h"]["mlp"]["c_fc"]
    assert (
        base["ln_f"]["scale"].dtype == base["h"]["ln_1"]["bias"].dtype == block["bias"].dtype == jnp.float32
    )
    assert base["wte"]["embedding"].dtype == ("float32" if dtype == "float32" else "bfloat16")
    assert block["kernel"].values.dtype == "int8" if dtype == "int8" else block["kernel"].dtype == dtype
    wide = cast_base(params, "float32")
    assert all(a is b for a, b in zip(jax.tree.leaves(wide), jax.tree.leaves(params), strict=True))
    as_it_is = jax.tree.leaves(cast_base(params, None))
    assert all(a is b for a, b in zip(as_it_is, jax.tree.leaves(params), strict=True))


def test_other_bases_are_named():
    for settings, named in (
        (
            {"base_dtype": "int4", "lora": LoRAConfig()},
            "base_dtype must be one of float32, bfloat16, int8, or None, got 'int4'",
        ),
        ({"base_dtype": "bfloat16"}, "base_dtype must be None without lora, got 'bfloat16'"),
    ):
        with pytest.raises(ValueError, match=named):
            gpt2jax.FinetuneConfig(**settings)


def test_no_wide_copy_of_all_layers_is_ever_made():
    """Neither by the forward pass for the backward pass, nor by XLA ahead of the loop over the layers."""
    config = dataclasses.replace(TINY, n_layer=3)  # so that no other array has the shapes of the kernels
    precision, ids = Precision.for_backend("bfloat16"), np.zeros((2, 10), np.int32)
    params = jax.eval_shape(lambda: init_params(config))
    base = jax.eval_shape(lambda p: cast_base(p, "int8"), params)
    lora = LoRAConfig(rank=4, targets=("mlp.*",), use_dora=True)
    adapters = jax.eval_shape(lambda p: init_adapters(config, lora, params=p), base)

    def loss(adapters, base):
        return jnp.square(hidden_states(base, config, ids, adapters=adapters, precision=precision)).sum()

    text = jax.jit(jax.grad(loss)).lower(adapters, base).compile().as_text()
    for name in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"):
        shape = re.escape(str(list(kernel_of(params["h"], name).shape)).replace(" ", ""))
        assert re.search(f"s8{shape}", text) and not re.search(f"(f32|bf16){shape}", text)


def test_a_narrow_base_is_kept_as_it_is_for_the_backward_pass():
    """Products in float32 with weights in 16 bits: a float32 copy would be twice the base."""
    x, w = jnp.ones((4, 8)), jnp.ones((8, 6), jnp.bfloat16)
    _, pull = jax.vjp(lambda x: matmul(x, w, jnp.dtype("float32")), x)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(pull) if leaf.shape == w.shape} == {"bfloat16"}


def test_a_rounded_kernel_is_cut_as_a_plain_one(params):
    mesh = AbstractMesh((2, 2, 2), AXES)
    ours, expected = (
        jax.tree_util.tree_map(lambda cut: cut.spec, shardings(base, mesh))
        for base in (cast_base(params, "int8"), params)
    )
    for module, linear in (("attn", "c_attn"), ("attn", "c_proj"), ("mlp", "c_fc"), ("mlp", "c_proj")):
        cut, whole = ours["h"][module][linear], expected["h"][module][linear]
        assert cut["kernel"].values == whole["kernel"] and len(whole["kernel"]) == 3
        # the scale as the outputs that it multiplies
        assert cut["kernel"].scale == PartitionSpec(None, whole["kernel"][-1])
        assert cut["bias"] == whole["bias"]


def test_a_run_learns_on_it_what_it_learns_on_float32():
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
