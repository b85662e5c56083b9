from __future__ import annotations

import dataclasses
import json
import math
import re

import jax
import numpy as np
import pytest
from tiny_models import CONFIG, decode_bytes, encode, numpy_losses, random_model, uniform_model

from gpt2jax.doctor.reference import reference_logits
from gpt2jax.evaluation.accumulators import TokenScores
from gpt2jax.evaluation.config import EvaluationConfig
from gpt2jax.evaluation.evaluate import evaluate
from gpt2jax.evaluation.keras_metrics import keras_metrics
from gpt2jax.evaluation.result import Evaluation
from gpt2jax.evaluation.scoring import Scorer
from gpt2jax.lora.adapters import init_adapters
from gpt2jax.lora.config import LoRAConfig
from gpt2jax.tokenizer.bpe import Tokenizer
from gpt2jax.utils.notices import Notice

LENGTH = 16
TEXTS = [
    "",
    "a",
    "to be",
    "été, 東京 and 🙂",
    "x" * (LENGTH - 2),  # with random merges of 44 tokens: about this many
    "a sentence that is longer than any row of this test, and so it is truncated at the end of the row",
    "<|endoftext|>!!!!",
    "the\n\n\tlast   one \x00",
]


def tokens_of(result: Evaluation) -> TokenScores:
    assert result.per_token is not None
    return result.per_token


def keras_by_hand(model, texts, length):
    """Compute Keras' loss, correct predictions and positions in float64."""
    end, pad = model.end_token_id, 0
    total, correct, positions = 0.0, 0, 0
    for text in texts:
        ids = [end] + encode(model, text)[: length - 1] + [end]
        mask = [1] * len(ids) + [0] * (length + 1 - len(ids))
        ids = np.array(ids + [pad] * (length + 1 - len(ids)))
        logits = reference_logits(model.params, model.config, ids[:-1], np.array(mask[:-1], float))
        total += (numpy_losses(logits, ids[1:]) * np.array(mask[1:])).sum()
        correct += int((logits.argmax(-1) == ids[1:]).sum())
        positions += length
    return total / positions, correct, positions


@pytest.fixture(scope="module")
def keen_model():
    """A model that often predicts "!", token 0, so that padding counts in the accuracy of Keras."""
    model = random_model(3)
    embedding = model.params["wte"]["embedding"]
    direction = model.params["ln_f"]["bias"]
    embedding = embedding.at[0].set(embedding[0] + 2.5 * direction / np.linalg.norm(direction))
    return dataclasses.replace(model, params={**model.params, "wte": {"embedding": embedding}})


@pytest.mark.slow
@pytest.mark.parametrize("batch_size", [1, 3, 32])
def test_evaluate_keras_figures_equal_float64_numpy(keen_model, batch_size):
    result = evaluate(keen_model, TEXTS, sequence_length=LENGTH, batch_size=batch_size)
    loss, correct, positions = keras_by_hand(keen_model, TEXTS, LENGTH)
    assert result.keras is not None
    assert result.keras.correct == correct
    assert result.keras.positions == positions
    assert result.keras_accuracy == correct / positions
    assert result.keras_loss == pytest.approx(loss, rel=1e-5)
    on_padding = result.per_document.correct_on_padding.sum()
    assert on_padding == correct - result.per_document.correct.sum()
    assert 0 < on_padding < positions - result.tokens  # else this test says nothing about padding


def test_evaluate_keras_accuracy_depends_on_the_padding(keen_model):
    """The end token behind a short text is an input, padding is masked, positions count it: each has an effect."""
    texts = [text for text in TEXTS if len(encode(keen_model, text)) < LENGTH - 2]
    end = keen_model.end_token_id
    correct = {"right": 0, "no end token": 0, "no mask": 0}
    for text in texts:
        ids = [end] + encode(keen_model, text) + [end]
        row = np.array(ids + [0] * (LENGTH - len(ids)))
        labels = np.append(row[1:], 0)
        mask = (np.arange(LENGTH) < len(ids)).astype(float)
        without_end = np.where(np.arange(LENGTH) == len(ids) - 1, 0, row)
        for name, inputs, keys in (
            ("right", row, mask),
            ("no end token", without_end, np.arange(LENGTH) < len(ids) - 1),
            ("no mask", row, np.ones(LENGTH)),
        ):
            logits = reference_logits(keen_model.params, CONFIG, inputs, keys)
            correct[name] += int((logits.argmax(-1) == labels).sum())
    assert keras_metrics(keen_model, texts, sequence_length=LENGTH).correct == correct["right"]
    assert len(set(correct.values())) == 3, correct


