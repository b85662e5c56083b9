"""GPT-2 of keras-nlp and keras-hub: presets, *.weights.h5 files and TensorFlow checkpoints read, presets written.

The shapes give the whole architecture, down to the number of heads; epsilon and activation are fixed in that library.
A `config.json` beside a preset's weights must agree with them, and gives the dropout. A preset that is written here
loads with `keras_hub.models.GPT2CausalLM.from_preset(folder)`.

Source: keras_nlp/src/models/gpt2 and keras_hub/src/models/gpt2; keras_hub/src/utils/preset_utils.py (the JSON files);
keras/src/saving/saving_lib.py (the h5 layout); keras 2.15's saving/legacy/save.py (the checkpoint's names).
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from gpt2jax.model.config import GPT2Config
from gpt2jax.model.gpt2 import Params, count_parameters
from gpt2jax.tokenizer.bpe import Tokenizer
from gpt2jax.tokenizer.files import save_tokenizer
from gpt2jax.utils.atomic_io import atomic_folder
from gpt2jax.utils.json_files import read_json
from gpt2jax.utils.validation import must_be
from gpt2jax.weights.h5_reader import read_h5
from gpt2jax.weights.h5_writer import write_h5
from gpt2jax.weights.hf import refuse_foreign_files
from gpt2jax.weights.mapping import LazyTensor, ParamRule, WeightSource, export_tensors
from gpt2jax.weights.tf_checkpoint import checkpoint_prefix, read_checkpoint

PRESET_WEIGHTS = "model.weights.h5"
# a folder of only these files is taken for a preset, and may be replaced by a new one
KNOWN_FILES = re.compile(r"(config|metadata|tokenizer)\.json|model\.weights\.h5|assets")
# settings that are fixed in keras-hub's GPT-2
SUPPORTED_VALUES = {
    "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
    "layer_norm_epsilon": (1e-5,),
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "tie_word_embeddings": (True,),
}

_QKV = ("query", "key", "value")
RULES = (
    ParamRule("token_embedding/embeddings", "wte.embedding"),
    ParamRule("position_embedding/embeddings", "wpe.embedding"),
    ParamRule("block_{layer}/attention_norm/gamma", "h.ln_1.scale"),
    ParamRule("block_{layer}/attention_norm/beta", "h.ln_1.bias"),
    *(
        ParamRule(f"block_{{layer}}/{n}/kernel", "h.attn.c_attn.kernel", "heads_out", i)
        for i, n in enumerate(_QKV)
    ),
    *(
        ParamRule(f"block_{{layer}}/{n}/bias", "h.attn.c_attn.bias", "heads_out", i)
        for i, n in enumerate(_QKV)
    ),
    ParamRule("block_{layer}/attention_output/kernel", "h.attn.c_proj.kernel", "heads_in"),
    ParamRule("block_{layer}/attention_output/bias", "h.attn.c_proj.bias"),
    ParamRule("block_{layer}/mlp_norm/gamma", "h.ln_2.scale"),
    ParamRule("block_{layer}/mlp_norm/beta", "h.ln_2.bias"),
    ParamRule("block_{layer}/mlp_in/kernel", "h.mlp.c_fc.kernel"),
    ParamRule("block_{layer}/mlp_in/bias", "h.mlp.c_fc.bias"),
    ParamRule("block_{layer}/mlp_out/kernel", "h.mlp.c_proj.kernel"),
    ParamRule("block_{layer}/mlp_out/bias", "h.mlp.c_proj.bias"),
    ParamRule("final_norm/gamma", "ln_f.scale"),
    ParamRule("final_norm/beta", "ln_f.bias"),
)
# the layers of the table above, and their names in the files; those of a block have a leading underscore in some
# versions
BLOCK_LAYERS = {
    "attention_norm": "self_attention_layer_norm",
    "query": "self_attention_layer/query_dense",
    "key": "self_attention_layer/key_dense",
    "value": "self_attention_layer/value_dense",
    "attention_output": "self_attention_layer/output_dense",
    "mlp_norm": "feedforward_layer_norm",
    "mlp_in": "feedforward_intermediate_dense",
    "mlp_out": "feedforward_output_dense",
}
OTHER_LAYERS = {
    "token_embedding": "reversible_embedding",
    "position_embedding": "position_embedding",
    "final_norm": "layer_normalization",
}
_FROM_BLOCK_LAYER = {theirs: ours for ours, theirs in BLOCK_LAYERS.items()}
_FROM_OTHER_LAYER = {theirs: ours for ours, theirs in OTHER_LAYERS.items()}
_NORMS = ("attention_norm", "mlp_norm", "final_norm")
_H5_BLOCK = re.compile(
    r"(?P<root>.*?)transformer_decoder(?:_(?P<layer>\d+))?/(?P<rest>.+)/vars/(?P<index>[01])"
)
_H5_OTHER = re.compile(rf"(?P<root>.*?)(?P<kind>{'|'.join(_FROM_OTHER_LAYER)})/vars/(?P<index>[01])")
_H5_ROOTS = re.compile(r"((layers|_layer_checkpoint_dependencies)/(gpt2_backbone/|functional/)?)*")
# states that are not weights: of the optimizer, of metrics, of random number generators
_H5_IGNORED = re.compile(r"(optimizer|metrics)/.*|.*(^|/)seed_generator/.*|.*state_tree/.*")
_TF_VALUE = "/.ATTRIBUTES/VARIABLE_VALUE"
_TF_IGNORED = re.compile(
    r"(optimizer|save_counter|keras_api|_preprocessor|preprocessor)(/|$)|.*/\.OPTIMIZER_SLOT/.*"
)
_TF_NAME = re.compile(
    r"(?:layer_with_weights-(?P<outer>\d+)/)?layer_with_weights-(?P<number>\d+)/(?P<rest>.+)"
)


def load_keras(path: str | os.PathLike[str]) -> tuple[GPT2Config, Params]:
    """Load a preset folder or a *.weights.h5 file, of the backbone or of the whole model.

    Returns:
        (config, params), blocks stacked.

    Raises:
        FileNotFoundError: nothing lies there.
        ValueError: the file is of another kind or damaged; the message names it and all tensors that do not fit.
    """
    return open_keras(path).load()


def open_keras(path: str | os.PathLike[str]) -> WeightSource:
    """Return the weights that `load_keras` loads, no value read; raises as it does, except about values."""
    path = Path(path)
    file = path / PRESET_WEIGHTS if path.is_dir() else path
    if not file.is_file():
        raise FileNotFoundError(f"there are no Keras weights at {file}")
    found = read_h5(file)
    names = {full: _h5_name(full) for full in found if not _H5_IGNORED.fullmatch(full)}
    tensors = _rename(found, names, str(file))
    preset = file.parent / "config.json" if file.name == PRESET_WEIGHTS else None
    return WeightSource(_infer_config(tensors, preset, str(file)), RULES, tensors, str(file))


def load_keras_checkpoint(path: str | os.PathLike[str]) -> tuple[GPT2Config, Params]:
    """Load a TensorFlow checkpoint of `model.save_weights("....ckpt")`.

    Args:
        path: its prefix, its .index file, or the folder with it.

    Returns:
        (config, params), blocks stacked.

    Raises:
        ValueError: the checkpoint is of another kind or damaged; the message names the file and all tensors that do
            not fit.
    """
    return open_keras_checkpoint(path).load()


def open_keras_checkpoint(path: str | os.PathLike[str]) -> WeightSource:
    """Return the weights that `load_keras_checkpoint` loads, no value read; raises as it, except about values."""
    prefix = checkpoint_prefix(Path(path))
    if prefix is None:
        raise ValueError(
            f"{path} is not a TensorFlow checkpoint; expected {Path(path).name}.index and its data"
        )
    saved = read_checkpoint(prefix)
    if "model/wte" in saved:
        raise ValueError(
            f"{prefix} is a checkpoint of OpenAI's GPT-2; put its hparams.json into {prefix.parent}"
        )
    tensors = _rename_checkpoint(saved, str(prefix))
    return WeightSource(_infer_config(tensors, None, str(prefix)), RULES, tensors, str(prefix))


def is_keras(path: Path) -> bool:
    """Return True if a path looks like a preset folder or an h5 file."""
    return path.suffix == ".h5" or (path / PRESET_WEIGHTS).is_file()


def is_keras_checkpoint(path: Path) -> bool:
    """Return True if a path looks like a TensorFlow checkpoint."""
    return checkpoint_prefix(path) is not None


def save_keras(
    folder: str | os.PathLike[str], config: GPT2Config, params: Params, tokenizer: Tokenizer | None = None
) -> None:
    """Write a preset: config.json, metadata.json, model.weights.h5 and the tokenizer's files.

    The folder appears whole or not at all. It replaces a preset, but no other content.

    Args:
        folder: the folder to make.
        config: the architecture.
        params: the parameters, blocks stacked; float32 in the file.
        tokenizer: also written, unless None.

    Raises:
        ValueError: the architecture has a feature that keras-hub's GPT-2 lacks; the message names it.
        FileExistsError: the folder holds files that are not part of a preset.
    """
    for name, legal in SUPPORTED_VALUES.items():
        if getattr(config, name) not in legal:
            raise ValueError(must_be(name, f"{legal[0]!r} in a Keras preset", getattr(config, name)))
    rates = {name: getattr(config, name) for name in ("embd_pdrop", "attn_pdrop", "resid_pdrop")}
    if len(set(rates.values())) > 1:
        raise ValueError(must_be(", ".join(rates), "equal in a Keras preset", tuple(rates.values())))
    refuse_foreign_files(Path(folder), KNOWN_FILES, "a Keras preset", folders=("assets",))
    with atomic_folder(folder, overwrite=True) as aside:
        settings = {**_backbone_settings(config), "dropout": config.resid_pdrop}
        _write_object(aside / "config.json", "gpt2_backbone", "GPT2Backbone", settings)
        about = {"parameter_count": count_parameters(params), "tasks": ["CausalLM"]}
        _write_json(aside / "metadata.json", about)
        tensors = export_tensors(config, RULES, params)
        write_h5(
            aside / PRESET_WEIGHTS,
            ((_h5_path(name), np.asarray(values, np.float32)) for name, values in tensors),
        )
        if tokenizer is not None:
            _write_tokenizer(aside, tokenizer)


# ---- configuration ----


def _infer_config(tensors: Mapping[str, LazyTensor], preset: Path | None, source: str) -> GPT2Config:
    """Return the architecture that the shapes give, checked against a preset's config.json if there is one."""
    ndims = {"token_embedding/embeddings": 2, "position_embedding/embeddings": 2, "block_0/query/kernel": 3}
    ndims["block_0/mlp_in/kernel"] = 2
    for name, ndim in ndims.items():
        if name not in tensors or len(tensors[name].shape) != ndim:
            state = f"has shape {list(tensors[name].shape)}" if name in tensors else "is missing"
            raise ValueError(f"{source} is not a GPT-2 of Keras: {name} {state}")
    wte, wpe, query, mlp = (tensors[name].shape for name in ndims)
    layers = {name.split("/")[0] for name in tensors if name.startswith("block_")}
    try:
        config = GPT2Config(
            vocab_size=wte[0],
            n_positions=wpe[0],
            n_embd=wte[1],
            n_layer=len(layers),
            n_head=query[1],
            n_inner=None if mlp[1] == 4 * wte[1] else mlp[1],
            **GPT2Config.published_end_token(wte[0]),
        )
    except (ValueError, TypeError) as error:
        raise ValueError(f"{source}: {error}") from None
    return config if preset is None or not preset.is_file() else _read_preset(preset, config)


