"""Writes training.npz: logits, loss, gradients, AdamW steps and a loss curve of torch and transformers, in float64.

Run with the peers installed: python tests/golden/make_training.py
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

CONFIG = {
    "vocab_size": 53,
    "n_positions": 12,
    "n_embd": 12,
    "n_layer": 2,
    "n_head": 2,
    "n_inner": 32,
    "embd_pdrop": 0.0,
    "attn_pdrop": 0.0,
    "resid_pdrop": 0.0,
    "bos_token_id": 52,
    "eos_token_id": 52,
}
# the gradient is longer than max_grad_norm at first, so that clipping acts
TRAINING = {
    "learning_rate": 1e-2,
    "weight_decay": 0.1,
    "beta1": 0.9,
    "beta2": 0.95,
    "epsilon": 1e-5,
    "max_grad_norm": 0.5,
}
STEPS, ROWS, LENGTH = 10, 3, 12


def main() -> None:
    config = transformers.GPT2Config(**CONFIG, attn_implementation="eager")
    model = transformers.GPT2LMHeadModel(config).double().train()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # summed in float32, so that both sides begin with the same values
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float32) * 0.2
            parameter.copy_(noise + 1 if "ln_" in name and name.endswith("weight") else noise)
    batches = make_batches(generator)
    arrays: dict[str, Any] = {
        **batches,
        **named("before", {n: p.detach() for n, p in model.named_parameters()}),
    }
    optimizer = make_optimizer(model)
    losses = []
    for step in range(STEPS):
        logits = model(torch.tensor(batches["tokens"][step], dtype=torch.long)).logits
        loss = mean_loss(logits, batches["targets"][step], batches["weights"][step])
        optimizer.zero_grad()
        loss.backward()
        losses.append(loss.item())
        if step == 0:
            arrays["logits"] = logits.detach().numpy().astype(np.float32)
            arrays |= named("gradient", {n: p.grad for n, p in model.named_parameters()})
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), TRAINING["max_grad_norm"])
        if step == 0:
            arrays["grad_norm"] = np.float64(norm.item())
        optimizer.step()
        if step == 0:
            arrays |= named("after", {n: p.detach() for n, p in model.named_parameters()})
    arrays["losses"] = np.array(losses)
    made_by = {"torch": torch.__version__, "transformers": transformers.__version__}
    arrays["about"] = np.array(json.dumps({"config": CONFIG, "training": TRAINING, "made_by": made_by}))
    np.savez_compressed(Path(__file__).with_name("training.npz"), **arrays)


def make_batches(generator: torch.Generator) -> dict[str, np.ndarray]:
    """tokens, targets and weights, each [STEPS, ROWS, LENGTH]; rows of very different numbers of real tokens."""
    tokens = torch.randint(0, 10, (STEPS, ROWS, LENGTH), generator=generator).numpy()
    targets = (tokens * 3 + 1) % 10  # something to learn
    real = np.arange(LENGTH) < np.array([LENGTH, 1, 7])[:, None]
    weights = np.broadcast_to(real, tokens.shape)
    return {
        "tokens": tokens.astype(np.int32),
        "targets": targets.astype(np.int32),
        "weights": weights.astype(np.float32),
    }


def make_optimizer(model: torch.nn.Module) -> torch.optim.AdamW:
    """AdamW with decay on matrices only."""
    groups = [
        {"params": [p for p in model.parameters() if p.ndim == 2], "weight_decay": TRAINING["weight_decay"]},
        {"params": [p for p in model.parameters() if p.ndim == 1], "weight_decay": 0.0},
    ]
    betas = (TRAINING["beta1"], TRAINING["beta2"])
    return torch.optim.AdamW(groups, lr=TRAINING["learning_rate"], betas=betas, eps=TRAINING["epsilon"])


def mean_loss(logits: torch.Tensor, targets: np.ndarray, weights: np.ndarray) -> torch.Tensor:
    """Mean over the tokens that count."""
    labels = torch.where(torch.tensor(weights) > 0, torch.tensor(targets, dtype=torch.long), -100)
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())


def named(prefix: str, tensors: dict[str, torch.Tensor]) -> dict[str, np.ndarray]:
    """transformers' names and shapes, as they are: the test knows how they map."""
    return {f"{prefix}/{name}": t.numpy().astype(np.float32) for name, t in tensors.items()}


if __name__ == "__main__":
    main()
