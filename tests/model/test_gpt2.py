"""The model beside itself under masks, paddings and dtypes, and its gradient beside float64.

Equality with transformers is in tests/weights (golden files) and tests/parity.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_models import TINY, random_params

from gpt2jax.doctor.numerics import relative_error
from gpt2jax.doctor.reference import reference_gradient
from gpt2jax.language_model import LanguageModel
from gpt2jax.lora.adapters import init_adapters
from gpt2jax.lora.config import LoRAConfig
from gpt2jax.model.config import GPT2Config
from gpt2jax.model.gpt2 import (
    abstract_params,
    hidden_states,
    init_params,
    lm_head_weight,
    output_logits,
)
from gpt2jax.ops.cross_entropy import cross_entropy
from gpt2jax.ops.dropout import dropout
from gpt2jax.ops.precision import Precision


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    return LanguageModel(TINY, random_params())


def ids(*shape: int, seed: int = 0, below: int = TINY.vocab_size) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, below, shape).astype(np.int32)


@pytest.mark.slow
def test_logits_ignore_padding_left_and_right(model):
    tokens = ids(2, 20)
    mask = np.ones((2, 20), bool)
    mask[0, :7] = False
    mask[1, 15:] = False
    padded = model.logits(tokens, mask)
    np.testing.assert_allclose(padded[0, 7:], model.logits(tokens[:1, 7:])[0], atol=1e-5)
    np.testing.assert_allclose(padded[1, :15], model.logits(tokens[1:, :15])[0], atol=1e-5)
    assert np.isfinite(padded).all()


@pytest.mark.slow
def test_logits_are_causal(model):
    tokens = ids(1, 16)
    changed = tokens.copy()
    changed[0, 10] += 1
    before, after = model.logits(tokens), model.logits(changed)
    np.testing.assert_array_equal(before[0, :10], after[0, :10])
    assert np.abs(before[0, 10:] - after[0, 10:]).max() > 1e-3


@pytest.mark.slow
def test_hidden_states_of_segments_equal_the_documents_alone(model):
    tokens = ids(1, 24)
    segments = np.array([[0] * 9 + [1] * 4 + [2] * 11])
    hidden = hidden_states(model.params, TINY, tokens, segment_ids=jnp.asarray(segments))
    for begin, end in ((0, 9), (9, 13), (13, 24)):
        alone = hidden_states(model.params, TINY, tokens[:, begin:end])
        np.testing.assert_allclose(hidden[:, begin:end], alone, atol=1e-5)


@pytest.mark.slow
def test_hidden_states_positions_count_real_tokens_of_a_segment(model):
    """Padding before, between and behind two documents in one row."""
    tokens = ids(1, 20)
    mask = np.array([[False] * 2 + [True] * 6 + [False] * 3 + [True] * 7 + [False] * 2])
    segments = np.array([[0] * 8 + [1] * 12])  # the second begins with padding
    hidden = hidden_states(
        model.params, TINY, tokens, segment_ids=jnp.asarray(segments), attention_mask=jnp.asarray(mask)
    )
    for begin, end in ((2, 8), (11, 18)):
        alone = hidden_states(model.params, TINY, tokens[:, begin:end])
        np.testing.assert_allclose(hidden[:, begin:end], alone, atol=1e-5)


@pytest.mark.slow
def test_hidden_states_given_positions_are_rows_of_the_table(model):
    tokens, positions = ids(1, 12), np.arange(12)[None] + 7
    shifted = {**model.params, "wpe": {"embedding": model.params["wpe"]["embedding"][7:]}}
    config = dataclasses.replace(TINY, n_positions=TINY.n_positions - 7)
    np.testing.assert_array_equal(
        hidden_states(model.params, TINY, tokens, positions=jnp.asarray(positions)),
        hidden_states(shifted, config, tokens),
    )


@pytest.mark.parametrize(
    ("tokens", "mask", "message"),
    [
        (np.zeros((1, 33), int), None, "token_ids must be at most 32 long .*, got 33 tokens"),
        (np.zeros(5, int), None, "token_ids has shape"),
        (np.zeros((1, 5)), None, "dtype float64"),
        (np.full((1, 5), 101), None, "token id 101 is outside"),
        (np.full((1, 5), -1), None, "token id -1 is outside"),
        (np.zeros((1, 5), int), np.ones((1, 4), bool), "attention_mask has shape"),
    ],
)
def test_logits_name_wrong_input(model, tokens, mask, message):
    with pytest.raises(ValueError, match=message):
        model.logits(tokens, mask)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["bfloat16", "float16"])
def test_hidden_states_in_16_bits_stay_close(model, name):
    tokens = ids(2, 16)
    precision = Precision.for_device(name)
    narrow = output_logits(
        hidden_states(model.params, TINY, tokens, precision=precision),
        lm_head_weight(model.params),
        precision,
    )
    exact = model.logits(tokens)
    assert narrow.dtype == jnp.float32
    assert 0 < np.abs(narrow - exact).max() < 0.05 * np.abs(exact).max()


@pytest.mark.slow
def test_dropout_rate_and_scale():
    x = jnp.ones((300, 300))
    y = dropout(x, 0.1, jax.random.key(0))
    assert abs(float((y == 0).mean()) - 0.1) < 0.005
    np.testing.assert_allclose(y[y != 0], 1 / 0.9, rtol=1e-4)
    assert dropout(x, 0.1, None) is x
    assert dropout(x, 0.0, jax.random.key(0)) is x


def test_dropout_of_almost_everything_is_finite():
    y = dropout(jnp.ones(10_000), 0.9999999, jax.random.key(0))
    assert np.isfinite(y).all() and (y == 0).mean() > 0.99


@pytest.mark.slow
def test_hidden_states_drop_with_a_key_only(model):
    config = dataclasses.replace(TINY, embd_pdrop=0.1, attn_pdrop=0.1, resid_pdrop=0.1)
    tokens = ids(1, 16)
    plain = hidden_states(model.params, config, tokens)
    np.testing.assert_array_equal(plain, hidden_states(model.params, TINY, tokens))
    dropped = [hidden_states(model.params, config, tokens, dropout_key=jax.random.key(k)) for k in (0, 0, 1)]
    np.testing.assert_array_equal(dropped[0], dropped[1])
    assert np.abs(dropped[0] - dropped[2]).max() > 0.1 < np.abs(dropped[0] - plain).max()


@pytest.mark.slow
def test_init_params_scales():
    config = GPT2Config(n_layer=4, n_head=2, n_embd=64, vocab_size=500, n_positions=64)
    params = init_params(config, 0)
    np.testing.assert_allclose(params["wte"]["embedding"].std(), 0.02, rtol=0.05)
    np.testing.assert_allclose(params["h"]["attn"]["c_proj"]["kernel"].std(), 0.02 / np.sqrt(8), rtol=0.05)
    assert not params["h"]["mlp"]["c_fc"]["bias"].any() and (params["ln_f"]["scale"] == 1).all()
    other = init_params(config, 1)
    assert not jnp.array_equal(params["wte"]["embedding"], other["wte"]["embedding"])


def test_init_params_are_float32_with_64_bits_allowed():
    config = dataclasses.replace(
        TINY, tie_word_embeddings=False, n_positions=16
    )  # of no other test: traced here
    with jax.enable_x64(True):
        trees = abstract_params(config), jax.eval_shape(lambda: init_adapters(config, LoRAConfig(rank=2)))
    assert {leaf.dtype for leaf in jax.tree.leaves(trees)} == {np.dtype(np.float32)}


@pytest.mark.slow
def test_logits_and_gradient_beside_float64():
    """At a size where the CPU backend takes the kernels that it takes for real models."""
    config = GPT2Config(n_layer=2, n_head=2, n_embd=64, vocab_size=512, n_positions=64)
    params = random_params(config, seed=3)
    tokens = ids(2, 65, below=512, seed=1)
    inputs, targets = tokens[:, :-1], tokens[:, 1:]

    def loss(params):
        hidden = hidden_states(params, config, inputs)
        weights = jnp.full(targets.shape, 1 / targets.size)
        return cross_entropy(hidden, lm_head_weight(params), targets, weights)[0]

    value, gradient = jax.jit(jax.value_and_grad(loss))(params)
    exact, exact_gradient = reference_gradient(params, config, inputs, targets)
    assert abs(float(value) - exact) < 1e-5 * exact
    for (path, ours), right in zip(
        jax.tree_util.tree_leaves_with_path(gradient), jax.tree.leaves(exact_gradient), strict=True
    ):
        assert relative_error(ours, right) < 1e-5, jax.tree_util.keystr(path)
