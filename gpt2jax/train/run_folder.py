"""The files of a run: settings, metrics and results in one folder."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import operator
import os
import pathlib
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax

from gpt2jax.data.documents import Documents
from gpt2jax.language_model import LanguageModel
from gpt2jax.loading import HUB_IDS, save_adapter
from gpt2jax.train.config import FinetuneConfig
from gpt2jax.train.optimizer import have_equal_rates
from gpt2jax.utils.atomic_io import atomic_write, make_folder, naming_file
from gpt2jax.utils.fingerprint import params_sha256
from gpt2jax.utils.home_folder import abbreviate_home
from gpt2jax.utils.json_files import parse_json, read_json
from gpt2jax.utils.notices import count_noun, notice
from gpt2jax.utils.validation import check_path
from gpt2jax.weights.model_card import write_card

try:
    import fcntl
except ModuleNotFoundError:  # Windows has no such locks
    fcntl = None

RUN_FILE = "run.json"
# what a run and its resumption must have in common: the parameters that the run began with, whatever name they were
# loaded by, the texts, and the settings except those below
_MUST_AGREE = ("base_sha256", "model_config", "finetune", "data.documents", "data.tokens", "data.sha256")
# settings that do not change what is computed, or (devices) change its rounding only
_MAY_DIFFER = {
    f"finetune.{name}"
    for name in (
        "log_every",
        "eval_every",
        "checkpoint_every",
        "keep_checkpoints",
        "max_minutes",
        "patience",
        "token_cache",
        "trackers",
        "fsdp",
        "tensor_parallel",
    )
}
# a resumed run may have another length if that changes nothing in the steps that are done
_LENGTH = {"finetune.steps", "finetune.epochs"}
# names of settings and packings in files of version 1
_RENAMED = {
    "accumulation": "gradient_accumulation_steps",
    "decay_share": "decay_fraction",
    "final_learning_rate": "final_lr_ratio",
    "layout": "packing",
    "track": "trackers",
}
_RENAMED_PACKINGS = {"windows": "concat", "documents": "padded"}
# what a run writes into its folder, here and in the report: `overwrite` deletes this and nothing else
_OWN = ("checkpoints", "best", "model", "base", "adapter", "tensorboard", "wandb", "metrics.jsonl", RUN_FILE)
_REPORT = ("comparison.json", "report.html", "report.md")


def _marked(name: str, steps: int | str) -> str:
    """Return the name of a file of the report with the steps that it is of."""
    stem, dot, end = name.partition(".")
    return f"{stem}-{steps}-steps{dot}{end}"


class RunFolder:
    """A folder that holds one run. Of several processes the first one checks and writes it.

    Args:
        path: the folder; it need not exist.
        resume: go on with the run in the folder, if it holds one.
        overwrite: delete the run in the folder, if it holds one.

    Attributes:
        description: what `run.json` says, once the run has begun; of several processes in the first one.

    Raises:
        FileExistsError: the folder holds another run, or files that do not belong to a run, and neither `resume` nor
            `overwrite` is given.
        ValueError: both are given.
    """

    def __init__(self, path: str | pathlib.Path, *, resume: bool = False, overwrite: bool = False):
        if resume and overwrite:
            raise ValueError(
                "resume must be False with overwrite=True, which deletes the run to resume; got True"
            )
        self.path = check_path("output", path)
        self.checkpoints, self.best = self.path / "checkpoints", self.path / "best"
        self.description: dict[str, Any] = {}
        self._resume, self._overwrite = resume, overwrite
        self._writes = jax.process_index() == 0
        self._check_content()

    @property
    def _is_resumed(self) -> bool:
        return self._resume and (self.path / RUN_FILE).exists()

    def _check_content(self) -> None:
        """Raise FileExistsError for a folder that this run must not write into."""
        path = self.path
        if not self._writes or not path.exists():
            return
        if not path.is_dir():
            raise FileExistsError(f"{path} is a file; expected a folder for the run")
        if not set(path.iterdir()) - set(self._partial_files()):
            return
        has_run = (path / RUN_FILE).exists()
        if not has_run and not self._overwrite:
            raise FileExistsError(f"{path} is not empty and holds no run; choose another folder")
        if has_run and not (self._resume or self._overwrite):
            raise FileExistsError(
                f"{path} holds another run; resume it (--resume), overwrite it (--overwrite), or choose another folder"
            )

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Make the folder and lock it, until the block or the process ends.

        Raises:
            FileExistsError: another program runs in the folder now, or has left a run there since it was checked.
        """
        if self._writes:
            make_folder(self.path)
        if not self._writes or fcntl is None:
            yield
            return
        handle = os.open(self.path, os.O_RDONLY)
        try:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise FileExistsError(
                    f"another run is going on in {self.path}: wait for its end, or stop it"
                ) from None
            except OSError:  # a file system without locks
                pass
            self._check_content()
            yield
        finally:
            os.close(handle)

    def begin(
        self,
        model: LanguageModel,
        config: FinetuneConfig,
        documents: Documents,
        source: Mapping[str, Any] | None = None,
        *,
        count_steps: Callable[[FinetuneConfig], int | None] = operator.attrgetter("steps"),
    ) -> None:
        """Write `run.json`, or check that the one of a resumed run agrees.

        A resumed run may be longer than it was, or shorter, if the steps that are done had the learning rates of a run
        of the new length; `run.json` then gets the new length, and the report is renamed to `report-5-steps.html`,
        with the steps that it is of. `count_steps` tells the steps of a run from settings.

        Raises:
            ValueError: a resumed run had other settings, another model or other texts; names what differs.
        """
        if not self._writes:
            return
        is_resumed = self._is_resumed
        self.description = run_description(model, config, documents, source)
        old_steps = self._check_same(self.description, config, count_steps) if is_resumed else None
        for entry in self._partial_files():
            _remove(entry)
        if is_resumed and old_steps is None:
            return
        if old_steps is not None:
            self._mark_report(old_steps)
        if self._overwrite and self.path.is_dir():
            marked = [entry.name for name in _REPORT for entry in self.path.glob(_marked(name, "*"))]
            for name in (*_OWN, *_REPORT, *marked):
                _remove(self.path / name)
        with atomic_write(self.path / RUN_FILE) as file:
            json.dump(self.description, file, indent=2)

    def _mark_report(self, steps: int) -> None:
        """Name the report of a run that now goes on after the steps that it is of; say so."""
        found = [name for name in _REPORT if (self.path / name).exists()]
        for name in found:
            os.replace(self.path / name, self.path / _marked(name, steps))
        if found:
            names = ", ".join(_marked(name, steps) for name in found)
            notice(
                f"the report in {self.path} is of the run of {count_noun(steps, 'step')}, and is now called {names}"
            )

    def _partial_files(self) -> list[pathlib.Path]:
        """Return what a run was writing when it was killed: its description, its log, its model."""
        return list(self.path.glob(".*.part"))

    def _check_same(
        self,
        content: dict[str, Any],
        config: FinetuneConfig,
        count_steps: Callable[[FinetuneConfig], int | None],
    ) -> int | None:
        """Raise ValueError if the run in the folder is another one; return its steps if it had another length."""
        before = read_json(self.path / RUN_FILE, {"finetune": dict})
        # a setting that came with a later version had the value that is its default now
        before["finetune"] = _finetune_fields(FinetuneConfig()) | _current_names(before["finetune"])
        flat_before, flat_now = _flatten(before), _flatten(content)
        different = {
            name: f"{name} was {flat_before.get(name)!r}, is {flat_now.get(name)!r}"
            for name in sorted(flat_before.keys() | flat_now.keys())
            if flat_before.get(name) != flat_now.get(name) and _must_agree(name)
        }
        hint = ""
        if different and different.keys() <= _LENGTH:
            length = {name: before["finetune"][name] for name in ("steps", "epochs")}
            old, new = count_steps(dataclasses.replace(config, **length)), count_steps(config)
            if old and new and self._can_change_length(config, old, new):
                notice(f"the run in {self.path} had {count_noun(old, 'step')}, and goes on to step {new:,}")
                return old
            hint = (
                "; in a run of that length the steps that are done would have been other ones: "
                f"--model {self.path} trains on from its result"
            )
        if different:
            raise ValueError(f"cannot resume {self.path}: {'; '.join(different.values())}{hint}")
        return None

    def _can_change_length(self, config: FinetuneConfig, old: int, new: int) -> bool:
        """Return whether the steps of the newest checkpoint are those of a run of the new length, too."""
        done = [int(entry.name) for entry in self.checkpoints.glob("*") if entry.name.isdecimal()]
        if new < max(done, default=0):
            return False
        return have_equal_rates(config, (old, new), max(done, default=0))

    def read_metrics(self, *, up_to: int) -> list[dict[str, float]]:
        """Read the log up to a step; later lines, of steps that a resumed run repeats, are removed."""
        path = self.path / "metrics.jsonl"
        if not path.exists():
            return []
        kept = []
        for line in path.read_text("utf-8", errors="replace").splitlines():
            try:
                entry = parse_json(line, "the line")
            except ValueError:  # a run killed in the middle of a line
                continue
            # a damaged line may still be JSON
            if isinstance(entry, dict) and isinstance(entry.get("step"), int) and entry["step"] <= up_to:
                kept.append(entry)
        if self._writes:
            with atomic_write(path) as file:
                file.writelines(json.dumps(entry) + "\n" for entry in kept)
        return kept

    def append_metrics(self, entry: dict[str, float]) -> None:
        """Add a line to `metrics.jsonl`."""
        if not self._writes:
            return
        path = self.path / "metrics.jsonl"
        with naming_file(path), open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")

    def finish(self, model: LanguageModel, history: Sequence[Mapping[str, float]]) -> None:
        """Save the trained model or its adapters with a model card, and the base model if no name leads back to it."""
        if not self._writes:
            return
        if model.adapters is None:
            model.save(self.path / "model")
            self._write_card("model", history, library="transformers")
            return
        save_adapter(model, self.path / "adapter")
        self._write_card("adapter", history, library="peft", tags=("lora",))
        if model.source is None:
            dataclasses.replace(model, adapters=None, lora=None).save(self.path / "base")

    def describe_space(self) -> str:
        """Say what takes the space in the folder, largest first, and what can be deleted after the run."""
        sizes = {entry.name: _count_bytes(entry) for entry in self.path.iterdir()}
        large = [name for name in sorted(sizes, key=lambda name: -sizes[name]) if sizes[name] >= 0.05e6]
        parts = ", ".join(f"{name} {sizes[name] / 1e6:,.1f} MB" for name in large[:4])
        total = f"{sum(sizes.values()) / 1e6:,.1f} MB: {parts}"
        return f"{total}; the folder checkpoints can be deleted when you will not --resume the run"

    def _write_card(self, name: str, history: Sequence[Mapping[str, float]], **card: Any) -> None:
        """Write the model card of the result: data, settings that are not the defaults, last figures."""
        run, base = self.description, self.description["base_model"]
        defaults = _finetune_fields(FinetuneConfig())
        settings = {name: value for name, value in run["finetune"].items() if value != defaults[name]}
        settings.pop("token_cache", None)
        figures = {name: value for entry in history for name, value in entry.items()}
        for timing in ("seconds", "tokens_per_second"):
            figures.pop(timing, None)
        base = base if base is None else HUB_IDS.get(base, base)
        sections = {"Training data": run["data"], "Settings": settings, "Figures at the end": figures}
        write_card(self.path / name, self.path.name, base_model=base, sections=sections, **card)


