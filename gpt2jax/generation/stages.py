"""Which stages of choosing a token a decoding program has.

On a GPU a conditional inside the loop over tokens lets the host wait for the device, and a stage that is off still
launches its kernels. So the program holds only what some row of the call asks for, known before compiling. On a CPU a
conditional costs nothing, and one program with all stages serves every setting.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import jax

from gpt2jax.generation.config import GenerationConfig, is_greedy

# candidates of a draw: XLA's own top-k kernel takes up to 16 on a GPU, beyond that it would sort
SMALL_WINDOW, WINDOW = 16, 64


@dataclasses.dataclass(frozen=True)
class Stages:
    """The stages of a program, chosen on the host; `Stages | None` is static, and None holds all of them.

    The values of settings stay arrays. Switching a stage on or off compiles another program.

    Attributes:
        window: how many candidates the rows with a small top-k draw from: 1 (greedy), 16 or 64; 0 if there are none.
        has_vocabulary: rows draw from more than `WINDOW` candidates, with these filters:
        has_top_k, has_top_p, has_typical_p: of the rows that draw from the whole vocabulary.
        has_penalties: repetition, presence or frequency penalty.
        has_forbidden: n-grams, bad words or a least length.
    """

    window: int = SMALL_WINDOW
    has_vocabulary: bool = False
    has_top_k: bool = False
    has_top_p: bool = False
    has_typical_p: bool = False
    has_penalties: bool = False
    has_forbidden: bool = False

    @property
    def is_greedy(self) -> bool:
        """Whether no row draws at random."""
        return self.window == 1 and not self.has_vocabulary


def make_stages(configs: Sequence[GenerationConfig], *, has_bad_words: bool, vocab_size: int) -> Stages:
    """Return the stages that rows with these settings need together."""
    windows = [_window(config) for config in configs]
    whole = [config for config, window in zip(configs, windows, strict=True) if not window]
    return Stages(
        window=max(windows, default=1),
        has_vocabulary=bool(whole),
        has_top_k=any(c.top_k is not None and c.top_k < vocab_size for c in whole),
        has_top_p=any(c.top_p < 1.0 for c in whole),
        has_typical_p=any(c.typical_p < 1.0 for c in whole),
        has_penalties=any(
            c.repetition_penalty != 1.0 or c.presence_penalty != 0.0 or c.frequency_penalty != 0.0
            for c in configs
        ),
        has_forbidden=has_bad_words or any(c.no_repeat_ngram_size or c.min_new_tokens for c in configs),
    )


def _window(config: GenerationConfig) -> int:
    """Return `Stages.window` of one row; 0 if it draws from the whole vocabulary."""
    if is_greedy(config):
        return 1
    if config.top_k is None or config.top_k > WINDOW or config.typical_p < 1.0:
        return 0
    return SMALL_WINDOW if config.top_k <= SMALL_WINDOW else WINDOW


def apply_stage(
    is_on: bool | None,
    predicate: Callable[[], jax.Array],
    stage: Callable[[jax.Array], jax.Array],
    x: jax.Array,
) -> jax.Array:
    """Return `stage(x)` if the stage is on, else `x`; None lets the device decide by `predicate()`."""
    if is_on is None:
        return jax.lax.cond(predicate(), stage, lambda x: x, x)
    return stage(x) if is_on else x
