"""How good a model is on texts, and how much better than another one."""

from gpt2jax.evaluation.compare import STUDY_PROMPTS, Comparison, compare
from gpt2jax.evaluation.evaluation import Evaluation
from gpt2jax.evaluation.metrics import evaluate
from gpt2jax.evaluation.report import print_comparison

__all__ = ["STUDY_PROMPTS", "Comparison", "Evaluation", "compare", "evaluate", "print_comparison"]