def _backbone_settings(config: GPT2Config) -> dict[str, Any]:
    return {
        "vocabulary_size": config.vocab_size,
        "num_layers": config.n_layer,
        "num_heads": config.n_head,
        "hidden_dim": config.n_embd,
        "intermediate_dim": config.mlp_dim,
        "max_sequence_length": config.n_positions,
    }


def _read_preset(path: Path, config: GPT2Config) -> GPT2Config:
    """Return `config` with the dropout of a preset's config.json; raise ValueError if the rest of the file differs."""
    content = read_json(path, {"class_name": str, "config": dict})
    if content["class_name"] != "GPT2Backbone":
        raise ValueError(must_be(f"{path}: class_name", "GPT2Backbone", content["class_name"]))
    settings = content["config"]
    for name, value in _backbone_settings(config).items():
        if settings.get(name) != value:
            raise ValueError(must_be(f"{path}: {name}", f"{value} as in the weights", settings.get(name)))
    rate = settings.get("dropout", 0.1)
    try:
        return dataclasses.replace(config, embd_pdrop=rate, attn_pdrop=rate, resid_pdrop=rate)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: {error}") from None


# ---- names ----


def _h5_path(name: str) -> str:
    """Return the place in a preset's h5 file of a tensor of the table."""
    *block, layer, variable = name.split("/")
    number = int(block[0].removeprefix("block_")) if block else 0
    decoder = f"transformer_decoder{f'_{number}' if number else ''}/_{BLOCK_LAYERS[layer]}" if block else ""
    return f"layers/{decoder or OTHER_LAYERS[layer]}/vars/{int(variable in ('beta', 'bias'))}"