@pytest.mark.parametrize(
    ("windows", "stride"),
    [("truncate", None), ("non_overlapping", None), ("sliding", 5), ("sliding", 1), ("rolling", None)],
)
def test_evaluate_token_scores_equal_float64_numpy(model, windows, stride):
    result = evaluate(
        model, TEXTS, sequence_length=LENGTH, batch_size=3, windows=windows, stride=stride, per_token=True
    )
    scores = tokens_of(result)
    end = model.end_token_id
    step = stride or LENGTH
    for index, text in enumerate(TEXTS):
        ids = encode(model, text)
        ids = ids[: LENGTH - 1] if windows == "truncate" else ids
        inputs, labels = np.array([end, *ids]), np.array([*ids, end])
        if windows == "rolling":
            inputs, labels = inputs[:-1], labels[:-1]
        expected = np.full((3, len(labels)), np.nan)  # loss, rank, confidence
        begin = 0
        while np.isnan(expected).any():
            if windows == "rolling":  # the last window reaches back to be full
                begin = max(0, min(begin, len(labels) - LENGTH))
            part = slice(begin, min(begin + LENGTH, len(labels)))
            size = part.stop - part.start
            logits = reference_logits(model.params, CONFIG, inputs[part], np.ones(size))
            losses = numpy_losses(logits, labels[part])
            ranks = (logits > logits[np.arange(size), labels[part], None]).sum(-1)
            found = np.stack([losses, ranks, np.exp(-numpy_losses(logits, logits.argmax(-1)))])
            fresh = np.isnan(expected[:, part])
            expected[:, part] = np.where(fresh, found, expected[:, part])
            begin += step
        mine = slice(scores.offsets[index], scores.offsets[index + 1])
        np.testing.assert_array_equal(scores.labels[mine], labels)
        np.testing.assert_allclose(scores.loss[mine], expected[0], rtol=2e-5, atol=2e-5)
        np.testing.assert_array_equal(scores.rank[mine], expected[1])
        np.testing.assert_allclose(scores.confidence[mine], expected[2], rtol=2e-5)
        assert result.per_document.loss[index] == pytest.approx(expected[0].sum(), rel=1e-5)
    sums = result.per_document
    assert result.loss == pytest.approx(sums.loss.sum() / sums.tokens.sum(), rel=1e-12)
    assert result.accuracy == (scores.rank == 0).mean()
    assert result.accuracy_top5 == (scores.rank < 5).mean()


def test_evaluate_windows_score_the_tokens_they_promise(model):
    truncate, sliding, non_overlapping, rolling = (
        evaluate(model, TEXTS, sequence_length=LENGTH, batch_size=3, windows=windows)
        for windows in ("truncate", "sliding", "non_overlapping", "rolling")
    )
    assert sliding.tokens == non_overlapping.tokens == rolling.tokens + len(TEXTS) > truncate.tokens
    assert truncate.keras == keras_metrics(model, TEXTS, sequence_length=LENGTH, batch_size=3)
    assert sliding.keras is non_overlapping.keras_loss is rolling.keras_accuracy is None
    assert sliding.as_dict()["keras_loss"] is None


@pytest.mark.slow
def test_evaluate_scores_every_token_once_with_one_pass(model, monkeypatch):
    """No windows pay for the rows of Keras."""
    rows = []
    score = Scorer.__call__
    monkeypatch.setattr(Scorer, "__call__", lambda self, batch: rows.append(batch) or score(self, batch))
    for windows in ("truncate", "non_overlapping"):
        rows.clear()
        evaluate(model, ["a text of one row"] * 4, sequence_length=64, windows=windows)
        assert [batch["tokens"].shape[0] for batch in rows] == [4]


@pytest.mark.slow
def test_evaluate_figures_do_not_depend_on_batches(model):
    texts = [text for text in TEXTS for _ in range(3)]
    for windows in ("truncate", "sliding"):
        results = [
            evaluate(model, texts, sequence_length=LENGTH, batch_size=size, windows=windows, per_token=True)
            for size in (2, 7)
        ]
        one, other = map(tokens_of, results)
        np.testing.assert_allclose(one.loss, other.loss, rtol=1e-5, atol=1e-6)
        np.testing.assert_array_equal(one.rank, other.rank)
        assert results[0].keras_accuracy == results[1].keras_accuracy


