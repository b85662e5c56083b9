"""The estimate of a training step: its parts against arrays and compiled programs of this machine."""

from __future__ import annotations

import dataclasses

import jax
import pytest

from gpt2jax.lora.config import LoRAConfig
from gpt2jax.model.config import PRESETS, GPT2Config
from gpt2jax.model.gpt2 import count_parameters
from gpt2jax.ops.device import Device
from gpt2jax.plan.estimate import estimate_memory, flops_per_token, largest_batch
from gpt2jax.plan.program import compile_program, make_program, peak_bytes
from gpt2jax.sharding import make_mesh
from gpt2jax.train.config import FinetuneConfig

GPU, TPU = Device.of_backend("gpu"), Device("tpu")
SMALL = GPT2Config(
    n_layer=4, n_head=4, n_embd=128, vocab_size=512, n_positions=128, bos_token_id=511, eos_token_id=511,
    embd_pdrop=0.0, attn_pdrop=0.0, resid_pdrop=0.0,
)  # fmt: skip
EVERY = LoRAConfig(rank=4, targets=("*",))


@pytest.mark.slow
def test_estimate_memory_is_near_what_xla_plans():
    program = make_program(SMALL, FinetuneConfig(batch_size=16), Device.of_backend("cpu"))
    compiled = compile_program(program, make_mesh(devices=jax.devices()[:1]))
    memory = estimate_memory(program)
    arguments = memory.parameters + memory.optimizer + memory.batch
    assert arguments == pytest.approx(compiled.memory_analysis().argument_size_in_bytes, rel=0.001)
    assert 1.0 <= peak_bytes(compiled, "cpu") / memory.total <= 1.4


@pytest.mark.slow
def test_estimate_memory_counts_a_reduced_base_in_its_dtype():
    """Two bytes a number, or one in the blocks and two in the embeddings; scales, biases and LayerNorms are few."""
    sizes = {}
    for dtype in ("float32", "bfloat16", "int8"):
        train = FinetuneConfig(batch_size=16, compute_dtype="bfloat16", lora=EVERY, base_dtype=dtype)
        sizes[dtype] = estimate_memory(make_program(SMALL, train, TPU))
    kernels, embeddings = 4 * 12 * 128**2, (512 + 128) * 128
    full, half, quantized = (sizes[dtype].parameters for dtype in ("float32", "bfloat16", "int8"))
    assert full - half == 2 * (kernels + embeddings)
    assert half - quantized == kernels - 4 * 4 * 9 * 128
    # the residuals hold no copy of the base
    assert sizes["float32"].residuals == sizes["bfloat16"].residuals == sizes["int8"].residuals


@pytest.mark.slow
def test_estimate_memory_divides_parameters_moments_and_rows_among_devices():
    train = FinetuneConfig(batch_size=64, sequence_length=1024, compute_dtype="bfloat16", remat="full")
    program = make_program(dataclasses.replace(PRESETS["gpt2"], attn_pdrop=0.0), train, TPU)
    alone, shared = estimate_memory(program), estimate_memory(program, fsdp=8, devices=8)
    for kind, size in dataclasses.asdict(alone).items():
        assert getattr(shared, kind) == pytest.approx(size / 8, rel=1e-6)


@pytest.mark.slow
def test_estimate_memory_counts_both_gradients_under_accumulation():
    train = FinetuneConfig(batch_size=16)
    whole = estimate_memory(make_program(SMALL, train, GPU))
    parts = estimate_memory(
        make_program(SMALL, dataclasses.replace(train, gradient_accumulation_steps=2), GPU)
    )
    assert parts.gradients == 2 * whole.gradients
    assert parts.residuals == pytest.approx(whole.residuals / 2, rel=0.02)


def test_flops_per_token_is_six_a_weight_and_four_a_frozen_one():
    model = PRESETS["gpt2"]
    weights = count_parameters({"p": jax.ShapeDtypeStruct((124_439_808,), "float32")}) - 1024 * 768
    full = flops_per_token(model, 1)
    assert full == pytest.approx(6 * weights, rel=0.002)  # biases and LayerNorms are not products
    assert flops_per_token(model, 1, lora=LoRAConfig()) == pytest.approx(full * 2 / 3, rel=0.001)
    assert flops_per_token(model, 1024) > full


@pytest.mark.slow
def test_largest_batch_fits_and_one_more_row_does_not():
    train, memory = FinetuneConfig(sequence_length=128), 300_000_000
    rows = largest_batch(SMALL, train, GPU, memory)
    sizes = [
        estimate_memory(make_program(SMALL, dataclasses.replace(train, batch_size=n), GPU)).total
        for n in (rows, rows + 1)
    ]
    assert sizes[0] <= memory < sizes[1]
    assert largest_batch(SMALL, train, GPU, 1_000_000) == 0
