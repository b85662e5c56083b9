from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gpt2jax.weights import nanogpt
from gpt2jax.weights.formats import load_weights
from gpt2jax.weights.nanogpt import load_nanogpt
from gpt2jax.weights.torch_reader import read_torch

GOLDEN = Path(__file__).parent.parent / "golden"


def test_load_nanogpt_config_and_absent_biases():
    config, params, tokenizer = load_weights(GOLDEN / "nanogpt-plain")
    assert tokenizer is None
    assert (config.vocab_size, config.n_positions, config.n_embd, config.n_layer, config.n_head) == (
        97,
        32,
        16,
        2,
        2,
    )
    assert config.activation_function == "gelu" and config.tie_word_embeddings and config.resid_pdrop == 0.0
    assert "lm_head" not in params
    for path in ("ln_1", "ln_2"):
        assert not np.any(params["h"][path]["bias"]) and np.all(np.asarray(params["h"][path]["scale"]) != 0)
    assert not np.any(params["h"]["mlp"]["c_fc"]["bias"]) and not np.any(params["ln_f"]["bias"])


def test_load_nanogpt_transposes_kernels():
    file = GOLDEN / "nanogpt-bias" / "ckpt.pt"
    saved = read_torch(file)["model"]["transformer.h.1.attn.c_proj.weight"].read()
    _config, params = load_nanogpt(file)
    np.testing.assert_array_equal(params["h"]["attn"]["c_proj"]["kernel"][1], saved.T)
    assert np.any(params["h"]["attn"]["c_proj"]["bias"])


def with_content(monkeypatch, change) -> None:
    """Lets `change` edit what the file says."""

    def read(path: Path) -> Any:
        content = read_torch(path)
        change(content)
        return content

    monkeypatch.setattr(nanogpt, "read_torch", read)


def test_load_nanogpt_truncates_the_padded_vocabulary(monkeypatch):
    wide = np.random.default_rng(0).normal(size=(50304, 16)).astype(np.float32)

    def widen(content):
        content["model_args"]["vocab_size"] = 50304
        table = content["model"]["transformer.wte.weight"]
        wider = dataclasses.replace(table, shape=wide.shape, read=lambda: wide)
        content["model"]["transformer.wte.weight"] = content["model"]["lm_head.weight"] = wider

    with_content(monkeypatch, widen)
    config, params = load_nanogpt(GOLDEN / "nanogpt-bias")
    assert config.vocab_size == 50257 and config.eos_token_id == 50256
    np.testing.assert_array_equal(params["wte"]["embedding"], wide[:50257])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.pop("model_args"), "expected `model` and `model_args`"),
        (lambda c: c.update(model=[1]), "expected `model` and `model_args`"),
        (lambda c: c["model"].update(extra=3), "model: extra must be a tensor with a name, got a int"),
        (lambda c: c["model_args"].pop("n_head"), "model_args has no n_head"),
        (lambda c: c["model_args"].update(rotary=True), "model_args has unknown rotary"),
        (lambda c: c["model_args"].update(n_head=5), "n_head.*5"),
        (lambda c: c["model_args"].update(n_layer=2**31 - 1), f"n_layer={2**31 - 1}"),
        (lambda c: c["model_args"].update(n_layer="2"), "n_layer.*'2'"),
        (
            lambda c: c["model_args"].update(block_size=64),
            r"wpe\.weight: has shape \[32, 16\], expected \[64, 16\]",
        ),
        (lambda c: c["model"].pop("transformer.h.0.ln_1.bias"), r"h\.0\.ln_1\.bias: missing"),
        (lambda c: c["model_args"].update(bias=False, n_layer=3), r"h\.2\.ln_1\.weight: missing"),
    ],
)
def test_load_nanogpt_refuses_checkpoints_that_do_not_fit(monkeypatch, change, message):
    with_content(monkeypatch, change)
    with pytest.raises(ValueError, match=message) as info:
        load_nanogpt(GOLDEN / "nanogpt-bias")
    assert "ckpt.pt" in str(info.value)


def test_load_nanogpt_cut_short(tmp_path):
    shutil.copy(GOLDEN / "nanogpt-bias" / "ckpt.pt", tmp_path)
    whole = (tmp_path / "ckpt.pt").read_bytes()
    for length in range(0, len(whole), 997):
        (tmp_path / "ckpt.pt").write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"ckpt\.pt"):
            load_nanogpt(tmp_path)
