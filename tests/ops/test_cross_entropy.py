"""Chunked cross-entropy beside the plain formula, its gradient beside autodiff's."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from devices import on_four_devices

import gpt2jax.ops.cross_entropy as losses
from gpt2jax.ops.cross_entropy import chunk_size, column_slices, cross_entropy, token_losses
from gpt2jax.ops.precision import FLOAT32, Precision

ROWS, DIM, VOCAB = 50, 16, 200


@pytest.fixture(scope="module")
def inputs():
    generator = np.random.default_rng(0)
    return (
        jnp.asarray(generator.normal(size=(ROWS, DIM)), jnp.float32),
        jnp.asarray(generator.normal(size=(VOCAB, DIM)), jnp.float32),
        jnp.asarray(generator.integers(0, VOCAB, ROWS), jnp.int32),
        jnp.asarray(generator.integers(0, 3, ROWS), jnp.float32),
    )


def dense_gradients(*inputs, **extras):
    """Return the gradients of `dense` by its first two inputs, computed in float64."""
    with jax.enable_x64(True):
        hidden, head, targets, weights = (
            np.asarray(x, np.float64 if x.dtype == np.float32 else None) for x in inputs
        )
        gradient = jax.grad(lambda h, k: dense(h, k, targets, weights, **extras), argnums=(0, 1))
        return [np.asarray(x) for x in gradient(hidden, head)]


def dense(hidden, head, targets, weights, label_smoothing=0.0, z_loss=0.0):
    logits = hidden @ head.T
    labels = jax.nn.one_hot(targets, VOCAB) * (1 - label_smoothing) + label_smoothing / VOCAB
    losses = -(labels * jax.nn.log_softmax(logits)).sum(-1)
    return ((losses + z_loss * jax.nn.logsumexp(logits, -1) ** 2) * weights).sum()


def with_logits(count):
    """Return float32 that holds so many logits at once."""
    execution = dataclasses.replace(FLOAT32.execution, logits_bytes=4 * count)
    return dataclasses.replace(FLOAT32, execution=execution)


@pytest.fixture(params=["one chunk", "many chunks", "whole vocabulary"])
def chunks(request, monkeypatch):
    """Return float32 for one chunk or for many; with slices of the vocabulary, or without as on accelerators."""
    if request.param == "one chunk":
        return FLOAT32
    precision = with_logits(9 * VOCAB)
    if request.param == "whole vocabulary":
        given = {"has_cpu_shapes": False, "has_vocabulary_slices": False}
        execution = dataclasses.replace(precision.execution, **given)
        precision = dataclasses.replace(precision, execution=execution)
    else:
        monkeypatch.setattr(losses, "MAX_COLUMNS", 64)
        assert chunk_size(ROWS, VOCAB, precision) == 16 and ROWS % 16  # the last chunk is filled up
        width, starts, repeated = column_slices(VOCAB)
        assert width == 64 and starts[-1] + width == VOCAB
        assert repeated[-1] > 0  # the last slice overlaps the one before
    return precision


@pytest.mark.slow
@pytest.mark.parametrize(
    "extras", [{}, {"label_smoothing": 0.1}, {"z_loss": 0.01}, {"label_smoothing": 0.3, "z_loss": 0.1}]
)
def test_cross_entropy_loss_gradient_and_counts(inputs, chunks, extras):
    hidden, head, targets, weights = inputs

    def ours(hidden, head):
        total, sums = cross_entropy(hidden, head, targets, weights, chunks, **extras)
        return 3.0 * total, sums

    (total, counts), gradients = jax.value_and_grad(ours, argnums=(0, 1), has_aux=True)(hidden, head)
    expected = dense(hidden, head, targets, weights, **extras)
    np.testing.assert_allclose(total, 3 * expected, rtol=3e-6)
    np.testing.assert_allclose(ours(hidden, head)[0], 3 * expected, rtol=3e-6)  # without a gradient
    np.testing.assert_allclose(counts["nll"], dense(hidden, head, targets, weights), rtol=1e-6)
    for gradient, reference in zip(gradients, dense_gradients(*inputs, **extras), strict=True):
        assert np.linalg.norm(gradient - 3 * reference) < 2e-6 * np.linalg.norm(3 * reference)
    hits = jnp.argmax(hidden @ head.T, -1) == targets
    assert counts["correct"] == (hits * weights).sum()
    assert counts["tokens"] == weights.sum()


@pytest.mark.slow
def test_token_losses(inputs, chunks):
    hidden, head, targets, _ = inputs
    nll, hit = token_losses(hidden.reshape(5, 10, DIM), head, targets.reshape(5, 10), chunks)
    for index in range(ROWS):
        one = jax.nn.one_hot(index, ROWS)
        np.testing.assert_allclose(nll.reshape(-1)[index], dense(hidden, head, targets, one), rtol=1e-5)
    np.testing.assert_array_equal(hit.reshape(-1), jnp.argmax(hidden @ head.T, -1) == targets)


@pytest.mark.slow
def test_cross_entropy_ignores_tokens_of_weight_zero(inputs):
    hidden, head, targets, weights = inputs
    weights = weights.at[:10].set(0)
    changed = hidden.at[:10].set(100.0)
    gradient = jax.grad(lambda h: cross_entropy(h, head, targets, weights)[0])
    np.testing.assert_allclose(
        cross_entropy(hidden, head, targets, weights)[0], cross_entropy(changed, head, targets, weights)[0]
    )
    assert not gradient(changed)[:10].any()


def test_logits_of_all_rows_are_never_held():
    rows, vocab = 512, 512

    def compiled(rows_at_once) -> Any:
        precision = with_logits(rows_at_once * vocab)
        shapes = [jax.ShapeDtypeStruct(s, t) for s, t in (((rows, DIM), "f4"), ((vocab, DIM), "f4"))]
        shapes += [jax.ShapeDtypeStruct((rows,), "i4"), jax.ShapeDtypeStruct((rows,), "f4")]
        step = jax.grad(lambda h, w, t, m: cross_entropy(h, w, t, m, precision)[0], argnums=(0, 1))
        return jax.jit(step).lower(*shapes).compile()

    whole, cut = compiled(rows), compiled(32)
    assert f"f32[{rows},{vocab}]" in whole.as_text()
    assert f"f32[{rows},{vocab}]" not in cut.as_text()
    assert cut.memory_analysis().temp_size_in_bytes < 0.5 * whole.memory_analysis().temp_size_in_bytes


@pytest.mark.slow
def test_cross_entropy_bfloat16_stays_close(inputs):
    hidden, head, targets, weights = inputs
    exact = jax.grad(lambda h: cross_entropy(h, head, targets, weights, FLOAT32)[0])(hidden)
    narrow = jax.grad(
        lambda h: cross_entropy(h, head, targets, weights, Precision.for_device("bfloat16"))[0]
    )(hidden)
    assert 0 < float(jnp.abs(exact - narrow).max()) < 0.1


def test_chunk_size_divides_the_rows_if_possible():
    vocab = FLOAT32.execution.logits_bytes // 4 // 512
    assert chunk_size(512, vocab) == 512
    assert chunk_size(16 * 1024, vocab) == 512
    assert chunk_size(16 * 1023, vocab) == 496  # 33 of them
    assert chunk_size(8 * 127, vocab) == 512  # 8 times a prime number: filled up


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_cross_entropy_memory_at_full_size(dtype):
    """16 rows of 1024 tokens, GPT-2's vocabulary: 200 MB beside the activations and the two gradients, its results."""
    rows, dim, vocab = 16 * 1024, 768, 50257
    shapes = [jax.ShapeDtypeStruct(s, t) for s, t in (((rows, dim), "f4"), ((vocab, dim), "f4"))]
    shapes += [jax.ShapeDtypeStruct((rows,), "i4"), jax.ShapeDtypeStruct((rows,), "f4")]
    step = jax.grad(
        lambda h, w, t, m: cross_entropy(h, w, t, m, Precision.for_device(dtype))[0], argnums=(0, 1)
    )
    memory: Any = jax.jit(step).lower(*shapes).compile().memory_analysis()
    assert memory.output_size_in_bytes >= 4 * (rows * dim + vocab * dim)  # so the temporaries hold neither
    assert memory.temp_size_in_bytes < 200e6


