"""Models of tests of generation: random ones, and one that spells a given text."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from gpt2jax.language_model import LanguageModel
from gpt2jax.model.config import GPT2Config
from gpt2jax.model.gpt2 import init_params
from gpt2jax.tokenizer.bpe import Tokenizer

TOKENIZER = Tokenizer.gpt2(300)


END = TOKENIZER.vocab_size - 1


CONFIG = GPT2Config(n_layer=2, n_head=2, n_embd=32, vocab_size=300, n_positions=64)


# short ones run in a bucket of 16 positions when alone, and in one of 32 beside the long one
LONG = "one, two, three, four, five, six"  # 23 tokens


def model_of(config, params, tokenizer: Tokenizer | None = TOKENIZER):
    return LanguageModel(config, params, tokenizer)


def speller(continuation, prompt_length=1, *, vocab_size=300, tokenizer=TOKENIZER):
    """Return a model that continues any prompt of `prompt_length` tokens with the given token ids.

    Blocks and token embedding are zero, positions are one-hot, and the head of a token is the sum of the
    positions that it follows.
    """
    config = dataclasses.replace(
        CONFIG, n_layer=1, n_embd=64, vocab_size=vocab_size, tie_word_embeddings=False, eos_token_id=END
    )
    params = jax.tree.map(jnp.zeros_like, init_params(config))
    head = np.zeros((vocab_size, 64), np.float32)
    for i, token in enumerate(continuation):
        head[token, prompt_length - 1 + i] = 10.0
    params["wpe"]["embedding"] = jnp.eye(64)
    params["ln_f"]["scale"] = jnp.ones(64)
    params["lm_head"]["kernel"] = jnp.asarray(head)
    return model_of(config, params, tokenizer)


def steep_model() -> LanguageModel:
    """Return random weights, large enough that distributions are neither flat nor single-valued."""
    return model_of(CONFIG, jax.tree.map(lambda x: x * 6, init_params(CONFIG, 0)))
