"""Devices by name, and their descriptions."""

from __future__ import annotations

import pytest

from gpt2jax.plan import devices
from gpt2jax.plan.devices import find_device, topology_devices


def test_find_device_names_the_nearest_known_one():
    assert find_device("v5e").backend == "tpu"
    with pytest.raises(ValueError, match=r"there is no device 'h10'; did you mean 'h100'\?"):
        find_device("h10")


def test_topology_devices_says_what_is_described_and_what_to_install(monkeypatch):
    with pytest.raises(LookupError, match=r"no description of 1 x a100 here; described: none"):
        topology_devices(find_device("a100"), 1)
    with pytest.raises(LookupError, match=r"described: 1, 4, 8"):
        topology_devices(find_device("v5e"), 2)

    def without_plugin(device, topology):
        raise ImportError("No module named 'jax_plugins'")

    monkeypatch.setattr(devices, "_describe", without_plugin)
    with pytest.raises(LookupError, match=r'needs pip install "gpt2jax\[cuda\]"; No module'):
        topology_devices(find_device("h100"), 1)
