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
from gpt2jax.data.tokenization import tokenize_documents
from gpt2jax.lora.adapters import init_adapters
from gpt2jax.lora.config import LoRAConfig
from gpt2jax.model.gpt2 import REMAT, hidden_states, lm_head_weight
from gpt2jax.ops.cross_entropy import token_losses
from gpt2jax.ops.device import Device, can_lower_pallas
from gpt2jax.ops.precision import Precision
from gpt2jax.plan.program import make_program
from gpt2jax.train.config import FinetuneConfig
from gpt2jax.train.freezing import merge_params, partition_params
from gpt2jax.train.optimizer import (
    make_optimizer,
)
from gpt2jax.train.step import (
    GROWTH_INTERVAL,
    INITIAL_SCALE,
    init_state,
    make_configured_step,
    make_train_step,
    next_loss_scale,
    with_dropout,
)

CONFIG = FinetuneConfig(steps=10, learning_rate=1e-2, weight_decay=0.1)


def batch(seed: int = 0, rows: int = 4) -> dict[str, np.ndarray]:
    """Rows with very different numbers of real tokens."""
    generator = np.random.default_rng(seed)
    lengths = np.array([16, 2, 9, 1])[:rows, None]
    return {
        "tokens": generator.integers(0, TINY.vocab_size, (rows, 16)).astype(np.int32),
        "targets": generator.integers(0, TINY.vocab_size, (rows, 16)).astype(np.int32),
        "loss_mask": (np.arange(16) < lengths).astype(np.float32),
    }


def build(dtype="float32", config=CONFIG, model=TINY, **options) -> tuple[Any, Any]:
    optimizer = make_optimizer(config, 10)
    step = make_train_step(model, optimizer, Precision.for_device(dtype), **options)
    lora = options.get("lora")
    trainable = random_params() if lora is None else init_adapters(TINY, lora)
    return step, init_state(trainable, optimizer, loss_scaling=dtype == "float16")


@pytest.fixture(scope="module")
def plain_step():
    return build()[0]


def fresh_state():
    return init_state(random_params(), make_optimizer(CONFIG, 10), loss_scaling=False)


@pytest.mark.slow
def test_train_step_donates_its_state_and_compiles_once(plain_step):
    state = fresh_state()
    leaves = jax.tree.leaves(state)
    for index in range(3):
        state, metrics = plain_step(state, None, batch(index))
    assert all(leaf.is_deleted() for leaf in leaves)
    assert plain_step._cache_size() == 1
    assert int(state["step"]) == 3 and metrics["tokens"] == 28


@pytest.mark.slow
def test_train_step_learns(plain_step):
    state, losses = fresh_state(), []
    for _ in range(8):
        state, metrics = plain_step(state, None, batch())
        losses.append(float(metrics["loss"]))
    assert losses[-1] < losses[0] - 0.5


@pytest.mark.slow
def test_train_step_accumulates_parts_of_unequal_token_counts(plain_step):
    whole, expected = plain_step(fresh_state(), None, batch())
    step, state = build(gradient_accumulation_steps=4)
    parts, metrics = step(state, None, batch())
    assert metrics["tokens"] == 28
    for name in expected:
        np.testing.assert_allclose(metrics[name], expected[name], rtol=1e-6)
    # the first moment is a tenth of the gradient
    for a, b in zip(jax.tree.leaves(whole["optimizer"]), jax.tree.leaves(parts["optimizer"]), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-7)


@pytest.mark.slow
def test_train_step_dropout_is_a_function_of_seed_and_step():
    model = dataclasses.replace(TINY, resid_pdrop=0.5)

    steps = {seed: build(model=model, seed=seed)[0] for seed in (0, 1)}

    def first_loss(seed, at):
        return float(steps[seed]({**fresh_state(), "step": jnp.int32(at)}, None, batch())[1]["loss"])

    assert first_loss(0, 0) == first_loss(0, 0)
    assert len({first_loss(0, 0), first_loss(0, 1), first_loss(1, 0)}) == 3


@pytest.mark.parametrize(
    ("dropout", "attention_dropout", "expected"),
    [
        (None, None, (0.1, 0.2, 0.3)),
        (0.5, None, (0.5, 0.5, 0.5)),
        (None, 0.0, (0.1, 0.0, 0.3)),
        (0.5, 0.0, (0.5, 0.0, 0.5)),
        (0.0, 0.4, (0.0, 0.4, 0.0)),
    ],
)
def test_with_dropout_gives_the_step_the_rates_of_the_run(dropout, attention_dropout, expected):
    model = dataclasses.replace(TINY, embd_pdrop=0.1, attn_pdrop=0.2, resid_pdrop=0.3)
    train = FinetuneConfig(dropout=dropout, attention_dropout=attention_dropout)
    for found in (with_dropout(model, train), make_program(model, train, Device.of_backend("cpu")).model):
        assert (found.embd_pdrop, found.attn_pdrop, found.resid_pdrop) == expected


