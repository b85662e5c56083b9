"""LoRA adapters as PEFT folders, both ways: adapter_config.json and adapter_model.safetensors.

Source: `PeftModel.save_pretrained` of peft. GPT-2's linears are "Conv1D" there (fan_in_fan_out), but the factors
lie as for every linear: lora_A.weight [r, in], lora_B.weight [out, r], each the transpose of ours.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from gpt2jax.config import GPT2Config
from gpt2jax.files import atomic_folder
from gpt2jax.lora import TARGETS, LoRAConfig
from gpt2jax.model import Params, abstract_params
from gpt2jax.weights.hf import refuse_foreign_files
from gpt2jax.weights.mapping import FLOAT_DTYPES, Tensor, is_finite, listed
from gpt2jax.weights.safetensors_file import read_safetensors, write_safetensors

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
OURS = re.compile(r"adapter_config\.json|adapter_model\.safetensors")
NAME = "base_model.model.transformer.h.{layer}.{target}.lora_{factor}.weight"
FACTORS = {"A": "lora_a", "B": "lora_b"}
WRAPPERS = ("base_model.", "model.", "_orig_mod.", "module.", "transformer.")

# settings of PEFT that would change the result; any other value than those here is refused by name
PLAIN = {
    "peft_type": ("LORA",),
    "task_type": (None, "CAUSAL_LM"),
    "bias": ("none", None),
    "lora_bias": (False, None),
    "init_lora_weights": (True, False, None, "gaussian", "eva", "orthogonal"),  # others change the base model
    "use_dora": (False, None),
    "rank_pattern": ({}, None),
    "alpha_pattern": ({}, None),
    "modules_to_save": ([], None),
    "trainable_token_indices": ([], {}, None),
    "target_parameters": ([], None),
    "layer_replication": ([], None),
    "megatron_config": ({}, None),
}
# they choose which linears are adapted or how training begins: the tensors in the file say the outcome
WITHOUT_EFFECT = {
    "auto_mapping", "base_model_name_or_path", "exclude_modules", "fan_in_fan_out", "inference_mode",
    "eva_config", "layers_pattern", "layers_to_transform", "lora_alpha", "lora_dropout", "megatron_core",
    "peft_version", "r", "revision", "target_modules", "use_rslora", "ensure_weight_tying", "qalora_group_size",
    "runtime_config",
}  # fmt: skip


def load_adapter(folder: str | os.PathLike[str], config: GPT2Config) -> tuple[LoRAConfig, Params]:
    """Reads the adapters of a PEFT folder.

    rsLoRA's scale, alpha / sqrt(r), is expressed by an alpha that gives the same scale.

    Args:
        folder: the folder.
        config: of the model that they are for.

    Returns:
        (settings, adapters), stacked over the blocks. A linear that PEFT adapted in some blocks only has zero
        factors in the others.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: it holds no LoRA adapters, they use something that is not known here, or do not fit `config`.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no adapter folder at {folder}")
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        if not (folder / name).is_file():
            raise ValueError(f"{folder} is no PEFT folder: expected {CONFIG_FILE} and {WEIGHTS_FILE} in it")
    settings = _read_settings(folder / CONFIG_FILE)
    tensors = {_plain_name(name): t for name, t in read_safetensors(folder / WEIGHTS_FILE).items()}
    found = [target for target in TARGETS if any(f".{target}.lora_" in f".{name}" for name in tensors)]
    if not found:
        raise ValueError(f"{folder / WEIGHTS_FILE} holds no adapters of {', '.join(TARGETS)}")
    rank = settings["r"]
    scale = settings["lora_alpha"] / (math.sqrt(rank) if settings.get("use_rslora") else rank)
    try:
        dropout = settings.get("lora_dropout") or 0.0
        lora = LoRAConfig(rank=rank, alpha=scale * rank, dropout=dropout, targets=tuple(found))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{folder / CONFIG_FILE}: {error}") from None
    return lora, _fill(config, lora, tensors, folder / WEIGHTS_FILE)


