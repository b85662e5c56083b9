"""`LanguageModel`: configuration, parameters, tokenizer and adapters.

loading.py reads models from files. `LanguageModel.save` imports the writers in weights/ when it is called.
"""

from __future__ import annotations

import dataclasses
import functools
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.core import Tracer

from gpt2jax.generation.outputs import Generation
from gpt2jax.lora.adapters import merge_adapters, unmerge_adapters
from gpt2jax.lora.combine import concat_adapters
from gpt2jax.lora.config import LoRAConfig
from gpt2jax.model.config import GPT2Config
from gpt2jax.model.gpt2 import (
    Params,
    count_parameters,
    hidden_states,
    init_params,
    lm_head_weight,
    output_logits,
)
from gpt2jax.ops.precision import FLOAT32
from gpt2jax.tokenizer.bpe import END_TOKEN, Tokenizer
from gpt2jax.tokenizer.end_tokens import find_end_token, require_end_token
from gpt2jax.utils.jax_switches import default_switches
from gpt2jax.utils.notices import notice
from gpt2jax.utils.validation import check, check_model, check_path, is_number, must_be, one_of
from gpt2jax.utils.validation import seed as seed_rule
from gpt2jax.weights.saved_settings import SavedSettings

SAVE_FORMATS = ("hf", "keras")


