"""Validation: loss and accuracy on held-out documents during a training run."""

from __future__ import annotations

import functools
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
    """Put a batch on the devices: as it is without a mesh, else sharded over its rows."""
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
    """Compute loss (nats) and accuracy per token on held-out documents, packed as the training batches are.

    Args:
        trainable: parameters or adapters, as the training step has them.
        model: the model, for its configuration and end token.
        config: settings of the run.
        documents: the held-out documents.
        length: T, tokens of one row.
        frozen: the parameters that are not trained, as the training step takes them.
        mesh: devices of the run; None: one device.

    Returns:
        {"validation_loss": ..., "validation_accuracy": ...}
    """
    params, adapters = (merge_params(trainable, frozen), None) if config.lora is None else (frozen, trainable)
    scale = config.lora.scales(model.config.n_layer) if config.lora else 1.0
    precision = Precision.for_device(config.compute_dtype)
    batches = sequential_batches(
        documents,
        packing=config.packing,
        sequence_length=length,
        batch_size=config.batch_size // config.gradient_accumulation_steps,
        end_token_id=model.end_token_id,
    )
    sums = np.zeros(3)
    for batch in batches:
        batch_sums = _batch_sums(params, adapters, place(batch, mesh), model.config, precision, scale)
        sums += np.asarray(batch_sums, np.float64)
    return {"validation_loss": float(sums[0] / sums[2]), "validation_accuracy": float(sums[1] / sums[2])}


@functools.partial(jax.jit, static_argnums=(3, 4))
def _batch_sums(params, adapters, batch, config, precision, lora_scale):
    """Sum cross-entropy, correct predictions and labels over a batch; [3] float32."""
    hidden = hidden_states(
        params,
        config,
        batch["tokens"],
        segment_ids=batch.get("segment_ids"),
        precision=precision,
        adapters=adapters,
        lora_scale=lora_scale,
    )
    nll, correct = token_losses(hidden, lm_head_weight(params), batch["targets"], precision)
    mask = batch["loss_mask"]
    return jnp.stack([(nll * mask).sum(), (correct * mask).sum(), mask.sum()])
