"""Combine LoRA adapters by concatenating their factors; ranks add up.

With A = [A1, A2] and B = [s1 B1; s2 B2], A @ B is s1 A1 @ B1 + s2 A2 @ B2: the weighted sum of two adapters of a linear
layer. In the same way adapters of the three parts of attn.c_attn become one of the whole layer.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from gpt2jax.lora.adapters import kernel_of
from gpt2jax.lora.config import QKV_TARGETS, LoRAConfig, flatten_targets, nest_targets, pattern_matches
from gpt2jax.model.config import GPT2Config
from gpt2jax.model.gpt2 import Params
from gpt2jax.ops.low_rank import column_norms

FUSED = "attn.c_attn"  # the layer that consists of `QKV_TARGETS`


def concat_adapters(
    config: GPT2Config, parts: Sequence[tuple[LoRAConfig, Params]], weights: Sequence[float]
) -> tuple[LoRAConfig, Params]:
    """Combine adapters: the result adds to each linear layer the weighted sum of what all of `parts` add to it.

    Args:
        config: of the model that they are for.
        parts: settings and adapters of each.
        weights: one number for each.

    Returns:
        Settings and adapters: LoRA of scale 1, whose rank for a layer is the sum of its ranks in `parts`.

    Raises:
        ValueError: one of them is DoRA, which rescales the weights that it is added to: such changes have no sum.
    """
    if any(lora.use_dora for lora, _ in parts):
        raise ValueError("DoRA adapters cannot be combined; each rescales the weights that it is added to")
    targets = dict.fromkeys(target for lora, _ in parts for target in lora.targets)
    if FUSED in targets and targets.keys() & set(QKV_TARGETS):
        parts = [
            fuse_qkv(config, *part) if set(part[0].targets) & set(QKV_TARGETS) else part for part in parts
        ]
        targets = dict.fromkeys(target for lora, _ in parts for target in lora.targets)
    flat = [(lora, flatten_targets(tree)) for lora, tree in parts]
    adapters: dict[str, Any] = {}
    for target in targets:
        lora_a, lora_b = [], []
        for (lora, tree), weight in zip(flat, weights, strict=True):
            if target in lora.targets:
                scales = [weight * lora.scale_of(layer, target) for layer in range(config.n_layer)]
                lora_a.append(tree[target]["lora_a"])
                lora_b.append(tree[target]["lora_b"] * jnp.asarray(scales, jnp.float32)[:, None, None])
        adapters[target] = {
            "lora_a": jnp.concatenate(lora_a, axis=-1),
            "lora_b": jnp.concatenate(lora_b, axis=-2),
        }
    ranks = {target: pair["lora_a"].shape[-1] for target, pair in adapters.items()}
    rank = max(ranks.values())
    others = {target: own for target, own in ranks.items() if own != rank}
    lora = LoRAConfig(rank, rank, targets=tuple(ranks), rank_pattern=others, alpha_pattern=others)
    return lora, nest_targets(adapters)


def fuse_qkv(
    config: GPT2Config, lora: LoRAConfig, adapters: Params, params: Params | None = None
) -> tuple[LoRAConfig, Params]:
    """Turn adapters of attn.q, attn.k and attn.v into one of attn.c_attn, in NumPy.

    Raises:
        ValueError: DoRA without `params`, which it needs.
    """
    others = flatten_targets(adapters)
    parts = {target: others.pop(target) for target in QKV_TARGETS if target in lora.targets}
    # the scale is that of the first part; the second factors of the other parts make up for the difference
    scales = {
        target: np.asarray([lora.scale_of(layer, target) for layer in range(config.n_layer)])
        for target in parts
    }
    scale = scales[next(iter(parts))]
    fused = _fuse_factors(config, parts, {target: scales[target] / scale for target in parts})
    if lora.use_dora:
        if params is None:
            raise ValueError(
                "params must be the model's parameters to fuse DoRA of attn.q, attn.k or attn.v, got None"
            )
        lengths = [
            parts[target]["magnitude"] if target in parts else column_norms(kernel_of(params["h"], target))
            for target in QKV_TARGETS
        ]
        fused["magnitude"] = np.concatenate([np.asarray(length) for length in lengths], -1)
    rank = fused["lora_a"].shape[-1]
    alphas = [float(one * (rank**0.5 if lora.use_rslora else rank)) for one in scale]
    own = [(f"h.{layer}.{FUSED}", alpha) for layer, alpha in enumerate(alphas)]
    own = [(FUSED, alphas[0])] if len(set(alphas)) == 1 else own
    targets = (FUSED, *(target for target in lora.targets if target not in QKV_TARGETS))

    def keep_used(pattern):  # PEFT warns of keys that match nothing, such as those of attn.q
        places = [(layer, target) for layer in range(config.n_layer) for target in targets[1:]]
        return [pair for pair in pattern if any(pattern_matches(pair[0], *place) for place in places)]

    lora = dataclasses.replace(
        lora,
        targets=targets,
        rank_pattern=((FUSED, rank), *keep_used(lora.rank_pattern)),
        alpha_pattern=(*own, *keep_used(lora.alpha_pattern)),
    )
    return lora, nest_targets({**others, FUSED: fused})


def _fuse_factors(
    config: GPT2Config, parts: dict[str, Any], relative_scales: dict[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """Return lora_a [L, D, sum of ranks] and lora_b [L, sum of ranks, 3 D], which is block-diagonal."""
    lora_a = np.concatenate([np.asarray(part["lora_a"]) for part in parts.values()], -1)
    lora_b = np.zeros((config.n_layer, lora_a.shape[-1], 3 * config.n_embd), np.float32)
    row = 0
    for target, part in parts.items():
        column, rank = QKV_TARGETS.index(target) * config.n_embd, part["lora_a"].shape[-1]
        scaled = np.asarray(part["lora_b"]) * relative_scales[target][:, None, None]
        lora_b[:, row : row + rank, column : column + config.n_embd] = scaled
        row += rank
    return {"lora_a": lora_a, "lora_b": lora_b}
