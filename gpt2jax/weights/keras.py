"""GPT-2 of keras-nlp and keras-hub: preset folders, *.weights.h5 files and TensorFlow checkpoints.

The shapes say all of the architecture, down to the number of heads; epsilon and activation are fixed in that library.
A `config.json` beside a preset's weights must agree with them, and gives the dropout.

Source: keras_nlp/src/models/gpt2 and keras_hub/src/models/gpt2; keras/src/saving/saving_lib.py (the h5 layout);
keras 2.15's saving/legacy/save.py (the checkpoint's names).
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from gpt2jax.model.config import GPT2Config
from gpt2jax.model.gpt2 import Params
from gpt2jax.weights.mapping import LazyTensor, ParamRule, WeightSource
from gpt2jax.weights.tf_checkpoint import checkpoint_prefix, read_checkpoint

PRESET_WEIGHTS = "model.weights.h5"
H5_START = b"\x89HDF\r\n\x1a\n"

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
# layers of a block in the files (a leading underscore, which some versions write, aside) and in the table above
_LAYERS = {
    "self_attention_layer_norm": "attention_norm",
    "self_attention_layer/query_dense": "query",
    "self_attention_layer/key_dense": "key",
    "self_attention_layer/value_dense": "value",
    "self_attention_layer/output_dense": "attention_output",
    "feedforward_layer_norm": "mlp_norm",
    "feedforward_intermediate_dense": "mlp_in",
    "feedforward_output_dense": "mlp_out",
}
_NORMS = ("attention_norm", "mlp_norm", "final_norm")
_H5_LAYER = re.compile(
    r"(?P<root>.*?)transformer_decoder(?:_(?P<layer>\d+))?/(?P<rest>.+)/vars/(?P<index>[01])"
)
_H5_OTHER = re.compile(
    r"(?P<root>.*?)(?P<kind>reversible_embedding|position_embedding|layer_normalization)/vars/(?P<index>[01])"
)
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
    """Reads a preset folder or a *.weights.h5 file, of the backbone or of the whole model.

    Returns:
        (config, params), blocks stacked.

    Raises:
        FileNotFoundError: nothing lies there.
        ValueError: it is no such file, or damaged; the message names it and all tensors that do not fit.
    """
    return open_keras(path).load()


def open_keras(path: str | os.PathLike[str]) -> WeightSource:
    """The weights that `load_keras` reads; raises ValueError as it does, but for values."""
    path = Path(path)
    file = path / PRESET_WEIGHTS if path.is_dir() else path
    if not file.is_file():
        raise FileNotFoundError(f"there are no Keras weights at {file}")
    tensors = _h5_names(read_h5(file), file)
    preset = file.parent / "config.json" if file.name == PRESET_WEIGHTS else None
    return WeightSource(_config(tensors, preset, str(file)), RULES, tensors, str(file))


def load_keras_checkpoint(path: str | os.PathLike[str]) -> tuple[GPT2Config, Params]:
    """Reads a TensorFlow checkpoint of `model.save_weights("....ckpt")`.

    Args:
        path: its prefix, its .index file, or the folder with it.

    Returns:
        (config, params), blocks stacked.

    Raises:
        ValueError: it is no such checkpoint, or damaged; the message names the file and all tensors that do not fit.
    """
    return open_keras_checkpoint(path).load()


def open_keras_checkpoint(path: str | os.PathLike[str]) -> WeightSource:
    """The weights that `load_keras_checkpoint` reads; raises ValueError as it does, but for values."""
    prefix = checkpoint_prefix(Path(path))
    if prefix is None:
        raise ValueError(f"{path} is no TensorFlow checkpoint: expected {Path(path).name}.index and its data")
    tensors = _tf_names(read_checkpoint(prefix), str(prefix))
    return WeightSource(_config(tensors, None, str(prefix)), RULES, tensors, str(prefix))


def is_keras(path: Path) -> bool:
    """Whether a path looks like a preset folder or an h5 file."""
    return path.suffix == ".h5" or (path / PRESET_WEIGHTS).is_file()


def is_keras_checkpoint(path: Path) -> bool:
    """Whether a path looks like a TensorFlow checkpoint."""
    return checkpoint_prefix(path) is not None


def _config(tensors: Mapping[str, LazyTensor], preset: Path | None, source: str) -> GPT2Config:
    """The architecture that the shapes say, checked against a preset's config.json where there is one."""
    needed = {"token_embedding/embeddings": 2, "position_embedding/embeddings": 2, "block_0/query/kernel": 3}
    needed["block_0/mlp_in/kernel"] = 2
    for name, ndim in needed.items():
        if name not in tensors or len(tensors[name].shape) != ndim:
            state = f"has shape {list(tensors[name].shape)}" if name in tensors else "is missing"
            raise ValueError(f"{source} is no GPT-2 of Keras: {name} {state}")
    wte, wpe, query, mlp = (tensors[name].shape for name in needed)
    layers = {int(name.split("/")[0].removeprefix("block_")) for name in tensors if name.startswith("block_")}
    said: dict[str, Any] = {
        "vocabulary_size": wte[0],
        "hidden_dim": wte[1],
        "max_sequence_length": wpe[0],
        "num_heads": query[1],
        "num_layers": len(layers),
        "intermediate_dim": mlp[1],
        "dropout": 0.1,
    }
    if preset is not None and preset.is_file():
        said["dropout"] = _check_preset(preset, said)
    try:
        return GPT2Config(
            vocab_size=said["vocabulary_size"],
            n_positions=said["max_sequence_length"],
            n_embd=said["hidden_dim"],
            n_layer=said["num_layers"],
            n_head=said["num_heads"],
            n_inner=None if said["intermediate_dim"] == 4 * said["hidden_dim"] else said["intermediate_dim"],
            embd_pdrop=said["dropout"],
            attn_pdrop=said["dropout"],
            resid_pdrop=said["dropout"],
        )
    except (ValueError, TypeError) as error:
        raise ValueError(f"{source}: {error}") from None


