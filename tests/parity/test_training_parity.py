"""Gradients, optimizer steps and loss curves beside torch, transformers and peft."""

from __future__ import annotations

import copy
import math
from typing import Any

import jax
import numpy as np
import pytest

from gpt2jax.model.config import GPT2Config
from gpt2jax.model.gpt2 import Params, hidden_states, lm_head_weight, output_logits
from gpt2jax.ops.cross_entropy import cross_entropy
from gpt2jax.ops.precision import FLOAT32
from gpt2jax.train.config import FinetuneConfig
from gpt2jax.train.optimizer import make_optimizer
from gpt2jax.train.step import init_state, make_train_step
from gpt2jax.weights.hf import load_hf
from gpt2jax.weights.peft import read_adapter

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

SIZE: dict[str, Any] = {
    "vocab_size": 211,
    "n_positions": 40,
    "n_embd": 48,
    "n_layer": 3,
    "n_head": 4,
    "embd_pdrop": 0.0,
    "attn_pdrop": 0.0,
    "resid_pdrop": 0.0,
    "bos_token_id": 210,
    "eos_token_id": 210,
    "attn_implementation": "eager",
}
VARIANTS: dict[str, dict[str, Any]] = {
    "as published": {},
    "all otherwise": {
        "tie_word_embeddings": False,
        "n_inner": 64,
        "activation_function": "gelu",
        "layer_norm_epsilon": 1e-2,
        "scale_attn_by_inverse_layer_idx": True,
    },
}
STEPS, ROWS, LENGTH = 10, 4, 32


def random_torch_model(changes: dict[str, Any]):
    """A transformers model whose every leaf is random, biases and LayerNorms too."""
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**{**SIZE, **changes})).train()
    randomise(model, dict(model.named_parameters()))
    return model


def randomise(model, parameters: dict[str, Any]) -> None:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in parameters.items():
            noise = torch.randn(parameter.shape, generator=generator) * 0.1
            parameter.copy_(noise + 1 if "ln_" in name and name.endswith("weight") else noise)


def as_params(model, folder) -> tuple[GPT2Config, Params]:
    model.save_pretrained(folder)
    return load_hf(folder)


def with_gradients(model):
    """A copy of the model whose parameters are the gradients, so that they take the way of parameters."""
    gradients = copy.deepcopy(model)
    with torch.no_grad():
        for parameter, original in zip(gradients.parameters(), model.parameters(), strict=True):
            if original.grad is not None:
                parameter.copy_(original.grad)
    return gradients


def batches() -> list[dict[str, np.ndarray]]:
    """Rows of very different numbers of real tokens, and a successor of each token that can be learnt."""
    generator = np.random.default_rng(0)
    made = []
    for _ in range(STEPS):
        tokens = generator.integers(0, 20, (ROWS, LENGTH)).astype(np.int32)
        lengths = generator.permutation([LENGTH, 3, 17, 1])[:, None]
        weights = (np.arange(LENGTH) < lengths).astype(np.float32)
        made.append({"tokens": tokens, "targets": (tokens * 7 + 1) % 20, "loss_mask": weights})
    return made


def torch_loss(model, batch):
    tokens, targets = (torch.tensor(batch[name], dtype=torch.long) for name in ("tokens", "targets"))
    labels = torch.where(torch.tensor(batch["loss_mask"]) > 0, targets, -100)
    return torch.nn.functional.cross_entropy(model(tokens).logits.flatten(0, 1), labels.flatten())


def our_loss(params, config, batch, **options):
    hidden = hidden_states(params, config, batch["tokens"], **options)
    total, counts = cross_entropy(hidden, lm_head_weight(params), batch["targets"], batch["loss_mask"])
    return total / counts["tokens"]


def assert_close(ours: Params, expected: Params, tolerance: float = 1e-5) -> None:
    """Each leaf within `tolerance` of the expected one, relative to that one's norm."""

    def compare(path, a, b):
        distance = np.linalg.norm(np.asarray(a, np.float64) - np.asarray(b, np.float64))
        assert distance <= tolerance * np.linalg.norm(b), (jax.tree_util.keystr(path), distance)

    jax.tree_util.tree_map_with_path(compare, ours, expected)


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS.keys())
def test_loss_and_gradient_of_every_leaf(changes, tmp_path):
    model = random_torch_model(changes)
    batch = batches()[0]
    loss = torch_loss(model, batch)
    loss.backward()
    config, params = as_params(model, tmp_path / "model")
    value, gradient = jax.jit(jax.value_and_grad(our_loss), static_argnums=1)(params, config, batch)
    np.testing.assert_allclose(value, loss.item(), rtol=1e-6)
    assert_close(gradient, as_params(with_gradients(model), tmp_path / "gradient")[1])


SETTINGS = FinetuneConfig(
    steps=STEPS,
    learning_rate=5e-3,
    warmup_steps=3,
    final_lr_ratio=0.1,
    weight_decay=0.1,
    beta2=0.95,
    # some gradients are zero except for rounding, which an epsilon of 1e-8 would blow up to whole steps
    epsilon=1e-5,
    max_grad_norm=0.5,
)