def test_evaluate_text_counts_alike_among_others_and_alone(model):
    """Padding, longer neighbours and the filling of the last batch have no effect on a document."""
    together = evaluate(model, TEXTS, sequence_length=LENGTH, batch_size=5)
    for index, text in enumerate(TEXTS):
        if len(encode(model, text)) > 1:
            alone = evaluate(model, [text], sequence_length=LENGTH, batch_size=1)
            assert alone.per_document.loss[0] == pytest.approx(together.per_document.loss[index], rel=1e-5)
            assert alone.per_document.correct[0] == together.per_document.correct[index]
    short = evaluate(model, ["to be"], sequence_length=LENGTH)
    long = evaluate(model, ["to be"], sequence_length=4 * LENGTH)
    assert short.loss == pytest.approx(long.loss, rel=1e-5)
    assert short.keras_loss is not None and long.keras_loss is not None
    assert short.keras_loss == pytest.approx(4 * long.keras_loss, rel=1e-5)


def test_evaluate_uniform_model_by_hand():
    model = uniform_model()
    texts = ["", "short", "été " * 30]
    result = evaluate(model, texts, sequence_length=LENGTH, windows="non_overlapping")
    tokens = sum(len(encode(model, text)) for text in texts)
    size = sum(len(text.encode()) for text in texts)
    assert result.tokens == tokens + len(texts)
    assert result.loss == pytest.approx(math.log(CONFIG.vocab_size), rel=1e-6)
    assert result.perplexity == pytest.approx(CONFIG.vocab_size, rel=1e-5)
    # 300 tokens cost log2(300) bits each; the end tokens are no text
    assert result.bits_per_byte == pytest.approx(tokens * math.log2(300) / size, rel=1e-6)
    # all logits are equal: the first id counts as the most likely
    assert result.per_document.correct.sum() == result.breakdown.vocabulary_tokens[0]
    assert result.per_document.correct_top5.sum() == result.breakdown.vocabulary_tokens[:5].sum()
    assert result.bits_per_character == pytest.approx(
        tokens * math.log2(300) / sum(map(len, texts)), rel=1e-6
    )
    assert result.word_perplexity == pytest.approx(math.exp(tokens * math.log(300) / (1 + 31)), rel=1e-5)
    assert result.bits_per_byte is not None
    assert result.byte_perplexity == pytest.approx(2**result.bits_per_byte, rel=1e-9)
    # all predictions have probability 1/300: they are in the first bin, and right as often as "!" occurs
    assert result.calibration_error == pytest.approx(abs(1 / 300 - result.accuracy), rel=1e-5)
    assert result.calibration()[0]["tokens"] == result.tokens


def test_evaluate_bytes_of_a_truncated_text_are_those_of_its_scored_tokens():
    model = uniform_model()
    text = "été " * 30
    result = evaluate(model, [text], sequence_length=LENGTH)
    scored = decode_bytes(model, encode(model, text)[: LENGTH - 1])
    assert result.tokens == LENGTH and result.num_truncated == 1
    exact = decode_bytes(model, encode(model, "abcdef" * 9)[: LENGTH - 1]).decode()
    assert evaluate(model, [exact], sequence_length=LENGTH).num_truncated == 0
    assert result.per_document.bytes[0] == len(scored) < len(text.encode())
    assert result.bits_per_byte == pytest.approx((LENGTH - 1) * math.log2(300) / len(scored), rel=1e-6)


def test_evaluate_token_ids_need_no_tokenizer(model):
    bare = dataclasses.replace(model, tokenizer=None)
    ids = [encode(model, text) for text in TEXTS]
    result, expected = (evaluate(m, t, sequence_length=LENGTH) for m, t in ((bare, ids), (model, TEXTS)))
    np.testing.assert_array_equal(result.per_document.loss, expected.per_document.loss)
    assert result.bits_per_byte is None and expected.bits_per_byte is not None
    assert result.as_dict()["bits_per_byte"] is None


@pytest.mark.slow
def test_evaluate_vocabulary_with_ids_without_text():
    """Vocabularies are padded to round sizes: the ids behind the tokenizer's have no bytes."""
    config = dataclasses.replace(CONFIG, vocab_size=320, eos_token_id=299)
    model = random_model(0, config, Tokenizer.gpt2(300))
    result = evaluate(model, [[5, 6, 310, 7], "ab"], sequence_length=8)
    assert result.per_document.bytes.tolist() == [3, 2]


