"""Hugging Face folders and files: all layouts of GPT-2 weights are read; that of transformers is written.

Source: `GPT2LMHeadModel.save_pretrained` of transformers; its linears, "Conv1D", have kernels [in, out] too.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gpt2jax.model.config import GPT2Config
from gpt2jax.model.gpt2 import Params
from gpt2jax.tokenizer.bpe import Tokenizer
from gpt2jax.tokenizer.files import save_tokenizer
from gpt2jax.utils.atomic_io import atomic_folder
from gpt2jax.utils.json_files import read_json
from gpt2jax.utils.validation import check, must_be, one_of
from gpt2jax.weights.mapping import (
    PARAMETER_DTYPES,
    LazyTensor,
    ParamRule,
    WeightSource,
    export_tensors,
    numpy_dtype,
)
from gpt2jax.weights.model_card import refuse_foreign_card, write_card
from gpt2jax.weights.safetensors_io import read_safetensors, write_safetensors
from gpt2jax.weights.saved_settings import SavedSettings
from gpt2jax.weights.torch_reader import read_state_dict

RULES = (
    ParamRule("wte.weight", "wte.embedding"),
    ParamRule("wpe.weight", "wpe.embedding"),
    ParamRule("h.{layer}.ln_1.weight", "h.ln_1.scale"),
    ParamRule("h.{layer}.ln_1.bias", "h.ln_1.bias"),
    ParamRule("h.{layer}.attn.c_attn.weight", "h.attn.c_attn.kernel"),
    ParamRule("h.{layer}.attn.c_attn.bias", "h.attn.c_attn.bias"),
    ParamRule("h.{layer}.attn.c_proj.weight", "h.attn.c_proj.kernel"),
    ParamRule("h.{layer}.attn.c_proj.bias", "h.attn.c_proj.bias"),
    ParamRule("h.{layer}.ln_2.weight", "h.ln_2.scale"),
    ParamRule("h.{layer}.ln_2.bias", "h.ln_2.bias"),
    ParamRule("h.{layer}.mlp.c_fc.weight", "h.mlp.c_fc.kernel"),
    ParamRule("h.{layer}.mlp.c_fc.bias", "h.mlp.c_fc.bias"),
    ParamRule("h.{layer}.mlp.c_proj.weight", "h.mlp.c_proj.kernel"),
    ParamRule("h.{layer}.mlp.c_proj.bias", "h.mlp.c_proj.bias"),
    ParamRule("ln_f.weight", "ln_f.scale"),
    ParamRule("ln_f.bias", "ln_f.bias"),
    ParamRule("lm_head.weight", "lm_head.kernel"),
)
# prefixes of torch.compile, of data parallelism, and of the model within the model with a head
WRAPPERS = ("_orig_mod.", "module.", "transformer.")
# constants that old versions saved with the weights
MASK_BUFFERS = re.compile(r"h\.\d+\.attn\.(bias|masked_bias)")
# tensors of quantized linears: of GPTQ and AWQ, of bitsandbytes
QUANTIZED = (".qweight", ".qzeros", ".g_idx", ".SCB", ".quant_state.bitsandbytes__nf4", ".absmax")
INDEX = ".index.json"
WEIGHT_FILES = tuple(
    f"{name}{end}" for name in ("model.safetensors", "pytorch_model.bin") for end in ("", INDEX)
)
# a folder of only these files is taken for a saved model, and may be replaced by a new one
KNOWN_FILES = re.compile(
    r"(config|generation_config|vocab|tokenizer|tokenizer_config|special_tokens_map|added_tokens)\.json"
    r"|README\.md|chat_template\.jinja|merges\.txt|model(-\d{5}-of-\d{5})?\.safetensors|model\.safetensors\.index\.json"
)


def load_hf(path: str | os.PathLike[str]) -> tuple[GPT2Config, Params]:
    """Load a Hugging Face folder, or a weights file with its config.json beside it.

    Names may begin with `transformer.`, `module.` or `_orig_mod.`; saved attention masks are skipped; the tied head
    may be in the file once or twice, under either name. 16-bit weights become float32.

    Args:
        path: the folder, or the file.

    Returns:
        (config, params), blocks stacked.

    Raises:
        FileNotFoundError: nothing lies there.
        ValueError: the folder or file is of another kind or damaged, or tensors do not fit the configuration; all of
            them are named.
    """
    return open_hf(path).load()


def open_hf(path: str | os.PathLike[str]) -> WeightSource:
    """Return the weights that `load_hf` loads, no value read; raises as it does, except about values."""
    file = _find_weights_file(Path(path))
    config = read_config(file.parent)
    saved = _read_tensors(file)
    if quantized := next((name for name in saved if name.endswith(QUANTIZED)), None):
        raise ValueError(
            f"{file} holds quantized weights ({quantized}), as GPTQ, AWQ and bitsandbytes write, which can't be read; "
            "load the model that was quantized"
        )
    tensors = tie_head(config, strip_wrappers(saved, str(file)), str(file))
    return WeightSource(config, RULES, tensors, str(file))


def save_hf(
    folder: str | os.PathLike[str],
    config: GPT2Config,
    params: Params,
    tokenizer: Tokenizer | None = None,
    *,
    dtype: str = "float32",
    saved: SavedSettings | None = None,
    stop_token_ids: Sequence[int] = (),
    max_shard_bytes: int = 5_000_000_000,
) -> None:
    """Write config.json, generation_config.json, model.safetensors, the tokenizer's files and a model card.

    The folder appears whole or not at all. It replaces a saved model, but no other content. Rounding to 16 bits needs
    host memory for a rounded copy of one shard.

    Args:
        folder: the folder to make.
        config: the architecture.
        params: the parameters, blocks stacked.
        tokenizer: also written, unless None.
        dtype: of the weights in the file: "float32", "float16" or "bfloat16".
        saved: the files beside the weights that the model came from: what they hold and we do not use is kept.
        stop_token_ids: tokens that stop generation. Default: the end token.
        max_shard_bytes: larger weights are split into several files, which an index lists.

    Raises:
        ValueError: unknown dtype, or a weight that is not finite in it.
        FileExistsError: the folder holds files that are not part of a saved model.
    """
    check("dtype", dtype, one_of(PARAMETER_DTYPES))
    arrays = [
        (name if name.startswith("lm_head") else f"transformer.{name}", array)
        for name, array in export_tensors(config, RULES, params)
    ]
    refuse_foreign_files(Path(folder), KNOWN_FILES, "a saved model")
    refuse_foreign_card(Path(folder))
    with atomic_folder(folder, overwrite=True) as aside:
        saved = saved or SavedSettings()
        _write_json(aside / "config.json", {**saved.unused_config, **config.to_hf(), "dtype": dtype})
        stops = list(stop_token_ids) or [config.eos_token_id]
        tokens = {"bos_token_id": config.bos_token_id, "eos_token_id": stops if len(stops) > 1 else stops[0]}
        generation = saved.generation or {"_from_model_config": True}
        _write_json(aside / "generation_config.json", {**generation, **tokens})
        _write_weights(aside, arrays, dtype, max_shard_bytes)
        if tokenizer is not None:
            save_tokenizer(tokenizer, aside, max_length=config.n_positions)
        write_card(aside, Path(folder).name, library="transformers")


def read_config(folder: Path) -> GPT2Config:
    """Return the configuration in a folder's config.json.

    Raises:
        ValueError: there is none, or it is not that of a GPT-2; the message names the file.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise ValueError(
            f"{folder} has no config.json with the architecture of the weights; put it beside them"
        )
    content = read_json(path)
    if quantized := content.get("quantization_config"):
        method = quantized.get("quant_method") if isinstance(quantized, dict) else None
        raise ValueError(
            f"{path}: quantization_config says that the weights are quantized ({method or 'unknown method'!s:.50}), "
            "which can't be read; load the model that was quantized"
        )
    if content.get("pruned_heads"):
        raise ValueError(must_be(f"{path}: pruned_heads", "absent or empty", content["pruned_heads"]))
    try:
        return GPT2Config.from_hf(content)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: {error}") from None


