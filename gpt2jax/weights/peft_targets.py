"""Which linears an adapter_config.json of PEFT says have adapters, by target_modules and its like.

Source: `check_target_module_exists` of peft. A text is a regular expression for a linear's whole name, a list holds
ends of names; names are such as "transformer.h.0.attn.c_attn", without "transformer." where the base has no head.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from gpt2jax.lora.config import TARGETS, is_simple_pattern
from gpt2jax.utils.validation import is_integer

ALL = "all-linear"  # of files that were written by hand: PEFT writes the names


def declared_linears(settings: Mapping[str, Any], layers: int) -> set[str] | None:
    """The linears that have adapters by the settings, as "h.0.attn.c_attn".

    Returns:
        None where that can't be told: no target_modules, or an expression that could take any length of time.

    Raises:
        ValueError: a setting is of a kind that PEFT does not write.
    """
    wanted, left_out = settings.get("target_modules"), settings.get("exclude_modules")
    if not wanted:
        return None
    is_wanted = (lambda name: True) if wanted == ALL else _matcher("target_modules", wanted)
    is_left_out = _matcher("exclude_modules", left_out) if left_out else lambda name: False
    if is_wanted is None or is_left_out is None:
        return None
    has_layer = _layer_filter(settings)
    return {
        f"h.{layer}.{target}"
        for layer in range(layers)
        for target in TARGETS
        if has_layer(layer)
        and any(
            is_wanted(name) and not is_left_out(name)
            for name in (f"transformer.h.{layer}.{target}", f"h.{layer}.{target}")
        )
    }


def _matcher(setting: str, value: Any) -> Callable[[str], bool] | None:
    if isinstance(value, str):
        if not is_simple_pattern(value):
            return None
        try:
            expression = re.compile(value)
        except re.error as error:
            raise ValueError(f"{setting}={value!r:.100} is not a regular expression: {error}") from None
        return lambda name: expression.fullmatch(name) is not None
    if not isinstance(value, list) or not all(isinstance(end, str) for end in value):
        raise ValueError(f"{setting}={value!r:.100} must be a text or a list of texts")
    return lambda name: any(name == end or name.endswith(f".{end}") for end in value)


def _layer_filter(settings: Mapping[str, Any]) -> Callable[[int], bool]:
    chosen, pattern = settings.get("layers_to_transform"), settings.get("layers_pattern")
    if chosen is None or chosen == []:
        return lambda layer: True
    chosen = [chosen] if is_integer(chosen) else chosen
    if not isinstance(chosen, list) or not all(is_integer(layer) for layer in chosen):
        raise ValueError(f"layers_to_transform={chosen!r:.100} must be the numbers of layers")
    patterns = [pattern] if isinstance(pattern, str) else pattern or []
    if patterns and "h" not in patterns and all(str(name).isidentifier() for name in patterns):
        return lambda layer: False  # a list of layers by a name that GPT-2's has not
    return lambda layer: layer in chosen
