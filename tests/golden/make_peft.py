"""Writes peft*/: adapters of the peft library for the model in hf-tied/, and the logits of both together.

Run after make_hf.py with the peers installed: python tests/golden/make_peft.py
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

# without peft the name is that of the folder here
from peft import LoraConfig, get_peft_model  # pyright: ignore[reportAttributeAccessIssue]

KINDS: dict[str, dict[str, Any]] = {
    "peft": {"r": 3, "lora_alpha": 5, "use_rslora": True, "target_modules": ["c_attn", "mlp.c_proj"]},
    "peft-dora": {
        "r": 3,
        "lora_alpha": 5,
        "use_dora": True,
        "target_modules": ["c_attn", "c_fc"],
        "rank_pattern": {"h.1.attn.c_attn": 2},
        "alpha_pattern": {"c_fc": 4},
    },
}


def main() -> None:
    for name, settings in KINDS.items():
        make(Path(__file__).parent, name, settings)


def make(here: Path, name: str, settings: dict[str, Any]) -> None:
    folder = here / name
    base: Any = transformers.AutoModelForCausalLM.from_pretrained(
        here / "hf-tied", attn_implementation="eager"
    )
    model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", fan_in_fan_out=True, **settings)).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                noise = 0.2 * torch.randn(parameter.shape, generator=generator)
                parameter.copy_(parameter + noise if "magnitude" in name else noise)
        token_ids = torch.randint(0, 97, (2, 24), generator=generator)
        logits = model(token_ids).logits.numpy()
    shutil.rmtree(folder, ignore_errors=True)
    model.peft_config["default"].base_model_name_or_path = "hf-tied"
    model.save_pretrained(str(folder))
    (folder / "README.md").unlink()
    (folder / "expected.json").write_text(json.dumps({"token_ids": token_ids.tolist()}) + "\n")
    np.save(folder / "logits.npy", logits)


if __name__ == "__main__":
    main()
