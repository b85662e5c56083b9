"""LoRA and its kin: settings, fresh adapters, merging. Adapters are a pytree of their own beside frozen parameters.

An adapter of a linear with kernel [in, out] is {"lora_a": [in, r], "lora_b": [r, out]} and adds
`(x @ lora_a) @ lora_b * scale` to its output; `low_rank.py` has the arithmetic. `lora_b` starts at zero, so a fresh
adapter changes nothing.

Sources: Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models"; Kalajdzievski 2023, "A Rank
Stabilization Scaling Factor for Fine-Tuning with LoRA"; Liu et al. 2024, "DoRA: Weight-Decomposed Low-Rank
Adaptation". Patterns of ranks and alphas as in PEFT.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import math
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from gpt2jax.model.config import GPT2Config
from gpt2jax.model.gpt2 import Params, abstract_params
from gpt2jax.ops.linear import bitcast_kernel, quantize_kernel
from gpt2jax.ops.low_rank import add_lora_delta, attach_scales, column_norms, merge_kernel, slice_outputs
from gpt2jax.utils.validation import check_count, is_number, set_field

TARGETS = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
# the three parts of attn.c_attn's output, each as a linear of its own
QKV_TARGETS = ("attn.q", "attn.k", "attn.v")
BASE_DTYPES = ("float32", "bfloat16", "int8")

Number = TypeVar("Number", int, float)
Pattern = tuple[tuple[str, Number], ...]


@dataclasses.dataclass(frozen=True)
class LoRAConfig:
    """Which linears get adapters, and of which kind and size.

    Attributes:
        rank: r, width of the low-rank branch.
        alpha: its output is scaled by alpha / rank.
        dropout: of the branch's input, in training.
        targets: linears of every block, out of `TARGETS` and `QKV_TARGETS`; "*" and "?" stand for any characters of a
            name in `TARGETS`: "mlp.*", "*.c_proj", "*".
        use_rslora: scale by alpha / sqrt(rank) (rsLoRA).
        use_dora: learn the length of each column of the weights beside its direction (DoRA).
        rank_pattern, alpha_pattern: other ranks and alphas for some linears, {pattern: value} (or pairs). A pattern
            is a regular expression for the end of a name such as "transformer.h.11.attn.c_attn", from a dot on;
            the first that matches counts.

    Raises:
        ValueError: a field has an impossible value.
    """

    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    targets: tuple[str, ...] = ("attn.c_attn",)
    use_rslora: bool = False
    use_dora: bool = False
    rank_pattern: Mapping[str, int] | Pattern[int] = ()
    alpha_pattern: Mapping[str, float] | Pattern[float] = ()

    def __post_init__(self) -> None:
        set_field(self, "rank", _check_rank("rank", self.rank))
        set_field(self, "alpha", _check_alpha("alpha", self.alpha))
        if not is_number(self.dropout) or not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"LoRA dropout={self.dropout!r} must be at least 0 and below 1")
        set_field(self, "dropout", float(self.dropout))
        for name in ("use_rslora", "use_dora"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"LoRA {name}={getattr(self, name)!r:.100} must be True or False")
        set_field(self, "targets", _check_targets(self.targets))
        for name, check in (("rank_pattern", _check_rank), ("alpha_pattern", _check_alpha)):
            set_field(self, name, _check_pattern(name, getattr(self, name), check))

    @property
    def scale(self) -> float:
        """What the branch's output is multiplied by, where no pattern says otherwise."""
        return self.alpha / (math.sqrt(self.rank) if self.use_rslora else self.rank)

    def rank_of(self, layer: int, target: str) -> int:
        """The rank of one linear."""
        return _first_match(self.rank_pattern, layer, target, self.rank)

    def scale_of(self, layer: int, target: str) -> float:
        """The scale of one linear."""
        rank = self.rank_of(layer, target)
        alpha = _first_match(self.alpha_pattern, layer, target, self.alpha)
        return alpha / (math.sqrt(rank) if self.use_rslora else rank)

    def scales(self, layers: int) -> float | Params:
        """The scales as `hidden_states` takes them: one number, or with patterns an array [L] for each target."""
        if not self.rank_pattern and not self.alpha_pattern:
            return self.scale
        tree: Params = {}
        for target in self.targets:
            module, linear = target.split(".")
            scales = [self.scale_of(layer, target) for layer in range(layers)]
            tree.setdefault(module, {})[linear] = np.asarray(scales, np.float32)
        return {"h": tree}