def strip_wrappers(tensors: Mapping[str, LazyTensor], source: str) -> dict[str, LazyTensor]:
    """Return the tensors by their names without wrappers, saved masks left out.

    Raises:
        ValueError: two tensors have the same name without wrappers.
    """
    stripped: dict[str, LazyTensor] = {}
    for full_name, tensor in tensors.items():
        name = strip_prefixes(full_name, WRAPPERS)
        if MASK_BUFFERS.fullmatch(name):
            continue
        if name in stripped:
            raise ValueError(f"{source} has tensor {name} twice, once as {full_name}")
        stripped[name] = tensor
    return stripped


def strip_prefixes(name: str, prefixes: Sequence[str]) -> str:
    """Return a name without any of the prefixes, in whatever order and number they are."""
    while prefix := next((prefix for prefix in prefixes if name.startswith(prefix)), None):
        name = name.removeprefix(prefix)
    return name


def tie_head(config: GPT2Config, tensors: dict[str, LazyTensor], source: str) -> dict[str, LazyTensor]:
    """Return the tensors with one copy of a tied head, named as the embedding.

    Raises:
        ValueError: the two copies differ, so that tying would change the model.
    """
    if not config.tie_word_embeddings or "lm_head.weight" not in tensors:
        return tensors
    head = tensors["lm_head.weight"]
    embedding = tensors.get("wte.weight", head)
    others = {name: tensor for name, tensor in tensors.items() if name != "lm_head.weight"}
    # compared by their bytes: NaN is reported later, by name
    if embedding is not head and (
        head.shape != embedding.shape or head.read().tobytes() != embedding.read().tobytes()
    ):
        raise ValueError(
            f"{source}: lm_head.weight differs from wte.weight, but the config says that they are tied; "
            "set tie_word_embeddings to false to keep both, or remove one of them"
        )
    return {"wte.weight": embedding, **others}


