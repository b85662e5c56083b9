"""The architecture of a GPT-2: the frozen configuration and the published sizes.

Field names are those of a Hugging Face `config.json`, so that a configuration can be read and written as it is.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from gpt2jax.utils.validation import (
    array_size,
    check,
    in_range,
    int_in_range,
    is_integer,
    must_be,
    optional,
    positive_number,
    set_field,
    validated,
)

Activation = Literal["gelu_new", "gelu_pytorch_tanh", "gelu_fast", "gelu", "relu", "silu", "swish", "tanh"]
GPT2_END_TOKEN_ID = 50256
dropout_rate = in_range(0, 1, open_end=True)


@validated
@dataclasses.dataclass(frozen=True)
class GPT2Config:
    """Architecture of a GPT-2.

    Attributes:
        vocab_size: V, number of token ids.
        n_positions: longest context in tokens (learned positions).
        n_embd: D, width of the residual stream.
        n_layer: L, number of blocks.
        n_head: N, attention heads; `n_embd` must be a multiple of it.
        n_inner: F, width of the MLP; None is 4 * `n_embd`.
        activation_function: an `Activation`. GPT-2 was trained with "gelu_new" (the tanh form).
        layer_norm_epsilon: added to the variance in every LayerNorm.
        embd_pdrop, attn_pdrop, resid_pdrop: dropout of the embedding sum, the attention probabilities, and the
            output of attention and MLP. Active in training only.
        scale_attn_weights: divide attention scores by sqrt(head_dim).
        scale_attn_by_inverse_layer_idx: divide them by (layer index + 1) as well.
        reorder_and_upcast_attn: an overflow guard of other libraries for float16. The scores are always computed in
            float32 here, which is what it asks for, so both values give the same result.
        tie_word_embeddings: the output head is the token embedding.
        initializer_range: standard deviation of the random initial weights.
        bos_token_id, eos_token_id: the end-of-text token; None if there is none. -1 becomes the last id,
            `vocab_size - 1`, as in GPT-2.

    Source: Radford et al. 2019, "Language Models are Unsupervised Multitask Learners"; field names of Hugging Face.
    """

    vocab_size: Annotated[int, array_size] = 50257
    n_positions: Annotated[int, array_size] = 1024
    n_embd: Annotated[int, array_size] = 768
    n_layer: Annotated[int, array_size] = 12
    n_head: Annotated[int, array_size] = 12
    n_inner: Annotated[int | None, array_size] = None
    activation_function: Activation = "gelu_new"
    layer_norm_epsilon: Annotated[float, positive_number] = 1e-5
    embd_pdrop: Annotated[float, dropout_rate] = 0.1
    attn_pdrop: Annotated[float, dropout_rate] = 0.1
    resid_pdrop: Annotated[float, dropout_rate] = 0.1
    scale_attn_weights: bool = True
    scale_attn_by_inverse_layer_idx: bool = False
    reorder_and_upcast_attn: bool = False
    tie_word_embeddings: bool = True
    initializer_range: Annotated[float, positive_number] = 0.02
    bos_token_id: int | None = -1
    eos_token_id: int | None = -1

    def __post_init__(self) -> None:
        if self.n_embd % self.n_head:
            raise ValueError(must_be("n_head", f"a divisor of n_embd={self.n_embd}", self.n_head))
        last = self.vocab_size - 1
        for name in ("bos_token_id", "eos_token_id"):
            token_id = check(name, getattr(self, name), optional(int_in_range(-1, last)))
            set_field(self, name, last if token_id == -1 else token_id)

    @property
    def head_dim(self) -> int:
        """H, width of one attention head."""
        return self.n_embd // self.n_head

    @property
    def mlp_dim(self) -> int:
        """F, width of the MLP."""
        return self.n_inner or 4 * self.n_embd

    def to_hf(self) -> dict[str, Any]:
        """Return the content of a Hugging Face `config.json`."""
        return {
            "model_type": "gpt2",
            "architectures": ["GPT2LMHeadModel"],
            **dataclasses.asdict(self),
            "n_ctx": self.n_positions,
        }

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> GPT2Config:
        """Read the content of a Hugging Face `config.json`.

        A beginning or end token outside the vocabulary becomes None; of a list of end tokens the first one counts, see
        `gpt2jax.tokenizer.end_tokens`.

        Raises:
            ValueError: the file describes another architecture, or a feature that this GPT-2 does not have.
        """
        model_type = config.get("model_type", "gpt2")
        if model_type != "gpt2":
            raise ValueError(must_be("model_type", "'gpt2'", model_type))
        if config.get("add_cross_attention"):
            raise ValueError(must_be("add_cross_attention", "False", config["add_cross_attention"]))
        known = {field.name for field in dataclasses.fields(cls)}
        values = {name: value for name, value in config.items() if name in known}
        vocab_size = values.get("vocab_size", cls.vocab_size)
        for name in ("bos_token_id", "eos_token_id"):
            given = values.get(name, GPT2_END_TOKEN_ID)
            ids = given if isinstance(given, list | tuple) else [given]
            # other libraries write GPT-2's 50256 into configurations of smaller vocabularies: then it names no token
            inside = [
                i for i in ids if not is_integer(i) or not is_integer(vocab_size) or 0 <= i < vocab_size
            ]
            values[name] = inside[0] if inside else None
        return cls(**values)

    @staticmethod
    def published_end_token(vocab_size: Any) -> dict[str, Any]:
        """Return the end tokens of a file that names none: those of GPT-2, if the vocabulary has them."""
        has_gpt2 = is_integer(vocab_size) and vocab_size > GPT2_END_TOKEN_ID
        return dict.fromkeys(("bos_token_id", "eos_token_id"), GPT2_END_TOKEN_ID if has_gpt2 else None)


PRESETS: dict[str, GPT2Config] = {
    "gpt2": GPT2Config(),
    "gpt2-medium": GPT2Config(n_embd=1024, n_layer=24, n_head=16),
    "gpt2-large": GPT2Config(n_embd=1280, n_layer=36, n_head=20),
    "gpt2-xl": GPT2Config(n_embd=1600, n_layer=48, n_head=25),
    # packaged: trained on the documentation inside Python's standard library (see the README)
    "gpt2-mini": GPT2Config(vocab_size=4096, n_positions=256, n_embd=256, n_layer=4, n_head=4),
}
