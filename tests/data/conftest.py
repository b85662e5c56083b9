from __future__ import annotations

import datasets
import pytest

from gpt2jax.data.hub import DATA_VARIABLE


@pytest.fixture
def empty_folder(tmp_path, monkeypatch):
    """Make an empty folder the working folder: nothing of the machine is found by chance."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv(DATA_VARIABLE, raising=False)


@pytest.fixture
def papers() -> datasets.DatasetDict:
    return datasets.DatasetDict(
        {
            name: datasets.Dataset.from_dict(
                {"article": [f"{name} {i}" for i in range(4)], "abstract": ["short"] * 4, "pages": [1] * 4}
            )
            for name in ("train", "valid", "test")
        }
    )
