"""One training step as one jitted, donated function on plain pytrees."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from gpt2jax.lora.config import LoRAConfig
from gpt2jax.model.config import GPT2Config
from gpt2jax.model.gpt2 import Params, hidden_states, lm_head_weight
from gpt2jax.ops.cross_entropy import cross_entropy
from gpt2jax.ops.precision import Precision
from gpt2jax.sharding import constrain_batch, constrain_params
from gpt2jax.train.config import FinetuneConfig
from gpt2jax.train.freezing import merge_params
from gpt2jax.train.optimizer import clip_scale

TrainState = dict[str, Any]
Metrics = dict[str, jax.Array]
Step = Callable[[TrainState, Params | None, Params], tuple[TrainState, Metrics]]

# dynamic loss scaling of float16: gradients below 6e-8 would vanish without it
INITIAL_SCALE, MIN_SCALE, MAX_SCALE = 2.0**15, 1.0, 2.0**24
GROWTH_INTERVAL = 2000


def init_state(
    trainable: Params, optimizer: optax.GradientTransformation, *, loss_scaling: bool, ema: bool = False
) -> TrainState:
    """Build the state of a run at its beginning; it takes over `trainable`, which the step donates."""
    state: TrainState = {
        "step": jnp.zeros((), jnp.int32),
        "params": trainable,
        "optimizer": optimizer.init(trainable),
    }
    if ema:
        state["ema"] = jax.tree.map(jnp.copy, trainable)
    if loss_scaling:
        state["loss_scale"] = {
            "scale": jnp.asarray(INITIAL_SCALE, jnp.float32),
            "finite_steps": jnp.zeros((), jnp.int32),
            "skipped": jnp.zeros((), jnp.int32),
        }
    return state


def with_dropout(config: GPT2Config, train: FinetuneConfig) -> GPT2Config:
    """Return the configuration with the dropout rates of a run."""
    attention = train.dropout if train.attention_dropout is None else train.attention_dropout
    rates = {"embd_pdrop": train.dropout, "attn_pdrop": attention, "resid_pdrop": train.dropout}
    return dataclasses.replace(config, **{name: rate for name, rate in rates.items() if rate is not None})


def make_configured_step(
    model: GPT2Config,
    train: FinetuneConfig,
    optimizer: optax.GradientTransformation,
    precision: Precision,
    *,
    mask: Params | None = None,
) -> Step:
    """Build `make_train_step` with the settings of a run; `model` has the dropout rates of the run."""
    return make_train_step(
        model,
        optimizer,
        precision,
        lora=train.lora,
        max_grad_norm=train.max_grad_norm,
        gradient_accumulation_steps=train.gradient_accumulation_steps,
        seed=train.seed,
        label_smoothing=train.label_smoothing,
        z_loss=train.z_loss,
        remat=train.remat,
        ema_decay=train.ema_decay,
        mask=mask,
    )


def make_train_step(
    config: GPT2Config,
    optimizer: optax.GradientTransformation,
    precision: Precision,
    *,
    lora: LoRAConfig | None = None,
    max_grad_norm: float | None = 1.0,
    gradient_accumulation_steps: int = 1,
    seed: int = 0,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    remat: str = "none",
    ema_decay: float | None = None,
    mask: Params | None = None,
) -> Step:
    """Build `step(state, frozen, batch) -> (state, metrics)`; the state is donated.

    The batch holds tokens, targets [B, T] int, loss_mask [B, T] float32, and for packed rows segment_ids [B, T] int.
    Metrics are float32 scalars on the device: loss (mean cross-entropy of the labels), accuracy, tokens, grad_norm,
    and for float16 loss_scale and skipped (steps so far).

    Args:
        config: of the model, its dropout rates included.
        optimizer: an optax transformation of the trainable parameters.
        precision: dtypes; float16 makes the step scale its loss and skip overflowing steps.
        lora: if given, `state["params"]` are adapters and `frozen` the model's parameters; otherwise `frozen` holds
            the parameters that are not in `state["params"]`, or is None.
        seed: of dropout, whose key is a function of (seed, step).
        mask: factors 0 and 1 of gradients and updates, in the structure of `state["params"]`; None: all 1.
        max_grad_norm, gradient_accumulation_steps, label_smoothing, z_loss, remat, ema_decay: as in `FinetuneConfig`.
    """
    loss = _make_loss(
        config, precision, lora=lora, label_smoothing=label_smoothing, z_loss=z_loss, remat=remat
    )
    gradient = _accumulate(_make_gradient(loss, of_adapters=lora is not None), gradient_accumulation_steps)

    @functools.partial(jax.jit, donate_argnums=0)
    def step(state, frozen, batch):
        key = jax.random.fold_in(jax.random.key(seed), state["step"])
        tokens = jnp.maximum(batch["loss_mask"].sum(), 1.0)
        scale = state["loss_scale"]["scale"] if "loss_scale" in state else 1.0
        # one division by the whole batch's tokens, inside the scaled loss so that float16 sums stay in range
        gradients, sums = gradient(state["params"], frozen, batch, key, scale / tokens)
        gradients = jax.tree.map(lambda g: g.astype(jnp.float32) / scale, gradients)
        gradients = constrain_params(_masked(gradients, mask))
        norm = optax.tree.norm(gradients)
        clip = clip_scale(norm, max_grad_norm)
        gradients = jax.tree.map(lambda g: g * clip, gradients)
        new = _update(state, gradients, optimizer, mask, ema_decay)
        new = constrain_params(new)  # sharded as the state that came in, for the next step to take
        metrics = {name: sums[part] / tokens for name, part in (("loss", "nll"), ("accuracy", "correct"))}
        metrics |= {"tokens": sums["tokens"], "grad_norm": norm}
        if "loss_scale" in state:
            new = _unless_overflow(new, state, jnp.isfinite(norm))
            skipped = new["loss_scale"]["skipped"].astype(jnp.float32)
            metrics |= {"loss_scale": scale, "skipped": skipped}
        return new, metrics

    return step


def _update(
    state: TrainState,
    gradients: Params,
    optimizer: optax.GradientTransformation,
    mask: Params | None,
    ema_decay: float | None,
) -> TrainState:
    """Return the state after a step of the optimizer."""
    updates, optimizer_state = optimizer.update(gradients, state["optimizer"], state["params"])
    new = {
        "step": state["step"] + 1,
        "params": optax.apply_updates(state["params"], _masked(updates, mask)),
        "optimizer": optimizer_state,
    }
    if ema_decay is not None:
        new["ema"] = _moving_average(state, new["params"], ema_decay)
    return new


def _moving_average(state: TrainState, params: Params, decay: float) -> Params:
    """Return the moving average of the parameters after a step."""
    # a young average follows closely, or the first parameters would weigh in it for long
    rate = 1.0 - jnp.minimum(decay, (1.0 + state["step"]) / (10.0 + state["step"]))
    return jax.tree.map(lambda e, p: e + rate * (p - e), state["ema"], params)


def _unless_overflow(new: TrainState, state: TrainState, is_finite: jax.Array) -> TrainState:
    """Return the new state; after an overflow parameters, moments and the schedule's count as they were."""
    kept = {
        name: jax.tree.map(functools.partial(jnp.where, is_finite), new[name], state[name])
        for name in {"params", "optimizer", "ema"} & state.keys()
    }
    return {**new, **kept, "loss_scale": next_loss_scale(state["loss_scale"], is_finite)}