def test_evaluate_counts_adapters(model):
    lora = LoRAConfig(rank=2)
    adapters = jax.tree.map(lambda x: x + 0.3, init_adapters(CONFIG, lora, 0))
    adapted = dataclasses.replace(model, adapters=adapters, lora=lora)
    result = evaluate(adapted, TEXTS, sequence_length=LENGTH)
    merged = evaluate(adapted.merge_adapter(), TEXTS, sequence_length=LENGTH)
    assert result.loss == merged.loss != evaluate(model, TEXTS, sequence_length=LENGTH).loss


@pytest.mark.slow
def test_evaluate_16_bit_dtypes_are_close(model):
    exact = evaluate(model, TEXTS, sequence_length=LENGTH)
    for dtype, tolerance in (("float16", 2e-3), ("bfloat16", 2e-2)):
        narrow = evaluate(model, TEXTS, sequence_length=LENGTH, compute_dtype=dtype)
        assert narrow.loss == pytest.approx(exact.loss, rel=tolerance)
        assert narrow.loss != exact.loss


def test_breakdown_adds_up_to_the_figures(keen_model):
    texts = [*TEXTS, [1] * 5 + [0] * 3]
    result = evaluate(keen_model, texts, sequence_length=LENGTH, windows="non_overlapping", per_token=True)
    scores, table = tokens_of(result), result.breakdown
    loss, correct = result.per_document.loss.sum(), result.per_document.correct.sum()
    assert table.vocabulary_tokens.tolist() == np.bincount(scores.labels, minlength=300).tolist()
    assert (
        table.vocabulary_loss.sum() == pytest.approx(loss) and table.vocabulary_correct.sum() == correct > 0
    )
    by_hand = 0.0
    for low in range(15):
        inside = (scores.confidence >= low / 15) & (scores.confidence < (low + 1) / 15)
        if inside.any():
            gap = scores.confidence[inside].mean(dtype=np.float64) - (scores.rank[inside] == 0).mean()
            by_hand += abs(gap) * inside.sum() / result.tokens
            assert result.calibration()[low]["tokens"] == inside.sum()
    assert result.calibration_error == pytest.approx(by_hand, rel=1e-6)
    classes = result.loss_by_frequency()
    assert sum(entry["tokens"] for entry in classes) == result.tokens
    assert sum(entry["tokens"] * (entry["loss"] or 0) for entry in classes) == pytest.approx(loss)
    common = table.vocabulary_tokens >= result.tokens / 100
    assert classes[0]["tokens"] == table.vocabulary_tokens[common].sum()
    assert classes[-1] == {"class": "never", "tokens": 0, "loss": None, "accuracy": None}


def test_sum_text_measures_the_text_as_it_is(model):
    """Words as lm-evaluation-harness counts them, characters as Python does."""
    texts = [*TEXTS, "  two  words\n"]
    sums = evaluate(model, texts, sequence_length=LENGTH, windows="rolling").per_document
    assert sums.characters.tolist() == [len(text) for text in texts]
    assert sums.bytes.tolist() == [len(text.encode()) for text in texts]
    assert sums.words.tolist() == [len(re.split(r"\s+", text)) if text else 0 for text in texts]
    assert sums.words[-1] == 4 and not sums.truncated.any()


def test_evaluation_loss_by_position(model):
    result = evaluate(model, TEXTS, sequence_length=LENGTH, windows="sliding", stride=4, per_token=True)
    sums, counts = result.loss_by_position()
    scores = tokens_of(result)
    last = scores.offsets[1:] - 1
    assert counts.sum() == result.tokens - len(TEXTS)
    whole = result.per_document.loss.sum()
    assert sums.sum() == pytest.approx(whole - scores.loss[last].sum(dtype=np.float64))
    first = [scores.offsets[index] for index, text in enumerate(TEXTS) if text]
    assert sums[0] == pytest.approx(scores.loss[first].sum(dtype=np.float64))
    assert counts[0] == len(first)  # with context from before, no other token is the first of its row


def test_evaluation_as_dict_is_json(model):
    result = evaluate(model, TEXTS, sequence_length=LENGTH)
    figures = json.loads(json.dumps(result.as_dict(per_document=True), allow_nan=False))
    assert figures["loss"] == result.loss and figures["perplexity"] == math.exp(result.loss)
    assert sum(figures["document_tokens"]) == figures["tokens"] == result.tokens
    assert "document_loss" not in result.as_dict()


