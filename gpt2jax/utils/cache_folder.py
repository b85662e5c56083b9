"""The user's cache folder, where tokenized texts and compiled programs are kept for later runs."""

from __future__ import annotations

import os
import pathlib

from gpt2jax.utils.validation import check_path

CACHE_VARIABLE = "GPT2JAX_CACHE"


def cache_folder(name: str) -> pathlib.Path | None:
    """Return a folder in $GPT2JAX_CACHE, or in gpt2jax in the user's cache folder; it need not exist.

    None if the user's cache folder is not writable.
    """
    home = os.environ.get(CACHE_VARIABLE)
    if home:
        return check_path(CACHE_VARIABLE, home) / name
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    folder = check_path("XDG_CACHE_HOME", base)
    existing = next((place for place in (folder, *folder.parents) if os.path.exists(place)), folder)
    if folder.parts[0] == "~" or not os.access(existing, os.W_OK):
        return None
    return folder / "gpt2jax" / name
