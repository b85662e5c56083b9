"""The loss on held-out documents along the way of a training."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from gpt2jax.data.batches import Batch, sequential_batches
from gpt2jax.data.documents import Documents
from gpt2jax.language_model import LanguageModel
from gpt2jax.model.gpt2 import Params, hidden_states, lm_head_weight
from gpt2jax.ops.cross_entropy import token_losses
from gpt2jax.ops.precision import Precision
from gpt2jax.sharding import shard_batch
from gpt2jax.train.config import FinetuneConfig
from gpt2jax.train.freezing import merge_params


def place(batch: Batch, mesh: Mesh | None) -> Any:
    """The batch where the devices want it."""
    return batch if mesh is None else shard_batch(batch, mesh)


def validation_loss(
    trainable: Any,
    *,
    model: LanguageModel,
    config: FinetuneConfig,
    documents: Documents,
    length: int,
    frozen: Params | None = None,
    mesh: Mesh | None = None,
) -> dict[str, float]:
    """Loss and accuracy per token on held-out documents, laid out as the training batches are.

    `trainable` and `frozen` are those of the training step.
    """
    params, adapters = (merge_params(trainable, frozen), None) if config.lora is None else (frozen, trainable)
    sums = np.zeros(3)
    batches = _validation_batches(model, config, documents, length)
    for batch in batches:
        scale = config.lora.scales(model.config.n_layer) if config.lora else 1.0
        sums += np.asarray(
            _batch_sums(
                params,
                adapters,
                place(batch, mesh),
                model.config,
                Precision.for_backend(config.compute_dtype),
                scale,
            ),
            np.float64,
        )
    return {"validation_loss": float(sums[0] / sums[2]), "validation_accuracy": float(sums[1] / sums[2])}


def _validation_batches(
    model: LanguageModel, config: FinetuneConfig, documents: Documents, length: int
) -> Iterator[Batch]:
    return sequential_batches(
        documents,
        layout=config.layout,
        sequence_length=length,
        batch_size=config.batch_size // config.accumulation,
        end_token_id=model.end_token_id,
    )


@functools.partial(jax.jit, static_argnums=(3, 4))
def _batch_sums(params, adapters, batch, config, precision, lora_scale):
    hidden = hidden_states(
        params,
        config,
        batch["tokens"],
        segment_ids=batch.get("segment_ids"),
        precision=precision,
        adapters=adapters,
        lora_scale=lora_scale,
    )
    nll, hit = token_losses(hidden, lm_head_weight(params), batch["targets"], precision)
    weights = batch["weights"]
    return jnp.stack([(nll * weights).sum(), (hit * weights).sum(), weights.sum()])
