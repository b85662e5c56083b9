"""Adapters of the peft library read by us, and ours by it."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import numpy as np
import pytest

import gpt2jax
from gpt2jax.lora.adapters import init_adapters
from gpt2jax.model.gpt2 import hidden_states, lm_head_weight, output_logits

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


def peft_model(base, settings: dict[str, Any], model=None):
    """The base, or a model made of it, with adapters of peft whose every number is random."""
    lora = peft.LoraConfig(**{"task_type": "CAUSAL_LM", "fan_in_fan_out": True, **settings})
    model = peft.get_peft_model(torch_base(base) if model is None else model, lora)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:  # DoRA's magnitudes stay about as long as the weights' columns are
                noise = torch.randn(parameter.shape, generator=generator) * 0.1
                parameter.copy_(parameter + noise if "magnitude" in name else noise)
            elif parameter.requires_grad:  # embeddings
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model


@pytest.mark.parametrize(
    "settings",
    [
        {"r": 8, "lora_alpha": 16},  # peft's default target is c_attn
        {"r": 3, "lora_alpha": 16, "use_rslora": True, "target_modules": ["c_attn", "c_fc"]},
        {"r": 4, "lora_alpha": 2, "target_modules": ["c_attn", "c_proj", "c_fc"], "lora_dropout": 0.1},
        {"r": 4, "lora_alpha": 8, "target_modules": ["attn.c_proj"], "layers_to_transform": [1]},
        {"r": 4, "target_modules": "all-linear", "exclude_modules": ["h.0.mlp.c_fc"]},
        {"r": 4, "target_modules": r".*\.h\.1\..*c_(attn|fc)", "exclude_modules": r".*\.mlp\..*"},
        {"r": 4, "target_modules": ["c_fc"], "layers_to_transform": 0, "layers_pattern": "h"},
        {"r": 4, "lora_alpha": 8, "use_dora": True, "target_modules": ["c_attn", "c_proj", "c_fc"]},
        {"r": 4, "use_dora": True, "use_rslora": True, "layers_to_transform": [0]},
        {"r": 4, "use_dora": True, "fan_in_fan_out": False, "target_modules": ["c_attn", "mlp.c_proj"]},
        {
            "r": 4,
            "lora_alpha": 8,
            "target_modules": ["c_attn", "c_fc"],
            "rank_pattern": {"h.1.attn.c_attn": 2, "c_fc": 3},
            "alpha_pattern": {"h.0.attn.c_attn": 5, "h.1.mlp.c_fc": 1},
        },
    ],
    ids=str,
)
def test_adapters_of_peft(tmp_path, base, settings: dict[str, Any]):
    model = peft_model(base, settings)
    is_torch = "layers_to_transform" in settings
    model.save_pretrained(tmp_path / "adapter", safe_serialization=not is_torch)
    assert (tmp_path / "adapter" / "adapter_model.bin").is_file() == is_torch
    ours = gpt2jax.load_adapter(gpt2jax.load(base), tmp_path / "adapter")
    expected = logits(model)
    assert np.abs(expected - logits(torch_base(base))).max() > 0.1  # the adapter does something
    np.testing.assert_allclose(ours.logits(IDS), expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(ours.merge_adapter().logits(IDS), expected, rtol=2e-5, atol=2e-5)


ALL = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")


@pytest.mark.parametrize(
    "settings",
    [
        {"alpha": 16.0},
        {"alpha": 2.5, "use_rslora": True},
        {"use_dora": True},
        {"rank_pattern": {"h.1.attn.c_attn": 2, "mlp.*": 3}, "alpha_pattern": {"h.0.attn.*": 3.5}},
        {"targets": ("attn.q", "attn.v", "mlp.c_fc")},
        {"targets": ("attn.k", "attn.v"), "use_dora": True, "alpha_pattern": {"h.1.attn.v": 3, "attn.k": 2}},
    ],
    ids=str,
)
def test_peft_reads_our_adapters(tmp_path, base, settings: dict[str, Any]):
    model = gpt2jax.load(base)
    lora = gpt2jax.LoRAConfig(rank=4, **{"targets": ALL, **settings})
    rng = np.random.default_rng(2)

    def noise(path, leaf):
        values = 0.1 * rng.normal(size=leaf.shape).astype(np.float32)
        if path[-1].key == "magnitude":
            return leaf + values
        kept = (leaf == 0) & bool(lora.rank_pattern)  # of blocks with a smaller rank
        return jax.numpy.where(kept & (path[-1].key == "lora_a"), 0, values)

    fresh = init_adapters(model.config, lora, params=model.params)
    adapters = jax.tree_util.tree_map_with_path(noise, fresh)
    if lora.rank_pattern:  # what the first factor has not, the second one must not have either
        for linears in adapters["h"].values():
            for pair in linears.values():
                rows = (pair["lora_a"] != 0).any(1)[:, :, None]
                pair["lora_b"] = pair["lora_b"] * rows
    model = dataclasses.replace(model, adapters=adapters, lora=lora)
    gpt2jax.save_adapter(model, tmp_path / "adapter")
    theirs = peft.PeftModel.from_pretrained(torch_base(base), tmp_path / "adapter")
    np.testing.assert_allclose(model.logits(IDS), logits(theirs), rtol=1e-5, atol=1e-5)
    again = gpt2jax.load_adapter(gpt2jax.load(base), tmp_path / "adapter")
    np.testing.assert_allclose(again.logits(IDS), model.logits(IDS), rtol=1e-5, atol=1e-5)
    merged = theirs.merge_and_unload()
    np.testing.assert_allclose(model.merge_adapter().logits(IDS), logits(merged), rtol=1e-5, atol=1e-5)


def test_weighted_sum_of_two(tmp_path, base):
    """As `add_weighted_adapter` of peft, whose way "cat" is the exact one."""
    settings = {"one": {"r": 4, "lora_alpha": 6}, "two": {"r": 2, "lora_alpha": 8, "use_rslora": True}}
    for name, own in settings.items():
        peft_model(base, {"target_modules": list(ALL), **own}).save_pretrained(tmp_path / name)
    ours = [gpt2jax.load_adapter(gpt2jax.load(base), tmp_path / name) for name in settings]
    theirs = peft.PeftModel.from_pretrained(torch_base(base), tmp_path / "one", adapter_name="one")
    theirs.load_adapter(tmp_path / "two", adapter_name="two")
    theirs.add_weighted_adapter(list(settings), [0.7, 1.6], "both", combination_type="cat")
    theirs.set_adapter("both")
    both = gpt2jax.combine_adapters(ours, [0.7, 1.6])
    np.testing.assert_allclose(both.logits(IDS), logits(theirs), rtol=1e-5, atol=1e-5)


def test_gradient_of_dora(tmp_path, base):
    """Of every factor and magnitude; the loss is a mean of squares of the logits."""
    theirs = peft_model(base, {"r": 4, "lora_alpha": 6, "use_dora": True, "target_modules": list(ALL)})
    theirs.save_pretrained(tmp_path / "adapter")
    model = gpt2jax.load_adapter(gpt2jax.load(base), tmp_path / "adapter")
    assert model.lora is not None
    scale = model.lora.scales(model.config.n_layer)
    (theirs.eval()(torch.tensor(IDS)).logits ** 2).mean().backward()

    def loss(adapters):
        hidden = hidden_states(model.params, model.config, IDS, adapters=adapters, lora_scale=scale)
        return (output_logits(hidden, lm_head_weight(model.params)) ** 2).mean()

    gradient = jax.jit(jax.grad(loss))(model.adapters)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "lora_" in name:
                parameter.copy_(parameter.grad)
    theirs.save_pretrained(tmp_path / "gradient")
    expected = gpt2jax.load_adapter(gpt2jax.load(base), tmp_path / "gradient").adapters
    leaves = jax.tree_util.tree_leaves_with_path(gradient)
    for (path, ours), wanted in zip(leaves, jax.tree.leaves(expected), strict=True):
        assert np.linalg.norm(wanted) > 1e-4, jax.tree_util.keystr(path)
        assert np.linalg.norm(ours - wanted) <= 1e-5 * np.linalg.norm(wanted), jax.tree_util.keystr(path)


ROWS = [1, 5, 7]


@pytest.mark.parametrize("is_tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize(
    ("vocab_size", "settings"),
    [
        (300, {"modules_to_save": ["wte"]}),
        (300, {"modules_to_save": ["lm_head"]}),
        (300, {"modules_to_save": ["wte", "lm_head"]}),
        (300, {"modules_to_save": ["transformer.wte"], "ensure_weight_tying": True}),
        (300, {"modules_to_save": ["lm_head"], "ensure_weight_tying": True}),
        (300, {"modules_to_save": ["wpe"], "trainable_token_indices": ROWS}),
        (300, {"trainable_token_indices": {"wte": ROWS, "lm_head": ROWS}}),
        (300, {"trainable_token_indices": {"wte": ROWS, "lm_head": [2]}}),
        (300, {"trainable_token_indices": {"lm_head": ROWS}}),
        (310, {}),
        (310, {"trainable_token_indices": [305, 2]}),
        (310, {"modules_to_save": ["wte"]}),
        (310, {"modules_to_save": ["wte", "lm_head"]}),
    ],
    ids=str,
)
def test_embeddings_of_peft_there_and_back(tmp_path, base, vocab_size, settings, is_tied):
    """The adapter of peft, and ours written from it, are the same model in both libraries."""
    if not is_tied:
        model = torch_base(base)
        head = model.lm_head.weight.detach() * 1.5
        model.config.tie_word_embeddings, model.lm_head.weight = False, torch.nn.Parameter(head)
        model.save_pretrained(base)

    def resized():
        model = torch_base(base)
        model.resize_token_embeddings(vocab_size, mean_resizing=False)
        return model

    theirs = peft_model(base, {"r": 2, "target_modules": ["c_attn"], **settings}, resized())
    theirs.save_pretrained(tmp_path / "theirs")
    expected = logits(theirs)
    for name in ("theirs", "ours"):
        model = gpt2jax.load_adapter(gpt2jax.load(base), tmp_path / name)
        np.testing.assert_allclose(model.logits(IDS), expected, rtol=1e-5, atol=1e-5)
        gpt2jax.save_adapter(model, tmp_path / "ours")
    again = peft.PeftModel.from_pretrained(resized(), tmp_path / "ours")
    np.testing.assert_allclose(logits(again), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"bias": "all"}, "bias"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights"),
        ({"modules_to_save": ["ln_f"]}, "modules_to_save"),
        ({"target_modules": ["c_attn", "wte"]}, "wte"),
    ],
)
def test_what_is_refused(tmp_path, base, settings, named):
    peft_model(base, settings).save_pretrained(tmp_path / "adapter")
    with pytest.raises(ValueError, match=named):
        gpt2jax.load_adapter(gpt2jax.load(base), tmp_path / "adapter")
