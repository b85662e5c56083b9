"""The study's two tables against keras-hub's own `evaluate`, on files in the format of PubMed's archive."""

from __future__ import annotations

import json
import pathlib
import re
import zipfile

import pytest

import gpt2jax

keras_hub = pytest.importorskip("keras_hub")
keras = pytest.importorskip("keras")

# what these libraries say to each other
pytestmark = [pytest.mark.filterwarnings(f"ignore::{kind}") for kind in ("DeprecationWarning", "UserWarning")]

LENGTH = 32


def write_pubmed(folder: pathlib.Path, documents: int) -> pathlib.Path:
    """Write `pubmed-dataset.zip` with articles of words: keras-hub of today cuts numbers and punctuation otherwise.

    Some articles are shorter than a row, and one is empty.
    """
    found = gpt2jax.load_texts("python-docs", split="all", limit=3 * documents)
    articles = [re.findall("[A-Za-z]+", text) for text in found]
    articles[1::5] = [words[: 3 + index] for index, words in enumerate(articles[1::5])]
    articles[0] = []
    archive = folder / "pubmed-dataset.zip"
    with zipfile.ZipFile(archive, "w") as file:
        for index, name in enumerate(("train", "val", "test")):
            rows = [
                {
                    "article_id": str(number),
                    "article_text": [" ".join(words[i : i + 9]) for i in range(0, len(words), 9)],
                    "abstract_text": ["<S> short </S>"],
                    "section_names": ["introduction"],
                    "sections": [["short"]],
                }
                for number, words in enumerate(articles[index::3])
            ]
            lines = "".join(json.dumps(row) + "\n" for row in rows)
            file.writestr(f"pubmed-dataset/{name}.txt", lines)
    return archive


def evaluate_with_keras(model, texts, folder, *, dtype, length) -> tuple[float, float]:
    """Loss and accuracy, as keras-nlp compiled them by default when the study was made."""
    model.merge_adapter().save(folder, format="keras")
    theirs = keras_hub.models.GPT2CausalLM.from_preset(str(folder), dtype=dtype)
    theirs.preprocessor.sequence_length = length
    theirs.compile(
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=[keras.metrics.SparseCategoricalAccuracy()],
        weighted_metrics=[],
    )
    return theirs.evaluate(texts, batch_size=8, verbose=0)


def test_study_tables_equal_keras_evaluate(tmp_path):
    archive = write_pubmed(tmp_path, documents=20)
    texts = {split: gpt2jax.load_texts(archive, split=split) for split in ("train", "validation", "test")}
    assert "\n" in texts["test"][1] and "" in texts["train"]
    training = gpt2jax.FinetuneConfig(steps=2, batch_size=8, sequence_length=LENGTH, packing="padded")
    config = gpt2jax.StudyConfig(1, training, prompts=())
    found = gpt2jax.study(gpt2jax.load("gpt2-mini"), texts, config, output=tmp_path / "study", progress=False)
    assert [result["name"] for result in found.results] == ["generic", "stage 1"]
    for result in found.results:
        is_generic = result["method"] is None
        model = gpt2jax.load("gpt2-mini" if is_generic else found.output / result["folder"])
        for split in ("validation", "test"):
            preset = tmp_path / f"{result['folder']}-{split}"
            loss, accuracy = evaluate_with_keras(model, texts[split], preset, dtype="float32", length=LENGTH)
            figures = result[split]
            assert figures["tokens"] < figures["keras_positions"] == 20 * LENGTH  # there is padding
            assert round(accuracy * figures["keras_positions"]) == figures["keras_correct"]
            assert figures["keras_loss"] == pytest.approx(loss, rel=1e-5)
