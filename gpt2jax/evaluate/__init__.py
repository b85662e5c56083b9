"""How good a model is on texts, and how much better than another one."""

from gpt2jax.evaluate.compare import STUDY_PROMPTS, Comparison, compare
from gpt2jax.evaluate.evaluation import Evaluation
from gpt2jax.evaluate.metrics import evaluate
from gpt2jax.evaluate.report import print_comparison

__all__ = ["STUDY_PROMPTS", "Comparison", "Evaluation", "compare", "evaluate", "print_comparison"]