def run_description(
    model: LanguageModel,
    config: FinetuneConfig,
    documents: Documents,
    source: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Build the content of `run.json`: everything that the result follows from, without the home folder's name."""
    description = {
        "format": "gpt2jax run",
        "version": 2,
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
    return abbreviate_home(description)


def _remove(path: pathlib.Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def _count_bytes(path: pathlib.Path) -> int:
    return sum(file.stat().st_size for file in (path, *path.rglob("*")) if file.is_file())


def _finetune_fields(config: FinetuneConfig) -> dict[str, Any]:
    return json.loads(json.dumps(dataclasses.asdict(config)))


def _current_names(settings: dict[str, Any]) -> dict[str, Any]:
    """Translate the settings of a run of any version to the names and values of now."""
    settings = {_RENAMED.get(name, name): value for name, value in settings.items()}
    if isinstance(packing := settings.get("packing"), str):
        settings["packing"] = _RENAMED_PACKINGS.get(packing, packing)
    return settings


def _must_agree(name: str) -> bool:
    """Tell whether a flattened name of `run.json` is among those that must agree."""
    belongs = any(name == part or name.startswith(f"{part}.") for part in _MUST_AGREE)
    return belongs and name not in _MAY_DIFFER


def _flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        flat |= _flatten(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return flat
