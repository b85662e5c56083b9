"""Adapters of the peft library read by us, and ours by it."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import numpy as np
import pytest

import gpt2jax
from gpt2jax.lora import init_adapters

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

# what these libraries say to each other
pytestmark = [pytest.mark.filterwarnings(f"ignore::{kind}") for kind in ("FutureWarning", "UserWarning")]

SIZE = {"vocab_size": 300, "n_positions": 48, "n_embd": 32, "n_layer": 2, "n_head": 4}
IDS = np.random.default_rng(0).integers(0, 300, (2, 40))


def randomise(model, std: float) -> None:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator) * std
            parameter.copy_(noise + 1 if "ln_" in name and name.endswith("weight") else noise)


@pytest.fixture
def base(tmp_path):
    """The folder of a random model."""
    config = transformers.GPT2Config(**SIZE, bos_token_id=299, eos_token_id=299, attn_implementation="eager")
    model = transformers.GPT2LMHeadModel(config)
    randomise(model, 0.15)
    model.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def torch_base(base):
    return transformers.AutoModelForCausalLM.from_pretrained(base, attn_implementation="eager").eval()


def logits(model) -> np.ndarray:
    with torch.no_grad():
        return model.eval()(torch.tensor(IDS)).logits.numpy()


@pytest.mark.parametrize(
    "settings",
    [
        {"r": 8, "lora_alpha": 16},  # peft's default target is c_attn
        {"r": 3, "lora_alpha": 16, "use_rslora": True, "target_modules": ["c_attn", "c_fc"]},
        {"r": 4, "lora_alpha": 2, "target_modules": ["c_attn", "c_proj", "c_fc"], "lora_dropout": 0.1},
        {"r": 4, "lora_alpha": 8, "target_modules": ["attn.c_proj"], "layers_to_transform": [1]},
    ],
)
def test_adapters_of_peft(tmp_path, base, settings: dict[str, Any]):
    lora = peft.LoraConfig(task_type="CAUSAL_LM", fan_in_fan_out=True, **settings)
    model = peft.get_peft_model(torch_base(base), lora)
    randomise_adapters(model)
    model.save_pretrained(tmp_path / "adapter")
    ours = gpt2jax.load_adapter(gpt2jax.load(base), tmp_path / "adapter")
    expected = logits(model)
    assert np.abs(expected - logits(torch_base(base))).max() > 0.1  # the adapter does something
    np.testing.assert_allclose(ours.logits(IDS), expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(ours.merge_adapter().logits(IDS), expected, rtol=2e-5, atol=2e-5)


def randomise_adapters(model) -> None:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)


@pytest.mark.parametrize("alpha", [16.0, 2.5])
def test_peft_reads_our_adapters(tmp_path, base, alpha):
    model = gpt2jax.load(base)
    lora = gpt2jax.LoRAConfig(
        rank=4, alpha=alpha, targets=("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    )
    rng = np.random.default_rng(2)
    fresh = init_adapters(model.config, lora)
    adapters = jax.tree.map(
        lambda leaf: jax.numpy.asarray(0.1 * rng.normal(size=leaf.shape), "float32"), fresh
    )
    model = dataclasses.replace(model, adapters=adapters, lora=lora)
    gpt2jax.save_adapter(model, tmp_path / "adapter")
    theirs = peft.PeftModel.from_pretrained(torch_base(base), tmp_path / "adapter")
    np.testing.assert_allclose(model.logits(IDS), logits(theirs), rtol=1e-5, atol=1e-5)
    again = gpt2jax.load_adapter(gpt2jax.load(base), tmp_path / "adapter")
    np.testing.assert_array_equal(again.logits(IDS), model.logits(IDS))
    merged = theirs.merge_and_unload()
    np.testing.assert_allclose(model.merge_adapter().logits(IDS), logits(merged), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"bias": "all"}, "bias"),
        ({"rank_pattern": {"c_attn": 2}}, "rank_pattern"),
        ({"modules_to_save": ["ln_f"]}, "modules_to_save"),
        ({"target_modules": ["c_attn", "wte"]}, "wte"),
    ],
)
def test_what_is_refused(tmp_path, base, settings, named):
    model = peft.get_peft_model(
        torch_base(base), peft.LoraConfig(task_type="CAUSAL_LM", fan_in_fan_out=True, **settings)
    )
    model.save_pretrained(tmp_path / "adapter")
    with pytest.raises(ValueError, match=named):
        gpt2jax.load_adapter(gpt2jax.load(base), tmp_path / "adapter")
