"""Load models and adapters: by name, from the hub, from files of every known format, and from runs of `finetune`."""

from __future__ import annotations

import contextlib
import dataclasses
import pathlib
from collections.abc import Iterator
from typing import Any

import jax

from gpt2jax.generation.file_settings import notice_illegal_settings
from gpt2jax.language_model import LanguageModel
from gpt2jax.lora.config import LoRAConfig
from gpt2jax.model.config import PRESETS, GPT2Config
from gpt2jax.model.gpt2 import Params
from gpt2jax.tokenizer.bpe import SpecialTokens, Tokenizer
from gpt2jax.tokenizer.end_tokens import choose_end_tokens, read_token_ids
from gpt2jax.tokenizer.files import load_tokenizer
from gpt2jax.utils.atomic_io import recover_folder
from gpt2jax.utils.fingerprint import params_sha256
from gpt2jax.utils.jax_switches import default_switches
from gpt2jax.utils.json_files import read_json
from gpt2jax.utils.validation import (
    check,
    check_model,
    check_path,
    is_integer,
    must_be,
    non_empty_string,
    optional,
    unknown_name,
)
from gpt2jax.weights.formats import open_weights, read_tokenizer_beside
from gpt2jax.weights.hub import download
from gpt2jax.weights.keras_lora import load_keras_lora
from gpt2jax.weights.mapping import check_parameter_dtype
from gpt2jax.weights.orbax import is_checkpoint, read_run, restore_trained
from gpt2jax.weights.peft import read_adapter, read_embeddings, write_adapter
from gpt2jax.weights.saved_settings import read_saved_settings