@pytest.mark.slow
@pytest.mark.parametrize(("attention_dropout", "is_fused"), [(None, False), (0.0, True)])
def test_train_step_without_attention_dropout_runs_cudnn_on_an_h100(attention_dropout, is_fused, monkeypatch):
    """The other dropouts stay; with dropout of attention the Pallas kernels run, and neither keeps scores.

    The kernel of cuDNN can be traced on a GPU only.
    """
    asked = []

    def fused(q, k, v, *, scale, is_causal, implementation):
        asked.append((implementation, is_causal))
        return q + k + v

    monkeypatch.setattr(jax.nn, "dot_product_attention", fused)
    train = FinetuneConfig(
        batch_size=4, dropout=0.1, attention_dropout=attention_dropout, compute_dtype="bfloat16"
    )
    program = make_program(TINY, train, Device("cuda", (9, 0)))
    step = make_configured_step(program.model, train, make_optimizer(CONFIG, 10), program.precision)
    text = str(step.trace(program.state, None, program.batch).jaxpr)  # type: ignore[attr-defined]
    assert set(asked) == ({("cudnn", True)} if is_fused else set())
    heads, length = TINY.n_head, TINY.n_positions
    # JAX 0.11 and later lower Pallas for a GPU only where there is one: without it, blocks are computed
    has_kernels = can_lower_pallas() and not is_fused
    assert ("pallas_call" in text) is has_kernels
    assert (f"[4,{heads},{length},{length}]" not in text) is (is_fused or has_kernels)
    assert "random_bits" in text


@pytest.mark.slow
def test_train_step_trains_adapters_only():
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


@pytest.mark.slow
def test_train_step_skips_a_float16_overflow():
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


@pytest.mark.slow
def test_train_step_gradients_in_16_bits_are_close():
    norms = {}
    for dtype in ("float32", "bfloat16", "float16"):
        step, state = build(dtype)
        norms[dtype] = float(step(state, None, batch())[1]["grad_norm"])
    assert norms["bfloat16"] == pytest.approx(norms["float32"], rel=0.02)
    assert norms["float16"] == pytest.approx(norms["float32"], rel=0.005)


def test_next_loss_scale_grows_and_falls():
    state = {"scale": jnp.float32(8), "finite_steps": jnp.int32(GROWTH_INTERVAL - 1), "skipped": jnp.int32(3)}
    grown = next_loss_scale(state, jnp.bool_(True))
    assert (grown["scale"], grown["finite_steps"], grown["skipped"]) == (16, 0, 3)
    fallen = next_loss_scale(state, jnp.bool_(False))
    assert (fallen["scale"], fallen["finite_steps"], fallen["skipped"]) == (4, 0, 4)
    assert next_loss_scale({**state, "scale": jnp.float32(1)}, jnp.bool_(False))["scale"] == 1


@pytest.mark.slow
def test_partition_params_freezes_in_a_step():
    params = random_params()
    trained, frozen, mask = partition_params(params, ["wte", "h.0", "h.*.mlp.c_fc.bias"])
    jax.tree.map(np.testing.assert_array_equal, merge_params(trained, frozen), params)
    assert "wte" not in trained and "bias" not in trained["h"]["mlp"]["c_fc"] and mask is not None
    before = jax.tree.map(np.array, params)
    optimizer = make_optimizer(CONFIG, 10)
    state = init_state(jax.tree.map(jnp.copy, trained), optimizer, loss_scaling=False)
    step = make_train_step(TINY, optimizer, Precision.for_device("float32"), mask=mask)
    for index in range(2):
        state, metrics = step(state, frozen, batch(index))
    after = jax.tree.map(np.array, merge_params(state["params"], frozen))
    np.testing.assert_array_equal(after["wte"]["embedding"], before["wte"]["embedding"])
    for a, b in zip(jax.tree.leaves(after["h"]), jax.tree.leaves(before["h"]), strict=True):
        np.testing.assert_array_equal(a[0], b[0])
    kernels = [tree["h"]["attn"]["c_attn"]["kernel"][1] for tree in (after, before)]
    assert (kernels[0] != kernels[1]).all() and metrics["grad_norm"] > 0
    for wrong, message in (
        (["h.7"], r"freeze must be patterns that match parameters, got \['h\.7'\]"),
        (["*"], "freeze must be patterns that leave something to train"),
    ):
        with pytest.raises(ValueError, match=message):
            partition_params(params, wrong)


