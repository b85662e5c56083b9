"""One random model in the files of every library, at two layers and at gpt2's real shape, beside transformers."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

import gpt2jax

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

# what these libraries say to each other
pytestmark = [
    pytest.mark.filterwarnings(f"ignore::{kind}")
    for kind in ("DeprecationWarning", "UserWarning", "FutureWarning")
]

TINY: dict[str, Any] = {"vocab_size": 300, "n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 4}
REAL: dict[str, Any] = {"vocab_size": 50257, "n_positions": 1024, "n_embd": 768, "n_layer": 12, "n_head": 12}
LINEARS = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")


@pytest.fixture(params=["tiny", "real"], scope="module")
def model(request) -> Any:
    """A transformers model whose every leaf is random, biases and LayerNorms too."""
    size = TINY if request.param == "tiny" else REAL
    end = size["vocab_size"] - 1
    config = transformers.GPT2Config(**size, bos_token_id=end, eos_token_id=end, attn_implementation="eager")
    with torch.device("meta"):  # without the random numbers that would be overwritten
        made = transformers.GPT2LMHeadModel(config)
    made = made.to_empty(device="cpu").eval()
    made.tie_weights()
    std = 0.4 if request.param == "tiny" else 0.02
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            parameter.normal_(
                1.0 if "ln_" in name and name.endswith("weight") else 0.0, std, generator=generator
            )
    return made


def tensors_of(model) -> dict[str, np.ndarray]:
    return {name.removeprefix("transformer."): p.detach().numpy() for name, p in model.named_parameters()}


def blocks(model) -> Iterator[tuple[int, str]]:
    for layer in range(model.config.n_layer):
        for linear in LINEARS:
            yield layer, linear


# ---- writers: model, folder -> what to give `gpt2jax.load` ----


def safetensors(model, folder: Path) -> Path:
    model.save_pretrained(folder)
    return folder


def pytorch_bin(model, folder: Path) -> Path:
    model.config.to_json_file(folder / "config.json")
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    return folder


def nanogpt(model, folder: Path) -> Path:
    """Linears the other way round, the head under both names, torch.compile's prefix."""
    tensors = {name: torch.from_numpy(values) for name, values in tensors_of(model).items()}
    for layer, linear in blocks(model):
        name = f"h.{layer}.{linear}.weight"
        tensors[name] = tensors[name].T.contiguous()
    state = {f"_orig_mod.transformer.{name}": values for name, values in tensors.items()}
    state["_orig_mod.lm_head.weight"] = tensors["wte.weight"]
    c = model.config
    arguments = {"n_layer": c.n_layer, "n_head": c.n_head, "n_embd": c.n_embd, "block_size": c.n_positions}
    arguments |= {"bias": True, "vocab_size": c.vocab_size, "dropout": 0.0}
    torch.save({"model": state, "model_args": arguments, "iter_num": 1}, folder / "ckpt.pt")
    return folder


def openai(model, folder: Path) -> Path:
    tf = pytest.importorskip("tensorflow")
    values = {}
    for name, tensor in tensors_of(model).items():
        *path, leaf = name.replace("h.", "h", 1).split(".")
        if "ln_" in path[-1]:
            leaf = {"weight": "g", "bias": "b"}[leaf]
        elif path[-1].startswith("c_"):
            tensor, leaf = (tensor[None], "w") if leaf == "weight" else (tensor, "b")
        else:  # the embeddings have no leaf name
            leaf = ""
        values["/".join(["model", *path, leaf]).rstrip("/")] = tensor
    save_bundle(tf, folder / "model.ckpt", values)
    (folder / "checkpoint").write_text('model_checkpoint_path: "model.ckpt"\n')
    c = model.config
    sizes = {"n_vocab": c.vocab_size, "n_ctx": c.n_positions, "n_embd": c.n_embd}
    (folder / "hparams.json").write_text(json.dumps({**sizes, "n_head": c.n_head, "n_layer": c.n_layer}))
    return folder