def init_adapters(
    config: GPT2Config, lora: LoRAConfig, seed: int = 0, *, params: Params | None = None
) -> Params:
    """Fresh float32 adapters, nested and stacked as the parameters are.

    `lora_a` [L, in, r] is uniform within +-1/sqrt(in) (the Kaiming rule with slope sqrt(5) that PEFT uses too),
    `lora_b` [L, r, out] is zero. Where a pattern gives blocks different ranks, r is the largest one, and what a
    block has less is zero in both factors, which training leaves at zero. DoRA's `magnitude` [L, out] is the
    length of the kernel's columns.

    Args:
        config: of the model.
        lora: settings.
        seed: of `lora_a`.
        params: the parameters that the adapters stand on, needed for DoRA.
    """
    blocks = abstract_params(config)["h"]
    key = jax.random.key(seed)
    adapters: Params = {}
    for index, target in enumerate((*TARGETS, *QKV_TARGETS)):
        if target not in lora.targets:
            continue
        layers, in_dim, out_dim = kernel_of(blocks, target).shape
        ranks = np.asarray([lora.rank_of(layer, target) for layer in range(layers)])
        bound = 1.0 / math.sqrt(in_dim)
        # the key of a target does not depend on which other targets there are
        shape = (layers, in_dim, int(ranks.max()))
        lora_a = jax.random.uniform(jax.random.fold_in(key, index), shape, jnp.float32, -bound, bound)
        if ranks.min() < ranks.max():
            lora_a = jnp.where(np.arange(ranks.max()) < ranks[:, None, None], lora_a, 0.0)
        lora_b = jnp.zeros((layers, int(ranks.max()), out_dim), jnp.float32)
        adapter = {"lora_a": lora_a, "lora_b": lora_b}
        if lora.use_dora:
            if params is None:
                raise ValueError("DoRA's adapters begin at the lengths of the model's weights: give params")
            adapter["magnitude"] = column_norms(kernel_of(params["h"], target))
        module, linear = target.split(".")
        adapters.setdefault(module, {})[linear] = adapter
    return {"h": adapters}


def check_patterns(lora: LoRAConfig, layers: int) -> None:
    """Raises ValueError for a pattern of ranks or alphas that is the name of no linear with an adapter."""
    linears = [(layer, target) for layer in range(layers) for target in lora.targets]
    for field in ("rank_pattern", "alpha_pattern"):
        for key, _ in getattr(lora, field):
            if not any(pattern_matches(key, *linear) for linear in linears):
                raise ValueError(
                    f"LoRA {field}[{key!r}] is the name of no linear with an adapter; "
                    f"names are such as h.{layers - 1}.{lora.targets[0]}"
                )


def cast_base(params: Params, dtype: str | None) -> Params:
    """The frozen parameters that adapters are trained on.

    Args:
        params: plain parameters, which stay as they are; what need not change is shared.
        dtype: one of `BASE_DTYPES`, of all matrices; biases and LayerNorms are float32. "int8" rounds the kernels of
            the blocks to `Int8Kernel`, and embeddings and the head to bfloat16. None: as the parameters are.
    """

    def convert(path, leaf):
        name, of_block = path[-1].key, path[0].key == "h"
        if dtype is not None:
            if name not in ("kernel", "embedding"):
                return jnp.asarray(leaf, "float32")
            if dtype == "int8" and of_block:
                return quantize_kernel(leaf)
            leaf = jnp.asarray(leaf, "bfloat16" if dtype == "int8" else dtype)
        narrow = leaf.dtype.itemsize == 2
        return bitcast_kernel(leaf) if narrow and of_block and name == "kernel" else leaf

    return jax.tree_util.tree_map_with_path(convert, params)


def merge_adapters(params: Params, adapters: Params, lora: LoRAConfig) -> Params:
    """Plain parameters that compute what `params` with `adapters` compute; the given ones stay as they are.

    The product of the two factors is summed in float32 and added to the kernel in float32.
    """
    return _change_kernels(params, adapters, lora, merge_kernel)


def unmerge_adapters(params: Params, adapters: Params, lora: LoRAConfig) -> Params:
    """The parameters that `merge_adapters` made `params` of, but for rounding.

    Raises:
        ValueError: for DoRA, whose merging forgets how long the columns were: keep the model from before.
    """
    if lora.use_dora:
        raise ValueError("merged DoRA adapters cannot be taken out again: keep the parameters from before")

    def take_out(kernel, adapter):
        return add_lora_delta(kernel, adapter, sign=-1.0).astype(kernel.dtype)

    return _change_kernels(params, adapters, lora, take_out)


