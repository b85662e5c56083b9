"""GPT-2 in pure JAX: exact weights, fast training and sampling, and an honest comparison of models.

The public names, grouped like a table of contents. They load when they are first used, so that
`import gpt2jax` costs little.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

__version__ = "0.1.0"

if TYPE_CHECKING:
    from gpt2jax.comparison.compare import compare
    from gpt2jax.comparison.result import Comparison
    from gpt2jax.data.sources import Texts, load_texts
    from gpt2jax.evaluation.config import EvaluationConfig
    from gpt2jax.evaluation.evaluate import evaluate
    from gpt2jax.evaluation.keras_metrics import keras_metrics
    from gpt2jax.evaluation.result import Evaluation
    from gpt2jax.generation.config import GenerationConfig
    from gpt2jax.generation.generate import beam_search, generate, stream
    from gpt2jax.generation.generator import Generator
    from gpt2jax.generation.outputs import Generation
    from gpt2jax.language_model import LanguageModel, combine_adapters, from_config
    from gpt2jax.loading import load, load_adapter, save_adapter
    from gpt2jax.lora.config import LoRAConfig
    from gpt2jax.model.config import PRESETS, GPT2Config
    from gpt2jax.studies.config import StudyConfig
    from gpt2jax.studies.study import study
    from gpt2jax.tokenizer.bpe import Tokenizer
    from gpt2jax.tokenizer.files import load_tokenizer, save_tokenizer
    from gpt2jax.train.config import FinetuneConfig
    from gpt2jax.train.finetune import finetune
    from gpt2jax.train.trainer import Run

_HOMES = {
    # models
    "GPT2Config": "model.config",
    "PRESETS": "model.config",
    "LanguageModel": "language_model",
    "load": "loading",
    "from_config": "language_model",
    "load_adapter": "loading",
    "save_adapter": "loading",
    "combine_adapters": "language_model",
    "Tokenizer": "tokenizer.bpe",
    "load_tokenizer": "tokenizer.files",
    "save_tokenizer": "tokenizer.files",
    # generation
    "generate": "generation.generate",
    "stream": "generation.generate",
    "beam_search": "generation.generate",
    "Generation": "generation.outputs",
    "GenerationConfig": "generation.config",
    "Generator": "generation.generator",
    # training
    "finetune": "train.finetune",
    "Run": "train.trainer",
    "FinetuneConfig": "train.config",
    "LoRAConfig": "lora.config",
    # data
    "Texts": "data.sources",
    "load_texts": "data.sources",
    # evaluation
    "evaluate": "evaluation.evaluate",
    "EvaluationConfig": "evaluation.config",
    "Evaluation": "evaluation.result",
    "keras_metrics": "evaluation.keras_metrics",
    "compare": "comparison.compare",
    "Comparison": "comparison.result",
    "study": "studies.study",
    "StudyConfig": "studies.config",
}

__all__ = [
    "PRESETS",
    "Comparison",
    "Evaluation",
    "EvaluationConfig",
    "FinetuneConfig",
    "GPT2Config",
    "Generation",
    "GenerationConfig",
    "Generator",
    "LanguageModel",
    "LoRAConfig",
    "Run",
    "StudyConfig",
    "Texts",
    "Tokenizer",
    "beam_search",
    "combine_adapters",
    "compare",
    "evaluate",
    "finetune",
    "from_config",
    "generate",
    "keras_metrics",
    "load",
    "load_adapter",
    "load_texts",
    "load_tokenizer",
    "save_adapter",
    "save_tokenizer",
    "stream",
    "study",
]


def __getattr__(name: str):
    if name not in _HOMES:
        from gpt2jax.utils.other_names import our_name

        hint = f"; did you mean {ours!r}?" if (ours := our_name(name, _HOMES)) else ""
        raise AttributeError(f"module 'gpt2jax' has no attribute {name!r}{hint}")
    value = getattr(importlib.import_module(f"gpt2jax.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
