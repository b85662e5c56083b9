"""Freezing: split the parameter dict into trained and frozen parameters by patterns of names.

Names are those of the parameter dict with the layer's number after "h": "wte.embedding", "h.3.mlp.c_fc.kernel".
"""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from gpt2jax.model.gpt2 import Params
from gpt2jax.utils.validation import must_be


def partition_params(params: Params, patterns: Sequence[str]) -> tuple[Params, Params, Params | None]:
    """Split parameters into trained and frozen ones.

    Args:
        params: all parameters, blocks stacked.
        patterns: names of frozen parameters; "*", "?" and "[...]" as in file names; a name stands for all below it.

    Returns:
        (trained, frozen, mask). A stacked leaf with both trained and frozen layers is among the trained ones; then
        the mask has the structure of `trained`, with arrays of 0 and 1 [L, 1, ...] for these leaves and 1.0 for the
        others. It is None if no leaf is mixed.

    Raises:
        ValueError: a pattern matches no name, or nothing is left to train.
    """
    unused = set(patterns)

    def is_frozen(name: str) -> bool:
        matching = [
            p for p in patterns if fnmatch.fnmatchcase(name, p) or fnmatch.fnmatchcase(name, f"{p}.*")
        ]
        unused.difference_update(matching)
        return bool(matching)

    trained: Params = {}
    frozen: Params = {}
    mask: Params = {}
    is_mixed = False
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        names = [entry.key for entry in path]
        flags = [is_frozen(name) for name in leaf_names(names, leaf)]
        if all(flags):
            set_nested(frozen, names, leaf)
            continue
        set_nested(trained, names, leaf)
        is_mixed = is_mixed or any(flags)
        keep = 1.0 - np.asarray(flags, np.float32).reshape(-1, *(1,) * (leaf.ndim - 1))
        set_nested(mask, names, keep if any(flags) else 1.0)
    if unused:
        problem = must_be("freeze", "patterns that match parameters", sorted(unused))
        raise ValueError(f"{problem}; examples: wte, h.0, h.*.mlp, ln_f.scale")
    if not trained:
        raise ValueError(must_be("freeze", "patterns that leave something to train", tuple(patterns)))
    return trained, frozen, mask if is_mixed else None


def leaf_names(path: Sequence[str], leaf: Any) -> list[str]:
    """Return the names of a leaf of the parameter dict: one for each layer of a stacked leaf."""
    if path[0] != "h":
        return [".".join(path)]
    return [".".join(["h", str(layer), *path[1:]]) for layer in range(leaf.shape[0])]


def merge_params(trained: Params, frozen: Params | None) -> Params:
    """Build the whole parameter dict from its two parts."""
    if not frozen:
        return trained
    merged = dict(frozen)
    for name, value in trained.items():
        merged[name] = merge_params(value, frozen[name]) if name in frozen else value
    return merged


def set_nested(tree: Params, names: Sequence[str], leaf: Any) -> None:
    """Set the leaf at a path of names, making the dicts on the way."""
    for name in names[:-1]:
        tree = tree.setdefault(name, {})
    tree[names[-1]] = leaf
