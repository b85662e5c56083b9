"""The folder of a study: what study.json says, whether a study in the folder can go on, and what is deleted."""

from __future__ import annotations

import dataclasses
import itertools
import json
import pathlib
import shutil
from collections.abc import Mapping
from typing import Any

from gpt2jax.language_model import LanguageModel
from gpt2jax.studies.config import StudyConfig
from gpt2jax.utils.atomic_io import atomic_write, make_folder
from gpt2jax.utils.fingerprint import data_fingerprint, params_fingerprint
from gpt2jax.utils.home_folder import abbreviate_home
from gpt2jax.utils.json_files import read_json

SCHEMA = "gpt2jax.study"
SCHEMA_VERSION = 2  # 1 had one model
STUDY_FILE, OVERLAP_FILE = "study.json", "overlap.json"
STAGE_FOLDERS = "[0-9][0-9]-*"


def describe_model(model: LanguageModel) -> dict[str, Any]:
    """Return what identifies a model."""
    return {
        "source": model.source,
        "parameters": model.num_parameters(),
        "fingerprint": params_fingerprint(model.params),
    }


def describe_study(
    models: Mapping[str, dict[str, Any]], texts: Mapping[str, list[Any]], config: StudyConfig
) -> dict[str, Any]:
    """Return what the results follow from, as plain values."""
    settings = dataclasses.asdict(config)
    del settings["training"]["token_cache"]
    description = {
        "schema": SCHEMA,
        "schema_version": SCHEMA_VERSION,
        "models": models,
        "texts": {
            split: {"documents": len(found), "sha256": data_fingerprint(found)}
            for split, found in texts.items()
        },
        "config": settings,
    }
    return abbreviate_home(json.loads(json.dumps(description, default=repr)))


def begin(
    folder: pathlib.Path, description: dict[str, Any], *, resume: bool, overwrite: bool
) -> dict[str, Any] | None:
    """Write study.json, or check that the one there agrees; return it if its study is finished.

    Raises:
        ValueError: a resumed study had other settings, texts or models, or both `resume` and `overwrite`.
        FileExistsError: the folder holds a study, or something else.
    """
    if resume and overwrite:
        raise ValueError("resume must be False with overwrite=True, which deletes the study; got True")
    file = folder / STUDY_FILE
    if file.exists() and not (resume or overwrite):
        raise FileExistsError(f"{folder} holds a study; resume it, overwrite it, or choose another folder")
    if file.exists() and resume:
        before = read_json(file, ("schema_version",))
        for name in ("schema_version", "models", "texts", "config"):
            label = "" if name in ("models", "texts", "config") else name
            if differences := _differences(before.get(name), description[name], label):
                raise ValueError(f"cannot resume {folder}: {'; '.join(differences)}; choose another folder")
        return before if "results" in before else None
    if folder.exists() and any(folder.iterdir()) and not file.exists():
        raise FileExistsError(f"{folder} is not empty and holds no study; choose another folder")
    make_folder(folder)
    if file.exists():  # overwrite: a kill before its end leaves a file that cannot be resumed
        write_json(file, {})
        (folder / OVERLAP_FILE).unlink(missing_ok=True)
        for place in [*folder.glob(STAGE_FOLDERS), *folder.glob(f"*/{STAGE_FOLDERS}")]:
            shutil.rmtree(place)
    write_json(file, description)
    return None


def forget_states(folder: pathlib.Path) -> None:
    """Delete what only an unfinished study needs."""
    (folder / OVERLAP_FILE).unlink(missing_ok=True)
    for place in [*folder.glob(STAGE_FOLDERS), *folder.glob(f"*/{STAGE_FOLDERS}")]:
        for split in ("validation", "test"):
            (place / f"{split}.npz").unlink(missing_ok=True)


def _differences(before: Any, now: Any, name: str = "") -> list[str]:
    """Say which values of two nested dicts differ."""
    if before == now:
        return []
    if not (isinstance(before, dict) and isinstance(now, dict)):
        return [f"{name} was {before!r:.100}, is {now!r:.100}"]
    found = (
        _differences(before.get(key), now.get(key), f"{name}.{key}".lstrip("."))
        for key in sorted(before.keys() | now.keys())
    )
    return list(itertools.chain.from_iterable(found))


def write_json(path: pathlib.Path, content: Mapping[str, Any]) -> None:
    """Write a JSON file whole or not at all."""
    with atomic_write(path) as file:
        json.dump(content, file, indent=2)