@dataclasses.dataclass(frozen=True)
class LanguageModel:
    """A GPT-2 with its tokenizer and adapters. Treat it as immutable: functions return new ones.

    Attributes:
        config: the architecture.
        params: plain nested dict of arrays, float32 unless loaded in 16 bits, the blocks stacked along a leading
            layer axis.
        tokenizer: text to ids and back; None for a model made from a configuration alone.
        adapters: LoRA adapters, nested as `params`, or None.
        lora: their settings, or None.
        source: the name or path given to `load`, or None.
        stop_token_ids: tokens at which generation stops besides the end token.
        saved: what lay beside the weights besides the architecture, or None.
        adapter_embeddings: embeddings in `params` that the adapters' file replaced, by PEFT's names ("wte", "wpe",
            "lm_head"): the ids of the rows, or None for all. `save_adapter` writes them with the adapters.
    """

    config: GPT2Config
    params: Params
    tokenizer: Tokenizer | None = None
    adapters: Params | None = None
    lora: LoRAConfig | None = None
    source: str | None = None
    stop_token_ids: tuple[int, ...] = ()
    saved: SavedSettings | None = None
    adapter_embeddings: Mapping[str, tuple[int, ...] | None] = dataclasses.field(default_factory=dict)

    def __repr__(self) -> str:
        c = self.config
        shape = f"{c.n_layer} layers, {c.n_head} heads, width {c.n_embd}, {c.vocab_size} ids, context {c.n_positions}"
        lora = f", LoRA rank {self.lora.rank}" if self.lora else ""
        return (
            f"LanguageModel({self.source or 'unnamed'}: {self.num_parameters():,} parameters, {shape}{lora})"
        )

    @property
    def end_token_id(self) -> int:
        """The id that begins and ends a text: the tokenizer's, else the configuration's.

        Raises:
            ValueError: the model has none.
        """
        return require_end_token(self)

    def num_parameters(self) -> int:
        """Return the number of parameters without adapters; a tied head counts once."""
        return count_parameters(self.params)

    @default_switches()
    def logits(self, token_ids: Any, attention_mask: Any = None) -> jax.Array:
        """Return the next-token logits of every position.

        Args:
            token_ids: [B, T] int.
            attention_mask: [B, T] bool, False = padding, left or right; positions are counted over the real tokens.

        Returns:
            [B, T, V] float32.

        Raises:
            ValueError: wrong shape, T above the context, or an id outside the vocabulary (not checked inside
                `jax.jit`, where values are unknown).
        """
        try:
            ids = _array(token_ids)
        except ValueError:
            raise ValueError(
                "token_ids has rows of different lengths: pad them, and give attention_mask"
            ) from None
        if ids.ndim != 2 or not np.issubdtype(ids.dtype, np.integer):
            raise ValueError(
                f"token_ids has shape {ids.shape} and dtype {ids.dtype}; expected whole numbers [B, T]"
            )
        if (
            isinstance(ids, np.ndarray)
            and ids.size
            and (ids.min() < 0 or ids.max() >= self.config.vocab_size)
        ):
            bad = ids[(ids < 0) | (ids >= self.config.vocab_size)][0]
            raise ValueError(f"token id {bad} is outside the vocabulary of {self.config.vocab_size} ids")
        mask = None if attention_mask is None else _array(attention_mask).astype(bool)
        if mask is not None and mask.shape != ids.shape:
            raise ValueError(
                f"attention_mask has shape {mask.shape}; expected that of token_ids, {ids.shape}"
            )
        scale = self.lora.scales(self.config.n_layer) if self.lora else 1.0
        return _logits(self.params, self.adapters, ids.astype(np.int32), mask, self.config, scale)

    @staticmethod
    def from_pretrained(name: str | pathlib.Path, **options: Any) -> LanguageModel:
        """Load a model; another name of `gpt2jax.load`."""
        from gpt2jax.loading import load

        return load(name, **options)

    def save_pretrained(self, path: str | pathlib.Path, **options: Any) -> None:
        """Save the model; another name of `save`."""
        self.save(path, **options)

    def generate(self, prompts: Any, *args: Any, **options: Any) -> list[Generation]:
        """Continue prompts; `gpt2jax.generate` explains the arguments."""
        from gpt2jax.generation.generate import generate

        return generate(self, prompts, *args, **options)

    @default_switches()
    def merge_adapter(self) -> LanguageModel:
        """Return the model with its adapters merged into plain weights; itself if it has none."""
        if self.adapters is None or self.lora is None:
            return self
        params = merge_adapters(self.params, self.adapters, self.lora)
        return self._without_adapters(params)

    def _without_adapters(self, params: Params) -> LanguageModel:
        return dataclasses.replace(
            self, params=params, adapters=None, lora=None, source=None, adapter_embeddings={}
        )

    @default_switches()
    def unmerge_adapter(self) -> LanguageModel:
        """Undo `merge_adapter`, up to rounding: the weights hold the adapters already, and the result has neither.

        This is for merged weights in files: `load_adapter(load(merged), adapter).unmerge_adapter()`. `merge_adapter`
        does not change the model that it is called on.

        Raises:
            ValueError: the adapters are DoRA, whose merging cannot be undone.
        """
        if self.adapters is None or self.lora is None:
            return self
        params = unmerge_adapters(self.params, self.adapters, self.lora)
        return self._without_adapters(params)

    @default_switches()
    def save(self, path: str | pathlib.Path, format: str = "hf", *, dtype: str = "float32") -> None:
        """Save the model as a folder that transformers, CTranslate2 and llama.cpp's converter load as it is.

        Adapters are merged into the saved weights. A folder that holds a saved model is replaced, completely or not at
        all.

        Args:
            path: the folder; "~" is the home folder.
            format: "hf" (config.json, model.safetensors, tokenizer files) or "keras" (a preset of keras-hub).
            dtype: of the file: "float32", "float16" or "bfloat16".

        Raises:
            ValueError: unknown format or dtype, or a configuration that the format cannot express.
            FileExistsError: the folder holds other files than a saved model's.
        """
        check("format", format, one_of(SAVE_FORMATS))
        from gpt2jax.weights.hf import save_hf
        from gpt2jax.weights.keras import save_keras

        path = check_path("path", path)
        merged = self.merge_adapter()
        if format == "keras":
            if dtype != "float32":
                raise ValueError(must_be("dtype", "float32 for a Keras preset", dtype))
            save_keras(path, merged.config, merged.params, merged.tokenizer)
            _notice_lost_end_token(merged)
            return
        end = find_end_token(merged)
        config = dataclasses.replace(merged.config, eos_token_id=end)
        stops = [] if end is None else list(dict.fromkeys((end, *merged.stop_token_ids)))
        extra: dict[str, Any] = {"saved": merged.saved, "stop_token_ids": stops}
        save_hf(path, config, merged.params, merged.tokenizer, dtype=dtype, **extra)


