"""The training step: what it keeps, what it counts, and what an overflow does to it."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_models import TINY, random_params

from gpt2jax.data.batches import make_rows
from gpt2jax.data.documents import tokenize_documents
from gpt2jax.lora import LoRAConfig, init_adapters
from gpt2jax.losses import token_losses
from gpt2jax.model import head_kernel, hidden_states
from gpt2jax.precision import precision
from gpt2jax.train.config import FinetuneConfig
from gpt2jax.train.optimizer import (
    clip_scale,
    decay_mask,
    make_optimizer,
    make_schedule,
    resolve_learning_rate,
)
from gpt2jax.train.step import GROWTH_INTERVAL, INITIAL_SCALE, init_state, make_train_step, next_loss_scale

CONFIG = FinetuneConfig(steps=10, learning_rate=1e-2, weight_decay=0.1)


def batch(seed: int = 0, rows: int = 4) -> dict[str, np.ndarray]:
    """Rows with very different numbers of real tokens."""
    generator = np.random.default_rng(seed)
    lengths = np.array([16, 2, 9, 1])[:rows, None]
    return {
        "tokens": generator.integers(0, TINY.vocab_size, (rows, 16)).astype(np.int32),
        "targets": generator.integers(0, TINY.vocab_size, (rows, 16)).astype(np.int32),
        "weights": (np.arange(16) < lengths).astype(np.float32),
    }


def build(dtype="float32", config=CONFIG, model=TINY, **options) -> tuple[Any, Any]:
    optimizer = make_optimizer(config, 10)
    step = make_train_step(model, optimizer, precision(dtype), **options)
    lora = options.get("lora")
    trainable = random_params() if lora is None else init_adapters(TINY, lora)
    return step, init_state(trainable, optimizer, loss_scaling=dtype == "float16")


@pytest.fixture(scope="module")
def plain_step():
    return build()[0]


def fresh_state():
    return init_state(random_params(), make_optimizer(CONFIG, 10), loss_scaling=False)


def test_state_is_donated_and_compiled_once(plain_step):
    state = fresh_state()
    leaves = jax.tree.leaves(state)
    for index in range(3):
        state, metrics = plain_step(state, None, batch(index))
    assert all(leaf.is_deleted() for leaf in leaves)
    assert plain_step._cache_size() == 1
    assert int(state["step"]) == 3 and metrics["tokens"] == 28


def test_learns(plain_step):
    state, losses = fresh_state(), []
    for _ in range(8):
        state, metrics = plain_step(state, None, batch())
        losses.append(float(metrics["loss"]))
    assert losses[-1] < losses[0] - 0.5


def test_parts_of_unequal_token_counts_equal_one_batch(plain_step):
    whole, _ = plain_step(fresh_state(), None, batch())
    step, state = build(accumulation=4)
    parts, metrics = step(state, None, batch())
    assert metrics["tokens"] == 28
    for a, b in zip(jax.tree.leaves(whole["optimizer"]), jax.tree.leaves(parts["optimizer"]), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)


def test_dropout_is_a_function_of_seed_and_step():
    model = dataclasses.replace(TINY, resid_pdrop=0.5)

    steps = {seed: build(model=model, seed=seed)[0] for seed in (0, 1)}

    def first_loss(seed, at):
        return float(steps[seed]({**fresh_state(), "step": jnp.int32(at)}, None, batch())[1]["loss"])

    assert first_loss(0, 0) == first_loss(0, 0)
    assert len({first_loss(0, 0), first_loss(0, 1), first_loss(1, 0)}) == 3


def test_adapters_only():
    lora = LoRAConfig(rank=2, dropout=0.1)
    step, state = build(lora=lora)
    frozen = random_params()
    before = jax.tree.map(np.array, frozen)
    for _ in range(3):
        state, metrics = step(state, frozen, batch())
    jax.tree.map(np.testing.assert_array_equal, before, frozen)
    adapted = {leaf.shape for leaf in jax.tree.leaves(state["params"])}
    assert {leaf.shape for leaf in jax.tree.leaves(state["optimizer"]) if leaf.ndim} == adapted
    assert state["params"]["h"]["attn"]["c_attn"]["lora_b"].any() and np.isfinite(metrics["loss"])


def test_float16_overflow_skips_the_step():
    step, state = build("float16")
    state, metrics = step(state, None, batch())
    assert metrics["loss_scale"] == INITIAL_SCALE and metrics["skipped"] == 0
    state["loss_scale"]["scale"] = jnp.float32(2.0**24 * 2.0**100)  # the next gradient overflows for certain
    kept = jax.tree.map(np.array, {name: state[name] for name in ("params", "optimizer")})
    state, metrics = step(state, None, batch())
    jax.tree.map(np.testing.assert_array_equal, kept, {name: state[name] for name in kept})
    assert metrics["skipped"] == 1 and int(state["step"]) == 2
    state["loss_scale"]["scale"] = jnp.float32(INITIAL_SCALE)
    state, metrics = step(state, None, batch())
    assert np.isfinite(metrics["grad_norm"])
    assert any(
        (a != b).any()
        for a, b in zip(jax.tree.leaves(kept["params"]), jax.tree.leaves(state["params"]), strict=True)
    )


def test_narrow_gradients_are_close():
    norms = {}
    for dtype in ("float32", "bfloat16", "float16"):
        step, state = build(dtype)
        norms[dtype] = float(step(state, None, batch())[1]["grad_norm"])
    assert norms["bfloat16"] == pytest.approx(norms["float32"], rel=0.02)
    assert norms["float16"] == pytest.approx(norms["float32"], rel=0.005)


def test_loss_scale_grows_and_falls():
    state = {"scale": jnp.float32(8), "finite_steps": jnp.int32(GROWTH_INTERVAL - 1), "skipped": jnp.int32(3)}
    grown = next_loss_scale(state, jnp.bool_(True))
    assert (grown["scale"], grown["finite_steps"], grown["skipped"]) == (16, 0, 3)
    fallen = next_loss_scale(state, jnp.bool_(False))
    assert (fallen["scale"], fallen["finite_steps"], fallen["skipped"]) == (4, 0, 4)
    assert next_loss_scale({**state, "scale": jnp.float32(1)}, jnp.bool_(False))["scale"] == 1


def test_decay_acts_on_matrices_only():
    mask = decay_mask(random_params())
    assert mask["h"]["attn"]["c_attn"] == {"kernel": True, "bias": False}
    assert mask["h"]["ln_1"] == mask["ln_f"] == {"scale": False, "bias": False}
    assert mask["wte"] == {"embedding": True}
    with pytest.raises(KeyError):
        decay_mask({"strange": jnp.zeros(3)})


def test_schedule():
    config = FinetuneConfig(learning_rate=2.0, warmup_steps=3, final_learning_rate=0.1)
    schedule = make_schedule(config, 13)
    np.testing.assert_allclose([schedule(s) for s in range(4)], [0.5, 1.0, 1.5, 2.0])
    np.testing.assert_allclose(schedule(8), 2.0 * (0.1 + 0.9 * 0.5), rtol=1e-6)
    np.testing.assert_allclose(schedule(13), 0.2, rtol=1e-6)


def test_clipping():
    assert clip_scale(jnp.float32(4), 1.0) == 0.25 and clip_scale(jnp.float32(0.5), 1.0) == 1
    assert clip_scale(jnp.float32(4), None) == 1 and clip_scale(jnp.float32(0), 1.0) == 1


def test_learning_rate_by_size():
    config = FinetuneConfig()
    assert resolve_learning_rate(config, 4_000_000).learning_rate == 1e-3
    assert resolve_learning_rate(config, 124_000_000).learning_rate == 1e-4
    assert resolve_learning_rate(FinetuneConfig(lora=LoRAConfig()), 124_000_000).learning_rate == 5e-4
    assert resolve_learning_rate(FinetuneConfig(learning_rate=3e-3), 1).learning_rate == 3e-3


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("steps", 0),
        ("batch_size", 2.5),
        ("learning_rate", float("inf")),
        ("beta2", 1.0),
        ("layout", "rows"),
        ("optimizer", "sgd"),
        ("compute_dtype", "int8"),
        ("accumulation", 3),
        ("dropout", -0.1),
        ("seed", -1),
    ],
)
def test_impossible_settings_are_named(field, value):
    with pytest.raises(ValueError, match=f"{field}={value!r}"):
        FinetuneConfig(**{field: value})


def test_muon_moves_the_kernels_and_adam_the_rest():
    step, state = build(config=FinetuneConfig(steps=10, learning_rate=1e-2, optimizer="muon"))
    before = jax.tree.map(np.array, state["params"])
    after = step(state, None, batch())[0]["params"]
    change = np.asarray(after["h"]["mlp"]["c_fc"]["kernel"]) - before["h"]["mlp"]["c_fc"]["kernel"]
    # orthogonal updates have one singular value, and five iterations bring them near to each other; the last few
    # of the 32 are none, since the batch has 28 tokens
    for layer in change:
        values = np.linalg.svd(layer, compute_uv=False)
        assert values[0] < 3 * values[23]
    assert (np.asarray(after["wpe"]["embedding"][:16]) != before["wpe"]["embedding"][:16]).all()


def test_a_packed_document_has_the_loss_it_has_alone():
    """Losses of documents packed into rows, and of each in a row of its own."""
    generator = np.random.default_rng(0)
    rows = [generator.integers(0, 99, size) for size in (5, 20, 3, 70, 0, 1, 14, 9)]
    documents = tokenize_documents(rows, None, vocab_size=101)
    packed = make_rows(documents, "packed", 32, 100)
    stacked = [packed.row(index) for index in range(len(packed))]
    assert len(packed) < len(rows)
    whole = {name: np.stack([row[name] for row in stacked]) for name in stacked[0]}
    params = random_params()

    @jax.jit
    def loss(params, batch):
        hidden = hidden_states(params, TINY, batch["tokens"], segment_ids=batch["segment_ids"])
        return token_losses(hidden, head_kernel(params), batch["targets"])[0]

    losses = np.asarray(loss(params, whole))
    compared = 0
    for row, segments in enumerate(whole["segment_ids"]):
        for segment in range(1, segments.max() + 1):
            inside = segments == segment
            alone = jax.tree.map(lambda x, row=row: np.zeros_like(x[row]), whole)
            for name in ("tokens", "targets"):
                alone[name][: inside.sum()] = whole[name][row][inside]
            batch = jax.tree.map(lambda x: np.broadcast_to(x, whole["tokens"].shape), alone)
            expected = np.asarray(loss(params, batch))[0][: inside.sum()]
            np.testing.assert_allclose(losses[row][inside], expected, atol=1e-5)
            compared += inside.sum()
    assert compared == sum(len(ids) + 1 for ids in rows)
