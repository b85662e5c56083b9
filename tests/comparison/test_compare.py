from __future__ import annotations

import dataclasses
import html.parser
import io
import json
import re
import sys
from typing import Any

import jax
import numpy as np
import pytest
from tiny_models import CONFIG, decode_bytes, encode, random_model, uniform_model

from gpt2jax.comparison import generations
from gpt2jax.comparison.compare import STUDY_PROMPTS, compare
from gpt2jax.comparison.generations import repetition, repetition_by_model
from gpt2jax.comparison.paired import paired_difference, where_gain_lies
from gpt2jax.evaluation.accumulators import DocumentSums, TokenScores, break_down, sum_by_document
from gpt2jax.evaluation.evaluate import evaluate
from gpt2jax.evaluation.result import Evaluation, Settings
from gpt2jax.generation.generate import generate
from gpt2jax.report.summary import print_comparison
from gpt2jax.report.svg import short
from gpt2jax.utils.fingerprint import params_fingerprint

LENGTH = 16
NASTY = '<script src="https://example.org/x.js">alert("&amp;")</script> `code` | cell\n# head \x00 \u202e'
TEXTS = ["", "to be", "été, 東京 and 🙂 in one text", NASTY] + [
    f"text number {i} of the set" for i in range(12)
]
PROMPTS = ["the", "", NASTY, "", [5, 6, 7]]
HISTORY = [
    {
        "step": step,
        "loss": 4 - step / 50,
        "learning_rate": 1e-3,
        "tokens_per_second": 900.0 + step,
        "grad_norm": 1.0 + step / 100,
        "loss_scale": 2.0**15,
    }
    | ({"validation_loss": 3.5} if step % 40 == 0 else {})
    for step in range(10, 100, 10)
]
TRAINING_TEXTS = ["some other text", TEXTS[2].upper()]
SETTINGS: dict[str, Any] = {
    "sequence_length": LENGTH,
    "batch_size": 8,
    "max_new_tokens": 12,
    "resamples": 200,
}


@pytest.fixture(scope="module")
def comparison(model, other_model):
    models = {"generic": model, NASTY: other_model, "flat": uniform_model()}
    return compare(
        models,
        TEXTS,
        PROMPTS,
        **SETTINGS,
        seed=7,
        training_texts=TRAINING_TEXTS,
        history=HISTORY,
        command="gpt2jax compare <a> 'b'",
    )


@pytest.fixture(scope="module")
def folder(comparison, tmp_path_factory):
    return comparison.save(tmp_path_factory.mktemp("comparison") / "new" / "folder")


def test_evaluations_are_those_of_evaluate(comparison, model):
    alone = evaluate(model, TEXTS, sequence_length=LENGTH, batch_size=8)
    np.testing.assert_array_equal(alone.sums.loss, comparison.evaluations["generic"].sums.loss)
    assert comparison.baseline == "generic"


def test_json_is_as_promised(comparison, folder):
    data = json.loads((folder / "comparison.json").read_text(encoding="utf-8"))
    assert data == json.loads(json.dumps(comparison.as_dict()))
    assert data["schema"] == "gpt2jax.comparison" and data["schema_version"] == 1
    assert [entry["name"] for entry in data["models"]] == ["generic", NASTY, "flat"]
    figures = {"loss", "accuracy", "keras_loss", "keras_accuracy", "perplexity", "bits_per_byte", "tokens"}
    for entry in data["models"]:
        assert figures <= entry.keys()
        evaluation = comparison.evaluations[entry["name"]]
        assert all(entry[name] == getattr(evaluation, name) for name in figures)
        assert {**entry, **evaluation.as_dict()} == entry
    assert set(data["paired"]) == {NASTY, "flat"}
    assert set(data["gains"]) == set(data["paired"]) and set(data["repetition"]) == set(
        comparison.evaluations
    )
    for name, gains in data["gains"].items():
        whole = data["paired"][name]["difference"] * data["models"][0]["tokens"]
        for kind in ("frequency", "kind"):
            parts = [entry["difference"] * entry["tokens"] for entry in gains[kind]]
            assert sum(parts) == pytest.approx(whole) and sum(
                e["share"] for e in gains[kind]
            ) == pytest.approx(1)
        excerpts = comparison.excerpts[name]
        assert [e["document"] for e in gains["gains"][:3]] == [e.document for e in excerpts["gains"]]
    assert data["overlap"]["exact"] == 1 and data["overlap"]["listed"][0]["document"] == 2
    assert len(data["generations"]) == 3 * len(PROMPTS)
    for entry in data["generations"]:
        assert {"model", "prompt", "text", "seconds", "tokens_per_second"} <= entry.keys()
        assert entry["seconds"] >= 0 and entry["tokens_per_second"] > 0 and 0 <= entry["tokens"] <= 12


