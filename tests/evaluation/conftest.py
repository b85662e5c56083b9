"""Models that several tests share."""

from __future__ import annotations

import pytest
from tiny_models import random_model

from gpt2jax.language_model import LanguageModel


@pytest.fixture(scope="session")
def model() -> LanguageModel:
    return random_model(0)


@pytest.fixture(scope="session")
def other_model() -> LanguageModel:
    return random_model(1)
