"""Writes the models in keras-*/ (keras-lora/: an adapter) and openai/ with Keras and TensorFlow, and their logits.

Run twice: with keras-hub, and with keras-nlp 0.7.0 and tensorflow 2.15 (the last that write TensorFlow checkpoints):
python tests/golden/make_keras.py
"""

from __future__ import annotations

import importlib
import json
import shutil
from pathlib import Path

import numpy as np

try:
    library = importlib.import_module("keras_hub")
except ImportError:
    library = importlib.import_module("keras_nlp")

SIZE = {
    "vocabulary_size": 97,
    "num_layers": 2,
    "num_heads": 2,
    "hidden_dim": 16,
    "intermediate_dim": 64,
    "dropout": 0.2,
    "max_sequence_length": 32,
}


def main() -> None:
    here = Path(__file__).parent
    backbone = library.models.GPT2Backbone(**SIZE)
    model = library.models.GPT2CausalLM(backbone=backbone, preprocessor=None)
    rng = np.random.default_rng(0)
    backbone.set_weights([_random(rng, variable) for variable in backbone.weights])
    token_ids = rng.integers(0, 97, (2, 24))
    logits = np.array(model({"token_ids": token_ids, "padding_mask": np.ones_like(token_ids)}))
    if library.__name__ == "keras_hub":
        folder = _fresh(here / "keras-hub")
        model.save_to_preset(str(folder))
        (folder / "task.json").unlink()
        _expect(folder, token_ids, logits)
        _save_adapter(_fresh(here / "keras-lora"), model, rng, token_ids)
    else:
        folder = _fresh(here / "keras-nlp")
        model.save_weights(str(folder / "cp.ckpt"))
        model.save_weights(str(folder / "whole.weights.h5"))
        _expect(folder, token_ids, logits)
        folder = _fresh(here / "openai")
        _save_openai(folder, backbone)
        _expect(folder, token_ids, logits)


def _save_adapter(folder: Path, model, rng: np.random.Generator, token_ids: np.ndarray) -> None:
    """Adapters of the model, and the logits with them."""
    model.backbone.enable_lora(2)
    for variable in model.backbone.trainable_weights:
        if "lora" in variable.path:
            variable.assign(rng.normal(size=variable.shape, scale=0.2))
    model.backbone.save_lora_weights(str(folder / "adapter.lora.h5"))
    logits = np.array(model({"token_ids": token_ids, "padding_mask": np.ones_like(token_ids)}))
    _expect(folder, token_ids, logits)


def _random(rng: np.random.Generator, variable) -> np.ndarray:
    return rng.normal(size=variable.shape, scale=0.3) + ("gamma" in variable.name)


def _fresh(folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    return folder


def _expect(folder: Path, token_ids: np.ndarray, logits: np.ndarray) -> None:
    (folder / "expected.json").write_text(json.dumps({"token_ids": token_ids.tolist()}) + "\n")
    np.save(folder / "logits.npy", logits)


def _save_openai(folder: Path, backbone) -> None:
    """The same weights, with the names and shapes of OpenAI's release, by a Saver of TensorFlow 1."""
    tf = importlib.import_module("tensorflow")

    dim = SIZE["hidden_dim"]
    values = {
        "model/wte": backbone.get_layer("token_embedding").embeddings.numpy(),
        "model/wpe": backbone.get_layer("position_embedding").position_embeddings.numpy(),
        "model/ln_f/g": backbone.get_layer("layer_norm").gamma.numpy(),
        "model/ln_f/b": backbone.get_layer("layer_norm").beta.numpy(),
    }
    for i in range(SIZE["num_layers"]):
        layer = backbone.get_layer(f"transformer_layer_{i}")
        attention = layer._self_attention_layer
        qkv = (attention._query_dense, attention._key_dense, attention._value_dense)
        values.update(
            {
                f"model/h{i}/ln_1/g": layer._self_attention_layer_norm.gamma.numpy(),
                f"model/h{i}/ln_1/b": layer._self_attention_layer_norm.beta.numpy(),
                f"model/h{i}/ln_2/g": layer._feedforward_layer_norm.gamma.numpy(),
                f"model/h{i}/ln_2/b": layer._feedforward_layer_norm.beta.numpy(),
                f"model/h{i}/attn/c_attn/w": np.concatenate(
                    [d.kernel.numpy().reshape(dim, dim) for d in qkv], 1
                )[None],
                f"model/h{i}/attn/c_attn/b": np.concatenate([d.bias.numpy().ravel() for d in qkv]),
                f"model/h{i}/attn/c_proj/w": attention._output_dense.kernel.numpy().reshape(1, dim, dim),
                f"model/h{i}/attn/c_proj/b": attention._output_dense.bias.numpy(),
                f"model/h{i}/mlp/c_fc/w": layer._feedforward_intermediate_dense.kernel.numpy()[None],
                f"model/h{i}/mlp/c_fc/b": layer._feedforward_intermediate_dense.bias.numpy(),
                f"model/h{i}/mlp/c_proj/w": layer._feedforward_output_dense.kernel.numpy()[None],
                f"model/h{i}/mlp/c_proj/b": layer._feedforward_output_dense.bias.numpy(),
            }
        )
    with tf.Graph().as_default(), tf.compat.v1.Session() as session:
        for name, value in values.items():
            tf.compat.v1.get_variable(name, initializer=value)
        session.run(tf.compat.v1.global_variables_initializer())
        tf.compat.v1.train.Saver(save_relative_paths=True).save(session, str(folder / "model.ckpt"))
    hparams = {
        "n_vocab": 97,
        "n_ctx": 32,
        "n_embd": dim,
        "n_head": SIZE["num_heads"],
        "n_layer": SIZE["num_layers"],
    }
    (folder / "hparams.json").write_text(json.dumps(hparams) + "\n")
    (folder / "model.ckpt.meta").unlink()  # the graph: not needed, and larger than the weights


if __name__ == "__main__":
    main()