def keras_checkpoint(model, folder: Path) -> Path:
    """The names that Keras 2 gives the weights of a saved CausalLM."""
    tf = pytest.importorskip("tensorflow")
    tensors, c = tensors_of(model), model.config
    heads = (c.n_head, c.n_embd // c.n_head)
    root = "layer_with_weights-0/layer_with_weights-"
    values = {"layer_with_weights-1/embeddings": tensors["wte.weight"]}
    values[f"{root}1/position_embeddings"] = tensors["wpe.weight"]
    for layer in range(c.n_layer):
        h, to = f"h.{layer}.", f"{root}{layer + 2}/"
        for ours, theirs in (("ln_1", "_self_attention_layer_norm"), ("ln_2", "_feedforward_layer_norm")):
            values[f"{to}{theirs}/gamma"] = tensors[f"{h}{ours}.weight"]
            values[f"{to}{theirs}/beta"] = tensors[f"{h}{ours}.bias"]
        kernels = np.split(tensors[f"{h}attn.c_attn.weight"], 3, axis=1)
        biases = np.split(tensors[f"{h}attn.c_attn.bias"], 3)
        for part, kernel, bias in zip(("query", "key", "value"), kernels, biases, strict=True):
            values[f"{to}_self_attention_layer/_{part}_dense/kernel"] = kernel.reshape(-1, *heads)
            values[f"{to}_self_attention_layer/_{part}_dense/bias"] = bias.reshape(heads)
        output = tensors[f"{h}attn.c_proj.weight"].reshape(*heads, -1)
        values[f"{to}_self_attention_layer/_output_dense/kernel"] = output
        values[f"{to}_self_attention_layer/_output_dense/bias"] = tensors[f"{h}attn.c_proj.bias"]
        for ours, theirs in (("c_fc", "intermediate"), ("c_proj", "output")):
            values[f"{to}_feedforward_{theirs}_dense/kernel"] = tensors[f"{h}mlp.{ours}.weight"]
            values[f"{to}_feedforward_{theirs}_dense/bias"] = tensors[f"{h}mlp.{ours}.bias"]
    values[f"{root}{c.n_layer + 2}/gamma"] = tensors["ln_f.weight"]
    values[f"{root}{c.n_layer + 2}/beta"] = tensors["ln_f.bias"]
    save_bundle(
        tf, folder / "cp.ckpt", {f"{name}/.ATTRIBUTES/VARIABLE_VALUE": v for name, v in values.items()}
    )
    return folder / "cp.ckpt"


def save_bundle(tf, prefix: Path, values: dict[str, np.ndarray]) -> None:
    tf.raw_ops.SaveV2(
        prefix=str(prefix),
        tensor_names=list(values),
        shape_and_slices=[""] * len(values),
        tensors=[tf.constant(value) for value in values.values()],
    )


def keras_preset(model, folder: Path) -> Path:
    """keras-hub converts transformers' folder itself, and saves what it has."""
    keras_hub = pytest.importorskip("keras_hub")
    model.save_pretrained(folder / "hf")
    backbone = keras_hub.models.GPT2Backbone.from_preset(str(folder / "hf"))
    keras_hub.models.GPT2CausalLM(backbone=backbone, preprocessor=None).save_to_preset(str(folder / "keras"))
    return folder / "keras"


WRITERS: tuple[Callable[[Any, Path], Path], ...] = (
    safetensors, pytorch_bin, nanogpt, openai, keras_checkpoint, keras_preset,
)  # fmt: skip


@pytest.mark.parametrize("write", WRITERS, ids=lambda write: write.__name__)
def test_source(tmp_path, model, write):
    (tmp_path / "source").mkdir()
    try:
        check(tmp_path, model, write(model, tmp_path / "source"), "gelu" if write is nanogpt else "gelu_new")
    finally:
        shutil.rmtree(tmp_path)  # half a GB each


def check(tmp_path: Path, model, source: Path, activation: str) -> None:
    is_real = model.config.n_layer == 12
    activate = transformers.activations.ACT2FN[activation]
    for block in model.transformer.h:  # nanoGPT's is the exact one
        block.mlp.act = activate
    ours = gpt2jax.load(source)
    assert ours.config.activation_function == activation
    ids = np.random.default_rng(0).integers(0, model.config.vocab_size, (1, 24))
    with torch.no_grad():
        expected = model(torch.tensor(ids)).logits.numpy()
    assert np.abs(expected).max() > 0.5
    np.testing.assert_allclose(ours.logits(ids), expected, atol=1e-4 if is_real else 1e-5, rtol=1e-5)
    if is_real:
        return
    options = {"max_new_tokens": 40, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    theirs = model.generate(torch.tensor(ids), attention_mask=torch.ones_like(torch.tensor(ids)), **options)
    outs = gpt2jax.generate(ours, ids.tolist(), max_new_tokens=40, do_sample=False, stop_token_ids=[])
    assert list(outs[0].token_ids) == theirs[0, 24:].tolist() and len(set(outs[0].token_ids)) > 3
    formats = ("hf", "keras") if activation == "gelu_new" else ("hf",)
    for format in formats:
        ours.save(tmp_path / format, format=format)
        jax.tree.map(np.testing.assert_array_equal, gpt2jax.load(tmp_path / format).params, ours.params)