def _check_preset(path: Path, said: Mapping[str, Any]) -> float:
    """The dropout in a preset's config.json, when all else in it is what the shapes say."""
    try:
        content = json.loads(path.read_text("utf-8"))
        if content["class_name"] != "GPT2Backbone":
            raise ValueError(f"class_name={content['class_name']!r:.100} is not a GPT2Backbone")
        config = content["config"]
        wrong = [name for name in said if name != "dropout" and config[name] != said[name]]
        if wrong:
            raise ValueError(f"{wrong[0]}={config[wrong[0]]!r:.100}, but the weights have {said[wrong[0]]}")
        return config.get("dropout", 0.1)
    except (KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path} is not the config.json of a Keras preset: {error!r:.100}") from None
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


# ---- names ----


def _h5_names(tensors: Mapping[str, LazyTensor], file: Path) -> dict[str, LazyTensor]:
    names = {full: _h5_name(full) for full in tensors if not _H5_IGNORED.fullmatch(full)}
    return _renamed(tensors, names, str(file))


def _h5_name(full: str) -> str | None:
    if match := _H5_LAYER.fullmatch(full):
        layer = _LAYERS.get(re.sub(r"(^|/)_", r"\1", match["rest"]))
        name = f"block_{int(match['layer'] or 0)}/{layer}" if layer else None
    elif match := _H5_OTHER.fullmatch(full):
        kinds = {"reversible_embedding": "token_embedding", "layer_normalization": "final_norm"}
        name = kinds.get(match["kind"], match["kind"])
    else:
        return None
    if name is None or not _H5_ROOTS.fullmatch(match["root"]):
        return None
    return f"{name}/{_variable(name, int(match['index']))}"


def _variable(name: str, index: int) -> str:
    if name.endswith("embedding"):
        return ("embeddings", "reverse_embeddings")[index]
    norm = name.endswith(_NORMS)
    return (("gamma", "beta") if norm else ("kernel", "bias"))[index]


