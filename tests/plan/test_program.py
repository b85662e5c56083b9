"""The training step of a plan."""

from __future__ import annotations

import math

import jax
import pytest
from jax.sharding import AbstractMesh, AxisType

from gpt2jax.model.config import PRESETS
from gpt2jax.ops.device import Device
from gpt2jax.plan.program import make_program
from gpt2jax.sharding import AXES, shardings
from gpt2jax.train.config import FinetuneConfig


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("sizes", [(1, 8, 1), (1, 4, 2)])
def test_make_program_state_of_gpt2_xl_is_sharded(optimizer, sizes):
    """FSDP shards every parameter, moment and average, but not counts and constants."""
    train = FinetuneConfig(batch_size=8, optimizer=optimizer, ema_decay=0.9)
    state = make_program(PRESETS["gpt2-xl"], train, Device.of_backend("tpu")).state
    mesh = AbstractMesh(sizes, AXES, axis_types=(AxisType.Auto,) * 3)
    places = jax.tree.leaves(shardings(state, mesh))  # pyright: ignore[reportArgumentType]
    for leaf, sharding in zip(jax.tree.leaves(state), places, strict=True):
        parts = leaf.size // math.prod(sharding.shard_shape(leaf.shape))
        assert leaf.size < 10 or parts >= sizes[1], (leaf.shape, sharding.spec)


def test_make_program_refuses_a_sequence_over_the_context():
    with pytest.raises(
        ValueError, match="sequence_length must be at most the model's context of 1024, got 2000"
    ):
        make_program(PRESETS["gpt2"], FinetuneConfig(sequence_length=2000), Device.of_backend("gpu"))
