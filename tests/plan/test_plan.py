"""The plan of a training run: its parts against arrays and compiled programs of this machine."""

from __future__ import annotations

import dataclasses
import math

import jax
import pytest
from devices import on_four_devices
from jax.sharding import AbstractMesh, AxisType

from gpt2jax.cli.plan import main
from gpt2jax.lora.config import LoRAConfig
from gpt2jax.model.config import PRESETS, GPT2Config
from gpt2jax.model.gpt2 import count_parameters
from gpt2jax.plan.estimate import estimate_memory, flops_per_token, largest_batch
from gpt2jax.plan.program import compile_program, make_program, planned_bytes
from gpt2jax.sharding import AXES, make_mesh, shardings
from gpt2jax.train.config import FinetuneConfig

SMALL = GPT2Config(
    n_layer=6, n_head=4, n_embd=128, vocab_size=512, n_positions=128, bos_token_id=511, eos_token_id=511,
    embd_pdrop=0.0, attn_pdrop=0.0, resid_pdrop=0.0,
)  # fmt: skip


EVERY = LoRAConfig(rank=4, targets=("*",))


EVERY = LoRAConfig(rank=4, targets=("*",))


def compare_with_compiled(settings, vocabulary=512):
    """(estimated, compiled) bytes of the arguments, and of all together."""
    train = FinetuneConfig(batch_size=16, **settings)
    program = make_program(dataclasses.replace(SMALL, vocab_size=vocabulary), train, "cpu")
    mesh = make_mesh(fsdp=train.fsdp, devices=jax.devices()[: train.fsdp])
    compiled = compile_program(program, mesh)
    memory = estimate_memory(program, fsdp=train.fsdp, devices=train.fsdp)
    arguments = memory.parameters + memory.optimizer + memory.batch
    analysis = compiled.memory_analysis()
    return (arguments, analysis.argument_size_in_bytes), (memory.total, planned_bytes(compiled, "cpu"))


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"lora": LoRAConfig(rank=4)},
        {"lora": LoRAConfig(rank=4), "base_dtype": "int8"},
        {"lora": EVERY, "remat": "full", "compute_dtype": "bfloat16"},
    ],
)
def test_estimate_is_within_a_tenth_of_what_is_compiled(settings):
    arguments, whole = compare_with_compiled(settings)
    assert arguments[0] == pytest.approx(arguments[1], rel=0.001)
    assert whole[0] == pytest.approx(whole[1], rel=0.1)


# a vocabulary that makes the head's copies weigh, and logits of which few are held at once
ON_DEVICES = """
import json
from gpt2jax.ops import cross_entropy as losses
from test_plan import EVERY, compare_with_compiled

losses.MAX_LOGITS = 1 << 20
print(json.dumps(compare_with_compiled({"fsdp": 4, "lora": EVERY}, 8192)))
"""


def test_estimate_counts_what_devices_hold_whole():
    """Under FSDP the head and a layer at a time."""
    # optimization has no say in what buffers there are
    arguments, whole = on_four_devices(ON_DEVICES, "--xla_backend_optimization_level=0")
    assert arguments[0] == pytest.approx(arguments[1], rel=0.001)
    assert whole[0] == pytest.approx(whole[1], rel=0.1)


def test_a_narrow_base_is_counted_as_it_is_held():
    """Two bytes a number, or one in the blocks and two in the embeddings; scales, biases and LayerNorms are few."""
    lora, sizes = LoRAConfig(rank=4), {}
    for dtype in ("float32", "bfloat16", "int8"):
        train = FinetuneConfig(batch_size=16, compute_dtype="bfloat16", lora=lora, base_dtype=dtype)
        sizes[dtype] = estimate_memory(make_program(SMALL, train, "tpu"))
    kernels, embeddings = 6 * 12 * 128**2, (512 + 128) * 128
    wide, narrow, rounded = (sizes[dtype].parameters for dtype in ("float32", "bfloat16", "int8"))
    assert wide - narrow == 2 * (kernels + embeddings)
    assert narrow - rounded == kernels - 4 * 6 * 9 * 128
    # nothing is kept of a base but the base itself
    assert sizes["float32"].activations == sizes["bfloat16"].activations
    assert sizes["bfloat16"].activations == sizes["int8"].activations


def test_devices_share_parameters_moments_and_rows():
    train = FinetuneConfig(batch_size=64, sequence_length=1024, compute_dtype="bfloat16", remat="full")
    program = make_program(dataclasses.replace(PRESETS["gpt2"], attn_pdrop=0.0), train, "tpu")
    alone, shared = estimate_memory(program), estimate_memory(program, fsdp=8, devices=8)
    for kind in ("parameters", "optimizer", "batch", "gradients", "activations"):
        assert getattr(shared, kind) == pytest.approx(getattr(alone, kind) / 8, rel=1e-6)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("sizes", [(1, 8, 1), (1, 4, 2)])
def test_no_moment_of_gpt2_xl_is_whole_on_a_device(optimizer, sizes):
    """Nor a parameter or its average: FSDP cuts all of the state, but for counts and constants."""
    train = FinetuneConfig(batch_size=8, optimizer=optimizer, ema_decay=0.9)
    state = make_program(PRESETS["gpt2-xl"], train, "tpu").state
    mesh = AbstractMesh(sizes, AXES, axis_types=(AxisType.Auto,) * 3)
    for leaf, cut in zip(jax.tree.leaves(state), jax.tree.leaves(shardings(state, mesh)), strict=True):
        parts = leaf.size // math.prod(cut.shard_shape(leaf.shape))
        assert leaf.size < 10 or parts >= sizes[1], (leaf.shape, cut.spec)


def test_flops_are_six_a_weight_and_four_with_frozen_ones():
    model = PRESETS["gpt2"]
    weights = count_parameters({"p": jax.ShapeDtypeStruct((124_439_808,), "float32")}) - 1024 * 768
    full = flops_per_token(model, 1)
    assert full == pytest.approx(6 * weights, rel=0.002)  # biases and LayerNorms are not products
    assert flops_per_token(model, 1, lora=LoRAConfig()) == pytest.approx(full * 2 / 3, rel=0.001)
    assert flops_per_token(model, 1024) > full


def test_largest_batch_fits_and_one_more_does_not():
    train, memory = FinetuneConfig(sequence_length=128), 300_000_000
    found = largest_batch(SMALL, train, "cpu", memory)
    assert found is not None and found[1].total <= memory
    more = make_program(SMALL, dataclasses.replace(train, batch_size=found[0] + 1), "cpu")
    assert estimate_memory(more).total > memory
    assert largest_batch(SMALL, train, "cpu", 1_000_000) is None


def test_command_prints_the_estimate(capsys):
    main(["--model", "gpt2", "--batch-size", "8", "--device", "a100"])
    text = capsys.readouterr().out
    for part in (
        "activations",
        "estimate",
        "cudnn",
        "trained parameters  124,439,808",
        "largest batch that fits",
    ):
        assert part in text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--device", "h200x"], "device='h200x' is not known; known: h100"),
        (["--devices", "3", "--fsdp", "2"], "devices=3 must be a multiple of fsdp=2"),
        (
            ["--batch-size", "9", "--devices", "2"],
            "batch_size=9 / gradient_accumulation_steps=1 can't be divided among 2 devices",
        ),
        (["--sequence-length", "2000"], "sequence_length=2000 is over the model's context of 1024"),
    ],
)
def test_mistakes_are_one_line(options, message, capsys):
    with pytest.raises(SystemExit) as end:
        main(options)
    error = capsys.readouterr().err
    assert end.value.code == 2 and message in error and error.count("\n") == 1
