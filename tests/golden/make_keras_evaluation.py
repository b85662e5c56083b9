"""Writes keras_evaluation.json: what keras-hub's own `evaluate` gives for a small GPT-2 on token ids.

Run with keras-hub 0.32 and grain (no TensorFlow needed):

    KERAS_BACKEND=jax python tests/golden/make_keras_evaluation.py

Rows are packed by keras-hub's `StartEndPacker`, and loss and accuracy are Keras' own, compiled as keras-nlp
0.7 did by default: the accuracy is a plain metric, which no sample weight reaches. The weights are a function
of a seed and are made by `random_params` on both sides; NumPy's `RandomState` never changes its stream.
"""

from __future__ import annotations

import json
import pathlib

import numpy as np

TARGET = pathlib.Path(__file__).with_name("keras_evaluation.json")
SHAPE = {"vocab_size": 96, "n_positions": 24, "n_embd": 32, "n_layer": 2, "n_head": 2}
SEED, LENGTH = 5, 16


def random_params(seed: int, shape: dict[str, int]) -> dict:
    """Parameters as gpt2jax has them, noise on every leaf; token 0 is likely, so that padding counts as hit
    at times."""
    random = np.random.RandomState(seed)
    layers, dim, vocab = shape["n_layer"], shape["n_embd"], shape["vocab_size"]

    def noise(*size, mean=0.0, std=0.2):
        return (mean + std * random.standard_normal(size)).astype(np.float32)

    def norm(*size):
        return {"scale": noise(*size, mean=1.0), "bias": noise(*size)}

    def linear(inputs, outputs):
        return {"kernel": noise(layers, inputs, outputs), "bias": noise(layers, outputs)}

    params = {
        "wte": {"embedding": noise(vocab, dim)},
        "wpe": {"embedding": noise(shape["n_positions"], dim)},
        "h": {
            "ln_1": norm(layers, dim),
            "attn": {"c_attn": linear(dim, 3 * dim), "c_proj": linear(dim, dim)},
            "ln_2": norm(layers, dim),
            "mlp": {"c_fc": linear(dim, 4 * dim), "c_proj": linear(4 * dim, dim)},
        },
        "ln_f": norm(dim),
    }
    direction = params["ln_f"]["bias"]
    params["wte"]["embedding"][0] += 1.5 * direction / np.linalg.norm(direction)
    return params


def texts(seed: int, vocab_size: int) -> list[list[int]]:
    """Token ids of documents of all lengths around the cut, empty ones included."""
    random = np.random.RandomState(seed)
    lengths = [0, 1, 2, 13, 14, 15, 16, 17, 40, 0] + list(random.randint(0, 30, size=37))
    return [random.randint(0, vocab_size - 1, size=length).tolist() for length in lengths]


def _assign(backbone, params: dict, shape: dict[str, int]) -> None:
    dim, heads = shape["n_embd"], shape["n_head"]
    values = {
        "token_embedding/embeddings": params["wte"]["embedding"],
        "position_embedding/embeddings": params["wpe"]["embedding"],
        "layer_norm/gamma": params["ln_f"]["scale"],
        "layer_norm/beta": params["ln_f"]["bias"],
    }
    h = params["h"]
    for layer in range(shape["n_layer"]):
        at = f"transformer_layer_{layer}/"
        for ours, theirs in (("ln_1", "self_attention_layer_norm"), ("ln_2", "feedforward_layer_norm")):
            values[f"{at}{theirs}/gamma"] = h[ours]["scale"][layer]
            values[f"{at}{theirs}/beta"] = h[ours]["bias"][layer]
        for index, name in enumerate(("query", "key", "value")):
            part = slice(index * dim, (index + 1) * dim)
            kernel, bias = (h["attn"]["c_attn"][kind][layer][..., part] for kind in ("kernel", "bias"))
            values[f"{at}self_attention/{name}/kernel"] = kernel.reshape(dim, heads, -1)
            values[f"{at}self_attention/{name}/bias"] = bias.reshape(heads, -1)
        output = h["attn"]["c_proj"]
        values[f"{at}self_attention/attention_output/kernel"] = output["kernel"][layer].reshape(
            heads, -1, dim
        )
        values[f"{at}self_attention/attention_output/bias"] = output["bias"][layer]
        for ours, theirs in (("c_fc", "intermediate"), ("c_proj", "output")):
            values[f"{at}feedforward_{theirs}_dense/kernel"] = h["mlp"][ours]["kernel"][layer]
            values[f"{at}feedforward_{theirs}_dense/bias"] = h["mlp"][ours]["bias"][layer]
    for weight in backbone.weights:
        weight.assign(values.pop(weight.path))
    assert not values


def main() -> None:
    import keras  # pyright: ignore[reportMissingImports]
    import keras_hub  # pyright: ignore[reportMissingImports]

    end = SHAPE["vocab_size"] - 1
    backbone = keras_hub.models.GPT2Backbone(
        vocabulary_size=SHAPE["vocab_size"],
        num_layers=SHAPE["n_layer"],
        num_heads=SHAPE["n_head"],
        hidden_dim=SHAPE["n_embd"],
        intermediate_dim=4 * SHAPE["n_embd"],
        max_sequence_length=SHAPE["n_positions"],
        dtype="float32",
    )
    _assign(backbone, random_params(SEED, SHAPE), SHAPE)
    model = keras_hub.models.GPT2CausalLM(backbone=backbone, preprocessor=None)
    model.compile(
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=[keras.metrics.SparseCategoricalAccuracy()],
        weighted_metrics=[],
    )
    packer = keras_hub.layers.StartEndPacker(
        sequence_length=LENGTH + 1, start_value=end, end_value=end, pad_value=0, return_padding_mask=True
    )
    documents = texts(SEED, SHAPE["vocab_size"])
    packed = [packer(ids) for ids in documents]
    ids, mask = (np.stack([np.asarray(row[part]) for row in packed]) for part in (0, 1))
    inputs = {"token_ids": ids[:, :-1], "padding_mask": mask[:, :-1]}
    loss, accuracy = model.evaluate(inputs, ids[:, 1:], sample_weight=mask[:, 1:], batch_size=8, verbose=0)
    positions = len(documents) * LENGTH
    hits = round(accuracy * positions)
    assert abs(hits / positions - accuracy) < 1e-6
    found = {
        "seed": SEED,
        "shape": SHAPE,
        "sequence_length": LENGTH,
        "loss": float(loss),
        "hits": hits,
        "positions": positions,
        "tokens": int(mask[:, 1:].sum()),
        "versions": {"keras": keras.__version__, "keras_hub": keras_hub.__version__},
    }
    TARGET.write_text(json.dumps(found, indent=2) + "\n")
    print(found)


if __name__ == "__main__":
    main()
