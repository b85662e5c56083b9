"""A model out of a checkpoint: what a run had learned at a step, whether the run has ended or not."""

from __future__ import annotations

import dataclasses
import pathlib
from typing import Any

import jax

from gpt2jax.language_model import LanguageModel, load
from gpt2jax.lora.adapters import LoRAConfig
from gpt2jax.model.config import GPT2Config
from gpt2jax.model.gpt2 import Params
from gpt2jax.train.checkpoint import read_run, restore_trained
from gpt2jax.train.run_folder import params_sha256
from gpt2jax.weights.mapping import check_parameter_dtype


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