@pytest.mark.slow
def test_train_step_with_moving_average_and_lora_plus():
    lora = LoRAConfig(rank=2)
    config = dataclasses.replace(CONFIG, lora=lora, lora_plus_ratio=4.0, weight_decay=0.0)
    fast, slow = (make_optimizer(c, 10) for c in (config, dataclasses.replace(config, lora_plus_ratio=1.0)))
    adapters = init_adapters(TINY, lora)
    gradient = jax.tree.map(jnp.ones_like, adapters)
    changes: list[Any] = [o.update(gradient, o.init(adapters), adapters)[0] for o in (fast, slow)]
    updates = [change["h"]["attn"]["c_attn"] for change in changes]
    np.testing.assert_allclose(updates[0]["lora_b"], 4 * updates[1]["lora_b"])
    np.testing.assert_allclose(updates[0]["lora_a"], updates[1]["lora_a"])
    step = make_train_step(TINY, slow, Precision.for_device("float32"), lora=lora, ema_decay=0.3)
    state = init_state(adapters, slow, loss_scaling=False, ema=True)
    expected = jax.tree.map(np.array, state["params"])
    for index in range(5):
        state, _ = step(state, random_params(), batch(index))
        decay = min(0.3, (1 + index) / (10 + index))
        expected = jax.tree.map(
            lambda e, p, d=decay: d * e + (1 - d) * np.asarray(p), expected, state["params"]
        )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-7), state["ema"], expected)


@pytest.mark.slow
def test_hidden_states_remat_changes_memory_only():
    model = dataclasses.replace(TINY, n_positions=64, n_layer=4)
    ids = jnp.asarray(np.random.default_rng(0).integers(0, 99, (4, 64)))

    def loss(params, remat):
        hidden = hidden_states(params, model, ids, remat=remat)
        return token_losses(hidden, lm_head_weight(params), ids)[0].sum()

    params = random_params(model)
    gradients, memory = {}, {}
    for remat in REMAT:
        lowered: Any = jax.jit(jax.grad(loss), static_argnums=1).lower(params, remat)
        program = lowered.compile({"xla_backend_optimization_level": 0})  # what is kept is decided before
        memory[remat] = program.memory_analysis().temp_size_in_bytes
        gradients[remat] = program(params)
    assert memory["full"] < memory["weights"] < memory["dots"] < memory["none"]
    for remat in REMAT[1:]:
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6 * np.abs(b).max()),
            gradients[remat],
            gradients["none"],
        )


@pytest.mark.slow
def test_make_optimizer_muon_moves_the_kernels_and_adam_the_rest():
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


def test_packed_rows_have_the_loss_of_single_documents():
    """Losses of documents packed into rows, and of each alone in a row."""
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
        return token_losses(hidden, lm_head_weight(params), batch["targets"])[0]

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


@pytest.mark.slow
@pytest.mark.parametrize("lora", [False, True])
def test_step_of_a_gpu_equals_that_of_a_cpu(lora):
    """Layers written out, attention by blocks and the whole vocabulary at once: the same step up to rounding."""
    adapters = LoRAConfig(rank=2, alpha=4) if lora else None
    rng = np.random.default_rng(3)
    batch = {
        name: rng.integers(0, TINY.vocab_size, (4, 12)).astype(np.int32) for name in ("tokens", "targets")
    }
    batch |= {
        "loss_mask": np.ones((4, 12), np.float32),
        "segment_ids": np.sort(rng.integers(0, 3, (4, 12)), axis=1),
    }
    results = []
    for device in (Device("cpu"), Device("cuda", (7, 5))):
        # not AdamW: it makes steps of full size from gradients that are zero but for rounding, as that of a key's bias
        optimizer = make_optimizer(FinetuneConfig(learning_rate=0.1, steps=10, optimizer="sgd"), 10)
        params = random_params()
        frozen = params if lora else None
        trainable = init_adapters(TINY, adapters, 0, params=params) if adapters else params
        state = init_state(jax.tree.map(jnp.array, trainable), optimizer, loss_scaling=False)
        step = make_train_step(TINY, optimizer, Precision.for_device("float32", device), lora=adapters)
        for _ in range(2):
            state, metrics = step(state, frozen, batch)
        results.append((state["params"], metrics))
    (cpu, of_cpu), (gpu, of_gpu) = results
    for name in ("loss", "grad_norm", "accuracy"):
        np.testing.assert_allclose(of_gpu[name], of_cpu[name], rtol=2e-5)
    for mine, theirs in zip(jax.tree.leaves(gpu), jax.tree.leaves(cpu), strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-4, atol=1e-5)