# the published models: the names that people use, and those on the hub
HUB_IDS = {name: f"openai-community/{name}" for name in ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")}
PACKAGED_MODEL = "gpt2-mini"
ASSETS = pathlib.Path(__file__).parent / "assets"


@default_switches()
def load(
    name: str | pathlib.Path,
    *,
    revision: str | None = None,
    dtype: str = "float32",
    tokenizer: Tokenizer | str | pathlib.Path | None = None,
    end_token: str | int | None = None,
    special_tokens: SpecialTokens = "text",
) -> LanguageModel:
    """Load a model.

    Args:
        name: "gpt2-mini" (packaged, needs no network), "gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl" or any other
            hub id of a GPT-2 (`owner/name`), or a path: a weights folder or file, a run folder of `finetune`, or one
            of its checkpoints (`RUN/checkpoints/STEP`), even of a run that has not ended.
        revision: commit, tag or branch, for a model on the hub.
        dtype: of the parameters. "bfloat16" and "float16" round them as they are read and take half the memory: for
            generating, evaluating, and as the frozen base of adapters. Training all parameters makes them float32.
        tokenizer: for weights without one, or instead of the one beside them: a folder or file for
            `load_tokenizer`, "gpt2", or a `Tokenizer`.
        end_token: text or id of the token that begins, separates and ends texts. Default: see
            `gpt2jax.tokenizer.end_tokens`.
        special_tokens: "parse" reads the special tokens that prompts and texts spell, such as <|endoftext|>, as these
            tokens; "text" reads them as plain characters.

    Raises:
        ValueError: an unknown name (the message gives the nearest known one), or files of another kind or damaged.
        FileNotFoundError: nothing lies at the path.
    """
    check_parameter_dtype(dtype)
    place = locate(name, revision=revision)
    if is_checkpoint(place.weights):
        model = _with_tokenizer(load_checkpoint(place.weights, dtype), tokenizer, end_token)
    else:
        model = build_model(*open_weights(place.weights)[1].load(dtype), place.weights, tokenizer, end_token)
    if place.adapter is not None:
        model = load_adapter(model, place.adapter)
    if model.tokenizer is not None:
        model = dataclasses.replace(model, tokenizer=model.tokenizer.with_special_tokens(special_tokens))
    return dataclasses.replace(model, source=str(name))


def build_model(
    config: GPT2Config,
    params: Params,
    weights: pathlib.Path,
    tokenizer: Tokenizer | str | pathlib.Path | None = None,
    end_token: str | int | None = None,
) -> LanguageModel:
    """Build the model of some weights with what lies beside them: tokenizer, end tokens, settings.

    Args:
        config: as read from the weights.
        params: their parameters.
        weights: file or folder that both were read from.
        tokenizer: see `load`.
        end_token: see `load`.

    Raises:
        ValueError: a file beside the weights is damaged, or an argument does not fit the model.
    """
    folder = weights if weights.is_dir() else weights.parent
    saved = read_saved_settings(folder)
    if tokenizer is None:
        model = LanguageModel(config, params, read_tokenizer_beside(weights, end_token), saved=saved)
    else:
        model = LanguageModel(config, params, saved=saved)
    model = _with_tokenizer(model, tokenizer, end_token)
    notice_illegal_settings(model)
    files = {"config.json": saved.config, "generation_config.json": saved.generation}
    named = {name: read_token_ids(str(folder / name), content) for name, content in files.items()}
    if saved.is_derived and set(named["generation_config.json"]) == set(named["config.json"]):
        del named["generation_config.json"]
    if end_token is not None:  # the caller knows better than the files
        return model
    trusted = () if saved.is_derived else ("generation_config.json",)
    found = choose_end_tokens(config.vocab_size, model.tokenizer, named, trusted=trusted)
    end = config.eos_token_id if found.end is None and not named.get("config.json") else found.end
    bos = end if config.bos_token_id is None else config.bos_token_id
    config = dataclasses.replace(config, bos_token_id=bos, eos_token_id=end)
    return dataclasses.replace(model, config=config, stop_token_ids=found.stops)


def _with_tokenizer(
    model: LanguageModel, tokenizer: Tokenizer | str | pathlib.Path | None, end_token: str | int | None
) -> LanguageModel:
    """Return the model with the tokenizer and the end token that a caller of `load` names."""
    vocab_size = model.config.vocab_size
    if tokenizer is not None:
        found = read_tokenizer(tokenizer, end_token)
        unsplit = {*found.special_tokens.values(), *found.added_tokens.values()}
        if any(i >= vocab_size and i not in unsplit for i, _ in found.tokens()):
            raise ValueError(
                f"tokenizer must be one of the model's {vocab_size} ids, got one of {found.vocab_size} ({tokenizer})"
            )
        model = dataclasses.replace(model, tokenizer=found)
    if end_token is None:
        return model
    end = end_token
    if model.tokenizer is not None:
        changed = model.tokenizer.with_end_token(end_token)
        model, end = dataclasses.replace(model, tokenizer=changed), changed.end_token_id
    if not isinstance(end, int) or not 0 <= end < vocab_size:
        legal = f"a token of the model, which has ids 0 to {vocab_size - 1}"
        hint = (
            f"; the tokenizer gives it id {end}"
            if is_integer(end)
            else "; there is no tokenizer to give it an id"
        )
        raise ValueError(must_be("end_token", legal, end_token) + hint)
    config = dataclasses.replace(model.config, bos_token_id=end, eos_token_id=end)
    return dataclasses.replace(model, config=config, stop_token_ids=())


def read_tokenizer(
    tokenizer: Tokenizer | str | pathlib.Path, end_token: str | int | None = None
) -> Tokenizer:
    """Return the tokenizer that an argument names: itself, "gpt2", or a folder or file; raises as `load_tokenizer`."""
    if isinstance(tokenizer, Tokenizer):
        return tokenizer
    path = check_path("tokenizer", tokenizer)
    if not path.exists():
        if str(tokenizer) in PRESETS:
            return Tokenizer.gpt2(PRESETS[str(tokenizer)].vocab_size)
        raise FileNotFoundError(f"there is no tokenizer at {tokenizer}; expected a folder, a file, or gpt2")
    return load_tokenizer(path, end_token=end_token)


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


def check_model_name(name: str | pathlib.Path) -> None:
    """Raise as `load` does for a name that is unknown, or a path where nothing lies; the hub is not asked."""
    if not _is_on_hub(str(name), check_path("name", name)):
        locate(name)


def locate(name: str | pathlib.Path, *, revision: str | None = None) -> Location:
    """Find what `load` loads; fetch it if it is on the hub. Raises as `load` does."""
    source = str(name)
    path = check_path("name", name)
    check("revision", revision, optional(non_empty_string))
    recover_folder(path)
    exists, is_on_hub = _exists(path), _is_on_hub(source, path)
    is_packaged = source == PACKAGED_MODEL
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
        if source.count("/") == 1:
            raise FileNotFoundError(
                f"there is no model at {source}; a name that begins with runs/ or a folder that is here is a path"
            )
        raise ValueError(
            f"{unknown_name('model', source, PRESETS)} (or a hub id such as owner/name, or a path)"
        )
    return _locate_run(path) if (path / "run.json").is_file() else Location(path, None, source)


def _locate_run(path: pathlib.Path) -> Location:
    """Return the result of a run folder: its model, or its adapters and their base."""
    for name in ("model", "adapter", "base"):
        recover_folder(path / name)
    if (path / "model").is_dir():
        return Location(path / "model", None, str(path / "model"))
    if not (path / "adapter").is_dir():
        raise ValueError(
            f"{path} holds a run that has not ended; resume it, or load one of {path / 'checkpoints'}"
        )
    base = path / "base"
    if not base.is_dir():
        base = read_json(path / "run.json", {"base_model": str})["base_model"]
    adapters = f"{path} holds adapters of a model that"
    with _base_errors(f"{adapters} can't be found", f"{adapters} leads back to it: {base!r:.200}"):
        return dataclasses.replace(locate(base), adapter=path / "adapter")


@contextlib.contextmanager
def _base_errors(missing: str, circular: str) -> Iterator[None]:
    """Say of what the model is the base that can't be loaded, such as one of another working folder.

    Args:
        missing: the beginning of the message; the reason follows.
        circular: the message for a model that is its own base.
    """
    try:
        yield
    except RecursionError:
        raise ValueError(circular) from None
    except (ValueError, OSError) as error:
        if "leads back to it" in str(error):
            raise
        kind = FileNotFoundError if isinstance(error, OSError) else ValueError
        raise kind(f"{missing}: {error}") from None


def _looks_like_path(source: str) -> bool:
    has_suffix = bool(pathlib.PurePath(source).suffix)
    return source.startswith((".", "/", "~")) or source.count("/") > 1 or has_suffix


def _exists(path: pathlib.Path) -> bool:
    # a TensorFlow checkpoint goes by the first part of its files' names
    return path.exists() or pathlib.Path(f"{path}.index").is_file()


def _is_on_hub(source: str, path: pathlib.Path) -> bool:
    """Return whether a name is looked for on the hub: runs/mine and other names that begin with a folder are paths."""
    if source in HUB_IDS:
        return True
    is_hub_id = source.count("/") == 1 and not _looks_like_path(source)
    first = pathlib.Path(source.split("/")[0])
    return is_hub_id and not _exists(path) and str(first) != "runs" and not first.is_dir()


@default_switches()
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
        config, params, embeddings = read_embeddings(path, model.config, model.params)
        model = dataclasses.replace(model, config=config, params=params, adapter_embeddings=embeddings)
        lora, adapters = read_adapter(path, config, params)
    return dataclasses.replace(model, adapters=adapters, lora=lora)


@default_switches()
def save_adapter(model: LanguageModel, path: str | pathlib.Path) -> None:
    """Write the model's LoRA adapters as a PEFT folder: adapters, the tokenizer's files, and a model card.

    Embeddings that came with the adapters (`LanguageModel.adapter_embeddings`) are written with them.

    Raises:
        ValueError: the model has no adapters.
    """
    check_model("model", model)
    if model.adapters is None or model.lora is None:
        raise ValueError("the model has no adapters to save; fine-tune it with lora=LoRAConfig(...) first")
    base_model = None if model.source is None else HUB_IDS.get(model.source, model.source)
    path = check_path("path", path)
    write_adapter(
        path,
        model.config,
        model.lora,
        model.adapters,
        base_model=base_model,
        params=model.params,
        embeddings=model.adapter_embeddings,
        tokenizer=model.tokenizer,
    )


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
    circular = f"{path} is a part of a model: {name} leads back to it"
    with _base_errors(f"{path} began with a model that can't be loaded", circular):
        base = None if name is None else load(name).merge_adapter()
    lora = settings.get("lora")
    if lora is not None or settings.get("freeze"):
        if base is None:
            raise ValueError(f"{path} is a part of a model that was made in memory and is in no file")
        if params_sha256(base.params) != run.get("base_sha256"):
            raise ValueError(f"{path} is a part of a model: {name} is no longer what the run began with")
    trained = restore_trained(path)
    try:
        if base is None:
            model = LanguageModel(GPT2Config(**run.get("model_config", {})), trained)
        elif lora is not None:
            model = dataclasses.replace(base, adapters=trained, lora=LoRAConfig(**lora))
        else:
            model = dataclasses.replace(base, params=_replace_leaves(base.params, trained))
    except (TypeError, ValueError) as error:  # of settings that are unknown or not legal
        raise ValueError(f"{path / 'run' / 'metadata'}: {error}") from None
    params = jax.tree.map(lambda leaf: leaf.astype(dtype), model.params)
    return dataclasses.replace(model, params=params, source=str(path))


def _replace_leaves(params: Params, trained: Params) -> Params:
    """Return `params` with the leaves of `trained`, which may have a part of the same names."""

    def replace(name: str, value: Any) -> Any:
        if name not in trained:
            return value
        return _replace_leaves(value, trained[name]) if isinstance(value, dict) else trained[name]

    return {name: replace(name, value) for name, value in params.items()}
