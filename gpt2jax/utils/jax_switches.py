"""jax's switches for a user's own code, such as `jax_numpy_rank_promotion="raise"`, which are not for the library's.

The library broadcasts, mixes dtypes and transfers arrays on purpose. Its public calls therefore compute as jax does by
default, and give the same results whatever is switched on. `jax_debug_nans` and `jax_disable_jit` stay as they are.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any

import jax

_TRANSFERS = ("", "_host_to_device", "_device_to_host", "_device_to_device")
_owner: int | None = None  # the process in which jax was first used


@contextlib.contextmanager
def default_switches() -> Iterator[None]:
    """Compute as jax does by default in the block, or in the function that this decorates.

    Raises:
        RuntimeError: the process was forked from one that had used jax: it would wait forever for threads that only
            its parent has.
    """
    global _owner
    _owner = _owner or os.getpid()
    if _owner != os.getpid():
        raise RuntimeError(
            f"this process was forked from process {_owner}, which had used jax; jax's threads do not survive a fork. "
            'Start processes with multiprocessing.get_context("spawn")'
        )
    settings: Any = jax.config  # whose attributes jax adds as it runs
    with contextlib.ExitStack() as stack:
        if settings.jax_numpy_rank_promotion != "allow":
            stack.enter_context(jax.numpy_rank_promotion("allow"))
        if settings.jax_numpy_dtype_promotion != "standard":
            stack.enter_context(jax.numpy_dtype_promotion("standard"))
        if any(getattr(settings, f"jax_transfer_guard{name}") not in (None, "allow") for name in _TRANSFERS):
            stack.enter_context(jax.transfer_guard("allow"))
        if settings.jax_enable_x64:
            stack.enter_context(jax.enable_x64(False))
        yield
