"""Settings of a study."""

from __future__ import annotations

import dataclasses
from typing import Annotated

from gpt2jax.comparison.compare import DEFAULT_PROMPTS
from gpt2jax.evaluation.config import DEFAULT_LENGTH, EvaluationConfig
from gpt2jax.generation.config import GenerationConfig
from gpt2jax.train.config import FinetuneConfig
from gpt2jax.utils.validation import each, instance_of, must_be, positive_int, string, validated


@validated
@dataclasses.dataclass(frozen=True)
class StudyConfig:
    """How to train, evaluate and generate in a study. The defaults are those of the published study.

    Attributes:
        stages: equal parts of the training texts, in their order. Each part is one run of `training`, from the
            parameters of the run before; 1 trains once on all texts.
        training: of each stage. Without `sequence_length`: 128, or the model's context if that is less.
        evaluation: of every stage. None: rows of the training's length, in the training's dtype.
        generation: of the texts. Without a length: `max_length` is 200, or the model's context if that is less.
        prompts: what every stage continues.
    """

    stages: Annotated[int, positive_int] = 2
    training: Annotated[FinetuneConfig, instance_of(FinetuneConfig)] = FinetuneConfig(
        epochs=3, packing="padded"
    )
    evaluation: Annotated[EvaluationConfig | None, instance_of(EvaluationConfig)] = None
    generation: Annotated[GenerationConfig, instance_of(GenerationConfig)] = GenerationConfig()
    prompts: Annotated[tuple[str, ...], each(string)] = DEFAULT_PROMPTS

    def __post_init__(self) -> None:
        if self.evaluation is not None and self.evaluation.windows != "truncate":
            hint = "; the other windows have no figures of Keras"
            raise ValueError(must_be("windows", "'truncate' in a study", self.evaluation.windows) + hint)

    def resolve(self, context: int) -> tuple[FinetuneConfig, EvaluationConfig]:
        """Return the settings of training and evaluation with the defaults for a model of `context` positions."""
        length = self.training.sequence_length or min(DEFAULT_LENGTH, context)
        training = dataclasses.replace(self.training, sequence_length=length)
        evaluation = self.evaluation or EvaluationConfig(length, compute_dtype=training.compute_dtype)
        return training, evaluation.resolve(context)
