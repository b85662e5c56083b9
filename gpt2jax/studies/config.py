"""Settings of a study."""

from __future__ import annotations

import dataclasses
from typing import Annotated

from gpt2jax.comparison.compare import DEFAULT_MAX_LENGTH, DEFAULT_PROMPTS
from gpt2jax.evaluation.config import DEFAULT_LENGTH, EvaluationConfig
from gpt2jax.generation.config import GenerationConfig
from gpt2jax.lora.config import LoRAConfig
from gpt2jax.train.config import FinetuneConfig
from gpt2jax.utils.validation import (
    each,
    instance_of,
    must_be,
    one_of,
    positive_int,
    set_field,
    string,
    validated,
)

FULL, LORA = "full", "lora"


@validated
@dataclasses.dataclass(frozen=True)
class StudyConfig:
    """How to train, evaluate and generate in a study. The defaults are those of the published study.

    Attributes:
        stages: equal parts of the training texts, in their order. Each part is one run of `training`, from the
            parameters of the run before; 1 trains once on all texts.
        training: of each stage. Without `sequence_length`: 128, or the model's context if that is less.
        methods: what is trained: "full" (all parameters), "lora" (adapters, of `training.lora` or its defaults), or
            both, each from the same generic model. Empty: "lora" if `training.lora` is given, else "full".
        evaluation: of every stage. None: rows of the training's length, in the training's dtype.
        generation: of the texts. Without a length: `max_length` is 200, or the model's context if that is less.
        prompts: what every stage continues.
    """

    stages: Annotated[int, positive_int] = 2
    training: Annotated[FinetuneConfig, instance_of(FinetuneConfig)] = FinetuneConfig(
        epochs=3, packing="padded"
    )
    methods: Annotated[tuple[str, ...], each(one_of((FULL, LORA)))] = ()
    evaluation: Annotated[EvaluationConfig | None, instance_of(EvaluationConfig)] = None
    generation: Annotated[GenerationConfig, instance_of(GenerationConfig)] = GenerationConfig()
    prompts: Annotated[tuple[str, ...], each(string)] = DEFAULT_PROMPTS

    def __post_init__(self) -> None:
        if self.evaluation is not None and self.evaluation.windows != "truncate":
            hint = "; the other windows have no figures of Keras"
            raise ValueError(must_be("windows", "'truncate' in a study", self.evaluation.windows) + hint)
        if self.generation.num_return_sequences != 1:
            hint = "; repeat a prompt for several texts"
            raise ValueError(
                must_be("num_return_sequences", "1", self.generation.num_return_sequences) + hint
            )
        if not self.methods:
            set_field(self, "methods", (FULL,) if self.training.lora is None else (LORA,))
        if len(set(self.methods)) < len(self.methods):
            raise ValueError(must_be("methods", "different ones", self.methods))
        if self.training.lora is not None and LORA not in self.methods:
            raise ValueError(must_be("methods", "with 'lora' if adapters have settings", self.methods))

    def resolve(self, context: int) -> StudyConfig:
        """Return the settings with the defaults for models of at least `context` positions filled in."""
        length = self.training.sequence_length or min(DEFAULT_LENGTH, context)
        training = dataclasses.replace(self.training, sequence_length=length)
        evaluation = self.evaluation or EvaluationConfig(length, compute_dtype=training.compute_dtype)
        generation = self.generation
        if generation.max_length is None and generation.max_new_tokens is None:
            generation = dataclasses.replace(generation, max_length=min(DEFAULT_MAX_LENGTH, context))
        return dataclasses.replace(
            self, training=training, evaluation=evaluation.resolve(context), generation=generation
        )

    def training_of(self, method: str) -> FinetuneConfig:
        """Return the settings of the training by one of the methods."""
        if method == LORA:
            return dataclasses.replace(self.training, lora=self.training.lora or LoRAConfig())
        return dataclasses.replace(self.training, lora=None, base_dtype=None, lora_plus_ratio=1.0)