def without_times(value):
    if isinstance(value, dict):
        return {k: without_times(v) for k, v in value.items() if k not in ("seconds", "tokens_per_second")}
    return [without_times(item) for item in value] if isinstance(value, list) else value


def test_a_second_run_gives_the_same_to_the_last_digit(comparison, folder, model, other_model, tmp_path):
    models = {"generic": model, NASTY: other_model, "flat": uniform_model()}
    again = compare(
        models,
        TEXTS,
        PROMPTS,
        **SETTINGS,
        seed=7,
        training_texts=TRAINING_TEXTS,
        history=HISTORY,
        command="gpt2jax compare <a> 'b'",
    )
    assert json.dumps(without_times(again.as_dict())) == json.dumps(without_times(comparison.as_dict()))
    again.save(tmp_path)
    pictures = [
        re.findall(r"<svg.*?</svg>", (f / "report.html").read_text(), re.DOTALL) for f in (folder, tmp_path)
    ]
    assert pictures[0] == pictures[1] and len(pictures[0]) == 9
    other_seed = compare(models, TEXTS, PROMPTS, **SETTINGS, seed=8)
    assert other_seed.generations[0]["text"] != comparison.generations[0]["text"]
    assert other_seed.paired[NASTY].interval != comparison.paired[NASTY].interval
    assert other_seed.paired[NASTY].difference == comparison.paired[NASTY].difference


def test_generations(comparison, model):
    first = comparison.generations[: len(PROMPTS)]
    assert [entry["prompt"] for entry in first] == PROMPTS and {entry["model"] for entry in first} == {
        "generic"
    }
    alone = generate(model, ["the"], max_new_tokens=12, top_k=5, seed=7)[0]
    assert first[0]["text"] == alone.text
    assert first[1]["text"] != first[3]["text"]  # the same prompt, with a seed of its own
    assert set(comparison.first_call_seconds) == set(comparison.evaluations)


def test_a_call_that_compiles_is_timed_again(model, monkeypatch):
    asked = []

    def generate_and_compile(model, prompts, config, **settings):
        asked.append(prompts[0])
        if len(asked) in (1, 4):
            jax.jit(lambda x: x + len(asked))(np.arange(3))
        return generate(model, prompts, config, **settings)

    generate(model, ["a"], max_new_tokens=2)  # compiles what the next ones need
    monkeypatch.setattr(generations, "generate", generate_and_compile)
    found, first = generations.generate_texts({"m": model}, ["a", "b", "c"], {"max_new_tokens": 2}, 0)
    assert asked == ["a", "a", "b", "c", "c"] and [entry["prompt"] for entry in found] == ["a", "b", "c"]
    assert first["m"] > 0


def evaluation_of(losses: list[list[float]], hits: list[list[bool]]) -> Evaluation:
    """An evaluation with given losses of each document's tokens, which have the ids 0, 1, ... in each."""
    offsets = np.cumsum([0] + [len(row) for row in losses])
    labels = np.concatenate([np.arange(len(row)) for row in losses])
    rank = np.where(np.concatenate(hits), 0, 7)
    loss = np.concatenate(losses).astype(np.float32)
    scores = TokenScores(offsets, labels, labels, loss, rank, np.full(len(loss), 0.5, np.float32))
    none = np.zeros(len(losses), np.int64)
    sums = DocumentSums(
        np.diff(offsets),
        sum_by_document(loss, offsets),
        sum_by_document(rank == 0, offsets, np.int64),
        *(none,) * 7,
        none > 0,
    )
    breakdown = break_down(scores, end_token_id=9, sequence_length=LENGTH, vocab_size=10)
    settings = Settings(LENGTH, "disjoint", LENGTH, 1, "float32")
    return Evaluation(settings, sums, breakdown, False, "", 0.0, scores)


