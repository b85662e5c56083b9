"""A comparison of three tiny models, one of them with a name that a report must escape."""

from __future__ import annotations

from typing import Any

from tiny_models import uniform_model

from gpt2jax.comparison.compare import compare
from gpt2jax.comparison.result import Comparison
from gpt2jax.language_model import LanguageModel

LENGTH = 16
NASTY = '<script src="https://example.org/x.js">alert("&amp;")</script> `code` | cell\n# head \x00 \u202e'
TEXTS = ["", "to be", "été, 東京 and 🙂 in one text", NASTY] + [
    f"text number {i} of the set" for i in range(12)
]
PROMPTS = ["the", "", NASTY, "", [5, 6, 7]]
HISTORY = [
    {
        "step": step,
        "loss": 4 - step / 50,
        "learning_rate": 1e-3,
        "tokens_per_second": 900.0 + step,
        "grad_norm": 1.0 + step / 100,
        "loss_scale": 2.0**15,
    }
    | ({"validation_loss": 3.5} if step % 40 == 0 else {})
    for step in range(10, 100, 10)
]
TRAINING_TEXTS = ["some other text", TEXTS[2].upper()]
SETTINGS: dict[str, Any] = {
    "sequence_length": LENGTH,
    "batch_size": 8,
    "max_new_tokens": 12,
    "resamples": 200,
}


def make_comparison(model: LanguageModel, other_model: LanguageModel) -> Comparison:
    """Compare three models with everything that a report can show."""
    return compare(
        {"generic": model, NASTY: other_model, "flat": uniform_model()},
        TEXTS,
        PROMPTS,
        **SETTINGS,
        seed=7,
        training_texts=TRAINING_TEXTS,
        history=HISTORY,
        command="gpt2jax compare <a> 'b'",
    )
