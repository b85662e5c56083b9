"""The result of a comparison as plain data: every model owns its figures. `gpt2jax.report` renders it."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import pathlib
from typing import TYPE_CHECKING, Any

from gpt2jax.comparison.excerpts import Excerpts
from gpt2jax.comparison.paired import PER_TOKEN, PairedDifference, loss_standard_error, paired_difference
from gpt2jax.evaluation.result import Evaluation, finite_values
from gpt2jax.utils.validation import unknown_name

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

SCHEMA = "gpt2jax.comparison"
SCHEMA_VERSION = 2  # 1 had other names for some figures of models, and "gains" for "breakdown"


@dataclasses.dataclass(frozen=True, eq=False)
class VersusBaseline:
    """A model against the baseline.

    Attributes:
        difference: the difference of the losses and how certain it is.
        breakdown: which tokens it comes from, see `difference_breakdown`; None if the models' tokens differ.
        excerpts: the documents with the largest differences; None if the models' tokens differ.
    """

    difference: PairedDifference
    breakdown: dict[str, list[dict[str, Any]]] | None
    excerpts: Excerpts | None


@dataclasses.dataclass(frozen=True, eq=False)
class ModelResult:
    """The figures of one model.

    Attributes:
        name: unique in the comparison.
        info: source, parameters, adapter_rank and fingerprint, see `describe_model`.
        evaluation: of the texts.
        generations: one dict a prompt: model, prompt, text, seconds, tokens_per_second, token_ids, tokens,
            finish_reason, seed, mean_logprob, distinct_1, distinct_2, distinct_3, repeated_4.
        repetition: the figures of `repetition_by_model` over all its texts; None without generations.
        first_call_seconds: time of the first generation, which compiles; None without generations.
        versus_baseline: None for the baseline itself, which is the first model.
    """

    name: str
    info: dict[str, Any]
    evaluation: Evaluation
    generations: list[dict[str, Any]]
    repetition: dict[str, float | None] | None
    first_call_seconds: float | None
    versus_baseline: VersusBaseline | None

    @property
    def loss_standard_error(self) -> float | None:
        """Standard error of the loss per token, over documents."""
        return loss_standard_error(self.evaluation)


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Comparison:
    """The result of a comparison.

    Attributes:
        models: results in the given order; the first model is the baseline.
        overlap: what the texts share with the training texts, see `text_overlap`; None without training texts.
        settings: of the generation and the bootstrap.
        data: number of documents and SHA-256 of the texts, and where they come from, if that was given.
        versions: of Python, the packages and the device.
        history: what `finetune` logged, for the training curve; or None.
        command: the command line that made this, or None.
        by_texts: of several lists of texts, the comparison on each by their names; the rest of this one is that on the
            first. Empty if `compare` was given one list.
    """

    models: list[ModelResult]
    overlap: dict[str, Any] | None
    settings: dict[str, Any]
    data: dict[str, Any]
    versions: dict[str, str]
    history: list[dict[str, float]] | None
    command: str | None
    by_texts: dict[str, Comparison] = dataclasses.field(default_factory=dict)

    @property
    def parts(self) -> list[Comparison]:
        """The comparisons on each list of texts; itself if there is one list."""
        return list(self.by_texts.values()) or [self]

    @property
    def texts_name(self) -> str:
        """The name of the texts, "" if they have none."""
        return self.data.get("name", "")

    @property
    def baseline(self) -> ModelResult:
        """The first model, which the others are compared with."""
        return self.models[0]

    @property
    def differences(self) -> dict[str, PairedDifference]:
        """The difference of every other model to the baseline, by name."""
        return {m.name: m.versus_baseline.difference for m in self.models if m.versus_baseline}

    @functools.cached_property
    def pairs(self) -> dict[tuple[str, str], PairedDifference]:
        """The difference of any two models by (first name, second name), second minus first, in the order of models."""
        differences = self.differences
        same_tokens = all(difference.unit == PER_TOKEN for difference in differences.values())
        bootstrap = {name: self.settings[name] for name in ("resamples", "seed")}
        return {
            (a.name, b.name): differences[b.name]
            if a is self.baseline
            else paired_difference(
                a.evaluation, b.evaluation, baseline=a.name, same_tokens=same_tokens, **bootstrap
            )
            for a, b in itertools.combinations(self.models, 2)
        }

    def __getitem__(self, name: str) -> ModelResult:
        """Return the result of a model by its name.

        Raises:
            KeyError: there is no model of this name.
        """
        found = {model.name: model for model in self.models}
        if name not in found:
            raise KeyError(unknown_name("model", name, found))
        return found[name]

    def _figures(self) -> dict[str, Any]:
        """Return what `as_dict` has for each list of texts."""
        return {
            "models": [
                {
                    "name": model.name,
                    **model.evaluation.as_dict(),
                    "loss_standard_error": model.loss_standard_error,
                    **model.info,
                }
                for model in self.models
            ],
            "paired": {name: difference.as_dict() for name, difference in self.differences.items()},
            "pairs": [{"model": name, **found.as_dict()} for (_, name), found in self.pairs.items()],
            "breakdown": {
                model.name: model.versus_baseline.breakdown
                for model in self.models
                if model.versus_baseline and model.versus_baseline.breakdown
            },
            "overlap": self.overlap,
        }

    def as_dict(self) -> dict[str, Any]:
        """Return plain values for JSON.

        Two runs with the same seed on the same machine give the same, except under the keys `seconds` and
        `tokens_per_second`. Of several lists of texts, `by_texts` has the figures of each.
        """
        times = [(m.name, "evaluation", m.evaluation.seconds) for m in self.models]
        times += [(m.name, "first generation", m.first_call_seconds) for m in self.models]
        by_texts = {name: {**part._figures(), "data": part.data} for name, part in self.by_texts.items()}
        return {
            "schema": SCHEMA,
            "schema_version": SCHEMA_VERSION,
            **self._figures(),
            "generations": [
                finite_values(generation) for model in self.models for generation in model.generations
            ],
            "repetition": {model.name: model.repetition for model in self.models if model.repetition},
            "settings": self.settings,
            "data": self.data,
            "versions": self.versions,
            "command": self.command,
            "timing": [
                {"model": name, "step": step, "seconds": round(seconds, 3)}
                for name, step, seconds in times
                if seconds is not None
            ],
            **({"by_texts": by_texts} if by_texts else {}),
        }

    def as_json(self) -> str:
        """Return `as_dict()` as the text of a JSON file."""
        return json.dumps(self.as_dict(), indent=2, ensure_ascii=False, allow_nan=False) + "\n"

    def save(self, folder: str | pathlib.Path) -> pathlib.Path:
        """Write `report.html`, `report.md` and `comparison.json` into a folder, and return the folder."""
        from gpt2jax.report.save import save_report

        return save_report(self, folder)

    def plot_losses(self) -> Figure:
        """Draw the loss of each model with its 95 % interval as a `matplotlib.figure.Figure`."""
        from gpt2jax.report.plots import losses_figure

        return losses_figure(self)

    def to_frame(self) -> pd.DataFrame:
        """Return a `pandas.DataFrame` with a row for each model, under its name.

        The columns are the single figures of `as_dict()["models"]`, and `loss_difference`,
        `loss_difference_standard_error`, `interval_low` and `interval_high` of the difference to the baseline, which
        the baseline itself does not have. Of several lists of texts, the rows stand under the name of the texts, too.

        Raises:
            ModuleNotFoundError: pandas is not installed.
        """
        try:
            import pandas as pd
        except ModuleNotFoundError:
            raise ModuleNotFoundError("to_frame needs pandas; pip install pandas") from None
        if self.by_texts:
            frames = {name: part.to_frame() for name, part in self.by_texts.items()}
            return pd.concat(frames, names=["texts"])
        rows = []
        for entry in self.as_dict()["models"]:
            row = {name: value for name, value in entry.items() if not isinstance(value, dict | list)}
            if found := self.differences.get(row["name"]):
                row |= {
                    "loss_difference": found.difference,
                    "loss_difference_standard_error": found.standard_error,
                    "interval_low": found.interval[0],
                    "interval_high": found.interval[1],
                }
            rows.append(row)
        return pd.DataFrame(rows).set_index("name")

    def __repr__(self) -> str:
        losses = ", ".join(
            f"{model.name}{' on ' if part.texts_name else ''}{part.texts_name}: {model.evaluation.loss:.4f}"
            for part in self.parts
            for model in part.models
        )
        return f"Comparison({losses} nats per token)"

    def _repr_html_(self) -> str:
        from gpt2jax.report.notebook import comparison_html

        return comparison_html(self)