def _h5_name(full: str) -> str | None:
    """Return the name in the table of a dataset; None if it has none."""
    name = None
    if match := _H5_BLOCK.fullmatch(full):
        layer = _FROM_BLOCK_LAYER.get(_strip_underscores(match["rest"]))
        name = f"block_{int(match['layer'] or 0)}/{layer}" if layer else None
    elif match := _H5_OTHER.fullmatch(full):
        name = _FROM_OTHER_LAYER[match["kind"]]
    if match is None or name is None or not _H5_ROOTS.fullmatch(match["root"]):
        return None
    variables = ("kernel", "bias")
    if name.endswith("embedding"):
        variables = ("embeddings", "reverse_embeddings")
    elif name.endswith(_NORMS):
        variables = ("gamma", "beta")
    return f"{name}/{variables[int(match['index'])]}"


def _strip_underscores(path: str) -> str:
    return re.sub(r"(^|/)_", r"\1", path)


def _rename_checkpoint(tensors: Mapping[str, LazyTensor], source: str) -> dict[str, LazyTensor]:
    """Return a checkpoint's tensors by the names of the table.

    Layers with weights are numbered: in the backbone token 0, position 1, blocks 2.., the final norm last. A saved
    whole model has the backbone as its number 0 and the token embedding, which is nearer to its root, as 1.
    """
    values = {n.removesuffix(_TF_VALUE): t for n, t in tensors.items() if n.endswith(_TF_VALUE)}
    values = {name: tensor for name, tensor in values.items() if not _TF_IGNORED.match(name)}
    matches = {name: _TF_NAME.fullmatch(name) for name in values}
    is_whole = any(match and match["outer"] for match in matches.values())
    names = {name: match and _checkpoint_name(match, is_whole) for name, match in matches.items()}
    return _rename(values, names, source)