def kernel_of(blocks: Params, target: str) -> Any:
    """The kernel [L, in, out] of a target; of a slice, that part of attn.c_attn's."""
    module, linear = target.split(".")
    if target not in QKV_TARGETS:
        return blocks[module][linear]["kernel"]
    kernel = blocks["attn"]["c_attn"]["kernel"]
    if isinstance(kernel, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct((*kernel.shape[:-1], kernel.shape[-1] // 3), kernel.dtype)
    return slice_outputs(kernel, QKV_TARGETS.index(target), len(QKV_TARGETS))


def _change_kernels(
    params: Params, adapters: Params, lora: LoRAConfig, change: Callable[[jax.Array, Params], jax.Array]
) -> Params:
    """`params` with `change(kernel, adapter)` in place of each kernel that has an adapter."""
    blocks = {module: dict(linears) for module, linears in params["h"].items()}
    layers = len(jax.tree.leaves(params["h"])[0])
    for module, linears in attach_scales(adapters, lora.scales(layers), layers)["h"].items():
        for linear, adapter in linears.items():
            target = f"{module}.{linear}"
            home = "c_attn" if target in QKV_TARGETS else linear
            kernel = change(kernel_of(blocks, target), adapter)
            if target in QKV_TARGETS:
                start = QKV_TARGETS.index(target) * kernel.shape[-1]
                whole = blocks[module][home]["kernel"]
                kernel = jax.lax.dynamic_update_slice_in_dim(whole, kernel, start, axis=-1)
            blocks[module][home] = {**blocks[module][home], "kernel": kernel}
    return {**params, "h": blocks}


def is_simple_pattern(key: str) -> bool:
    """Whether it can be matched at once: more than this is no name, and could take any length of time."""
    return not re.search(r"\)[*+?{]", key) and len(re.findall(r"[*+?{]", key)) <= 3


def pattern_matches(key: str, layer: int, target: str) -> bool:
    """Whether a key of `rank_pattern` or `alpha_pattern` is for this linear."""
    return re.fullmatch(rf"(.*\.)?({key})", f"transformer.h.{layer}.{target}") is not None


def _first_match(pattern: Any, layer: int, target: str, default: Number) -> Number:
    return next((value for key, value in pattern if pattern_matches(key, layer, target)), default)


def _check_rank(name: str, rank: Any) -> int:
    return check_count(f"LoRA {name}", rank)


def _check_alpha(name: str, alpha: Any) -> float:
    if not is_number(alpha) or alpha <= 0:
        raise ValueError(f"LoRA {name}={alpha!r:.60} must be a positive number")
    return float(alpha)


def _check_targets(targets: tuple[str, ...]) -> tuple[str, ...]:
    """The names that the targets stand for, each once."""
    patterns = list(targets) if isinstance(targets, Iterable) else []
    matches = [
        [pattern] if pattern in QKV_TARGETS else fnmatch.filter(TARGETS, str(pattern)) for pattern in patterns
    ]
    if not matches or not all(matches):
        raise ValueError(
            f"LoRA targets={targets!r:.100} must be some of: {', '.join((*TARGETS, *QKV_TARGETS))}"
        )
    found = [name for names in matches for name in names]
    both = set(QKV_TARGETS) & set(found)
    if both and "attn.c_attn" in found:
        raise ValueError(
            f"LoRA targets={targets!r}: {min(both)} is a part of attn.c_attn, give one of the two"
        )
    return tuple(dict.fromkeys(found))


def _check_pattern(
    name: str, pattern: Mapping[str, Any] | Pattern[Any], check: Callable[[str, Any], Any]
) -> Pattern[Any]:
    try:
        items = pattern.items() if isinstance(pattern, Mapping) else pattern
        pairs = tuple((key, value) for key, value in items)
    except (TypeError, ValueError):
        raise ValueError(f"LoRA {name}={pattern!r:.100} must be values by pattern") from None
    checked = []
    for key, value in pairs:
        if not isinstance(key, str) or not is_simple_pattern(key):
            raise ValueError(f"LoRA {name}: {key!r:.100} is not a simple expression for names of linears")
        try:
            re.compile(key)
        except re.error as error:
            raise ValueError(f"LoRA {name}: {key!r:.100} is not a regular expression: {error}") from None
        checked.append((key, check(f"{name}[{key!r}]", value)))
    return tuple(checked)
