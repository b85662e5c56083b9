"""Tiny models whose every parameter is random."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gpt2jax.language_model import LanguageModel, from_config
from gpt2jax.model.config import GPT2Config
from gpt2jax.model.gpt2 import Params, init_params
from gpt2jax.tokenizer.bpe import Tokenizer

CONFIG = GPT2Config(n_layer=2, n_head=2, n_embd=32, vocab_size=300, n_positions=128)
# without dropout, for what must repeat exactly in training
NO_DROPOUT: dict[str, Any] = {"embd_pdrop": 0.0, "attn_pdrop": 0.0, "resid_pdrop": 0.0}
TINY = GPT2Config(n_layer=2, n_head=2, n_embd=32, vocab_size=101, n_positions=32, **NO_DROPOUT)


def random_params(config: GPT2Config = TINY, seed: int = 0, noise: float = 0.2) -> Params:
    """Parameters with noise on every leaf, so that biases and LayerNorms matter."""
    leaves, structure = jax.tree.flatten(init_params(config, seed))
    keys = jax.random.split(jax.random.key(seed + 100), len(leaves))
    # one draw for all: a program with a draw for each leaf took 7.6 s to compile. The numbers are the same, since
    # a key's first numbers do not depend on how many are drawn
    drawn = np.asarray(_normal(keys, max(leaf.size for leaf in leaves)))
    noisy = [
        jnp.asarray(leaf + np.float32(noise) * numbers[: leaf.size].reshape(leaf.shape))
        for leaf, numbers in zip(map(np.asarray, leaves), drawn, strict=True)
    ]
    return jax.tree.unflatten(structure, noisy)


@partial(jax.jit, static_argnums=1)
def _normal(keys: jax.Array, count: int) -> jax.Array:
    return jax.vmap(lambda key: jax.random.normal(key, (count,)))(keys)


def random_model(seed: int, config: GPT2Config = CONFIG, tokenizer: Tokenizer | None = None) -> LanguageModel:
    """A model with noise on every leaf."""
    return LanguageModel(config, random_params(config, seed), tokenizer or Tokenizer.gpt2(config.vocab_size))


def uniform_model(config: GPT2Config = CONFIG) -> LanguageModel:
    """A model that gives every token the same probability."""
    model = from_config(config, tokenizer=Tokenizer.gpt2(config.vocab_size))
    return dataclasses.replace(model, params=jax.tree.map(jnp.zeros_like, model.params))


def encode(model: LanguageModel, text: str) -> list[int]:
    """Token ids of a text."""
    assert model.tokenizer is not None
    return model.tokenizer.encode(text)


def decode_bytes(model: LanguageModel, ids: list[int]) -> bytes:
    """The bytes of token ids."""
    assert model.tokenizer is not None
    return model.tokenizer.decode_bytes(ids)


def numpy_losses(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """[T, V] float64 and [T] labels -> [T] cross-entropy."""
    top = logits.max(-1, keepdims=True)
    log_z = top[:, 0] + np.log(np.exp(logits - top).sum(-1))
    return log_z - logits[np.arange(len(labels)), labels]