def test_paired_difference_by_hand():
    first = evaluation_of([[2, 2], [4, 4, 4, 4], [1]], [[True, False], [False] * 4, [True]])
    second = evaluation_of([[1, 2], [3, 3, 3, 2], [1]], [[True, True], [True, False, False, False], [False]])
    found = paired_difference(first, second, baseline="a", same_tokens=True, resamples=500, seed=0)
    assert found.difference == pytest.approx((-1 - 5 + 0) / 7)
    residuals = [-1 + 6 / 7 * 2, -5 + 6 / 7 * 4, 0 + 6 / 7 * 1]
    assert found.standard_error == pytest.approx(np.sqrt(3 / 2 * np.square(residuals).sum()) / 7)
    assert found.win_rate == pytest.approx(2.5 / 3)
    assert found.accuracy_difference == pytest.approx((1 + 1 - 1) / 7)
    assert -1.25 <= found.interval[0] <= found.difference <= found.interval[1] <= 0
    assert found.documents == 3 and found.unit == "nats per token"


def test_where_the_gain_lies_by_hand():
    first = evaluation_of([[2, 2], [4, 4, 4, 4], [1]], [[True, False], [False] * 4, [True]])
    second = evaluation_of([[1, 2], [3, 3, 3, 2], [3]], [[True, True], [True, False, False, False], [False]])
    found = where_gain_lies(first, second, tokenizer=None, end_token_id=9)
    assert [(c["class"], c["tokens"], c["difference"]) for c in found["position"]] == [
        ("1", 3, pytest.approx((-1 - 1 + 2) / 3)),
        ("2 to 3", 3, pytest.approx((0 - 1 - 1) / 3)),
        ("4 to 7", 1, -2),
    ]
    assert [c["share"] for c in found["position"]] == pytest.approx([0, 0.5, 0.5])
    # every id occurs once in seven tokens or more often
    assert [(c["class"], c["tokens"], c["share"]) for c in found["frequency"]] == [
        ("1 in 100 or more often", 7, 1)
    ]
    assert [c["class"] for c in found["kind"]] == ["no text"]
    # documents of fewer than four tokens are left out where there are longer ones
    assert found["gains"] == [{"document": 1, "tokens": 4, "difference": -1.25}] and found["losses"] == []
    counts = np.array([5_000, 400, 30, 0, 0, 0, 0, 0, 0, 94_570])
    rare = where_gain_lies(first, second, tokenizer=None, end_token_id=9, token_counts=counts)["frequency"]
    assert [(c["class"], c["tokens"]) for c in rare] == [
        ("1 in 100 or more often", 3),
        ("1 in 1,000", 2),
        ("1 in 10,000", 1),
        ("never", 1),
    ]


def test_a_model_against_itself(model):
    found = compare({"a": model, "b": model}, TEXTS, [], **SETTINGS).paired["b"]
    assert (
        found.difference == 0
        and found.standard_error == 0
        and found.interval == (0, 0)
        and found.win_rate == 0.5
    )


def test_a_single_document_has_no_standard_error(model, other_model, tmp_path):
    found = compare({"a": model, "b": other_model}, ["one text only"], [], **SETTINGS)
    assert found.paired["b"].standard_error is None
    data = json.loads((found.save(tmp_path) / "comparison.json").read_text())
    assert data["models"][0]["loss_standard_error"] is None


def test_one_model(model, tmp_path):
    found = compare({"only": model}, TEXTS, ["the"], **SETTINGS)
    assert found.paired == {} and found.as_dict()["paired"] == {}
    found.save(tmp_path)
    text = (tmp_path / "report.html").read_text()
    assert "only: " in text and "Where the loss lies" in text and "Where the difference lies" not in text


def test_a_name_stands_on_one_line_of_a_plot():
    assert short("two\nlines") == "two lines" and len(short("long" * 9)) == 22


