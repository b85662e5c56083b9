"""Settings of LoRA: which linear layers get adapters, of which rank and scale.

Sources: Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models"; Kalajdzievski 2023, "A Rank
Stabilization Scaling Factor for Fine-Tuning with LoRA"; Liu et al. 2024, "DoRA: Weight-Decomposed Low-Rank
Adaptation". Patterns of ranks and alphas as in PEFT.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import math
import re
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, ClassVar, TypeVar

import numpy as np

from gpt2jax.utils.validation import (
    Rule,
    array_size,
    check,
    in_range,
    must_be,
    optional,
    positive_number,
    set_field,
    validated,
)

TARGETS = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
# the three parts of attn.c_attn's output, each as its own linear layer
QKV_TARGETS = ("attn.q", "attn.k", "attn.v")
BASE_DTYPES = ("float32", "bfloat16", "int8")

Number = TypeVar("Number", int, float)
Pattern = tuple[tuple[str, Number], ...]


def _expand_targets(targets: Any) -> tuple[str, ...]:
    """Return the names that targets stand for, each once."""
    if not isinstance(targets, Iterable) or isinstance(targets, str):
        raise ValueError
    patterns = list(targets)
    matches = [
        [pattern] if pattern in QKV_TARGETS else fnmatch.filter(TARGETS, str(pattern)) for pattern in patterns
    ]
    if not matches or not all(matches):
        raise ValueError
    return tuple(dict.fromkeys(name for names in matches for name in names))


_targets = Rule(f"a list of {', '.join((*TARGETS, *QKV_TARGETS))}", _expand_targets)


@validated
@dataclasses.dataclass(frozen=True)
class LoRAConfig:
    """Which linear layers get adapters, and of which kind and size.

    Attributes:
        rank: r, width of the low-rank branch. With adapters on all linear layers, 32 gains nearly what training all
            parameters gains (`benchmarks/training_quality.py`); PEFT's defaults, 8 on attn.c_attn, gain less.
        alpha: the branch's output is scaled by alpha / rank. None: what makes the scale 1.
        dropout: of the branch's input, in training.
        targets: linear layers of every block, from `TARGETS` and `QKV_TARGETS`; "*" and "?" stand for any characters
            of a name in `TARGETS`: "mlp.*", "*.c_proj", "*".
        use_rslora: scale by alpha / sqrt(rank) (rsLoRA).
        use_dora: learn the length of each column of the weights beside its direction (DoRA).
        rank_pattern: other ranks for some layers, {pattern: rank} or pairs. A pattern is a regular expression for the
            end of a name such as "transformer.h.11.attn.c_attn", from a dot on; the first that matches counts.
        alpha_pattern: other alphas for some layers, in the same form.
    """

    error_prefix: ClassVar[str] = "lora."

    rank: Annotated[int, array_size] = 32
    alpha: Annotated[float, optional(positive_number)] = None  # pyright: ignore[reportAssignmentType]  # see below
    dropout: Annotated[float, in_range(0, 1, open_end=True)] = 0.0
    targets: Annotated[tuple[str, ...], _targets] = ("*",)
    use_rslora: bool = False
    use_dora: bool = False
    rank_pattern: Mapping[str, int] | Pattern[int] = ()
    alpha_pattern: Mapping[str, float] | Pattern[float] = ()

    def __post_init__(self) -> None:
        if self.alpha is None:
            set_field(self, "alpha", math.sqrt(self.rank) if self.use_rslora else float(self.rank))
        both = set(QKV_TARGETS) & set(self.targets)
        if both and "attn.c_attn" in self.targets:
            legal = "layers of which none contains another"
            raise ValueError(
                f"{must_be('lora.targets', legal, self.targets)}; {min(both)} is a part of attn.c_attn"
            )
        for name, rule in (("rank_pattern", array_size), ("alpha_pattern", positive_number)):
            set_field(self, name, _check_pattern(f"lora.{name}", getattr(self, name), rule))

    @property
    def scale(self) -> float:
        """The factor of the branch's output, where no pattern says otherwise."""
        return self.alpha / (math.sqrt(self.rank) if self.use_rslora else self.rank)

    def rank_of(self, layer: int, target: str) -> int:
        """Return the rank of one linear layer."""
        return _first_match(self.rank_pattern, layer, target, self.rank)

    def scale_of(self, layer: int, target: str) -> float:
        """Return the scale of one linear layer."""
        rank = self.rank_of(layer, target)
        alpha = _first_match(self.alpha_pattern, layer, target, self.alpha)
        return alpha / (math.sqrt(rank) if self.use_rslora else rank)

    def scales(self, layers: int) -> Any:
        """Return the scales as `hidden_states` takes them: one number, or with patterns an array [L] per target."""
        if not self.rank_pattern and not self.alpha_pattern:
            return self.scale
        return nest_targets(
            {
                target: np.asarray([self.scale_of(layer, target) for layer in range(layers)], np.float32)
                for target in self.targets
            }
        )


def nest_targets(values: Mapping[str, Any]) -> dict[str, Any]:
    """Nest values by target as parameters are: {"attn.c_attn": x} -> {"h": {"attn": {"c_attn": x}}}."""
    tree: dict[str, Any] = {}
    for target, value in values.items():
        module, linear = target.split(".")
        tree.setdefault(module, {})[linear] = value
    return {"h": tree}


def flatten_targets(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Undo `nest_targets`."""
    return {
        f"{module}.{linear}": value
        for module, linears in tree["h"].items()
        for linear, value in linears.items()
    }


def check_patterns(lora: LoRAConfig, layers: int) -> None:
    """Check that each pattern of ranks and alphas matches a linear layer with an adapter.

    Raises:
        ValueError: a pattern matches none.
    """
    linears = [(layer, target) for layer in range(layers) for target in lora.targets]
    for field in ("rank_pattern", "alpha_pattern"):
        for key, _ in getattr(lora, field):
            if not any(pattern_matches(key, *linear) for linear in linears):
                raise ValueError(
                    f"lora.{field} must match linear layers with an adapter, got {key!r}; "
                    f"such a layer is h.{layers - 1}.{lora.targets[0]}"
                )


def is_simple_pattern(key: str) -> bool:
    """Return whether a regular expression is short to match: any other could take any length of time."""
    return not re.search(r"\)[*+?{]", key) and len(re.findall(r"[*+?{]", key)) <= 3


def pattern_matches(key: str, layer: int, target: str) -> bool:
    """Return whether a key of `rank_pattern` or `alpha_pattern` is for this linear layer."""
    return re.fullmatch(rf"(.*\.)?({key})", f"transformer.h.{layer}.{target}") is not None


def _first_match(pattern: Any, layer: int, target: str, default: Number) -> Number:
    return next((value for key, value in pattern if pattern_matches(key, layer, target)), default)


def _check_pattern(name: str, pattern: Any, rule: Rule) -> Pattern[Any]:
    try:
        items = pattern.items() if isinstance(pattern, Mapping) else pattern
        pairs = tuple((key, value) for key, value in items)
    except (TypeError, ValueError):
        raise ValueError(must_be(name, "values by pattern", pattern)) from None
    for key, _ in pairs:
        legal = "simple regular expressions for names of linear layers"
        if not isinstance(key, str) or not is_simple_pattern(key):
            raise ValueError(must_be(f"{name} keys", legal, key))
        try:
            re.compile(key)
        except re.error as error:
            raise ValueError(f"{must_be(f'{name} keys', legal, key)}; {error}") from None
    return tuple((key, check(f"{name}[{key!r}]", value, rule)) for key, value in pairs)
