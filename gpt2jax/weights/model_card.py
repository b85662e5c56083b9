"""README.md of a saved model or adapter: the model card that the hub shows."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from gpt2jax.utils.atomic_io import atomic_write
from gpt2jax.utils.home_folder import abbreviate_home
from gpt2jax.utils.notices import printable

CARD_FILE = "README.md"
# by this a card that we wrote, and may replace, is known
_OWN_TAG = "gpt2jax"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def write_card(
    folder: Path,
    title: str,
    *,
    library: str,
    base_model: str | None = None,
    tags: Sequence[str] = (),
    sections: Mapping[str, Mapping[str, object]] | None = None,
) -> None:
    """Write README.md with a front matter in YAML and a table for each section, without the home folder's name.

    Args:
        folder: of the model.
        title: heading of the card.
        library: what loads the folder: "transformers" or "peft".
        base_model: name or path of the model that training began with. The front matter holds it if it can be the id of
            a model on the hub, which refuses other values.
        tags: besides those that every card has.
        sections: names and values by heading; empty ones are left out.
    """
    front = [f"library_name: {library}", "pipeline_tag: text-generation"]
    base = abbreviate_home(base_model)
    if base is not None and _HUB_ID.fullmatch(base) and not Path(base).exists():
        front.append(f"base_model: {json.dumps(base)}")
    front += ["tags:", *(f"- {tag}" for tag in ("gpt2", _OWN_TAG, *tags))]
    lines = ["---", *front, "---", "", f"# {_escape(title)}", "", "Saved by gpt2jax, a GPT-2 in JAX."]
    if base is not None:
        lines[-1] += f" Base model: {_escape(base) if '`' in base else f'`{base}`'}."
    for heading, values in (sections or {}).items():
        if values:
            lines += ["", f"## {heading}", "", "| name | value |", "| --- | --- |"]
            lines += [f"| {name} | {_cell(value)} |" for name, value in values.items()]
    with atomic_write(folder / CARD_FILE) as file:
        file.write("\n".join(map(printable, lines)) + "\n")  # a folder's name need not be UTF-8


def refuse_foreign_card(folder: Path) -> None:
    """Raise FileExistsError if the folder holds a README.md that no saved model has."""
    path = folder / CARD_FILE
    if path.is_file() and f"\n- {_OWN_TAG}\n" not in path.read_text("utf-8", errors="replace"):
        raise FileExistsError(
            f"{folder} holds a {CARD_FILE} that gpt2jax did not write; give the name of a new folder"
        )


def _cell(value: object) -> str:
    text = f"{value:.6g}" if isinstance(value, float) else str(abbreviate_home(value))
    return _escape(" ".join(text.split()))


def _escape(text: str) -> str:
    """Return a name with what Markdown takes for links, HTML or cells escaped: others choose the names of files."""
    return re.sub(r"([\\`*\[\]<>|])", r"\\\1", text)
