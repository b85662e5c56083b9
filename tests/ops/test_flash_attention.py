"""The fused kernels, interpreted on the CPU, beside plain operations with the same mask."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gpt2jax.ops import device as devices
from gpt2jax.ops.attention import attention, causal_mask
from gpt2jax.ops.device import Device, Execution
from gpt2jax.ops.flash_attention import FlashForm, flash_attention, supports_flash
from gpt2jax.ops.flash_trial import LIMITS, check_kernels, kernel_errors

FLOAT32, BFLOAT16 = jnp.dtype("float32"), jnp.dtype("bfloat16")
H100 = Device("cuda", (9, 0), 80 << 30, "H100")
PALLAS = Execution(platform="cuda", attention="cudnn", masked_attention="pallas")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dtype", "rate", "blocks", "shape", "segments"),
    [
        ("float32", 0.25, (16, 16), (2, 2, 40, 8), 3),
        ("float32", 0.1, (32, 16), (1, 1, 33, 20), 1),  # heads are padded to 32 dimensions
        ("bfloat16", 0.0, None, (1, 1, 70, 80), 2),
    ],
)
def test_flash_attention_equals_plain_operations(dtype, rate, blocks, shape, segments):
    form = FlashForm(jnp.dtype(dtype), rate, blocks, is_interpreted=True)
    errors = kernel_errors(form, shape, segments)  # of any blocks, beside one mask
    assert list(errors) == ["output", "dq", "dk", "dv"]
    assert max(errors.values()) < LIMITS[dtype], errors


@pytest.mark.parametrize(("head_dim", "length"), [(64, 200), (80, 130), (96, 260), (128, 1024)])
def test_flash_attention_keeps_nothing_of_t_times_t(head_dim, length):
    """No array of the traced program, forward and backward and inside its kernels, has a side of T twice."""
    x = jax.ShapeDtypeStruct((1, 2, length, head_dim), BFLOAT16)
    ids = jax.ShapeDtypeStruct((1, length), jnp.int32)
    form = FlashForm(BFLOAT16, 0.1)

    def gradients(q, k, v, ids):
        y, pull = jax.vjp(lambda q, k, v: flash_attention(q, k, v, ids, jax.random.key(0), form), q, k, v)
        return y, pull(y)

    traced = jax.make_jaxpr(gradients)(x, x, x, ids)
    assert [aval.shape for aval in traced.out_avals] == [x.shape] * 4
    shapes = list(shapes_of(traced.jaxpr))
    assert len(shapes) > 300 and all(sum(size >= length for size in shape) < 2 for shape in shapes)


def shapes_of(jaxpr):
    for equation in jaxpr.eqns:
        yield from (variable.aval.shape for variable in equation.outvars if hasattr(variable.aval, "shape"))
        for value in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from shapes_of(inner)


@pytest.mark.parametrize(
    ("given", "is_fused"),
    [
        ({"dropout_rate": 0.1}, True),
        ({"segment_ids": np.zeros((1, 32), np.int32)}, True),
        ({"dropout_rate": 0.1, "is_causal": False}, False),
        ({"dropout_rate": 0.1, "dtype": FLOAT32}, False),
        ({"dropout_rate": 0.1, "head_dim": 136}, False),
        ({"dropout_rate": 0.1, "execution": Execution(attention="plain", masked_attention="pallas")}, False),
        ({"dropout_rate": 0.1, "execution": Execution(attention="cudnn")}, False),
    ],
    ids=["dropout", "segments", "not-causal", "float32", "large-heads", "plain", "blockwise"],
)
def test_attention_takes_the_kernel_for_masked_rows_in_16_bits(given, is_fused):
    given = {
        "is_causal": True,
        "dtype": BFLOAT16,
        "execution": PALLAS,
        "dropout_rate": 0.0,
        "head_dim": 64,
    } | given
    x = jax.ShapeDtypeStruct((1, 2, 32, given.pop("head_dim")), BFLOAT16)
    key = jax.random.key(0) if given["dropout_rate"] else None
    traced = jax.make_jaxpr(lambda q: attention(q, q, q, causal_mask(32), dropout_key=key, **given))(x)
    assert ("pallas_call" in str(traced)) is is_fused


def test_attention_of_arrays_that_a_mesh_shards_does_not_take_the_kernel():
    x, key = jax.ShapeDtypeStruct((2, 2, 32, 64), BFLOAT16), jax.random.key(0)
    given = {
        "is_causal": True,
        "dtype": BFLOAT16,
        "execution": PALLAS,
        "dropout_rate": 0.1,
        "dropout_key": key,
    }
    mesh = jax.sharding.AbstractMesh((2, 1), ("data", "tensor"))
    with jax.sharding.use_abstract_mesh(mesh):
        traced = jax.make_jaxpr(lambda q: attention(q, q, q, causal_mask(32), **given))(x)
    assert "pallas_call" not in str(traced)


def test_supports_flash():
    assert supports_flash(1024, 128) and not supports_flash(1024, 136) and not supports_flash(70_000, 64)


@pytest.mark.skipif(
    not devices.can_lower_pallas(), reason="JAX 0.11 and later lower Pallas only beside a GPU"
)
def test_flash_attention_is_lowered_for_cuda_without_a_gpu():
    x = jax.ShapeDtypeStruct((1, 1, 100, 80), BFLOAT16)
    ids = jax.ShapeDtypeStruct((1, 100), jnp.int32)
    form = FlashForm(BFLOAT16, 0.1)

    def gradients(q, ids):
        return jax.grad(
            lambda q: flash_attention(q, q, q, ids, jax.random.key(0), form).astype(jnp.float32).sum()
        )(q)

    text = jax.jit(gradients).trace(x, ids).lower(lowering_platforms=("cuda",)).as_text()
    for kernel in ("forward", "query_gradient", "key_gradient"):
        assert f"flash_attention_{kernel}" in text


def test_execution_takes_pallas_where_it_can_run(monkeypatch):
    here = Device("cuda", (9, 0), 80 << 30, "H100", is_here=True)
    monkeypatch.setattr(devices, "try_cudnn_attention", lambda dtype: (True, ""))
    devices.try_flash_attention.cache_clear()

    def fail(dtype):
        raise ValueError("dq is off")

    monkeypatch.setattr("gpt2jax.ops.flash_trial.check_kernels", fail)
    with pytest.warns(
        UserWarning, match="by blocks, because its Pallas kernel does not work here: dq is off"
    ):
        found = Execution.for_device(here, BFLOAT16)
    devices.try_flash_attention.cache_clear()
    assert (found.attention, found.masked_attention) == ("cudnn", "blockwise")
    monkeypatch.setattr(devices, "try_flash_attention", lambda dtype: (True, ""))
    assert Execution.for_device(here, BFLOAT16).masked_attention == "pallas"
    assert "Pallas" in Execution.for_device(here, BFLOAT16).describe()
    for other, dtype, overrides in (
        (here, FLOAT32, {}),
        (here, BFLOAT16, {"masked_attention": "blockwise"}),
        (here, BFLOAT16, {"attention": "blockwise"}),
        (Device("cuda", (7, 5), is_here=True), jnp.dtype("float16"), {}),
        (Device("rocm"), BFLOAT16, {}),
        (Device("tpu"), BFLOAT16, {}),
        (Device("cpu"), BFLOAT16, {}),
    ):
        assert Execution.for_device(other, dtype, **overrides).masked_attention == "blockwise"


def test_execution_of_a_described_device_takes_pallas_if_jax_can_lower_it(monkeypatch):
    for can in (True, False):
        monkeypatch.setattr(devices, "can_lower_pallas", lambda can=can: can)
        expected = "pallas" if can else "blockwise"
        assert Execution.for_device(H100, BFLOAT16).masked_attention == expected


def test_check_kernels_finds_wrong_gradients(monkeypatch):
    found = {"output": 1e-3, "dq": 1e-3}
    monkeypatch.setattr("gpt2jax.ops.flash_trial.kernel_errors", lambda form, shape: found)
    check_kernels("bfloat16")
    for wrong in (0.04, float("nan")):
        found["dq"] = wrong
        with pytest.raises(ValueError, match="dq for heads of 64 dimensions is off by"):
            check_kernels("bfloat16")
