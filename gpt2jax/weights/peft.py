"""LoRA adapters as PEFT folders, read and written: adapter_config.json and adapter_model.safetensors.

Source: `PeftModel.save_pretrained` and `check_target_module_exists` of peft. GPT-2's linears are "Conv1D" there
(fan_in_fan_out), but the factors lie as for every linear: lora_A.weight [r, in], lora_B.weight [out, r], each the
transpose of ours; DoRA's lora_magnitude_vector is [out].
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import NoneType
from typing import Any

import jax
import numpy as np

from gpt2jax.lora.adapters import kernel_of, kernel_shape
from gpt2jax.lora.combine import fuse_qkv
from gpt2jax.lora.config import QKV_TARGETS, TARGETS, LoRAConfig, nest_targets
from gpt2jax.model.config import GPT2Config
from gpt2jax.model.gpt2 import Params, abstract_params
from gpt2jax.ops.low_rank import column_norms
from gpt2jax.tokenizer.bpe import Tokenizer
from gpt2jax.tokenizer.files import save_tokenizer
from gpt2jax.utils.atomic_io import atomic_folder
from gpt2jax.utils.json_files import read_json
from gpt2jax.utils.stand_ins import describe_stand_in
from gpt2jax.utils.validation import check, is_integer, must_be, positive_int, positive_number
from gpt2jax.weights.hf import refuse_foreign_files, strip_prefixes
from gpt2jax.weights.mapping import LazyTensor, check_tensors, read_all
from gpt2jax.weights.model_card import write_card
from gpt2jax.weights.peft_embeddings import (
    Embeddings,
    check_modules,
    embedding_settings,
    embedding_tensors,
    is_embedding,
    replace_embeddings,
    saved_modules,
    token_rows,
)
from gpt2jax.weights.safetensors_io import read_safetensors, write_safetensors
from gpt2jax.weights.torch_reader import read_state_dict

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
TORCH_FILE = "adapter_model.bin"  # of old versions, and of save_pretrained(safe_serialization=False)
# a folder of only these files is taken for a saved adapter, and may be replaced by a new one
KNOWN_FILES = re.compile(
    r"adapter_config\.json|adapter_model\.(safetensors|bin)|README\.md|chat_template\.jinja|merges\.txt"
    r"|(vocab|tokenizer|tokenizer_config|special_tokens_map|added_tokens)\.json"
)
# the tensors of a linear, and their names here; all are transposed
LEAVES = {"lora_A.weight": "lora_a", "lora_B.weight": "lora_b", "lora_magnitude_vector": "magnitude"}
WRAPPERS = ("base_model.", "model.", "_orig_mod.", "module.", "transformer.")

# settings of PEFT that would change the result; other values than these are refused by name
SUPPORTED_VALUES = {
    "peft_type": ("LORA",),
    "task_type": (None, "CAUSAL_LM"),
    "bias": ("none", None),
    "lora_bias": (False, None),
    "init_lora_weights": (True, False, None, "gaussian", "eva", "orthogonal"),  # others change the base model
    "target_parameters": ([], None),
    "layer_replication": ([], None),
    "megatron_config": ({}, None),
}
# settings of PEFT that are fields of LoRAConfig, and their names there
CONFIG_MAP = {
    "r": "rank",
    "lora_alpha": "alpha",
    "lora_dropout": "dropout",
    "use_rslora": "use_rslora",
    "use_dora": "use_dora",
    "rank_pattern": "rank_pattern",
    "alpha_pattern": "alpha_pattern",
}
# settings of how training begins, and those that name linears, which `_contradictions` compares with the tensors
IGNORED_SETTINGS = {
    "auto_mapping", "base_model_name_or_path", "exclude_modules", "fan_in_fan_out", "inference_mode",
    "eva_config", "layers_pattern", "layers_to_transform", "megatron_core", "peft_version", "revision",
    "target_modules", "ensure_weight_tying", "qalora_group_size", "runtime_config",
    "modules_to_save", "trainable_token_indices",  # of embeddings: `peft_embeddings` reads them
}  # fmt: skip

# target such as "attn.c_attn" -> leaf such as "lora_a" -> array, stacked over the blocks
FlatAdapters = dict[str, dict[str, np.ndarray]]


def read_adapter(
    folder: str | os.PathLike[str], config: GPT2Config, params: Params | None = None
) -> tuple[LoRAConfig, Params]:
    """Read the adapters of a PEFT folder.

    Args:
        folder: the folder.
        config: of the model that they are for.
        params: its parameters, needed for DoRA in some of the blocks only.

    Returns:
        (settings, adapters), stacked over the blocks. A linear that has adapters in some blocks only, as the settings
        say, has zero factors in the others.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: it holds no LoRA adapters, they use a setting that is not known here, contradict their settings, or
            do not fit `config`.
    """
    folder = Path(folder)
    file, settings, every = _open_folder(folder)
    tensors = {name: tensor for name, tensor in every.items() if not is_embedding(name)}
    found = [target for target in TARGETS if any(f".{target}.lora_" in f".{name}" for name in tensors)]
    if not found:
        raise ValueError(f"{file} holds no adapters of {', '.join(TARGETS)}")
    try:
        shared = {CONFIG_MAP[name]: value for name, value in settings.items() if name in CONFIG_MAP and value}
        lora = LoRAConfig(**shared, targets=tuple(found))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{folder / CONFIG_FILE}: {error}") from None
    adapters = _zero_adapters(config, lora, tensors, file)
    places = dict(_iter_parts(config, lora, adapters))
    linears = {_linear_of(name) for name in tensors}
    check_tensors(
        f"{file} does not fit the model and its {CONFIG_FILE}",
        tensors,
        {name: place.T.shape for name, place in places.items()},
        required=[name for name in places if _linear_of(name) in linears],
        other_problems=_contradictions(settings, linears, found, config.n_layer),
    )
    read_all(str(file), {name: (places[name], tensor, "transposed") for name, tensor in tensors.items()})
    if lora.use_dora:
        _fill_magnitudes(adapters, linears, params, file)
    return lora, jax.tree.map(jax.device_put, nest_targets(adapters))


def read_embeddings(
    folder: str | os.PathLike[str], config: GPT2Config, params: Params
) -> tuple[GPT2Config, Params, Embeddings]:
    """Return (config, params) with the embeddings that a PEFT folder holds beside its adapters, and which these are.

    Raises:
        FileNotFoundError, ValueError: see `read_adapter`.
    """
    file, settings, tensors = _open_folder(Path(folder))
    tensors = {name: tensor for name, tensor in tensors.items() if is_embedding(name)}
    rows = token_rows(settings, Path(folder) / CONFIG_FILE)
    named = {*saved_modules(settings), *(name for name, ids in rows.items() if ids)}
    if config.tie_word_embeddings and rows.get("wte") and rows.get("wte") == rows.get("lm_head"):
        named -= {"lm_head"}  # saved once
    found: Embeddings = {}
    if tensors:
        config, params, found = replace_embeddings(config, params, tensors, rows, file)
    if lost := named - found.keys():
        raise ValueError(
            f"{file} has no tensor of {' and '.join(sorted(lost))}, which {CONFIG_FILE} says are trained"
        )
    return config, params, found


def _open_folder(folder: Path) -> tuple[Path, dict[str, Any], dict[str, LazyTensor]]:
    """Return the file of tensors of a PEFT folder, its settings, and the tensors by their names from the block on."""
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no adapter folder at {folder}")
    file = next((folder / name for name in (WEIGHTS_FILE, TORCH_FILE) if (folder / name).is_file()), None)
    if file is None or not (folder / CONFIG_FILE).is_file():
        raise ValueError(f"{folder} is not a PEFT folder; expected {CONFIG_FILE} and {WEIGHTS_FILE} in it")
    for part in (folder / CONFIG_FILE, file):
        with open(part, "rb") as stream:
            if reason := describe_stand_in(stream.read(512)):
                raise ValueError(f"{part} {reason}")
    settings = _read_settings(folder / CONFIG_FILE)
    read = read_safetensors if file.name == WEIGHTS_FILE else read_state_dict
    # PEFT leaves the adapter's own name out of its files
    return file, settings, {strip_prefixes(name, WRAPPERS): tensor for name, tensor in read(file).items()}


def write_adapter(
    folder: str | os.PathLike[str],
    config: GPT2Config,
    lora: LoRAConfig,
    adapters: Params,
    *,
    base_model: str | None = None,
    params: Params | None = None,
    embeddings: Embeddings | None = None,
    tokenizer: Tokenizer | None = None,
) -> None:
    """Write adapters as a PEFT folder, whole or not at all.

    PEFT cannot express adapters of query, key and value alone: they become one adapter of attn.c_attn, which has
    their factors side by side and zeros elsewhere.

    Args:
        folder: the folder to make. It replaces a saved adapter, but no other content.
        config: of the model that they are for.
        lora: their settings.
        adapters: the adapters, stacked over the blocks.
        base_model: name or path of that model, for PEFT's AutoPeftModel.
        params: its parameters, needed for DoRA of query, key or value, and for `embeddings`.
        embeddings: which embeddings to write beside the adapters, see `read_embeddings`.
        tokenizer: also written, unless None.

    Raises:
        ValueError: DoRA of query, key or value without `params`.
        FileExistsError: the folder holds other files.
    """
    if any(target in QKV_TARGETS for target in lora.targets):
        lora, adapters = fuse_qkv(config, lora, adapters, params)
    flat = {target: jax.tree.map(np.asarray, _get_target(adapters, target)) for target in lora.targets}
    arrays = [(name, values.T) for name, values in _iter_parts(config, lora, flat)]
    embeddings = embeddings if embeddings and params else {}
    arrays += embedding_tensors(params or {}, embeddings)
    settings = _peft_settings(lora, base_model) | embedding_settings(embeddings)
    refuse_foreign_files(Path(folder), KNOWN_FILES, "a saved adapter")
    with atomic_folder(folder, overwrite=True) as aside:
        (aside / CONFIG_FILE).write_text(json.dumps(settings, indent=2) + "\n", "utf-8")
        roots = {True: "base_model.model", False: "base_model.model.transformer"}
        named = [(f"{roots[name.startswith('lm_head')]}.{name}", values) for name, values in arrays]
        write_safetensors(aside / WEIGHTS_FILE, named, "float32", {"format": "pt"})
        if tokenizer is not None:
            save_tokenizer(tokenizer, aside, max_length=config.n_positions)
        write_card(aside, Path(folder).name, library="peft", base_model=base_model, tags=("lora",))


def _peft_settings(lora: LoRAConfig, base_model: str | None) -> dict[str, Any]:
    is_integer = float(
        lora.alpha
    ).is_integer()  # PEFT declares alpha as a whole number, and computes with any
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "r": lora.rank,
        "lora_alpha": int(lora.alpha) if is_integer else lora.alpha,
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


def _get_target(adapters: Params, target: str) -> Params:
    module, linear = target.split(".")
    return adapters["h"][module][linear]


def _linear_of(name: str) -> str:
    """Return the linear of a tensor, such as "h.0.attn.c_attn"."""
    return name.partition(".lora_")[0]


def _read_settings(path: Path) -> dict[str, Any]:
    named = {"target_modules": (str, list, NoneType), "layers_to_transform": (int, list, NoneType)}
    kind = read_json(path, {"peft_type": str})["peft_type"]
    if kind not in SUPPORTED_VALUES["peft_type"]:
        raise ValueError(must_be(f"{path}: peft_type", "LORA, the only type that can be read", kind))
    settings = read_json(path, {"r": int, "lora_alpha": float}, named)
    check_modules(settings, path)
    for name, value in settings.items():
        if name in SUPPORTED_VALUES:
            if value not in SUPPORTED_VALUES[name]:
                raise ValueError(must_be(f"{path}: {name}", repr(SUPPORTED_VALUES[name][0]), value))
        elif name not in CONFIG_MAP and name not in IGNORED_SETTINGS and value:
            # settings that are newer than these tables are off when false or empty
            problem = must_be(f"{path}: {name}", "absent or off", value)
            raise ValueError(f"{problem}; it is not known here and may change the result")
    for name, rule in (("r", positive_int), ("lora_alpha", positive_number)):
        check(f"{path}: {name}", settings[name], rule)
    return settings


def _contradictions(
    settings: Mapping[str, Any], linears: set[str], targets: list[str], layers: int
) -> list[str]:
    """Return where the tensors are not of the linears that the settings name, as with adapters of a smaller model."""
    modules, excluded = settings.get("target_modules"), settings.get("exclude_modules") or []
    if isinstance(modules, str) and not re.search(
        r"\d", modules
    ):  # an expression that is the same for all blocks
        modules = targets
    if not isinstance(modules, list) or not isinstance(excluded, list):
        return []
    chosen = settings.get("layers_to_transform")
    chosen = range(layers) if chosen in (None, []) else [chosen] if is_integer(chosen) else chosen

    def is_named(name: str, ends: list[Any]) -> bool:
        return any(f".transformer.{name}".endswith(f".{end}") for end in ends)

    every = {f"h.{layer}.{target}": layer in chosen for layer in range(layers) for target in TARGETS}
    named = {
        n
        for n, is_chosen in every.items()
        if is_chosen and is_named(n, modules) and not is_named(n, excluded)
    }
    where = " and ".join(name for name in ("target_modules", "layers_to_transform") if settings.get(name))
    missing = [f"{name}: has no tensors, but {where} name it" for name in sorted(named - linears)]
    return missing + [
        f"{n}: has tensors, but {where} do not name it" for n in sorted(linears & every.keys() - named)
    ]


def _iter_parts(
    config: GPT2Config, lora: LoRAConfig, adapters: FlatAdapters
) -> Iterator[tuple[str, np.ndarray]]:
    """Yield (name of a tensor from the block on, the view of `adapters` that it is the transpose of)."""
    for layer in range(config.n_layer):
        for target in lora.targets:
            adapter, rank = adapters[target], lora.rank_of(layer, target)
            parts = {"lora_a": adapter["lora_a"][layer, :, :rank], "lora_b": adapter["lora_b"][layer, :rank]}
            if lora.use_dora:
                parts["magnitude"] = adapter["magnitude"][layer]
            for name, leaf in LEAVES.items():
                if leaf in parts:
                    yield f"h.{layer}.{target}.{name}", parts[leaf]


def _zero_adapters(
    config: GPT2Config, lora: LoRAConfig, tensors: Mapping[str, LazyTensor], file: Path
) -> FlatAdapters:
    """Return adapters of zeros, for tensors to be read into."""
    largest = max(max(tensor.shape, default=0) for tensor in tensors.values())
    blocks = abstract_params(config)["h"]
    adapters: FlatAdapters = {}
    for target in lora.targets:
        layers, in_dim, out_dim = kernel_shape(blocks, target)
        rank = max(lora.rank_of(layer, target) for layer in range(layers))
        if rank > largest:  # a damaged number must not ask for memory
            raise ValueError(f"{file}: no tensor is as large as the rank of {rank} in {CONFIG_FILE}")
        shapes: dict[str, tuple[int, ...]] = {
            "lora_a": (layers, in_dim, rank),
            "lora_b": (layers, rank, out_dim),
        }
        if lora.use_dora:
            shapes["magnitude"] = (layers, out_dim)
        adapters[target] = {leaf: np.zeros(shape, np.float32) for leaf, shape in shapes.items()}
    return adapters


def _fill_magnitudes(adapters: FlatAdapters, linears: set[str], params: Params | None, file: Path) -> None:
    """Give DoRA's linears without tensors the column norms of their kernels, which leaves the kernels unchanged."""
    for target, adapter in adapters.items():
        magnitude = adapter["magnitude"]
        absent = [f"h.{layer}.{target}" not in linears for layer in range(len(magnitude))]
        if any(absent):
            if params is None:
                raise ValueError(
                    f"{file} has DoRA in some blocks only; give the model's parameters to read it"
                )
            magnitude[absent] = np.asarray(column_norms(kernel_of(params["h"], target)))[absent]
