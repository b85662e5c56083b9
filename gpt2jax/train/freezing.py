"""Which parameters are trained: names by pattern, and the dict cut in two by them.

Names are those of the parameter dict with the layer's number after "h": "wte.embedding", "h.3.mlp.c_fc.kernel".
"""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from gpt2jax.model.gpt2 import Params


def partition_params(params: Params, patterns: Sequence[str]) -> tuple[Params, Params, Params | None]:
    """Parts parameters that stay as they are from those that are trained.

    Args:
        params: all parameters, blocks stacked.
        patterns: names of what is frozen; "*", "?" and "[...]" as in file names; a name stands for all below it.

    Returns:
        (trained, frozen, mask). A stacked leaf of which only some layers are frozen is among the trained ones; then
        the mask has the structure of `trained`, arrays of 0 and 1 for such leaves [L, 1, ...] and 1.0 for the others.
        It is None where there is no such leaf.

    Raises:
        ValueError: a pattern that no name matches, or nothing is left to train.
    """
    unused = set(patterns)

    def is_frozen(name: str) -> bool:
        hits = [p for p in patterns if fnmatch.fnmatchcase(name, p) or fnmatch.fnmatchcase(name, f"{p}.*")]
        unused.difference_update(hits)
        return bool(hits)

    trained: Params = {}
    frozen: Params = {}
    mask: Params = {}
    partly = False
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        names = [entry.key for entry in path]
        flags = [is_frozen(name) for name in leaf_names(names, leaf)]
        if all(flags):
            _put(frozen, names, leaf)
            continue
        _put(trained, names, leaf)
        some = np.asarray(flags).any()
        partly = partly or bool(some)
        keep = 1.0 - np.asarray(flags, np.float32).reshape(-1, *(1,) * (leaf.ndim - 1))
        _put(mask, names, keep if some else 1.0)
    if unused:
        examples = "wte, h.0, h.*.mlp, ln_f.scale"
        raise ValueError(
            f"freeze={sorted(unused)!r} is the name of no parameter; names are such as {examples}"
        )
    if not trained:
        raise ValueError(f"freeze={tuple(patterns)!r} leaves nothing to train")
    return trained, frozen, mask if partly else None


def leaf_names(path: Sequence[str], leaf: Any) -> list[str]:
    """The names of a leaf of the parameter dict: one for each layer of a stacked one."""
    if path[0] != "h":
        return [".".join(path)]
    return [".".join(["h", str(layer), *path[1:]]) for layer in range(leaf.shape[0])]


def merge_params(trained: Params, frozen: Params | None) -> Params:
    """The whole parameter dict out of its two parts."""
    if not frozen:
        return trained
    joined = dict(frozen)
    for name, value in trained.items():
        joined[name] = merge_params(value, frozen[name]) if name in frozen else value
    return joined


def _put(tree: Params, names: Sequence[str], leaf: Any) -> None:
    for name in names[:-1]:
        tree = tree.setdefault(name, {})
    tree[names[-1]] = leaf