def test_evaluation_without_finite_loss_is_still_json(model):
    broken = dataclasses.replace(model, params=jax.tree.map(lambda x: x * np.nan, model.params))
    with pytest.warns(
        Notice, match="the model: 8 of 8 documents have no finite loss: 0, 1, 2, 3, 4 and 3 more, cou"
    ):
        figures = evaluate(broken, TEXTS, sequence_length=LENGTH).as_dict()
    assert figures["loss"] is None and figures["perplexity"] is None
    json.dumps(figures, allow_nan=False)


@pytest.mark.parametrize(
    ("texts", "settings", "message"),
    [
        ([], {}, "the data set is empty"),
        (["", "a"], {}, "all 2 texts are shorter than two tokens"),
        (
            ["some text"],
            {"sequence_length": 129},
            "sequence_length must be at most the model's context of 128 tokens, got 129",
        ),
        (
            ["some text"],
            {"sequence_length": 1},
            "sequence_length must be a whole number of at least 2, or None, got 1",
        ),
        (
            ["some text"],
            {"sequence_length": 8.0},
            "sequence_length must be a whole number of at least 2, or None, got 8.0",
        ),
        (["some text"], {"batch_size": 0}, "batch_size must be a positive whole number, got 0"),
        (
            ["some text"],
            {"windows": "all"},
            "windows must be one of truncate, non_overlapping, sliding, rolling, got 'all'",
        ),
        (
            ["some text"],
            {"windows": "sliding", "stride": 17},
            "stride must be a whole number from 1 to 16, got 17",
        ),
        (["some text"], {"stride": 4}, "stride must be None with windows='truncate', got 4; only"),
        (["some text"], {"compute_dtype": "int8"}, "compute_dtype must be one of float32, .*, got 'int8'"),
        ([[1, 2, 300]], {}, "token id 300"),
        (["some text", None], {}, "text 1 is neither a string nor a list of token ids: None"),
        (["some text", b"bytes"], {}, "text 1 is neither a string nor a list of token ids: b'bytes'"),
        ([{"text": "a row", "id": 1}], {}, "text 0 has the columns 'text', 'id'; pass one column"),
        (
            ["some text"],
            {"devices": []},
            "devices must be a list of at least one jax.Device, or None, got ..",
        ),
        (["some text"], {"devices": "cpu"}, "devices must be .*, got .'c', 'p', 'u'.; jax.devices"),
    ],
)
def test_evaluate_refuses(model, texts, settings, message):
    with pytest.raises(ValueError, match="^.*" + message.replace("(", r"\(")):
        evaluate(model, texts, **{"sequence_length": LENGTH, **settings})


def test_evaluate_takes_a_config_and_overrides(model):
    config = EvaluationConfig(sequence_length=8, windows="sliding")
    found = evaluate(model, TEXTS, config, stride=2)
    assert found.config == dataclasses.replace(config, stride=2)
    assert EvaluationConfig().resolve(1024).sequence_length == 128
    assert EvaluationConfig(windows="sliding").resolve(64) == EvaluationConfig(64, "sliding", 32)
    with pytest.raises(
        TypeError, match="there is no setting 'sequence_lenght'; did you mean 'sequence_length'"
    ):
        evaluate(model, TEXTS, sequence_lenght=8)
    with pytest.raises(TypeError, match="there is no setting 'per_tokens'; did you mean 'per_token'"):
        evaluate(model, TEXTS, per_tokens=True)
    with pytest.raises(ValueError, match="config must be an EvaluationConfig, or None, got 8"):
        evaluate(model, TEXTS, 8)  # pyright: ignore[reportArgumentType]


def test_keras_metrics_refuses_no_texts(model):
    with pytest.raises(ValueError, match="there are no texts"):
        keras_metrics(model, [])


def test_evaluate_refuses_what_is_not_a_list_of_texts(model):
    with pytest.raises(TypeError, match="one string"):
        evaluate(model, "some text", sequence_length=LENGTH)
    with pytest.raises(TypeError, match="texts must be a list of texts, got None"):
        evaluate(model, None, sequence_length=LENGTH)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="model must be a LanguageModel, got 'gpt2-mini'; gpt2jax.load"):
        evaluate("gpt2-mini", ["some text"])  # pyright: ignore[reportArgumentType]


def test_evaluate_progress_goes_to_stderr(model, capsys):
    evaluate(model, TEXTS, sequence_length=LENGTH, progress=True)
    assert capsys.readouterr().out == ""
