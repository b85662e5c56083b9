"""Writes the models in hf-*/ with transformers, and its logits and greedy continuation beside them.

Run with the peers installed: python tests/golden/make_hf.py
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

BASE: dict[str, Any] = {
    "attn_implementation": "eager",
    "vocab_size": 97,
    "n_positions": 64,
    "n_embd": 16,
    "n_layer": 2,
    "n_head": 2,
    "bos_token_id": 96,
    "eos_token_id": 96,
}
VARIANTS: dict[str, tuple[torch.dtype, dict[str, Any]]] = {
    "hf-tied": (torch.float32, {}),
    "hf-untied-float16": (
        torch.float16,
        {
            "tie_word_embeddings": False,
            "n_inner": 24,
            "activation_function": "gelu",
            "layer_norm_epsilon": 0.01,
            "scale_attn_by_inverse_layer_idx": True,
        },
    ),
    "hf-relu-bfloat16": (torch.bfloat16, {"activation_function": "relu", "scale_attn_weights": False}),
}


def main() -> None:
    here = Path(__file__).parent
    for seed, (name, (dtype, changes)) in enumerate(VARIANTS.items()):
        config = transformers.GPT2Config(**{**BASE, **changes})
        model: Any = transformers.GPT2LMHeadModel(config).eval()
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter_name, parameter in model.named_parameters():
                noise = torch.randn(parameter.shape, generator=generator) * 0.3
                is_scale = "ln_" in parameter_name and parameter_name.endswith("weight")
                parameter.copy_(noise + 1 if is_scale else noise)
        if name == "hf-tied":
            save_for_torch(model, here)
        folder = here / name
        shutil.rmtree(folder, ignore_errors=True)
        model.to(dtype).save_pretrained(folder)
        model.float()
        token_ids = torch.randint(0, 97, (2, 24), generator=generator)
        with torch.no_grad():
            logits = model(token_ids).logits.numpy()
            options = {"max_new_tokens": 40, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
            greedy = model.generate(token_ids[:1, :8], **options).numpy()[0]
        expected = {"token_ids": token_ids.tolist(), "greedy": greedy.tolist()}
        (folder / "expected.json").write_text(json.dumps(expected) + "\n")
        np.save(folder / "logits.npy", logits)
        print(folder, sum(file.stat().st_size for file in folder.iterdir()), "bytes")


def save_for_torch(model, here: Path) -> None:
    """pytorch_model.bin as older versions of transformers wrote it: with masks, and the tied head twice."""
    tensors = dict(model.state_dict())
    for layer in range(model.config.n_layer):
        mask = torch.tril(torch.ones((64, 64), dtype=torch.uint8)).view(1, 1, 64, 64)
        tensors[f"transformer.h.{layer}.attn.bias"] = mask
        tensors[f"transformer.h.{layer}.attn.masked_bias"] = torch.tensor(-1e4)
    for name, is_zip in (("hf-bin-zip", True), ("hf-bin-legacy", False)):
        folder = here / name
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        model.config.to_json_file(folder / "config.json")
        torch.save(tensors, folder / "pytorch_model.bin", _use_new_zipfile_serialization=is_zip)


if __name__ == "__main__":
    main()
