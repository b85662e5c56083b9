"""The state that a run begins with, and the model that it ends with."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from gpt2jax.language_model import LanguageModel
from gpt2jax.lora.adapters import cast_base, init_adapters
from gpt2jax.model.gpt2 import Params
from gpt2jax.sharding import gather, shard
from gpt2jax.train.checkpoint import Checkpoints
from gpt2jax.train.config import FinetuneConfig
from gpt2jax.train.freezing import merge_params, partition_params
from gpt2jax.train.step import TrainState, init_state
from gpt2jax.train.unrolled import should_unroll, unstack_layers


def offload_params(model: LanguageModel, config: FinetuneConfig) -> LanguageModel:
    """Move the model's parameters to host memory if the run trains on a copy of them: the device may not hold both.

    They return to the device with the trained model.
    """
    if config.base_dtype is None:
        return model
    model = model.merge_adapter()
    return dataclasses.replace(model, params=jax.device_get(model.params))


def starting_state(
    model: LanguageModel,
    config: FinetuneConfig,
    optimizer: optax.GradientTransformation,
    *,
    length: int,
    mesh: Mesh | None,
    checkpoints: Checkpoints | None,
) -> tuple[TrainState, Params | None, Params | None, list[dict[str, float]]]:
    """Build the state of a new run, or restore that of the newest checkpoint.

    Returns:
        (state, frozen, mask, pending_metrics): the first three as `make_train_step` takes them, the last as
        `TrainLog` does. Layers are unrolled if training is faster that way for rows of `length` tokens.
    """
    trainable, frozen, mask = _split_params(model, config)
    scaling, ema = config.compute_dtype == "float16", config.ema_decay is not None
    state, pending_metrics = init_state(trainable, optimizer, loss_scaling=scaling, ema=ema), []
    # committed to its device, as a restored state is: both take the very same compiled step
    state = jax.device_put(state, jax.tree.map(lambda leaf: leaf.sharding, state))
    if mesh is not None:
        state, frozen = shard(state, mesh), None if frozen is None else shard(frozen, mesh)
    if checkpoints is not None and checkpoints.latest_step() is not None:
        state, pending_metrics = checkpoints.restore(state)
    if should_unroll(model.config, config, length, jax.default_backend(), jax.device_count()):
        state = unstack_layers(state)
    return state, frozen, mask, pending_metrics


def _split_params(
    model: LanguageModel, config: FinetuneConfig
) -> tuple[Params, Params | None, Params | None]:
    """Return (trained parameters or adapters, frozen parameters, mask of the former)."""
    if config.lora is not None:
        base = cast_base(model.params, config.base_dtype)
        return init_adapters(model.config, config.lora, config.seed, params=base), base, None
    trained, frozen, mask = model.params, None, None
    if config.freeze:
        trained, frozen, mask = partition_params(model.params, config.freeze)
    # copies: the step donates its state, and the model must stay as it is; trained parameters are float32 always
    return jax.tree.map(lambda leaf: jnp.array(leaf, jnp.float32), trained), frozen or None, mask


def trained_model(
    model: LanguageModel, config: FinetuneConfig, result: Params, frozen: Params | None, mesh: Mesh | None
) -> LanguageModel:
    """Build the model from the trained parameters or adapters; with adapters its own parameters stay as they are."""
    if config.lora is not None:
        if any(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(model.params)):
            model = dataclasses.replace(model, params=jax.tree.map(jnp.asarray, model.params))
        return dataclasses.replace(model, adapters=_gathered(result, mesh), lora=config.lora)
    params: Any = merge_params(result, frozen)
    # the order of the leaves is part of a file's bytes
    ordered = jax.tree.unflatten(jax.tree.structure(model.params), jax.tree.leaves(params))
    return dataclasses.replace(model, params=_gathered(ordered, mesh), source=None)


def _gathered(tree: Params, mesh: Mesh | None) -> Params:
    """Return whole arrays that are not committed to a device, as a loaded model has them, for the same programs."""
    tree = tree if mesh is None else gather(tree)
    return jax.tree.map(lambda leaf: jnp.array(jax.device_get(leaf)), tree)
