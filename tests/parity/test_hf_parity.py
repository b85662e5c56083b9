"""Files that transformers writes, read by us, and the other way round."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gpt2jax
from gpt2jax.model.config import GPT2Config
from gpt2jax.model.gpt2 import hidden_states, lm_head_weight, output_logits
from gpt2jax.tokenizer.bpe import Tokenizer
from gpt2jax.weights.hf import load_hf, save_hf

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

TINY: dict[str, Any] = {
    "vocab_size": 300,
    "n_positions": 48,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "bos_token_id": 299,
    "eos_token_id": 299,
    "attn_implementation": "eager",
}
VARIANTS: dict[str, dict[str, Any]] = {
    "default": {},
    "untied": {"tie_word_embeddings": False},
    "n_inner": {"n_inner": 40},
    "epsilon": {"layer_norm_epsilon": 0.1},
    "unscaled": {"scale_attn_weights": False},
    "inverse layer": {"scale_attn_by_inverse_layer_idx": True},
    "upcast": {"reorder_and_upcast_attn": True, "scale_attn_by_inverse_layer_idx": True},
    **{
        name: {"activation_function": name}
        for name in ("gelu", "relu", "silu", "swish", "tanh", "gelu_fast", "gelu_pytorch_tanh")
    },
}


def random_torch_model(seed: int = 0, std: float = 0.15, **changes: Any):
    """A transformers model whose every leaf is random, biases and LayerNorms too."""
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**{**TINY, **changes})).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator) * std
            parameter.copy_(noise + 1 if "ln_" in name and name.endswith("weight") else noise)
    return model


def random_ids(shape: tuple[int, int], vocab_size: int = 300) -> np.ndarray:
    return np.random.default_rng(0).integers(0, vocab_size, shape)


def torch_logits(model, ids: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return model(torch.tensor(ids)).logits.float().numpy()


@jax.jit
def _head(hidden, params):
    return output_logits(hidden, lm_head_weight(params))


def our_logits(config: GPT2Config, params: Any, ids: np.ndarray) -> np.ndarray:
    forward = jax.jit(lambda params, ids: hidden_states(params, config, ids))
    return np.asarray(_head(forward(params, jnp.asarray(ids)), params))


def assert_close(ours: np.ndarray, theirs: np.ndarray, tolerance: float = 1e-5) -> None:
    assert np.abs(theirs).max() > 0.5  # a comparison of zeros would prove nothing
    np.testing.assert_allclose(ours, theirs, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_of_saved_models(tmp_path, variant):
    model = random_torch_model(**VARIANTS[variant])
    model.save_pretrained(tmp_path)
    ids = random_ids((2, 48))
    assert_close(our_logits(*load_hf(tmp_path), ids), torch_logits(model, ids))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_16_bit_files(tmp_path, dtype):
    model = random_torch_model().to(getattr(torch, dtype))
    model.save_pretrained(tmp_path)
    ids = random_ids((2, 48))
    assert_close(our_logits(*load_hf(tmp_path), ids), torch_logits(model.float(), ids))


def test_model_without_head(tmp_path):
    model = random_torch_model()
    model.transformer.save_pretrained(tmp_path)  # names without "transformer."
    ids = random_ids((2, 48))
    assert_close(our_logits(*load_hf(tmp_path), ids), torch_logits(model, ids))


def test_shards(tmp_path):
    model = random_torch_model()
    model.save_pretrained(tmp_path / "theirs", max_shard_size="40KB")
    assert len(list((tmp_path / "theirs").glob("model-*.safetensors"))) > 2
    config, params = load_hf(tmp_path / "theirs")
    ids = random_ids((2, 48))
    assert_close(our_logits(config, params, ids), torch_logits(model, ids))
    save_hf(tmp_path / "ours", config, params, max_shard_bytes=40_000)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    for name, parameter in model.named_parameters():
        assert torch.equal(again.get_parameter(name), parameter), name


@pytest.mark.parametrize("is_zip", [True, False])
def test_files_of_torch(tmp_path, is_zip):
    model = random_torch_model(tie_word_embeddings=False)
    model.config.to_json_file(tmp_path / "config.json")
    tensors = {f"_orig_mod.{name}": value for name, value in model.state_dict().items()}
    tensors["_orig_mod.transformer.h.0.attn.c_attn.weight"] = (  # saved as a view, not contiguous
        model.transformer.h[0].attn.c_attn.weight.detach().T.contiguous().T
    )
    tensors["_orig_mod.transformer.ln_f.bias"] = torch.nn.Parameter(model.transformer.ln_f.bias.detach())
    torch.save(tensors, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=is_zip)
    ids = random_ids((2, 48))
    assert_close(our_logits(*load_hf(tmp_path), ids), torch_logits(model, ids))


@pytest.mark.parametrize("variant", ["default", "untied", "n_inner", "upcast"])
def test_transformers_reads_our_folder(tmp_path, variant):
    model = random_torch_model(**VARIANTS[variant])
    model.save_pretrained(tmp_path / "theirs")
    config, params = load_hf(tmp_path / "theirs")
    tokenizer = Tokenizer.gpt2(300)
    save_hf(tmp_path / "ours", config, params, tokenizer)
    again, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "ours", output_loading_info=True, attn_implementation="eager"
    )
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    for name, parameter in model.named_parameters():
        assert torch.equal(again.get_parameter(name), parameter), name
    ids = random_ids((2, 48))
    np.testing.assert_array_equal(torch_logits(again, ids), torch_logits(model, ids))
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "ours")
    text = "The model, once saved, is read by others: 1, 2, 3.\n"
    assert theirs(text)["input_ids"] == tokenizer.encode(text)
    assert theirs.eos_token_id == again.generation_config.eos_token_id == config.eos_token_id == 299


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_transformers_reads_our_16_bit_folder(tmp_path, dtype):
    model = random_torch_model()
    model.save_pretrained(tmp_path / "theirs")
    save_hf(tmp_path / "ours", *load_hf(tmp_path / "theirs"), dtype=dtype)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    assert again.dtype == getattr(torch, dtype)
    for name, parameter in model.named_parameters():
        assert torch.equal(again.get_parameter(name), parameter.to(again.dtype)), name


def test_same_names_and_settings_as_transformers_writes(tmp_path):
    from safetensors import safe_open

    random_torch_model().save_pretrained(tmp_path / "theirs")
    save_hf(tmp_path / "ours", *load_hf(tmp_path / "theirs"))
    names = []
    for folder in ("theirs", "ours"):
        with safe_open(Path(tmp_path / folder / "model.safetensors"), "numpy") as file:
            names.append(set(file.keys()))
            assert file.metadata() == {"format": "pt"}
    assert names[0] == names[1]
    theirs, ours = (json.loads((tmp_path / f / "config.json").read_text()) for f in ("theirs", "ours"))
    assert {name: theirs[name] for name in ours if name in theirs} == {
        name: value for name, value in ours.items() if name in theirs
    }


@pytest.mark.parametrize("variant", ["default", "untied", "inverse layer"])
def test_greedy_continuation(tmp_path, variant):
    model = random_torch_model(std=0.5, **VARIANTS[variant])
    model.save_pretrained(tmp_path)
    prompt = random_ids((1, 5))
    options = {"max_new_tokens": 40, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    theirs = model.generate(torch.tensor(prompt), attention_mask=torch.ones((1, 5)), **options)[
        0, 5:
    ].tolist()
    ours = gpt2jax.generate(
        gpt2jax.load(tmp_path), prompt.tolist(), max_new_tokens=40, do_sample=False, stop_token_ids=[]
    )
    assert list(ours[0].token_ids) == theirs and len(set(theirs)) > 5
