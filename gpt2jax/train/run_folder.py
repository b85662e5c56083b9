"""The files of a run: settings, metrics and results in one folder."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import pathlib
import shutil
from collections.abc import Iterator, Mapping
from typing import Any

import jax

from gpt2jax.data.documents import Documents
from gpt2jax.language_model import LanguageModel
from gpt2jax.loading import save_adapter
from gpt2jax.train.config import FinetuneConfig
from gpt2jax.utils.atomic_io import atomic_write
from gpt2jax.utils.fingerprint import params_sha256
from gpt2jax.utils.json_files import read_json
from gpt2jax.utils.validation import check_path

try:
    import fcntl
except ModuleNotFoundError:  # Windows has no such locks
    fcntl = None

RUN_FILE = "run.json"
# these say how to log and keep, not what is computed: a resumed run may change them; nor does it matter under what
# name the same parameters were loaded, or the same texts
_FREE_FIELDS = {
    "base_model",
    "checkpoint_every",
    "eval_every",
    "keep_checkpoints",
    "log_every",
    "max_minutes",
    "patience",
    "revision",
    "source",
    "split",
    "token_cache",
    "track",
}
_FREE_FIELDS |= {"fsdp", "tensor_parallel"}  # a checkpoint moves to other devices; equal to rounding only
# what a run writes into its folder, here and in the report: `overwrite` deletes this and nothing else
_OWN = ("checkpoints", "best", "model", "base", "adapter", "tensorboard", "wandb", "metrics.jsonl", RUN_FILE)
_REPORT = ("comparison.json", "report.html", "report.md")


class RunFolder:
    """A folder with one run in it. Of several processes the first one checks and writes it.

    Attributes:
        description: what `run.json` says, once the run has begun; of several processes in the first one.

    Raises:
        FileExistsError: it holds another run, or files that are no run's, and `resume` or `overwrite` is not given.
        ValueError: both are given.
    """

    def __init__(self, path: str | pathlib.Path, *, resume: bool = False, overwrite: bool = False):
        if resume and overwrite:
            raise ValueError("resume=True goes on with the run that overwrite=True deletes: give one of them")
        self.path = check_path("output", path)
        self.checkpoints, self.best = self.path / "checkpoints", self.path / "best"
        self._writes = jax.process_index() == 0
        if self._writes:
            self._check(resume=resume, overwrite=overwrite)
        self._resumed = resume and (self.path / RUN_FILE).exists()
        self._overwrite = overwrite
        self.description: dict[str, Any] = {}

    def _check(self, *, resume: bool, overwrite: bool) -> None:
        path = self.path
        if path.exists() and not self.path.is_dir():
            raise FileExistsError(f"{path} is a file; expected a folder for the run")
        holds_run = (self.path / RUN_FILE).exists()
        if self.path.exists() and set(self.path.iterdir()) - set(self._left_over()):
            if not holds_run and not overwrite:
                raise FileExistsError(f"{path} is not empty and holds no run; choose another folder")
            if holds_run and not (resume or overwrite):
                raise FileExistsError(
                    f"{path} holds another run; resume it, overwrite it, or choose another folder"
                )

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """Makes the folder and holds it, as long as the block runs and the process lives.

        Raises:
            FileExistsError: the run of another program is in it at this moment.
        """
        if self._writes:
            self.path.mkdir(parents=True, exist_ok=True)
        if not self._writes or fcntl is None:
            yield
            return
        handle = os.open(self.path, os.O_RDONLY)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(handle)
            raise FileExistsError(
                f"another run is going on in {self.path}: wait for its end, or stop it"
            ) from None
        except OSError:  # a file system without locks
            pass
        try:
            yield
        finally:
            os.close(handle)

    def begin(
        self,
        model: LanguageModel,
        config: FinetuneConfig,
        documents: Documents,
        source: Mapping[str, Any] | None = None,
    ) -> None:
        """Writes `run.json`, or checks that the one of a resumed run says the same.

        Raises:
            ValueError: a resumed run had other settings, another model or other texts; names what differs.
        """
        if not self._writes:
            return
        self.description = content = run_description(model, config, documents, source)
        if self._resumed:
            self._check_same(content)
        for entry in self._left_over():
            _remove(entry)
        if self._resumed:
            return
        if self._overwrite and self.path.is_dir():
            for name in (*_OWN, *_REPORT):
                _remove(self.path / name)
        self.path.mkdir(parents=True, exist_ok=True)
        with atomic_write(self.path / RUN_FILE) as file:
            json.dump(content, file, indent=2)

    def _left_over(self) -> list[pathlib.Path]:
        """What a run was writing when it was killed: its description, its log, its model."""
        return list(self.path.glob(".*.part"))

    def _check_same(self, content: dict[str, Any]) -> None:
        before = read_json(self.path / RUN_FILE, ("finetune",))
        # a run of an earlier version lacks settings that came later: it had what is now their default
        before["finetune"] = {**_finetune_fields(FinetuneConfig()), **before["finetune"]}
        flat_before, flat_now = _flatten(before), _flatten(content)
        different = [
            f"{name} was {flat_before.get(name)!r}, is {flat_now.get(name)!r}"
            for name in sorted(flat_before.keys() | flat_now.keys())
            if flat_before.get(name) != flat_now.get(name) and name.split(".")[-1] not in _FREE_FIELDS
        ]
        if different:
            raise ValueError(f"cannot resume {self.path}: {'; '.join(different)}")

    def read_metrics(self, *, up_to: int) -> list[dict[str, float]]:
        """The log up to a step; later lines, of steps that a resumed run does again, are removed."""
        path = self.path / "metrics.jsonl"
        if not path.exists():
            return []
        kept = []
        for line in path.read_text("utf-8").splitlines():
            try:
                entry = json.loads(line)
            except json.JSONDecodeError:  # a run killed in the middle of a line
                continue
            # a damaged line may be JSON still
            if isinstance(entry, dict) and isinstance(entry.get("step"), int) and entry["step"] <= up_to:
                kept.append(entry)
        if self._writes:
            with atomic_write(path) as file:
                file.writelines(json.dumps(entry) + "\n" for entry in kept)
        return kept

    def append_metrics(self, entry: dict[str, float]) -> None:
        """Adds a line to `metrics.jsonl`."""
        if not self._writes:
            return
        with open(self.path / "metrics.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")

    def finish(self, model: LanguageModel) -> None:
        """Saves the trained model, or its adapters, and the base model where no name leads back to it."""
        if not self._writes:
            return
        if model.adapters is None:
            model.save(self.path / "model")
            return
        save_adapter(model, self.path / "adapter")
        if model.source is None:
            dataclasses.replace(model, adapters=None, lora=None).save(self.path / "base")


def run_description(
    model: LanguageModel,
    config: FinetuneConfig,
    documents: Documents,
    source: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """What `run.json` says: everything that the result follows from."""
    return {
        "format": "gpt2jax run",
        "version": 1,
        "base_model": model.source,
        "base_sha256": params_sha256(model.params),
        "model_config": dataclasses.asdict(model.config),
        "finetune": _finetune_fields(config),
        "data": {
            **(source or {}),
            "documents": len(documents),
            "tokens": int(documents.offsets[-1]),
            "sha256": documents.sha256,
        },
    }


def _remove(path: pathlib.Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def _finetune_fields(config: FinetuneConfig) -> dict[str, Any]:
    return json.loads(json.dumps(dataclasses.asdict(config)))


def _flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        flat |= _flatten(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return flat
