"""Load models and adapters: by name, from the hub, from files of every known format, and from runs of `finetune`."""

from __future__ import annotations

import dataclasses
import pathlib
from typing import Any

import jax

from gpt2jax.language_model import LanguageModel
from gpt2jax.lora.config import LoRAConfig
from gpt2jax.model.config import PRESETS, GPT2Config
from gpt2jax.model.gpt2 import Params
from gpt2jax.utils.fingerprint import params_sha256
from gpt2jax.utils.json_files import read_json
from gpt2jax.utils.validation import check, check_model, check_path, non_empty_string, optional, unknown_name
from gpt2jax.weights.formats import load_weights
from gpt2jax.weights.hub import download
from gpt2jax.weights.keras_lora import load_keras_lora
from gpt2jax.weights.mapping import check_parameter_dtype
from gpt2jax.weights.orbax import is_checkpoint, read_run, restore_trained
from gpt2jax.weights.peft import read_adapter, read_embeddings, write_adapter

# the published models: the names that people use, and those on the hub
HUB_IDS = {name: f"openai-community/{name}" for name in ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")}
PACKAGED_MODEL = "gpt2-mini"
ASSETS = pathlib.Path(__file__).parent / "assets"


def load(name: str | pathlib.Path, *, revision: str | None = None, dtype: str = "float32") -> LanguageModel:
    """Load a model.

    Args:
        name: "gpt2-mini" (packaged, needs no network), "gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl" or any other
            hub id of a GPT-2 (`owner/name`), or a path: a weights folder or file, a run folder of `finetune`, or one
            of its checkpoints (`RUN/checkpoints/STEP`), even of a run that has not ended.
        revision: commit, tag or branch, for a model on the hub.
        dtype: of the parameters. "bfloat16" and "float16" round them as they are read and take half the memory: for
            generating, evaluating, and as the frozen base of adapters. Training all parameters makes them float32.

    Raises:
        ValueError: an unknown name (the message gives the nearest known one), or files of another kind or damaged.
        FileNotFoundError: nothing lies at the path.
    """
    check_parameter_dtype(dtype)
    place = locate(name, revision=revision)
    if is_checkpoint(place.weights):
        model = load_checkpoint(place.weights, dtype)
    else:
        config, params, tokenizer = load_weights(place.weights, dtype)
        model = LanguageModel(config, params, tokenizer)
    if place.adapter is not None:
        model = load_adapter(model, place.adapter)
    return dataclasses.replace(model, source=str(name))


@dataclasses.dataclass(frozen=True)
class Location:
    """The place of a model.

    Attributes:
        weights: folder, file or prefix of its weights, or a checkpoint of a run.
        adapter: folder of the adapters on them, or None.
        name: what `load` takes for the weights: the name on the hub, or the path.
    """

    weights: pathlib.Path
    adapter: pathlib.Path | None
    name: str


def locate(name: str | pathlib.Path, *, revision: str | None = None) -> Location:
    """Find what `load` loads; fetch it if it is on the hub. Raises as `load` does."""
    source = str(name)
    path = check_path("name", name)
    check("revision", revision, optional(non_empty_string))
    # a TensorFlow checkpoint goes by the first part of its files' names
    exists = path.exists() or pathlib.Path(f"{path}.index").is_file()
    is_packaged = source == PACKAGED_MODEL
    is_on_hub = source in HUB_IDS or (not exists and _is_hub_id(source))
    if revision is not None and not is_on_hub and (exists or is_packaged):
        raise ValueError(
            f"revision must be None for {source}, which is not on the hub, got {revision!r:.100}"
        )
    if is_packaged:
        path = ASSETS / source
    elif is_on_hub:
        path = download(HUB_IDS.get(source, source), revision=revision)
    elif not exists:
        if _looks_like_path(source):
            raise FileNotFoundError(f"there is no model at {source}")
        raise ValueError(
            f"{unknown_name('model', source, PRESETS)} (or a hub id such as owner/name, or a path)"
        )
    return _locate_run(path) if (path / "run.json").is_file() else Location(path, None, source)


def _locate_run(path: pathlib.Path) -> Location:
    """Return the result of a run folder: its model, or its adapters and their base."""
    if (path / "model").is_dir():
        return Location(path / "model", None, str(path / "model"))
    if not (path / "adapter").is_dir():
        raise ValueError(
            f"{path} holds a run that has not ended; resume it, or load one of {path / 'checkpoints'}"
        )
    base = path / "base"
    if not base.is_dir():
        base = read_json(path / "run.json", {"base_model": str})["base_model"]
    try:
        return dataclasses.replace(locate(base), adapter=path / "adapter")
    except (ValueError, FileNotFoundError) as error:  # such as a path from another working folder
        kind = FileNotFoundError if isinstance(error, FileNotFoundError) else ValueError
        raise kind(f"{path} holds adapters of a model that can't be found: {error}") from None


def _looks_like_path(source: str) -> bool:
    has_suffix = bool(pathlib.PurePath(source).suffix)
    return source.startswith((".", "/", "~")) or source.count("/") > 1 or has_suffix


def _is_hub_id(source: str) -> bool:
    return source.count("/") == 1 and not _looks_like_path(source)


def load_adapter(model: LanguageModel, path: str | pathlib.Path) -> LanguageModel:
    """Return the model with the LoRA adapters of a PEFT folder, or of a *.lora.h5 file of Keras.

    Adapters that the model has already are merged into its weights first; see `combine_adapters`.

    Raises:
        FileNotFoundError: nothing lies there.
        ValueError: the adapters do not fit the model, or are of an unknown kind.
    """
    check_model("model", model)
    path = check_path("path", path)
    model = model.merge_adapter()
    if path.suffix == ".h5":
        lora, adapters = load_keras_lora(path, model.config)
    else:
        config, params = read_embeddings(path, model.config, model.params)
        model = dataclasses.replace(model, config=config, params=params)
        lora, adapters = read_adapter(path, config, params)
    return dataclasses.replace(model, adapters=adapters, lora=lora)


def save_adapter(model: LanguageModel, path: str | pathlib.Path) -> None:
    """Write the model's LoRA adapters as a PEFT folder (adapter_config.json, adapter_model.safetensors).

    Raises:
        ValueError: the model has no adapters.
    """
    check_model("model", model)
    if model.adapters is None or model.lora is None:
        raise ValueError("the model has no adapters to save; fine-tune it with lora=LoRAConfig(...) first")
    base_model = None if model.source is None else HUB_IDS.get(model.source, model.source)
    path = check_path("path", path)
    write_adapter(path, model.config, model.lora, model.adapters, base_model=base_model, params=model.params)


def load_checkpoint(path: pathlib.Path, dtype: str = "float32") -> LanguageModel:
    """Load the model of a checkpoint, such as the folder `RUN/checkpoints/STEP`.

    Its parameters are their moving average if the run kept one. A checkpoint is not one of `weights.formats.FORMATS`,
    because of a run that trained adapters or a part of the parameters it holds only those: the rest is that of the
    model that the run began with, which may be of any format.

    Args:
        path: the folder.
        dtype: of the parameters; adapters are float32.

    Raises:
        ValueError: adapters or a part of the parameters were trained, and the rest of the model can't be found: it
            had no name, or is another one now.
        FileNotFoundError: the model that the run began with, which has the tokenizer, is not where it was.
    """
    run = read_run(path)
    settings, name = run["finetune"], run["base_model"]
    base = None if name is None else load(name).merge_adapter()
    if settings["lora"] is not None or settings["freeze"]:
        if base is None:
            raise ValueError(f"{path} is a part of a model that was made in memory and is in no file")
        if params_sha256(base.params) != run["base_sha256"]:
            raise ValueError(f"{path} is a part of a model: {name} is no longer what the run began with")
    trained = restore_trained(path)
    if base is None:
        model = LanguageModel(GPT2Config(**run["model_config"]), trained)
    elif settings["lora"] is not None:
        model = dataclasses.replace(base, adapters=trained, lora=LoRAConfig(**settings["lora"]))
    else:
        model = dataclasses.replace(base, params=_replace_leaves(base.params, trained))
    params = jax.tree.map(lambda leaf: leaf.astype(dtype), model.params)
    return dataclasses.replace(model, params=params, source=str(path))


def _replace_leaves(params: Params, trained: Params) -> Params:
    """Return `params` with the leaves of `trained`, which may have a part of the same names."""

    def replace(name: str, value: Any) -> Any:
        if name not in trained:
            return value
        return _replace_leaves(value, trained[name]) if isinstance(value, dict) else trained[name]

    return {name: replace(name, value) for name, value in params.items()}
