"""Writes flax-*/ and tf/ with the Flax and TensorFlow models of transformers 4, and their logits beside them.

Made with transformers 4.49.0, flax 0.10.4, jax 0.4.38, tensorflow-cpu 2.18.1 and tf-keras 2.18.0, which need an
environment of their own. One framework at a time: python tests/golden/make_transformers4.py flax (or tf).
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np

os.environ["TF_USE_LEGACY_KERAS"] = "1"
import transformers

SIZES = {"vocab_size": 97, "n_positions": 32, "n_embd": 16, "n_layer": 2, "n_head": 2}
IDS = np.random.default_rng(0).integers(0, 97, (2, 24))


def random(shape: tuple[int, ...], generator: np.random.Generator) -> np.ndarray:
    return 0.3 * generator.normal(size=shape).astype(np.float32)


def flax_model(config: Any, generator: np.random.Generator) -> Any:
    import jax

    model = transformers.FlaxGPT2LMHeadModel(config, seed=0)
    model.params = jax.tree_util.tree_map(lambda leaf: random(leaf.shape, generator), model.params)
    return model


def tf_model(config: Any, generator: np.random.Generator) -> Any:
    model = transformers.TFGPT2LMHeadModel(config)
    model(IDS)  # makes the weights
    model.set_weights([random(weight.shape, generator) for weight in model.get_weights()])
    return model


def main(framework: str) -> None:
    here = Path(__file__).parent
    names = {"flax": {"flax-tied": True, "flax-untied": False}, "tf": {"tf": True}}[framework]
    for name, is_tied in names.items():
        config = transformers.GPT2Config(
            **SIZES, bos_token_id=96, eos_token_id=96, tie_word_embeddings=is_tied
        )
        model = {"flax": flax_model, "tf": tf_model}[framework](config, np.random.default_rng(1))
        folder = here / name
        shutil.rmtree(folder, ignore_errors=True)
        model.save_pretrained(folder)
        np.save(folder / "logits.npy", np.asarray(model(IDS).logits))
        (folder / "expected.json").write_text(json.dumps({"token_ids": IDS.tolist()}) + "\n")


if __name__ == "__main__":
    main(sys.argv[1])