def _notice_lost_end_token(model: LanguageModel) -> None:
    """Say that a Keras preset, whose end token is <|endoftext|>, does not keep the model's."""
    end, tokenizer = find_end_token(model), model.tokenizer
    if tokenizer is None:
        kept = GPT2Config.published_end_token(model.config.vocab_size)["eos_token_id"]
    else:
        kept = tokenizer.special_tokens.get(END_TOKEN)
    if end is not None and end != kept:
        notice(
            f"a Keras preset does not keep the end token {end}; name it where the preset is loaded, with "
            "end_token=... (--end-token)"
        )


def _array(values: Any) -> Any:
    """Return an array on the host; a tracer, whose values are unknown, as it is."""
    return values if isinstance(values, Tracer) else np.asarray(values)


@functools.partial(jax.jit, static_argnums=(4,))
def _logits(params, adapters, token_ids, mask, config, lora_scale):
    hidden = hidden_states(
        params,
        config,
        token_ids,
        attention_mask=mask,
        adapters=adapters,
        lora_scale=lora_scale,
        precision=FLOAT32,
    )
    return output_logits(hidden, lm_head_weight(params), FLOAT32)


@default_switches()
def from_config(config: GPT2Config, seed: int = 0, *, tokenizer: Tokenizer | None = None) -> LanguageModel:
    """Build a model with random parameters.

    Raises:
        ValueError: an argument has another type, or `seed` is not a whole number of 32 bits.
    """
    if not isinstance(config, GPT2Config):
        raise ValueError(f"{must_be('config', 'a GPT2Config', config)}; such as gpt2jax.PRESETS['gpt2']")
    if tokenizer is not None and not isinstance(tokenizer, Tokenizer):
        raise ValueError(must_be("tokenizer", "a Tokenizer, or None", tokenizer))
    seed = check("seed", seed, seed_rule)
    return LanguageModel(config, init_params(config, seed), tokenizer)


@default_switches()
def combine_adapters(
    models: Sequence[LanguageModel], weights: Sequence[float] | None = None
) -> LanguageModel:
    """Combine the adapters of several models on one base into their weighted sum, exact to rounding.

    Models with adapters share the arrays of their base (`load_adapter` copies nothing), so several of them need only
    the memory of their adapters.

    Args:
        models: with LoRA or rsLoRA adapters on the same base.
        weights: a number for each; a negative one subtracts the adapter. None: 1 for all.

    Raises:
        ValueError: a model without adapters or with DoRA, different bases, or weights that are not one number each.
    """
    if not isinstance(models, list | tuple):
        raise ValueError(must_be("models", "a list of models", models))
    for index, model in enumerate(models):
        check_model(f"models[{index}]", model)
    weights = [1.0] * len(models) if weights is None else list(weights)
    if not models or len(weights) != len(models) or not all(map(is_number, weights)):
        raise ValueError(must_be("weights", f"a finite number for each of {len(models)} models", weights))
    parts = [(model.lora, model.adapters) for model in models if model.lora and model.adapters]
    if len(parts) < len(models):
        raise ValueError("a model has no adapters: load_adapter(base, path) gives one that has")
    base = models[0]
    if any(not _same_base(base, other) for other in models[1:]):
        raise ValueError("the adapters are on different models: load them all on the same base")
    lora, adapters = concat_adapters(base.config, parts, weights)
    # the name of a run leads to the base with that run's adapters
    source = base.source if all(model.source == base.source for model in models) else None
    return dataclasses.replace(base, adapters=adapters, lora=lora, source=source)


def _same_base(a: LanguageModel, b: LanguageModel) -> bool:
    if a.config != b.config or jax.tree.structure(a.params) != jax.tree.structure(b.params):
        return False
    same = jax.tree.map(lambda x, y: x is y or np.array_equal(x, y), a.params, b.params)
    return all(jax.tree.leaves(same))