def _tf_names(tensors: Mapping[str, LazyTensor], source: str) -> dict[str, LazyTensor]:
    """Layers with weights are numbered: in the backbone token 0, position 1, blocks 2.., the final norm last.

    A saved whole model has the backbone as its number 0 and, the shortest way to it, the token embedding as 1.
    """
    values = {n.removesuffix(_TF_VALUE): t for n, t in tensors.items() if n.endswith(_TF_VALUE)}
    values = {name: tensor for name, tensor in values.items() if not _TF_IGNORED.match(name)}
    matches = {name: _TF_NAME.fullmatch(name) for name in values}
    whole = any(match and match["outer"] for match in matches.values())
    return _renamed(
        values, {name: match and _tf_name(match, whole) for name, match in matches.items()}, source
    )


def _tf_name(match: re.Match[str], whole: bool) -> str | None:
    number, rest = int(match["number"]), match["rest"]
    if whole and not match["outer"]:
        return "token_embedding/embeddings" if (number, rest) == (1, "embeddings") else None
    if rest in ("gamma", "beta"):
        return f"final_norm/{rest}"
    if rest in ("embeddings", "position_embeddings"):
        return {0: "token_embedding/embeddings", 1: "position_embedding/embeddings"}.get(number)
    layer, _, variable = rest.rpartition("/")
    name = _LAYERS.get(re.sub(r"(^|/)_", r"\1", layer))
    return f"block_{number - 2}/{name}/{variable}" if name and number >= 2 else None


def _renamed(
    tensors: Mapping[str, LazyTensor], names: Mapping[str, str | None], source: str
) -> dict[str, LazyTensor]:
    """The tensors by the names of the table; what has none keeps its own and is reported as unknown."""
    result: dict[str, LazyTensor] = {}
    for full, name in names.items():
        if (name or full) in result:
            raise ValueError(f"{source}: {name} is there twice, once as {full}")
        result[name or full] = tensors[full]
    return result


# ---- h5 files ----


def read_h5(path: Path) -> dict[str, LazyTensor]:
    """The datasets of an h5 file by path, nothing read yet.

    Raises:
        ValueError: the file is not in the format, damaged, or points to others; the message names it.
    """
    import h5py

    with open(path, "rb") as file:
        if file.read(8) != H5_START:
            raise ValueError(f"{path} is not an HDF5 file: it does not begin with the format's mark")
    try:
        with h5py.File(path, "r") as file:
            return {name: _h5_tensor(path, name, dataset) for name, dataset in _datasets(file)}
    except (OSError, RuntimeError, KeyError, TypeError, ValueError, MemoryError) as error:
        raise ValueError(f"{path} is cut short or damaged: {error}") from None


def _datasets(group: Any, prefix: str = "", depth: int = 0) -> Iterator[tuple[str, Any]]:
    """(path, dataset) below a group; links to other files are not followed."""
    import h5py

    if depth > 20:
        raise RuntimeError("its groups are nested too deeply")
    for name in group:
        if not isinstance(group.get(name, getlink=True), h5py.HardLink):
            raise RuntimeError(f"{prefix}{name} is a link, which is refused")
        item = group[name]
        if isinstance(item, h5py.Group):
            yield from _datasets(item, f"{prefix}{name}/", depth + 1)
        elif isinstance(item, h5py.Dataset):
            yield f"{prefix}{name}", item


def _h5_tensor(path: Path, name: str, dataset: Any) -> LazyTensor:
    dtype = dataset.dtype
    is_bfloat16 = dtype == np.dtype("V2") and str(dataset.attrs.get("dtype", "")) == "bfloat16"
    stored = dataset.id.get_storage_size()
    if dataset.external or dataset.is_virtual or (dataset.shape is not None and stored != dataset.nbytes):
        # also bounds the memory that a damaged file can ask for
        raise RuntimeError(f"{name} is compressed, or its numbers are not in the file")

    def read() -> np.ndarray:
        import h5py

        try:
            with h5py.File(path, "r") as file:
                values = np.asarray(file[name])
        except (OSError, RuntimeError, KeyError, TypeError, ValueError, MemoryError) as error:
            raise ValueError(f"{path} is damaged at {name}: {error}") from None
        return values.view(ml_dtypes.bfloat16) if is_bfloat16 else values

    return LazyTensor(tuple(dataset.shape or ()), "bfloat16" if is_bfloat16 else dtype.name, read, str(path))
