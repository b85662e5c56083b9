"""Writes nanogpt-*/ckpt.pt as nanoGPT's train.py saves it, and the logits of a forward pass in torch.

The model is spelled out here after nanoGPT's description: pre-LayerNorm blocks, exact GELU, linears [out, in],
biases everywhere or nowhere, tied head. Run with torch installed: python tests/golden/make_nanogpt.py
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F

LAYERS, HEADS, DIM, VOCAB, CONTEXT = 2, 2, 16, 97, 32


def main() -> None:
    here = Path(__file__).parent
    for bias in (True, False):
        generator = torch.Generator().manual_seed(int(bias))

        def random(*shape: int, around: float = 0.0, generator=generator) -> torch.Tensor:
            return around + 0.3 * torch.randn(shape, generator=generator)

        tensors = {
            "transformer.wte.weight": random(VOCAB, DIM),
            "transformer.wpe.weight": random(CONTEXT, DIM),
        }
        for i in range(LAYERS):
            h = f"transformer.h.{i}"
            linears = {"attn.c_attn": (3 * DIM, DIM), "attn.c_proj": (DIM, DIM), "mlp.c_fc": (4 * DIM, DIM)}
            for norm in ("ln_1", "ln_2"):
                tensors[f"{h}.{norm}.weight"] = random(DIM, around=1.0)
                if bias:
                    tensors[f"{h}.{norm}.bias"] = random(DIM)
            for name, shape in {**linears, "mlp.c_proj": (DIM, 4 * DIM)}.items():
                tensors[f"{h}.{name}.weight"] = random(*shape)
                if bias:
                    tensors[f"{h}.{name}.bias"] = random(shape[0])
        tensors["transformer.ln_f.weight"] = random(DIM, around=1.0)
        if bias:
            tensors["transformer.ln_f.bias"] = random(DIM)
        tensors["lm_head.weight"] = tensors["transformer.wte.weight"]  # one tensor under two names
        token_ids = torch.randint(0, VOCAB, (2, 24), generator=generator)
        logits = forward(tensors, token_ids)
        arguments = {"n_layer": LAYERS, "n_head": HEADS, "n_embd": DIM, "block_size": CONTEXT, "bias": bias}
        arguments.update(vocab_size=VOCAB, dropout=0.0)
        prefix = "" if bias else "_orig_mod."  # torch.compile's
        checkpoint = {
            "model": {f"{prefix}{name}": tensor for name, tensor in tensors.items()},
            "optimizer": {
                "state": {0: {"step": torch.tensor(5.0), "exp_avg": random(3)}},
                "param_groups": [{"lr": 1e-3}],
            },
            "model_args": arguments,
            "iter_num": 5,
            "best_val_loss": torch.tensor(3.5),
            "config": {"out_dir": "out", "learning_rate": 6e-4, "compile": not bias},
        }
        folder = here / ("nanogpt-bias" if bias else "nanogpt-plain")
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        torch.save(checkpoint, folder / "ckpt.pt")
        (folder / "expected.json").write_text(json.dumps({"token_ids": token_ids.tolist()}) + "\n")
        np.save(folder / "logits.npy", logits.numpy())


def forward(tensors: dict[str, torch.Tensor], token_ids: torch.Tensor) -> torch.Tensor:
    def linear(x: torch.Tensor, name: str) -> torch.Tensor:
        return F.linear(x, tensors[f"{name}.weight"], tensors.get(f"{name}.bias"))

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        return F.layer_norm(x, (DIM,), tensors[f"{name}.weight"], tensors.get(f"{name}.bias"), 1e-5)

    batch, length = token_ids.shape
    x = tensors["transformer.wte.weight"][token_ids] + tensors["transformer.wpe.weight"][:length]
    for i in range(LAYERS):
        h = f"transformer.h.{i}"
        qkv = linear(norm(x, f"{h}.ln_1"), f"{h}.attn.c_attn").split(DIM, dim=2)
        q, k, v = (part.view(batch, length, HEADS, DIM // HEADS).transpose(1, 2) for part in qkv)
        y = (
            F.scaled_dot_product_attention(q, k, v, is_causal=True)
            .transpose(1, 2)
            .reshape(batch, length, DIM)
        )
        x = x + linear(y, f"{h}.attn.c_proj")
        x = x + linear(F.gelu(linear(norm(x, f"{h}.ln_2"), f"{h}.mlp.c_fc")), f"{h}.mlp.c_proj")
    return norm(x, "transformer.ln_f") @ tensors["lm_head.weight"].T


if __name__ == "__main__":
    main()