ON_DEVICES = """
import dataclasses, json, re
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from gpt2jax.ops import cross_entropy as losses
from gpt2jax.ops.precision import FLOAT32
from gpt2jax.sharding import BATCH_AXES, make_mesh, use_mesh

losses.MAX_COLUMNS = 64  # four slices
# three chunks of each device's rows
small = dataclasses.replace(FLOAT32, execution=dataclasses.replace(FLOAT32.execution, logits_bytes=4 * 8 * 200))
ROWS, DIM, VOCAB = 96, 16, 200
generator = np.random.default_rng(0)
hidden, head = (jnp.asarray(generator.normal(size=(n, DIM)), jnp.float32) for n in (ROWS, VOCAB))
targets, weights = jnp.asarray(generator.integers(0, VOCAB, ROWS)), jnp.asarray(generator.integers(0, 3, ROWS) * 1.0)

def loss(hidden, head, targets, weights):
    return losses.cross_entropy(hidden, head, targets, weights, small)[0]

def both(hidden, head, targets, weights):
    return jax.value_and_grad(loss, argnums=(0, 1))(hidden, head, targets, weights), losses.token_losses(
        hidden, head, targets, small)

alone = jax.jit(both)(hidden, head, targets, weights)
plain = jax.jit(loss)(hidden, head, targets, weights)
mesh = make_mesh(fsdp=2)
rows = NamedSharding(mesh, PartitionSpec(BATCH_AXES))
of_head = NamedSharding(mesh, PartitionSpec(None, "fsdp"))
placed = [jax.device_put(x, rows) for x in (hidden, head, targets, weights)]
placed[1] = jax.device_put(head, of_head)
with use_mesh(mesh):
    compiled = jax.jit(both).lower(*placed).compile()
    shared, without = compiled(*placed), jax.jit(loss)(*placed)
pairs = zip(jax.tree.leaves((alone, plain)), jax.tree.leaves((shared, without)), strict=True)
apart = [float(jnp.abs(a * 1.0 - b).max() / jnp.abs(a).max()) for a, b in pairs]
text = compiled.as_text()
loops = text[: text.index("\\nENTRY")]
names = "all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute"
print(json.dumps({
    "apart": apart,
    "in_loops": re.findall(rf" = .* (?:{names})[(].*", loops),
    "outside": len(re.findall(rf"(?:{names})[(]", text[len(loops):])),
    "chunks": [f"f32[{n},200]" in text for n in (8, 24)],
}))
"""


@pytest.mark.slow
def test_cross_entropy_devices_add_their_gradients_once():
    """Four devices, as one alone to rounding; in the loops over chunks and slices none asks another for anything."""
    found = on_four_devices(ON_DEVICES)
    assert max(found["apart"]) < 1e-6
    assert found["in_loops"] == [] and found["outside"] > 0
    assert found["chunks"] == [True, False]  # logits of one chunk and not of all rows of a device
