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
from gpt2jax.utils.atomic_io import read_object
from gpt2jax.utils.fingerprint import params_sha256
from gpt2jax.utils.validation import check_model, check_path
from gpt2jax.weights.formats import load_weights
from gpt2jax.weights.hub import download
from gpt2jax.weights.keras_lora import load_keras_lora
from gpt2jax.weights.mapping import check_parameter_dtype
from gpt2jax.weights.orbax import is_checkpoint, read_run, restore_trained
from gpt2jax.weights.peft import read_adapter, write_adapter

# the published models, by the name that people use, and where the hub keeps them
HUB_IDS = {name: f"openai-community/{name}" for name in ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")}
PACKAGED = pathlib.Path(__file__).parent / "assets"


def load(name: str | pathlib.Path, *, revision: str | None = None, dtype: str = "float32") -> LanguageModel:
    """Loads a model.

    Args:
        name: "gpt2-mini" (packaged, needs no network), "gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl" or any other
            hub id of a GPT-2 (`owner/name`), or a path: a weights folder or file, a run folder of `finetune`, or one
            of its checkpoints (`RUN/checkpoints/STEP`), be the run at its end or not.
        revision: commit, tag or branch, for a model on the hub.
        dtype: of the parameters. "bfloat16" and "float16" round them as they are read and take half the memory: for
            generating, evaluating, and as the frozen base of adapters. Training all parameters makes them float32.

    Raises:
        ValueError: no such name (the message lists the known ones), or files that are not what they should be.
        FileNotFoundError: a path where nothing lies.
    """
    path = check_path("name", name)
    if is_checkpoint(path):
        return load_checkpoint(path, dtype)
    place = locate(name, revision=revision)
    config, params, tokenizer = load_weights(place.weights, dtype)
    model = LanguageModel(config, params, tokenizer, source=str(name))
    if place.adapter is not None:
        model = dataclasses.replace(load_adapter(model, place.adapter), source=str(name))
    return model


@dataclasses.dataclass(frozen=True)
class Location:
    """Where a model lies.

    Attributes:
        weights: folder, file or prefix of its weights.
        adapter: folder of the adapters on them, or None.
        name: what leads to the weights: the name on the hub, or the path.
    """

    weights: pathlib.Path
    adapter: pathlib.Path | None
    name: str


def locate(name: str | pathlib.Path, *, revision: str | None = None) -> Location:
    """Finds what `load` loads, and fetches it from the hub where it is there; raises as `load` does."""
    source = str(name)
    path = check_path("name", name)
    if revision is not None and (not isinstance(revision, str) or not revision):
        raise ValueError(f"revision={revision!r:.60} must be a commit, tag or branch, or None")
    # a TensorFlow checkpoint is named by what its files' names begin with
    exists = path.exists() or pathlib.Path(f"{path}.index").is_file()
    on_hub = source in HUB_IDS or (not exists and _is_hub_id(source))
    if revision is not None and not on_hub and (exists or source == "gpt2-mini"):
        raise ValueError(f"{source} is not on the hub: it has no revision {revision!r}")
    if source == "gpt2-mini":
        path = PACKAGED / source
    elif on_hub:
        path = download(HUB_IDS.get(source, source), revision=revision)
    elif not exists:
        if _looks_like_path(source):
            raise FileNotFoundError(f"there is no model at {source}")
        known = ", ".join(PRESETS)
        raise ValueError(f"unknown model {source!r}; known: {known}, hub ids such as owner/name, and paths")
    return _locate_run(path) if (path / "run.json").is_file() else Location(path, None, source)


def _locate_run(path: pathlib.Path) -> Location:
    """The result of a run folder: its model, or its adapters and their base."""
    if (path / "model").is_dir():
        return Location(path / "model", None, str(path / "model"))
    if not (path / "adapter").is_dir():
        raise ValueError(
            f"{path} holds a run that has not ended: resume it, or load one of {path / 'checkpoints'}"
        )
    base = path / "base"
    if not base.is_dir():
        base = read_object(path / "run.json", "base_model")["base_model"]
    try:
        return dataclasses.replace(locate(base), adapter=path / "adapter")
    except (ValueError, FileNotFoundError) as error:  # such as a path from another working folder
        kind = FileNotFoundError if isinstance(error, FileNotFoundError) else ValueError
        raise kind(f"{path} holds adapters of a model that can't be had: {error}") from None


def _looks_like_path(source: str) -> bool:
    return (
        source.startswith((".", "/", "~")) or source.count("/") > 1 or bool(pathlib.PurePath(source).suffix)
    )


def _is_hub_id(source: str) -> bool:
    return source.count("/") == 1 and not _looks_like_path(source)


def load_adapter(model: LanguageModel, path: str | pathlib.Path) -> LanguageModel:
    """The model with the LoRA adapters of a PEFT folder, or of a *.lora.h5 file of Keras.

    Adapters that the model has already are merged into its weights first; see `combine_adapters`.

    Raises:
        FileNotFoundError: nothing lies there.
        ValueError: the adapters do not fit the model, or are of a kind that is not known here.
    """
    check_model("model", model)
    path = check_path("path", path)
    model = model.merge_adapter()
    if path.suffix == ".h5":
        lora, adapters = load_keras_lora(path, model.config)
    else:
        lora, adapters = read_adapter(path, model.config, model.params)
    return dataclasses.replace(model, adapters=adapters, lora=lora)


def save_adapter(model: LanguageModel, path: str | pathlib.Path) -> None:
    """Writes the model's LoRA adapters as a PEFT folder (adapter_config.json, adapter_model.safetensors).

    Raises:
        ValueError: the model has no adapters.
    """
    check_model("model", model)
    if model.adapters is None or model.lora is None:
        raise ValueError("the model has no adapters to save: fine-tune it with lora=LoRAConfig(...) first")
    base_model = None if model.source is None else HUB_IDS.get(model.source, model.source)
    path = check_path("path", path)
    write_adapter(path, model.config, model.lora, model.adapters, base_model=base_model, params=model.params)


def load_checkpoint(path: pathlib.Path, dtype: str = "float32") -> LanguageModel:
    """The model of a checkpoint, such as the folder `RUN/checkpoints/STEP`.

    Its parameters are their moving average where the run kept one.

    Args:
        path: the folder.
        dtype: of the parameters; adapters are float32.

    Raises:
        ValueError: no such dtype; or adapters or a part of the parameters were trained, and the rest of the model is
            not to be had: it had no name, or is another one now.
        FileNotFoundError: the model that the run began with, which has the tokenizer, is not where it was.
    """
    check_parameter_dtype(dtype)
    run = read_run(path)
    settings, name = run["finetune"], run["base_model"]
    base = None if name is None else load(name).merge_adapter()
    if settings["lora"] is not None or settings["freeze"]:
        if base is None:
            raise ValueError(f"{path} is a part of a model that was made in memory and is in no file")
        if params_sha256(base.params) != run["base_sha256"]:
            raise ValueError(f"{path} is a part of a model: {name} is not any more what the run began with")
    trained = restore_trained(path)
    if base is None:
        model = LanguageModel(GPT2Config(**run["model_config"]), trained)
    elif settings["lora"] is not None:
        model = dataclasses.replace(base, adapters=trained, lora=LoRAConfig(**settings["lora"]))
    else:
        model = dataclasses.replace(base, params=_replaced(base.params, trained))
    params = jax.tree.map(lambda leaf: leaf.astype(dtype), model.params)
    return dataclasses.replace(model, params=params, source=str(path))


def _replaced(params: Any, trained: Any) -> Params:
    """`params` with the leaves of `trained` in the place of its own."""
    if not isinstance(trained, dict):
        return trained
    return {
        name: _replaced(value, trained[name]) if name in trained else value for name, value in params.items()
    }
