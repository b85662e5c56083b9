"""LoRA adapters as PEFT folders, both ways: adapter_config.json and adapter_model.safetensors.

Source: `PeftModel.save_pretrained` of peft. GPT-2's linears are "Conv1D" there (fan_in_fan_out), but the factors
lie as for every linear: lora_A.weight [r, in], lora_B.weight [out, r], each the transpose of ours; DoRA's
lora_magnitude_vector is [out].
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from gpt2jax.lora.adapters import kernel_of
from gpt2jax.lora.combine import fuse_qkv
from gpt2jax.lora.config import QKV_TARGETS, TARGETS, LoRAConfig
from gpt2jax.model.config import GPT2Config
from gpt2jax.model.gpt2 import Params, abstract_params
from gpt2jax.ops.low_rank import column_norms
from gpt2jax.utils.atomic_io import atomic_folder
from gpt2jax.weights.hf import refuse_foreign_files
from gpt2jax.weights.mapping import FLOAT_DTYPES, LazyTensor, is_finite, listed
from gpt2jax.weights.peft_targets import declared_linears
from gpt2jax.weights.safetensors_io import read_safetensors, write_safetensors
from gpt2jax.weights.torch_reader import read_state_dict

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
TORCH_FILE = "adapter_model.bin"  # of old versions, and of save_pretrained(safe_serialization=False)
OURS = re.compile(r"adapter_config\.json|adapter_model\.(safetensors|bin)|README\.md")
# the tensors of a linear, and ours; all are turned
LEAVES = {"lora_A.weight": "lora_a", "lora_B.weight": "lora_b", "lora_magnitude_vector": "magnitude"}
WRAPPERS = ("base_model.", "model.", "_orig_mod.", "module.", "transformer.")

# settings of PEFT that would change the result; any other value than those here is refused by name
PLAIN = {
    "peft_type": ("LORA",),
    "task_type": (None, "CAUSAL_LM"),
    "bias": ("none", None),
    "lora_bias": (False, None),
    "init_lora_weights": (True, False, None, "gaussian", "eva", "orthogonal"),  # others change the base model
    "modules_to_save": ([], None),
    "trainable_token_indices": ([], {}, None),
    "target_parameters": ([], None),
    "layer_replication": ([], None),
    "megatron_config": ({}, None),
}
# settings that are ours too, by their names here
SHARED = {
    "r": "rank",
    "lora_alpha": "alpha",
    "lora_dropout": "dropout",
    "use_rslora": "use_rslora",
    "use_dora": "use_dora",
    "rank_pattern": "rank_pattern",
    "alpha_pattern": "alpha_pattern",
}
# they say how training begins, or which linears are adapted, which the tensors must agree with (peft_targets.py)
WITHOUT_EFFECT = {
    "auto_mapping", "base_model_name_or_path", "exclude_modules", "fan_in_fan_out", "inference_mode",
    "eva_config", "layers_pattern", "layers_to_transform", "megatron_core", "peft_version", "revision",
    "target_modules", "ensure_weight_tying", "qalora_group_size", "runtime_config",
}  # fmt: skip


def read_adapter(
    folder: str | os.PathLike[str], config: GPT2Config, params: Params | None = None
) -> tuple[LoRAConfig, Params]:
    """Reads the adapters of a PEFT folder.

    Args:
        folder: the folder.
        config: of the model that they are for.
        params: its parameters, needed for DoRA in some of the blocks only.

    Returns:
        (settings, adapters), stacked over the blocks. A linear that PEFT adapted in some blocks only, by what the
        settings say, has zero factors in the others.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: it holds no LoRA adapters, they use something that is not known here, are not those that the
            settings name, or do not fit `config`.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no adapter folder at {folder}")
    file = next((folder / name for name in (WEIGHTS_FILE, TORCH_FILE) if (folder / name).is_file()), None)
    if file is None or not (folder / CONFIG_FILE).is_file():
        raise ValueError(f"{folder} is no PEFT folder: expected {CONFIG_FILE} and {WEIGHTS_FILE} in it")
    settings = _read_settings(folder / CONFIG_FILE)
    read = read_safetensors if file.name == WEIGHTS_FILE else read_state_dict
    tensors = {_plain_name(name): tensor for name, tensor in read(file).items()}
    found = [target for target in TARGETS if any(f".{target}.lora_" in f".{name}" for name in tensors)]
    if not found:
        raise ValueError(f"{file} holds no adapters of {', '.join(TARGETS)}")
    try:
        shared = {SHARED[name]: value for name, value in settings.items() if name in SHARED and value}
        lora = LoRAConfig(**shared, targets=tuple(found))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{folder / CONFIG_FILE}: {error}") from None
    problems = _contradictions(settings, tensors, config.n_layer, folder / CONFIG_FILE)
    return lora, _fill(config, lora, tensors, file, params, problems)