def _make_loss(
    config: GPT2Config,
    precision: Precision,
    *,
    lora: LoRAConfig | None,
    label_smoothing: float,
    z_loss: float,
    remat: str,
) -> Callable[..., tuple[jax.Array, Metrics]]:
    """Build the sum of the loss over a batch, times a scale, and the sums that the metrics come from."""

    def loss_sum(trainable, token_embeddings, frozen, batch, key, scale):
        params, adapters = (merge_params(trainable, frozen), None) if lora is None else (frozen, trainable)
        hidden = hidden_states(
            params,
            config,
            batch["tokens"],
            token_embeddings=token_embeddings,
            segment_ids=batch.get("segment_ids"),
            precision=precision,
            dropout_key=key,
            adapters=adapters,
            lora_scale=lora.scales(config.n_layer) if lora else 1.0,
            lora_dropout=lora.dropout if lora else 0.0,
            remat=remat,
        )
        total, sums = cross_entropy(
            hidden,
            lm_head_weight(params),
            batch["targets"],
            batch["loss_mask"],
            precision,
            label_smoothing=label_smoothing,
            z_loss=z_loss,
        )
        return total * scale, sums

    return loss_sum


def _make_gradient(loss_sum: Callable[..., Any], *, of_adapters: bool) -> Callable[..., Any]:
    """Build the gradient of the loss sum in the trainable parameters; it returns the sums too."""

    def gradient(trainable, frozen, batch, key, scale):
        if of_adapters or "wte" not in trainable:
            return jax.grad(loss_sum, has_aux=True)(trainable, None, frozen, batch, key, scale)
        # differentiated through, the lookup would make a second gradient of the whole table, most of it zeros
        table, tokens = trainable["wte"]["embedding"], batch["tokens"]
        looked_up = jnp.take(table, tokens, axis=0, mode="clip")
        gradients, sums = jax.grad(loss_sum, argnums=(0, 1), has_aux=True)(
            trainable, looked_up, frozen, batch, key, scale
        )
        trainable_gradient, of_rows = gradients
        of_table = trainable_gradient["wte"]["embedding"].at[tokens].add(of_rows, mode="drop")
        return trainable_gradient | {"wte": {"embedding": of_table}}, sums

    return gradient