def train_torch(model, decayed, plain):
    """Yields (loss, norm of the gradient) of every step; `decayed` and `plain` are the trained parameters."""
    rates = [5e-3 * fraction for fraction in (0.25, 0.5, 0.75)]
    rates += [5e-3 * (0.1 + 0.9 * (1 + math.cos(math.pi * s / 7)) / 2) for s in range(7)]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW([group for group in groups if group["params"]], betas=(0.9, 0.95), eps=1e-5)
    for batch, rate in zip(batches(), rates, strict=True):
        loss = torch_loss(model, batch)
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_([*decayed, *plain], 0.5).item()
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        yield loss.item(), norm


def step_together(step, state, frozen, torch_steps, torch_params):
    """Ten steps of both with the same losses, and the same parameters behind the first; how much the loss fell."""
    losses, torch_losses = [], []
    for index, (torch_step, batch) in enumerate(zip(torch_steps, batches(), strict=True)):
        torch_losses.append(torch_step[0])
        state, metrics = step(state, frozen, batch)
        losses.append(float(metrics["loss"]))
        if index == 0:
            assert torch_step[1] > 0.5
            np.testing.assert_allclose(metrics["grad_norm"], torch_step[1], rtol=1e-5)
            assert_close(state["params"], torch_params())
    np.testing.assert_allclose(losses, torch_losses, rtol=1e-4)
    return state, losses[0] - losses[-1]


def test_ten_steps_of_clipping_and_adamw_on_a_schedule(tmp_path):
    model = random_torch_model({})
    config, params = as_params(model, tmp_path / "before")
    optimizer = make_optimizer(SETTINGS, STEPS)
    step = make_train_step(config, optimizer, FLOAT32, max_grad_norm=0.5)
    state = init_state(params, optimizer, loss_scaling=False)
    matrices, vectors = ([p for p in model.parameters() if p.ndim == n] for n in (2, 1))
    state, gain = step_together(
        step,
        state,
        None,
        train_torch(model, matrices, vectors),
        lambda: as_params(model, tmp_path / "after")[1],
    )
    assert gain > 0.5
    assert_close(state["params"], as_params(model, tmp_path / "end")[1], 1e-4)


# peft warns of the layout of GPT-2's linears, which it then handles
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
def test_gradient_of_adapters(tmp_path):
    peft = pytest.importorskip("peft")
    base = random_torch_model({})
    config, params = as_params(base, tmp_path / "base")
    settings = peft.LoraConfig(
        r=4,
        lora_alpha=6,
        target_modules=["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"],
        fan_in_fan_out=True,
        task_type="CAUSAL_LM",
    )
    model = peft.get_peft_model(base, settings).train()
    randomise(model, {name: p for name, p in model.named_parameters() if "lora_" in name})
    batch = batches()[0]
    torch_loss(model, batch).backward()
    model.save_pretrained(tmp_path / "adapter")
    lora, adapters = read_adapter(tmp_path / "adapter", config)
    assert len(lora.targets) == 4

    def loss(adapters):
        return our_loss(params, config, batch, adapters=adapters, lora_scale=lora.scale)

    hidden = hidden_states(params, config, batch["tokens"], adapters=adapters, lora_scale=lora.scale)
    logits = model(torch.tensor(batch["tokens"], dtype=torch.long)).logits.detach().numpy()
    np.testing.assert_allclose(output_logits(hidden, lm_head_weight(params)), logits, atol=2e-5)
    gradient = jax.jit(jax.grad(loss))(adapters)
    with_gradients(model).save_pretrained(tmp_path / "gradient")
    assert_close(gradient, read_adapter(tmp_path / "gradient", config)[1])


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
@pytest.mark.parametrize(
    "kind",
    [{"rank_pattern": {"h.1.attn.c_attn": 2}}, {"use_rslora": True}, {"use_dora": True}],
    ids=lambda kind: next(iter(kind)),
)
def test_ten_steps_of_adapters(tmp_path, kind):
    peft = pytest.importorskip("peft")
    base = random_torch_model({})
    config, params = as_params(base, tmp_path / "base")
    settings = peft.LoraConfig(
        r=4, lora_alpha=6, target_modules=["attn.c_attn", "mlp.c_proj"], fan_in_fan_out=True, **kind
    )
    model = peft.get_peft_model(base, settings).train()
    # as they begin, except for the second factor's zeros: the first step would say nothing of the first one
    randomise(model, {name: p for name, p in model.named_parameters() if "lora_B" in name})

    def saved(name: str):
        model.save_pretrained(tmp_path / name)
        return read_adapter(tmp_path / name, config, params)

    lora, adapters = saved("before")
    optimizer = make_optimizer(SETTINGS, STEPS)
    step = make_train_step(config, optimizer, FLOAT32, lora=lora, max_grad_norm=0.5)
    state = init_state(adapters, optimizer, loss_scaling=False)
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    lengths = [p for name, p in trained if "magnitude" in name]
    factors = [p for name, p in trained if "magnitude" not in name]
    assert bool(lengths) == lora.use_dora
    state, gain = step_together(
        step, state, params, train_torch(model, factors, lengths), lambda: saved("after")[1]
    )
    assert gain > 0.1
    assert_close(state["params"], saved("end")[1], 1e-4)