def write_adapter(
    folder: str | os.PathLike[str],
    config: GPT2Config,
    lora: LoRAConfig,
    adapters: Params,
    *,
    base_model: str | None = None,
    params: Params | None = None,
) -> None:
    """Writes adapters as a PEFT folder, whole or not at all.

    PEFT knows no slices of a linear: those of query, key and value become one adapter of attn.c_attn, whose
    factors are theirs side by side with zeros elsewhere.

    Args:
        folder: the folder to make. One that holds an adapter is replaced.
        config: of the model that they are for.
        lora: their settings.
        adapters: the adapters, stacked over the blocks.
        base_model: name or path of that model, for PEFT's AutoPeftModel.
        params: its parameters, needed for DoRA of slices.

    Raises:
        ValueError: DoRA of slices, and no `params`.
        FileExistsError: the folder holds other files.
    """
    if any(target in QKV_TARGETS for target in lora.targets):
        lora, adapters = fuse_qkv(config, lora, adapters, params)
    arrays = [
        (f"base_model.model.transformer.{name}", values.T)
        for name, values in _parts(config, lora, jax.tree.map(np.asarray, adapters))
    ]
    shapes = {name: values.shape for name, values in arrays}
    whole = float(lora.alpha).is_integer()  # PEFT declares alpha as a whole number, and computes with any
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "r": lora.rank,
        "lora_alpha": int(lora.alpha) if whole else lora.alpha,
        "lora_dropout": lora.dropout,
        "use_rslora": lora.use_rslora,
        "use_dora": lora.use_dora,
        "rank_pattern": dict(lora.rank_pattern),
        "alpha_pattern": dict(lora.alpha_pattern),
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
        elif (
            name not in SHARED and name not in WITHOUT_EFFECT and value
        ):  # what is newer than this table is off when false or empty
            raise ValueError(f"{path}: {name}={value!r:.100} is not known and may change the result")
    if settings.get("peft_type") != "LORA":
        raise ValueError(f"{path}: peft_type is missing, expected 'LORA'")
    for name, kinds in (("r", (int,)), ("lora_alpha", (int, float))):
        if type(settings.get(name)) not in kinds or settings[name] <= 0:
            raise ValueError(f"{path}: {name}={settings.get(name)!r:.100} must be a positive number")
    return settings


def _plain_name(name: str) -> str:
    """The name from the block on, and without the adapter's own name, which PEFT leaves out of its files."""
    while wrapper := next((w for w in WRAPPERS if name.startswith(w)), None):
        name = name.removeprefix(wrapper)
    return name


def _parts(config: GPT2Config, lora: LoRAConfig, adapters: Params) -> Iterator[tuple[str, np.ndarray]]:
    """(name from the block on, the part of NumPy `adapters` that it is the transpose of), block by block."""
    for layer in range(config.n_layer):
        for target in lora.targets:
            module, linear = target.split(".")
            adapter, rank = adapters["h"][module][linear], lora.rank_of(layer, target)
            parts = {"lora_a": adapter["lora_a"][layer, :, :rank], "lora_b": adapter["lora_b"][layer, :rank]}
            if lora.use_dora:
                parts["magnitude"] = adapter["magnitude"][layer]
            for name, leaf in LEAVES.items():
                if leaf in parts:
                    yield f"h.{layer}.{target}.{name}", parts[leaf]