def test_different_tokenizers_are_compared_per_byte(model):
    larger = random_model(2, dataclasses.replace(CONFIG, vocab_size=350, bos_token_id=None, eos_token_id=349))
    models = {"a": model, "b": larger}
    with pytest.raises(ValueError, match="different tokenizers.*'disjoint', 'sliding' or 'rolling'"):
        compare(models, TEXTS, [], **SETTINGS)
    found = compare(models, TEXTS, [], windows="disjoint", **SETTINGS)
    a, b = found.evaluations.values()
    assert a.tokens != b.tokens and a.as_dict()["bytes"] == b.as_dict()["bytes"]
    paired = found.paired["b"]
    assert paired.unit == "nats per byte" and paired.accuracy_difference is None and found.excerpts == {}
    assert a.bits_per_byte is not None and b.bits_per_byte is not None
    assert paired.difference == pytest.approx((b.bits_per_byte - a.bits_per_byte) * np.log(2))


def test_excerpts_show_the_texts_by_difference(comparison, model):
    groups = comparison.excerpts[NASTY]
    first, second = comparison.evaluations["generic"], comparison.evaluations[NASTY]
    means = (second.document_loss - first.document_loss) / first.document_tokens
    gains = [excerpt.difference for excerpt in groups["gains"]]
    assert gains == sorted(gains) and all(gain < 0 for gain in gains)
    assert all(excerpt.difference > 0 for excerpt in groups["losses"])
    for excerpt in groups["gains"] + groups["losses"]:
        assert excerpt.difference == pytest.approx(means[excerpt.document])
        assert sum(difference for _, difference in excerpt.pieces) / excerpt.tokens == pytest.approx(
            excerpt.difference
        )
        shown = "".join(text for text, _ in excerpt.pieces).rstrip("■")
        ids = encode(model, TEXTS[excerpt.document])[: LENGTH - 1]
        assert shown == decode_bytes(model, ids).decode(errors="replace")


class Page(html.parser.HTMLParser):
    """Collects what a page refers to, its text and its open elements."""

    VOID = {"meta", "br", "link", "img", "hr"}

    def __init__(self, text: str):
        super().__init__()
        self.attributes: list[tuple[str, str, str]] = []
        self.text, self.open, self.ids = "", [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        self.ids += [value for name, value in attrs if name == "id"]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        self.ids += [value for name, value in attrs if name == "id"]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.text += data


def test_html_needs_nothing_else_and_shows_texts_as_they_are(comparison, folder):
    text = (folder / "report.html").read_text(encoding="utf-8")
    page = Page(text)
    assert page.open == [] and len(set(page.ids)) == len(page.ids)
    tags = {tag for tag, _, _ in page.attributes}
    assert tags.isdisjoint({"script", "link", "img", "iframe", "object", "b onload"})
    references = [
        value for _, name, value in page.attributes if name in ("href", "src", "xlink:href", "action")
    ]
    assert references and all(value.startswith("#") for value in references)
    assert all(value[1:] in page.ids for value in references)
    assert not re.findall(r"@import|url\((?!#)", text)
    assert not any(name.startswith("on") for _, name, _ in page.attributes)
    assert ("html", "lang", "en") in page.attributes
    shown = NASTY.replace("\x00", "\N{REPLACEMENT CHARACTER}")
    assert page.text.count(shown) >= 4 and "\x00" not in text  # title, heading, prompts, names of models
    for generation in comparison.generations:
        assert (
            re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", "\N{REPLACEMENT CHARACTER}", generation["text"])
            in page.text
        )
    for evaluation in comparison.evaluations.values():
        assert f"{evaluation.loss:.4f}" in page.text and f"{evaluation.keras_accuracy:.4f}" in page.text


def test_html_is_accessible(folder):
    text = (folder / "report.html").read_text(encoding="utf-8")
    assert text.count("<table") == text.count("<caption>") == 8
    assert text.count("<figure>") == text.count("<figcaption>") == 9
    assert "prefers-color-scheme: dark" in text and "@media print" in text
    headings = [int(level) for level in re.findall(r"<h(\d)", text)]
    assert headings[0] == 1 and headings.count(1) == 1
    assert all(after <= before + 1 for before, after in zip(headings, headings[1:], strict=False))


def test_pictures_take_their_colours_from_the_page(folder):
    text = (folder / "report.html").read_text(encoding="utf-8")
    for picture in re.findall(r"<svg.*?</svg>", text, re.DOTALL):
        assert not re.findall(r"#[0-9a-fA-F]{6}", picture)
        assert "DejaVu" not in picture and "<text" in picture


def luminance(colour: str) -> float:
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_contrast_in_light_and_dark(folder):
    text = (folder / "report.html").read_text(encoding="utf-8")
    schemes = re.findall(r":root \{(.*?)\}", text, re.DOTALL)
    assert len(schemes) == 3  # light, dark, paper
    for scheme in schemes:
        colours = dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})", scheme))
        for background in ("page", "card"):
            for name, needed in {
                "ink": 7,
                "muted": 4.5,
                **{f"series-{i}": 3 for i in range(6)},
                "gain": 3,
                "loss": 3,
            }.items():
                bright, dark = sorted(
                    (luminance(colours[name]), luminance(colours[background])), reverse=True
                )
                assert (bright + 0.05) / (dark + 0.05) >= needed, (name, background, colours)


