"""Several adapters as one: their factors side by side, so that their ranks add up and nothing is lost.

With A = [A1, A2] and B = [s1 B1; s2 B2], A @ B is s1 A1 @ B1 + s2 A2 @ B2: the sum of two adapters of a linear, each
times a number. In the same way adapters of the three parts of attn.c_attn are one of the whole.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np

from gpt2jax.lora.adapters import QKV_TARGETS, LoRAConfig, kernel_of, pattern_matches
from gpt2jax.model.config import GPT2Config
from gpt2jax.model.gpt2 import Params
from gpt2jax.ops.low_rank import column_norms

FUSED = "attn.c_attn"  # what `QKV_TARGETS` are the parts of


def concat_adapters(
    config: GPT2Config, parts: Sequence[tuple[LoRAConfig, Params]], weights: Sequence[float]
) -> tuple[LoRAConfig, Params]:
    """Adapters that add to each linear what all of `parts` add to it, each times its weight.

    Args:
        config: of the model that they are for.
        parts: settings and adapters of each.
        weights: one number for each.

    Returns:
        (settings, adapters): LoRA of scale 1, whose rank for a linear is the sum of its ranks in `parts`.

    Raises:
        ValueError: one of them is DoRA, which scales the weights that it adds to: such changes have no sum.
    """
    if any(lora.use_dora for lora, _ in parts):
        raise ValueError("DoRA adapters can't be summed up: each rescales the weights that it is added to")
    targets = {target for lora, _ in parts for target in lora.targets}
    if FUSED in targets and targets & set(QKV_TARGETS):
        parts = [
            fuse_qkv(config, *part) if set(part[0].targets) & set(QKV_TARGETS) else part for part in parts
        ]
    adapters: Params = {}
    ranks: dict[str, int] = {}
    for target in dict.fromkeys(target for lora, _ in parts for target in lora.targets):
        module, linear = target.split(".")
        lora_a, lora_b = [], []
        for (lora, tree), weight in zip(parts, weights, strict=True):
            if target not in lora.targets:
                continue
            scales = [weight * lora.scale_of(layer, target) for layer in range(config.n_layer)]
            pair = tree["h"][module][linear]
            lora_a.append(pair["lora_a"])
            lora_b.append(pair["lora_b"] * jnp.asarray(scales, jnp.float32)[:, None, None])
        pair = {"lora_a": jnp.concatenate(lora_a, axis=-1), "lora_b": jnp.concatenate(lora_b, axis=-2)}
        adapters.setdefault(module, {})[linear] = pair
        ranks[target] = pair["lora_a"].shape[-1]
    rank = max(ranks.values())
    others = {target: own for target, own in ranks.items() if own != rank}
    lora = LoRAConfig(rank, rank, targets=tuple(ranks), rank_pattern=others, alpha_pattern=others)
    return lora, {"h": adapters}


def fuse_qkv(
    config: GPT2Config, lora: LoRAConfig, adapters: Params, params: Params | None = None
) -> tuple[LoRAConfig, Params]:
    """Settings and adapters with attn.c_attn in place of its slices, in NumPy.

    Raises:
        ValueError: DoRA, which needs the model's parameters, and no `params`.
    """
    present = [target for target in QKV_TARGETS if target in lora.targets]
    attention = dict(adapters["h"]["attn"])
    parts = {target: attention.pop(target.partition(".")[2]) for target in present}
    layers, dim = config.n_layer, config.n_embd
    total = sum(part["lora_a"].shape[-1] for part in parts.values())
    fused = {"lora_a": np.concatenate([np.asarray(part["lora_a"]) for part in parts.values()], -1)}
    fused["lora_b"] = np.zeros((layers, total, 3 * dim), np.float32)
    # the scale is that of the first slice; what another one's is more or less goes into its second factor
    scales = {target: np.asarray([lora.scale_of(i, target) for i in range(layers)]) for target in present}
    row = 0
    for target, part in parts.items():
        column, rank = QKV_TARGETS.index(target) * dim, part["lora_a"].shape[-1]
        relative = (scales[target] / scales[present[0]])[:, None, None]
        fused["lora_b"][:, row : row + rank, column : column + dim] = np.asarray(part["lora_b"]) * relative
        row += rank
    if lora.use_dora:
        if params is None:
            raise ValueError("DoRA of slices fits a PEFT folder only together with the model's parameters")
        lengths = [
            parts[target]["magnitude"] if target in parts else column_norms(kernel_of(params["h"], target))
            for target in QKV_TARGETS
        ]
        fused["magnitude"] = np.concatenate([np.asarray(length) for length in lengths], -1)
    divisor = total**0.5 if lora.use_rslora else total
    alphas = [float(scale * divisor) for scale in scales[present[0]]]
    own = [(f"h.{layer}.{FUSED}", alpha) for layer, alpha in enumerate(alphas)]
    own = [(FUSED, alphas[0])] if len(set(alphas)) == 1 else own
    targets = (FUSED, *(target for target in lora.targets if target not in QKV_TARGETS))

    def used(pattern):  # PEFT warns of keys that match nothing, as those of slices do
        places = [(layer, target) for layer in range(layers) for target in targets[1:]]
        return [pair for pair in pattern if any(pattern_matches(pair[0], *place) for place in places)]

    lora = dataclasses.replace(
        lora,
        targets=targets,
        rank_pattern=((FUSED, total), *used(lora.rank_pattern)),
        alpha_pattern=(*own, *used(lora.alpha_pattern)),
    )
    attention["c_attn"] = fused
    return lora, {"h": {**adapters["h"], "attn": attention}}