def refuse_foreign_files(
    folder: Path, known: re.Pattern[str], kind: str, *, folders: tuple[str, ...] = ()
) -> None:
    """Raise FileExistsError if replacing the folder would delete something that is not part of `kind`."""
    entries = sorted(folder.iterdir()) if folder.is_dir() else []
    for entry in entries:
        if not known.fullmatch(entry.name) or entry.is_dir() != (entry.name in folders):
            raise FileExistsError(
                f"{folder} holds {entry.name!r}, which is not part of {kind}; give the name of a new folder"
            )


def _find_weights_file(path: Path) -> Path:
    if path.is_file():
        return path
    if not path.is_dir():
        raise FileNotFoundError(f"there are no weights at {path}")
    for name in WEIGHT_FILES:
        if (path / name).is_file():
            return path / name
    raise ValueError(f"{path} holds no weights; expected {' or '.join(WEIGHT_FILES)} in it")


def _write_weights(
    folder: Path, arrays: Sequence[tuple[str, np.ndarray]], dtype: str, max_shard_bytes: int
) -> None:
    """Write one file, or as many as the limit asks for and their index."""
    itemsize = numpy_dtype(dtype).itemsize
    shards: list[list[tuple[str, np.ndarray]]] = [[]]
    room = max_shard_bytes
    for name, array in arrays:
        if shards[-1] and array.size * itemsize > room:
            shards.append([])
            room = max_shard_bytes
        shards[-1].append((name, array))
        room -= array.size * itemsize
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        last = len(shards)
        file = "model.safetensors" if last == 1 else f"model-{number:05}-of-{last:05}.safetensors"
        write_safetensors(folder / file, shard, dtype, {"format": "pt"})
        weight_map |= dict.fromkeys((name for name, _ in shard), file)
    if len(shards) > 1:
        count = sum(array.size for _, array in arrays)
        metadata = {"total_parameters": count, "total_size": count * itemsize}
        _write_json(folder / f"model.safetensors{INDEX}", {"metadata": metadata, "weight_map": weight_map})


def _read_tensors(file: Path) -> dict[str, LazyTensor]:
    if file.name.endswith(INDEX):
        return _read_shards(file)
    return read_safetensors(file) if file.suffix == ".safetensors" else read_state_dict(file)


def _read_shards(index: Path) -> dict[str, LazyTensor]:
    """Return the tensors of all files that an index names.

    Raises:
        ValueError: the index is damaged, names files elsewhere or absent, or disagrees with their content.
    """
    weight_map = read_json(index, {"weight_map": dict})["weight_map"]
    files = sorted({str(file) for file in weight_map.values()})
    for name in files:
        if Path(name).name != name or name.endswith(INDEX):
            raise ValueError(must_be(f"{index}: a file", "a name without folders", name))
        if not (index.parent / name).is_file():
            raise ValueError(f"{index} names {name!r:.200}, which is not beside it; fetch it again")
    tensors: dict[str, LazyTensor] = {}
    for name in files:
        shard = index.parent / name
        found = _read_tensors(shard)
        expected = {tensor for tensor, file in weight_map.items() if file == name}
        wrong = sorted(expected ^ set(found))
        if wrong:
            state = "missing" if wrong[0] in expected else "there, but not in the index"
            raise ValueError(f"{shard} is not as {index.name} says: {wrong[0]} is {state}")
        tensors.update(found)
    return tensors


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", "utf-8")