def _fill(
    config: GPT2Config,
    lora: LoRAConfig,
    tensors: Mapping[str, LazyTensor],
    file: Path,
    params: Params | None,
    problems: list[str],
) -> Params:
    """Every tensor to its place; all that do not fit are named in one error, with the problems there are already."""
    adapters = _empty(config, lora, tensors, file)
    places = dict(_parts(config, lora, adapters))
    problems = _problems(tensors, places) + problems
    if problems:
        raise ValueError(f"{file} does not fit the model and its {CONFIG_FILE}: {listed(problems)}")
    for name, tensor in tensors.items():
        places[name][...] = tensor.read().T
        if not is_finite(places[name]):
            raise ValueError(f"{file}: tensor {name} holds values that are not finite numbers")
    for target in lora.targets if lora.use_dora else ():
        names = [f"h.{layer}.{target}.lora_magnitude_vector" for layer in range(config.n_layer)]
        absent = [name not in tensors for name in names]
        if any(absent):
            if params is None:
                raise ValueError(
                    f"{file} has DoRA in some blocks only: give the model's parameters to read it"
                )
            module, linear = target.split(".")
            lengths = np.asarray(column_norms(kernel_of(params["h"], target)))
            adapters["h"][module][linear]["magnitude"][absent] = lengths[absent]
    return jax.tree.map(jax.device_put, adapters)


def _empty(config: GPT2Config, lora: LoRAConfig, tensors: Mapping[str, LazyTensor], file: Path) -> Params:
    """Adapters of zeros in NumPy, for tensors to be read into."""
    largest = max(max(tensor.shape, default=0) for tensor in tensors.values())
    adapters: Params = {}
    for target in lora.targets:
        module, linear = target.split(".")
        layers, in_dim, out_dim = kernel_of(abstract_params(config)["h"], target).shape
        rank = max(lora.rank_of(layer, target) for layer in range(layers))
        if rank > largest:  # a damaged number must not ask for memory
            raise ValueError(f"{file}: no tensor is as large as the rank of {rank} in {CONFIG_FILE}")
        shapes = {"lora_a": (layers, in_dim, rank), "lora_b": (layers, rank, out_dim)}
        if lora.use_dora:
            shapes["magnitude"] = (layers, out_dim)
        zeros = {leaf: np.zeros(shape, np.float32) for leaf, shape in shapes.items()}
        adapters.setdefault(module, {})[linear] = zeros
    return {"h": adapters}


def _contradictions(
    settings: Mapping[str, Any], tensors: Mapping[str, LazyTensor], layers: int, path: Path
) -> list[str]:
    """Where the tensors are not of the linears that the settings name, as with adapters of a smaller model."""
    try:
        declared = declared_linears(settings, layers)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    if declared is None:
        return []
    every = {f"h.{layer}.{target}" for layer in range(layers) for target in TARGETS}
    adapted = {name.partition(".lora_")[0] for name in tensors} & every
    names = f"target_modules={settings['target_modules']!r:.60}"
    if settings.get("layers_to_transform") is not None:
        names += f" and layers_to_transform={settings['layers_to_transform']!r:.60}"
    missing = [f"{name}: has no tensors, but is one of {names}" for name in sorted(declared - adapted)]
    return missing + [f"{name}: has tensors, but is none of {names}" for name in sorted(adapted - declared)]


def _problems(tensors: Mapping[str, LazyTensor], places: Mapping[str, np.ndarray]) -> list[str]:
    """What keeps the tensors from their places. A linear may be absent from a block, but not in part."""
    problems = []
    for name, tensor in tensors.items():
        if name not in places:
            problems.append(f"{name}: unknown, {list(tensor.shape)}")
        elif tensor.shape != places[name].T.shape:
            problems.append(f"{name}: has shape {list(tensor.shape)}, expected {list(places[name].T.shape)}")
        elif tensor.dtype not in FLOAT_DTYPES:
            problems.append(f"{name}: is {tensor.dtype}, expected one of {', '.join(FLOAT_DTYPES)}")
    adapted = {name.partition(".lora_")[0] for name in tensors}
    missing = [n for n in places if n not in tensors and n.partition(".lora_")[0] in adapted]
    return problems + [f"{name}: missing, though others of this linear are there" for name in missing]
