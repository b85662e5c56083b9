"""Devices by name, and their descriptions."""

from __future__ import annotations

import pytest

from gpt2jax.plan import devices
from gpt2jax.plan.devices import cuda_target, find_device, topology_devices


def test_find_device_names_the_nearest_known_one():
    assert find_device("v5e").backend == "tpu"
    with pytest.raises(ValueError, match=r"there is no device 'h10'; did you mean 'h100'\?"):
        find_device("h10")


def test_topology_devices_says_what_is_described_and_what_to_install(monkeypatch):
    with pytest.raises(LookupError, match=r"no description of 3 x a100 here; described: 1, 2, 4, 8"):
        topology_devices(find_device("a100"), 3)
    monkeypatch.setattr(devices, "CUDA_PLUGINS", ("none_at_all",))
    with pytest.raises(
        LookupError, match=r'needs pip install -e ".\[cuda\]" in the clone; no module named jax_plugins.none'
    ):
        topology_devices(find_device("h100"), 1)


@pytest.mark.parametrize("plugin", ["xla_cuda12", "xla_cuda13"])
def test_cuda_target_describes_the_chip_and_the_cuda_of_the_plugin(plugin):
    for name in ("t4", "a100", "h100"):
        device = find_device(name)
        assert device.chip is not None
        major, minor = device.chip.compute_capability
        target = cuda_target(device, plugin)
        assert f"cuda_compute_capability {{ major: {major} minor: {minor} }}" in target
        assert f"device_memory_size: {device.memory}\n" in target
        assert f"runtime_version {{ major: {plugin[-2:]} " in target


def test_topology_devices_gives_a_gpu_of_the_described_kind():
    """What XLA compiles for is read from the description."""
    pytest.importorskip("jax_plugins", reason="needs jax's CUDA plugin")
    try:
        [device] = topology_devices(find_device("t4"), 1)
    except LookupError as error:
        pytest.skip(str(error))
    assert device.platform == "cuda" and str(device.compute_capability) == "7.5"
