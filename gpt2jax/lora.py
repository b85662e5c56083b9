"""LoRA: low-rank adapters beside frozen linear layers, kept as a pytree of their own.

An adapter of a linear with kernel [in, out] is {"lora_a": [in, r], "lora_b": [r, out]} and adds
`(x @ lora_a) @ lora_b * alpha / r` to its output. `lora_b` starts at zero, so a fresh adapter changes nothing.

Source: Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models".
"""

from __future__ import annotations

import copy
import dataclasses
import math

import jax
import jax.numpy as jnp

from gpt2jax.config import GPT2Config
from gpt2jax.model import Params, abstract_params

TARGETS = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")


@dataclasses.dataclass(frozen=True)
class LoRAConfig:
    """Which linears get adapters, and how large.

    Attributes:
        rank: r, width of the low-rank branch.
        alpha: its output is scaled by alpha / rank.
        dropout: of the branch's input, in training.
        targets: linears of every block, out of `TARGETS`.

    Raises:
        ValueError: a field has an impossible value.
    """

    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    targets: tuple[str, ...] = ("attn.c_attn",)

    def __post_init__(self) -> None:
        if isinstance(self.rank, bool) or not isinstance(self.rank, int) or self.rank < 1:
            raise ValueError(f"LoRA rank={self.rank!r} must be a positive whole number")
        if not (math.isfinite(self.alpha) and self.alpha > 0):
            raise ValueError(f"LoRA alpha={self.alpha!r} must be a positive number")
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"LoRA dropout={self.dropout!r} must be at least 0 and below 1")
        object.__setattr__(self, "targets", tuple(dict.fromkeys(self.targets)))
        unknown = [target for target in self.targets if target not in TARGETS]
        if unknown or not self.targets:
            raise ValueError(f"LoRA targets={self.targets!r} must be some of: {', '.join(TARGETS)}")

    @property
    def scale(self) -> float:
        """alpha / rank."""
        return self.alpha / self.rank


def init_adapters(config: GPT2Config, lora: LoRAConfig, seed: int = 0) -> Params:
    """Fresh float32 adapters, nested and stacked as the parameters are.

    `lora_a` [L, in, r] is uniform within +-1/sqrt(in) (the Kaiming rule with slope sqrt(5) that PEFT uses too),
    `lora_b` [L, r, out] is zero.
    """
    blocks = abstract_params(config)["h"]
    key = jax.random.key(seed)
    adapters: Params = {}
    for index, target in enumerate(TARGETS):
        if target not in lora.targets:
            continue
        module, linear = target.split(".")
        layers, in_dim, out_dim = blocks[module][linear]["kernel"].shape
        bound = 1.0 / math.sqrt(in_dim)
        # the key of a target does not depend on which other targets there are
        shape = (layers, in_dim, lora.rank)
        lora_a = jax.random.uniform(jax.random.fold_in(key, index), shape, minval=-bound, maxval=bound)
        lora_b = jnp.zeros((layers, lora.rank, out_dim))
        adapters.setdefault(module, {})[linear] = {"lora_a": lora_a, "lora_b": lora_b}
    return {"h": adapters}


def merge_adapters(params: Params, adapters: Params, lora: LoRAConfig) -> Params:
    """Plain parameters that compute what `params` with `adapters` compute; the given ones stay as they are.

    The product of the two factors is summed in float32 and added to the kernel in float32.
    """
    merged = copy.copy(params)
    merged["h"] = {module: dict(linears) for module, linears in params["h"].items()}
    for module, linears in adapters["h"].items():
        for linear, adapter in linears.items():
            target = dict(merged["h"][module][linear])
            update = jnp.einsum(
                "lir,lro->lio",
                adapter["lora_a"].astype(jnp.float32),
                adapter["lora_b"].astype(jnp.float32),
                precision=jax.lax.Precision.HIGHEST,
            )
            kernel = target["kernel"]
            target["kernel"] = (kernel.astype(jnp.float32) + lora.scale * update).astype(kernel.dtype)
            merged["h"][module][linear] = target
    return merged
