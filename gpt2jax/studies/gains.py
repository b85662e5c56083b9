"""What each training of a study gained, and what it took: trained parameters, time and memory."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

from gpt2jax.comparison.paired import paired_difference
from gpt2jax.studies.compared import RESAMPLES
from gpt2jax.studies.stages import Stage


def list_gains(stages: Sequence[Stage]) -> list[dict[str, Any]]:
    """Return the gain of each model and method.

    Args:
        stages: all of the study.

    Returns:
        One dict for each: name (of the model, the method, or both), stage (name of the last one), gain (test loss of
        the generic model minus that of the last stage, nats per token), standard_error and interval (over documents,
        paired), loss (of the last stage), trained_parameters (of a stage), seconds (of all stages together),
        planned_bytes (by XLA, for the training step, on each device) and measured_bytes (the device's peak; None if
        it does not count, or an earlier training of the process used more).
    """
    found = []
    for (model, method), group in _group_trained(stages):
        generic = next(stage for stage in stages if stage.model == model and stage.method is None)
        trained, last = [stage.figures["training"] for stage in group], group[-1]
        difference = paired_difference(
            generic.evaluation("test"),
            last.evaluation("test"),
            baseline=generic.name,
            same_tokens=True,
            resamples=RESAMPLES,
            seed=last.config.training.seed,
        ).as_dict()
        low, high = difference["interval"]
        measured = [training["measured_bytes"] for training in trained]
        seconds = [training["seconds"] for training in trained]
        found.append(
            {
                "name": variant_name(last, model, method),
                "stage": last.name,
                "gain": _negative(difference["difference"]),
                "standard_error": difference["standard_error"],
                "interval": [_negative(high), _negative(low)],
                "loss": last.figures["test"]["loss"],
                "trained_parameters": trained[-1]["trained_parameters"],
                "seconds": None if None in seconds else sum(seconds),
                "planned_bytes": trained[0]["planned_bytes"],
                # the first stage's: later ones do the same, so that the peak does not rise again
                "measured_bytes": measured[0],
            }
        )
    return found


def variant_name(stage: Stage, model: str, method: str) -> str:
    """Return what a model that was trained by a method is called, where a study has several."""
    return " ".join(part for part in (model, method if len(stage.config.methods) > 1 else "") if part)


def joined_histories(stages: Sequence[Stage]) -> dict[str, list[dict[str, float]]]:
    """Return the logs of the training of each model and method, with the steps of its stages counted through."""
    joined: dict[str, list[dict[str, float]]] = {}
    for (model, method), group in _group_trained(stages):
        entries: list[dict[str, float]] = []
        for stage in group:
            before = entries[-1]["step"] if entries else 0
            entries += [{**entry, "step": before + entry["step"]} for entry in stage.figures["history"]]
        joined[variant_name(group[-1], model, method)] = entries
    return joined


def _group_trained(stages: Sequence[Stage]) -> list[tuple[tuple[str, str], list[Stage]]]:
    """Return the trained stages of each model and method."""
    trained = (stage for stage in stages if stage.method is not None)
    groups = itertools.groupby(trained, key=lambda stage: (stage.model, stage.method or ""))
    return [(key, list(group)) for key, group in groups]


def _negative(value: float | None) -> float | None:
    return None if value is None else -value