def test_markdown(comparison, folder):
    text = (folder / "report.md").read_text(encoding="utf-8")
    assert (
        text.startswith("# ") and "\x00" in text
    )  # generated text and prompts are word for word within fences
    for line in text.splitlines():
        if line.startswith("| "):
            assert len(re.findall(r"(?<!\\)\|", line)) in (3, 5, 6, 7, 9, 13)
    for evaluation in comparison.evaluations.values():
        assert f"{evaluation.loss:.4f}" in text


def test_terminal(comparison):
    from rich.console import Console

    stream = io.StringIO()
    print_comparison(comparison, Console(file=stream, width=200))
    for evaluation in comparison.evaluations.values():
        assert (
            f"{evaluation.loss:.4f}" in stream.getvalue()
            and f"{evaluation.keras_loss:.4f}" in stream.getvalue()
        )


def test_surrogates_and_failures_leave_no_half_file(model, tmp_path, monkeypatch):
    found = compare({"a": model}, TEXTS, ["half a pair: \ud83d"], **SETTINGS)
    found.save(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert set(before) == {"report.html", "report.md", "comparison.json"}
    monkeypatch.setattr("gpt2jax.report.html.html_report", lambda comparison: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        found.save(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_model_without_finite_loss_can_be_reported(model, tmp_path):
    broken = dataclasses.replace(model, params=jax.tree.map(lambda x: x * np.nan, model.params))
    found = compare({"good": model, "broken": broken}, TEXTS, [], **SETTINGS)
    data = json.loads((found.save(tmp_path) / "comparison.json").read_text())
    assert data["models"][1]["loss"] is None and data["paired"]["broken"]["difference"] is None
    assert "no finite loss" in (tmp_path / "report.md").read_text()


def test_prompts_of_the_study():
    assert len(STUDY_PROMPTS) == 8 and STUDY_PROMPTS[-2:] == ("", "")
    assert sum(prompt.endswith("?") for prompt in STUDY_PROMPTS) == 5


def test_without_a_tokenizer(model):
    bare = dataclasses.replace(model, tokenizer=None)
    found = compare({"a": bare}, [[1, 2, 3], [4, 5]], **SETTINGS)
    assert found.generations == []
    found = compare({"a": bare}, [[1, 2, 3], [4, 5]], [[1, 2]], **SETTINGS)
    assert found.generations[0]["prompt"] == [1, 2] and found.generations[0]["tokens"] > 0


def test_repetition_by_hand():
    # a b a b a b: 2 of 6 tokens, 2 of 5 pairs, 2 of 3 quadruples are new
    figures = repetition([1, 2, 1, 2, 1, 2])
    by_hand = {"distinct_1": 1 / 3, "distinct_2": 2 / 5, "distinct_3": 2 / 4, "repeated_4": 1 / 3}
    assert figures == pytest.approx(by_hand)
    assert repetition([1]) == {"distinct_1": 1.0, "distinct_2": None, "distinct_3": None, "repeated_4": None}


def test_repetition_over_texts_by_hand():
    texts = {"a": [[1, 2, 1, 2, 1, 2], [2, 1, 2, 1, 9], []], "b": [[1, 2, 3, 4]]}
    generations = [
        {"model": name, "token_ids": ids, "tokens": len(ids), "seconds": 0.5}
        for name, rows in texts.items()
        for ids in rows
    ]
    found = repetition_by_model(generations)
    # of "a": 4-grams 1212 and 2121 in the first text, 2121 and 1219 in the second; the shared one is half of each
    assert found["a"]["self_overlap_4"] == 0.5 and found["b"]["self_overlap_4"] is None
    assert found["a"]["repeated_4"] == pytest.approx(1 / 5)
    assert found["a"]["distinct_1"] == pytest.approx((2 + 3) / 11)
    assert found["a"]["tokens"] == 11 and found["a"]["tokens_per_second"] == pytest.approx(11 / 1.5, abs=0.05)


def test_numbers_of_numpy_are_written(model):
    settings = {"seed": np.uint32(2**32 - 1), "resamples": np.int64(20), "max_new_tokens": np.int16(2)}
    settings |= {"top_k": np.int64(3), "temperature": np.float32(0.5), "sequence_length": np.int32(LENGTH)}
    found = compare({"a": model}, TEXTS, "a prompt by itself", **settings)  # pyright: ignore[reportArgumentType]
    assert json.loads(found.as_json())["settings"]["seed"] == 2**32 - 1
    assert [generation["prompt"] for generation in found.generations] == ["a prompt by itself"]
    two = compare({"a": model}, TEXTS, ["x", "y"], **settings)  # pyright: ignore[reportArgumentType]
    assert [generation["seed"] for generation in two.generations] == [2**32 - 1, 0]


def test_fingerprints_tell_models_apart(model, other_model):
    assert params_fingerprint(model.params) == params_fingerprint(jax.tree.map(np.asarray, model.params))
    assert params_fingerprint(model.params) != params_fingerprint(other_model.params)


@pytest.mark.parametrize(
    ("models", "settings", "error", "message"),
    [
        ({}, {}, ValueError, "at least one name and model"),
        ({"": None}, {}, ValueError, "name of a model is ''"),
        ({"a": "gpt2"}, {}, ValueError, r"models\['a'\] is a str; expected a LanguageModel"),
        (None, {"texts": []}, ValueError, "the data set is empty"),
        (None, {"texts": ["", "a"]}, ValueError, "shorter than two tokens"),
        (None, {"texts": "one"}, TypeError, "one string"),
        (None, {"sequence_length": 129}, ValueError, "over the model's context of 128"),
        (None, {"resamples": 0}, ValueError, "resamples=0 must be a positive whole number"),
        (None, {"max_length": 20}, ValueError, "give one of them"),
        (None, {"prompts": ["long " * 60]}, ValueError, "prompt 0 has .* tokens"),
        (None, {"prompts": 5}, ValueError, "prompts=5 must be"),
        (None, {"temperature": [1.0]}, ValueError, r"temperature=\[1.0\] must be a finite number"),
        (None, {"top_p": 7}, ValueError, "top_p=7 must be"),
        (None, {"max_new_tokens": 0}, ValueError, "max_new_tokens=0 must be"),
        (None, {"seed": 1.5}, ValueError, "seed=1.5 must be a whole number from 0"),
        (None, {"seed": 2**32}, ValueError, "seed=4294967296 must be a whole number from 0"),
        (None, {"prompts": {"a": 1}}, ValueError, "prompts={'a': 1} must be"),
        (None, {"prompts": {"a"}}, ValueError, "prompts={'a'} must be"),  # in an order of its own each time
        (None, {"texts": {"a text"}}, TypeError, "texts={'a text'} is no list of texts"),
        (None, {"source": "docs"}, ValueError, "source='docs' must be a dict"),
        (None, {"training_texts": "one"}, TypeError, "training_texts is one string"),
    ],
)
def test_errors(model, models, settings, error, message):
    texts, prompts = settings.pop("texts", TEXTS), settings.pop("prompts", [])
    with pytest.raises(error, match=message):
        compare({"a": model} if models is None else models, texts, prompts, **{**SETTINGS, **settings})


def test_an_impossible_prompt_is_found_before_the_long_work(model, monkeypatch):
    monkeypatch.setattr(
        sys.modules["gpt2jax.comparison.compare"], "evaluate", lambda *_, **__: pytest.fail("evaluated first")
    )
    with pytest.raises(ValueError, match="prompt 1 .*: shorten the prompt below 128 tokens$"):
        compare({"a": model}, TEXTS, ["a", "long " * 60], **SETTINGS)