def _accumulate(gradient: Callable[..., Any], num_parts: int) -> Callable[..., Any]:
    """Build the sum of `gradient` over parts of the batch, computed one after the other."""
    if num_parts == 1:
        return gradient

    def summed_gradient(trainable, frozen, batch, key, scale):
        # every part takes rows from all over the batch: if devices hold some rows each, all work on each part
        parts = jax.tree.map(
            lambda x: constrain_batch(x.reshape(-1, num_parts, *x.shape[1:]).swapaxes(0, 1), axis=1), batch
        )

        def add(total, part):
            part, index = part
            return jax.tree.map(
                jnp.add, total, gradient(trainable, frozen, part, jax.random.fold_in(key, index), scale)
            ), None

        zero = (
            jax.tree.map(jnp.zeros_like, trainable),
            {name: jnp.zeros(()) for name in ("nll", "tokens", "correct")},
        )
        return jax.lax.scan(add, zero, (parts, jnp.arange(num_parts)))[0]

    return summed_gradient


def _masked(tree: Any, mask: Params | None) -> Any:
    return tree if mask is None else jax.tree.map(jnp.multiply, tree, mask)


def next_loss_scale(state: dict[str, jax.Array], finite: jax.Array) -> dict[str, jax.Array]:
    """Double the scale after `GROWTH_INTERVAL` finite steps in a row, halve it on an overflow."""
    finite_steps = jnp.where(finite, state["finite_steps"] + 1, 0)
    grow = finite_steps >= GROWTH_INTERVAL
    scale = jnp.where(finite, jnp.where(grow, state["scale"] * 2, state["scale"]), state["scale"] / 2)
    return {
        "scale": jnp.clip(scale, MIN_SCALE, MAX_SCALE),
        "finite_steps": jnp.where(grow, 0, finite_steps),
        "skipped": state["skipped"] + jnp.where(finite, 0, 1),
    }