def _checkpoint_name(match: re.Match[str], is_whole: bool) -> str | None:
    number, rest = int(match["number"]), match["rest"]
    if is_whole and not match["outer"]:
        return "token_embedding/embeddings" if (number, rest) == (1, "embeddings") else None
    if rest in ("gamma", "beta"):
        return f"final_norm/{rest}"
    if rest in ("embeddings", "position_embeddings"):
        return {0: "token_embedding/embeddings", 1: "position_embedding/embeddings"}.get(number)
    layer, _, variable = rest.rpartition("/")
    name = _FROM_BLOCK_LAYER.get(_strip_underscores(layer))
    return f"block_{number - 2}/{name}/{variable}" if name and number >= 2 else None


def _rename(
    tensors: Mapping[str, LazyTensor], names: Mapping[str, str | None], source: str
) -> dict[str, LazyTensor]:
    """Return the tensors by the names of the table; one without keeps its own and is reported as unknown."""
    result: dict[str, LazyTensor] = {}
    for full, name in names.items():
        if (name or full) in result:
            raise ValueError(f"{source} has tensor {name} twice, once as {full}")
        result[name or full] = tensors[full]
    return result


# ---- files of a preset ----


def _write_tokenizer(folder: Path, tokenizer: Tokenizer) -> None:
    settings = {
        "dtype": "int32",
        "config_file": "tokenizer.json",
        "sequence_length": None,
        "add_prefix_space": tokenizer.add_prefix_space,
        "unsplittable_tokens": sorted(tokenizer.special_tokens),
    }
    _write_object(folder / "tokenizer.json", "gpt2_tokenizer", "GPT2Tokenizer", settings)
    assets = folder / "assets" / "tokenizer"
    assets.mkdir(parents=True)
    with tempfile.TemporaryDirectory() as saved:
        save_tokenizer(tokenizer, saved)
        shutil.copy(Path(saved) / "vocab.json", assets / "vocabulary.json")
        shutil.copy(Path(saved) / "merges.txt", assets / "merges.txt")


def _write_object(path: Path, module: str, name: str, settings: Mapping[str, Any]) -> None:
    """Write the description of an object as Keras does."""
    content = {
        "module": f"keras_hub.src.models.gpt2.{module}",
        "class_name": name,
        "config": {"name": module, "trainable": True, **settings},
        "registered_name": f"keras_hub>{name}",
    }
    _write_json(path, content)


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=4) + "\n", "utf-8")
