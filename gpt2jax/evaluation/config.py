"""Settings of an evaluation: the one place where its options, defaults, rules and explanations stand."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Literal

from gpt2jax.utils.validation import (
    at_least,
    check,
    int_in_range,
    must_be,
    positive_int,
    validated,
)

DEFAULT_LENGTH = 128  # that of the Keras baseline


@validated
@dataclasses.dataclass(frozen=True)
class EvaluationConfig:
    """Which tokens of the texts are scored, with how much context, and how.

    Attributes:
        sequence_length: T, the most tokens of one row. Default: 128, or the model's context if that is less.
        windows: "truncate" (the first T - 1 tokens of each text and an end token, as Keras does), "non_overlapping"
            (every token, in rows side by side), "sliding" (every token, in rows that overlap), or "rolling" (every
            token, as lm-evaluation-harness counts them: without an end token behind the text).
        stride: labels by which a row of "sliding" advances; T - stride is the least context. Default: T // 2.
        batch_size: rows at once; changes time and memory, not the figures.
        compute_dtype: operands of matrix products; softmax and loss are float32. Default: float32; the commands take
            that of the training for a run, and say which.
    """

    sequence_length: Annotated[int | None, at_least(2)] = None
    windows: Literal["truncate", "non_overlapping", "sliding", "rolling"] = "truncate"
    stride: Annotated[int | None, positive_int] = None
    batch_size: Annotated[int, positive_int] = 32
    compute_dtype: Literal["float32", "tensorfloat32", "bfloat16", "float16"] = "float32"

    def __post_init__(self) -> None:
        if self.stride is not None and self.windows != "sliding":
            raise ValueError(
                must_be("stride", f"None with windows={self.windows!r}", self.stride)
                + "; only windows='sliding' have a stride"
            )
        if self.stride is not None and self.sequence_length is not None:
            check("stride", self.stride, int_in_range(1, self.sequence_length))

    def resolve(self, context: int) -> EvaluationConfig:
        """Return the settings with the defaults for a model of `context` positions filled in.

        Raises:
            ValueError: `sequence_length` is over the context, or `stride` over `sequence_length`.
        """
        length = min(DEFAULT_LENGTH, context) if self.sequence_length is None else self.sequence_length
        if length > context:
            legal = f"at most the model's context of {context} tokens"
            raise ValueError(must_be("sequence_length", legal, length))
        stride = max(1, length // 2) if self.windows == "sliding" and self.stride is None else self.stride
        return dataclasses.replace(self, sequence_length=length, stride=stride)

    @property
    def length(self) -> int:
        """T of resolved settings."""
        assert self.sequence_length is not None
        return self.sequence_length