def save_adapter(
    folder: str | os.PathLike[str],
    config: GPT2Config,
    lora: LoRAConfig,
    adapters: Params,
    *,
    base_model: str | None = None,
) -> None:
    """Writes adapters as a PEFT folder, whole or not at all.

    Args:
        folder: the folder to make. One that holds an adapter is replaced.
        config: of the model that they are for.
        lora: their settings.
        adapters: the adapters, stacked over the blocks.
        base_model: name or path of that model, for PEFT's AutoPeftModel.

    Raises:
        FileExistsError: the folder holds other files.
    """
    arrays = []
    for layer in range(config.n_layer):
        for target in lora.targets:
            module, linear = target.split(".")
            for factor, key in FACTORS.items():
                values = np.asarray(adapters["h"][module][linear][key])[layer].T
                arrays.append((NAME.format(layer=layer, target=target, factor=factor), values))
    shapes = {name: values.shape for name, values in arrays}
    whole = float(lora.alpha).is_integer()  # PEFT declares alpha as a whole number, and computes with any
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "r": lora.rank,
        "lora_alpha": int(lora.alpha) if whole else lora.alpha,
        "lora_dropout": lora.dropout,
        "target_modules": list(lora.targets),
        "fan_in_fan_out": True,
        "bias": "none",
        "inference_mode": True,
    }
    refuse_foreign_files(Path(folder), OURS, "a saved adapter")
    with atomic_folder(folder, overwrite=True) as aside:
        (aside / CONFIG_FILE).write_text(json.dumps(settings, indent=2) + "\n", "utf-8")
        write_safetensors(aside / WEIGHTS_FILE, shapes, arrays, "float32", {"format": "pt"})


def _read_settings(path: Path) -> Mapping[str, Any]:
    try:
        settings = json.loads(path.read_text("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(settings, dict):
        raise ValueError(f"{path} holds a {type(settings).__name__}, not an object")
    for name, value in settings.items():
        if name in PLAIN:
            if value not in PLAIN[name]:
                raise ValueError(
                    f"{path}: {name}={value!r:.100} is not supported, only {PLAIN[name][0]!r} is"
                )
        elif name not in WITHOUT_EFFECT and value:  # what is newer than this table is off when false or empty
            raise ValueError(f"{path}: {name}={value!r:.100} is not known and may change the result")
    if settings.get("peft_type") != "LORA":
        raise ValueError(f"{path}: peft_type is missing, expected 'LORA'")
    for name, kinds in (("r", (int,)), ("lora_alpha", (int, float))):
        if type(settings.get(name)) not in kinds:
            raise ValueError(f"{path}: {name}={settings.get(name)!r:.100} must be a positive number")
    if settings["r"] < 1:
        raise ValueError(f"{path}: r={settings['r']} must be at least 1")
    return settings


def _plain_name(name: str) -> str:
    """The name from the block on, and without the adapter's own name, which PEFT leaves out of its files."""
    while wrapper := next((w for w in WRAPPERS if name.startswith(w)), None):
        name = name.removeprefix(wrapper)
    return name


def _fill(config: GPT2Config, lora: LoRAConfig, tensors: Mapping[str, Tensor], file: Path) -> Params:
    """Every tensor to its place; all that do not fit are named in one error."""
    blocks = abstract_params(config)["h"]
    arrays: dict[str, np.ndarray] = {}
    places: dict[str, np.ndarray] = {}
    for target in lora.targets:
        module, linear = target.split(".")
        layers, in_dim, out_dim = blocks[module][linear]["kernel"].shape
        for factor, shape in (("A", (in_dim, lora.rank)), ("B", (lora.rank, out_dim))):
            key = f"{target}.{FACTORS[factor]}"
            arrays[key] = np.zeros((layers, *shape), np.float32)
            for layer in range(layers):
                places[f"h.{layer}.{target}.lora_{factor}.weight"] = arrays[key][layer]
    problems = []
    for name, tensor in tensors.items():
        if name not in places:
            problems.append(f"{name}: unknown, {list(tensor.shape)}")
        elif tensor.shape != places[name].T.shape:
            problems.append(f"{name}: has shape {list(tensor.shape)}, expected {list(places[name].T.shape)}")
        elif tensor.dtype not in FLOAT_DTYPES:
            problems.append(f"{name}: is {tensor.dtype}, expected one of {', '.join(FLOAT_DTYPES)}")
        other = (
            name.replace(".lora_A.", ".lora_?.")
            .replace(".lora_B.", ".lora_A.")
            .replace(".lora_?.", ".lora_B.")
        )
        if other not in tensors:
            problems.append(f"{other}: missing, though {name} is there")
    if problems:
        raise ValueError(f"{file} does not fit the model and its {CONFIG_FILE}:\n{listed(problems)}")
    for name, tensor in tensors.items():
        places[name][...] = tensor.read().T
        if not is_finite(places[name]):
            raise ValueError(f"{file}: tensor {name} holds values that are not finite numbers")
    adapters: Params = {}
    for key, array in arrays.items():
        module, linear, factor = key.split(".")
        adapters.setdefault(module, {}).setdefault(linear, {})[factor] = jax.device_put(array)
    return {"h": adapters}
