"""What a device is, and what is chosen because of it."""

from __future__ import annotations

import dataclasses
import types

import jax
import jax.numpy as jnp
import pytest

from gpt2jax.ops import device
from gpt2jax.ops.device import CPU, Device, Execution
from gpt2jax.ops.precision import FLOAT32, Precision, einsum

BFLOAT16 = jnp.dtype("bfloat16")
T4, H100 = Device("cuda", (7, 5), 16 << 30, "Tesla T4"), Device("cuda", (9, 0), 80 << 30, "H100")


def test_device_of_reads_the_first_local_device():
    assert Device.of() == Device.of(jax.local_devices()[0])
    assert Device.of().platform == jax.default_backend()


@pytest.mark.parametrize(
    ("version", "capability", "expected"),
    [
        ("cuda 12090", "7.5", ("cuda", (7, 5))),
        ("cuda 12090", None, ("cuda", None)),
        ("rocm 60000", "gfx942", ("rocm", None)),
    ],
)
def test_device_of_tells_makers_apart(version, capability, expected):
    gpu = types.SimpleNamespace(
        platform="gpu",
        client=types.SimpleNamespace(platform_version=version),
        compute_capability=capability,
        memory_stats=lambda: {"bytes_limit": 123},
        device_kind="some card",
    )
    found = Device.of(gpu)
    assert (found.platform, found.compute_capability) == expected
    assert (found.memory_bytes, found.name) == (123, "some card")


@pytest.mark.parametrize(
    ("device", "dtype", "expected"),
    [
        (H100, "bfloat16", "cudnn"),
        (H100, "float32", "blockwise"),
        (T4, "float16", "blockwise"),  # cuDNN's kernel needs capability 8.0
        (Device("rocm"), "bfloat16", "blockwise"),
        (Device("tpu"), "bfloat16", "blockwise"),
        (Device("cpu"), "bfloat16", "blockwise"),
    ],
)
def test_execution_attention_follows_the_device(device, dtype, expected):
    assert Execution.for_device(device, jnp.dtype(dtype)).attention == expected


def test_execution_falls_back_where_cudnn_does_not_work(monkeypatch):
    """A CPU stands for a GPU whose installation is incomplete: jax raises there as well."""
    device.try_cudnn_attention.cache_clear()
    assert device.try_cudnn_attention("bfloat16")[0] is False
    monkeypatch.setattr(device, "try_flash_attention", lambda dtype: (True, ""))
    here = dataclasses.replace(H100, is_here=True)
    with pytest.warns(UserWarning, match="by blocks, because cuDNN's kernel does not work here: "):
        assert Execution.for_device(here, BFLOAT16).attention == "blockwise"
    monkeypatch.setattr(device, "try_cudnn_attention", lambda dtype: (True, ""))
    assert Execution.for_device(here, BFLOAT16).attention == "cudnn"


def test_execution_of_a_cpu_is_what_ops_do_by_default():
    assert Execution.for_device(Device("cpu"), BFLOAT16, attention="plain") == CPU == FLOAT32.execution


def test_execution_logits_follow_the_memory():
    large, small = (Execution.for_device(device, BFLOAT16) for device in (H100, T4))
    assert large.logits_bytes == 5 * small.logits_bytes
    # all rows of the largest usual batch at once
    assert large.logits_bytes > 16 * 1024 * 50257 * 2


def test_execution_overrides():
    chosen = Execution.for_device(H100, BFLOAT16, attention="plain", has_unrolled_layers=False)
    assert chosen.attention == "plain" and not chosen.has_unrolled_layers
    with pytest.raises(TypeError, match="there is no choice 'atention'; did you mean 'attention'"):
        Execution.for_device(H100, BFLOAT16, atention="plain")
    with pytest.raises(ValueError, match="attention must be one of plain, blockwise, cudnn, got 'flash'"):
        Execution.for_device(H100, BFLOAT16, attention="flash")


def test_execution_describe_names_its_choices():
    line = Execution.for_device(H100, BFLOAT16).describe()
    assert "cuDNN attention" in line and "16-bit results" in line and "\n" not in line


def test_execution_describe_names_layers_only_if_they_are_settled():
    lines = {
        "cpu": Execution.for_device(Device("cpu"), BFLOAT16),
        "written out": Execution.for_device(Device("cpu"), BFLOAT16, has_unrolled_layers=True),
        "in a loop": Execution.for_device(H100, BFLOAT16, has_unrolled_layers=False),
    }
    for words, execution in lines.items():
        assert words in execution.describe()
    assert "layers" not in lines["cpu"].describe()


def test_einsum_results_are_narrow_where_the_device_wants_them():
    x = jnp.ones((2, 3))
    for place, dtype in ((Device("cpu"), "float32"), (H100, "bfloat16")):
        execution = Execution.for_device(place, BFLOAT16)
        assert einsum("ij,kj->ik", x, x, BFLOAT16, execution).dtype == dtype


def test_tensorfloat32_is_asked_for_on_accelerators_only():
    def products(place, name):
        precision = Precision.for_device(name, place)
        form = (precision.compute_dtype, precision.execution)
        return str(jax.make_jaxpr(lambda x: einsum("ij,kj->ik", x, x, *form))(jnp.ones((2, 3))))

    for place in (Device("cpu"), H100, Device("tpu")):
        assert "HIGHEST" in products(place, "float32")
    assert products(Device("cpu"), "tensorfloat32") == products(Device("cpu"), "float32")
    assert "HIGHEST" not in products(H100, "tensorfloat32")
    assert "HIGH," in products(Device("tpu"), "tensorfloat32").replace(")", ",")
