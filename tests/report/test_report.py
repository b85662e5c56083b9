from __future__ import annotations

import dataclasses
import html.parser
import io
import itertools
import json
import math
import re
from typing import Any

import pytest
from comparisons import NASTY, SETTINGS, TEXTS

from gpt2jax.comparison.compare import compare
from gpt2jax.comparison.paired import ratio_standard_error
from gpt2jax.report.plot_style import new_figure, short_name, to_svg
from gpt2jax.report.save import hide_home, replace_control_characters, save_report
from gpt2jax.report.summary import facts, print_comparison, print_table
from gpt2jax.report.tables import Table, figures_table, settings_table


@pytest.fixture(scope="module")
def folder(comparison, tmp_path_factory):
    return save_report(comparison, tmp_path_factory.mktemp("comparison") / "new" / "folder")


@pytest.mark.slow
def test_save_report_writes_the_figures(comparison, folder):
    assert {path.name for path in folder.iterdir()} == {"report.html", "report.md", "comparison.json"}
    data = json.loads((folder / "comparison.json").read_text(encoding="utf-8"))
    assert data == json.loads(json.dumps(comparison.as_dict()))


def test_hide_home(comparison, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    first, *others = comparison.models
    first = dataclasses.replace(first, info=first.info | {"source": f"{tmp_path}/m"})
    private = dataclasses.replace(
        comparison,
        models=[first, *others],
        data=comparison.data | {"source": (f"{tmp_path}/a.txt", f"{tmp_path}/b.txt")},
        command=f"gpt2jax compare {tmp_path}/m '{tmp_path}/a b' --data={tmp_path}/a.txt --out {tmp_path}",
    )
    saved = hide_home(private)
    assert str(tmp_path) not in saved.as_json() and "~/b.txt" in saved.as_json()
    assert saved.command == "gpt2jax compare ~/m '~/a b' --data=~/a.txt --out ~"


def test_short_name_is_one_line():
    assert short_name("two\nlines") == "two lines" and len(short_name("long" * 9)) == 22
    assert short_name("a\x00b") == "a\N{REPLACEMENT CHARACTER}b"
    assert short_name("gpt2-medium lora stage 2") != short_name("gpt2-medium lora stage 1")


def test_replace_control_characters():
    shown = replace_control_characters("a\x00\x1b[31m\x9b\u202e\u2066\udce9\tb\n\u05d0\u200f")
    assert shown == "a??[31m????\tb\n\u05d0\u200f".replace("?", "\N{REPLACEMENT CHARACTER}")
    assert replace_control_characters(3) == 3


@pytest.mark.slow
def test_report_begins_with_models_texts_and_steps_and_ends_with_settings_of_training(comparison):
    training: dict[str, Any] = {
        "steps": None,
        "epochs": 3.0,
        "batch_size": 8,
        "sequence_length": 16,
        "stages": 2,
    }
    training |= {"optimizer": "adamw", "compute_dtype": "float32", "lora": None}
    settings = comparison.settings | {"training": training}
    found = dict(facts(dataclasses.replace(comparison, settings=settings)))
    assert found["Models"].startswith("generic (") and f"{len(TEXTS)} documents" in found["Texts"]
    expected = "2 documents, 90 steps, 2 stages, 3 epochs, 8 rows a step, rows of 16 tokens, adamw, float32"
    assert found["Training"] == expected
    rows = {row[0]: row[1] for row in settings_table(dataclasses.replace(comparison, settings=settings)).rows}
    assert rows["training: epochs"] == "3.0" and rows["command"] == comparison.command
    run = {
        "base_model": "gpt2-mini",
        "data": {"source": "my-texts", "split": "train", "documents": 40},
        "settings": settings["training"] | {"steps": 9},
    }
    compared = dataclasses.replace(comparison, settings=comparison.settings | {"trained": {"mine": run}})
    expected = "from gpt2-mini, on my-texts, split train, 40 documents, 9 steps, 2 stages, 8 rows a step, "
    assert dict(facts(compared))["Training of mine"] == f"{expected}rows of 16 tokens, adamw, float32"
    [row] = [row for row in settings_table(compared).rows if row[0] == "training of mine"]
    assert "steps=9" in row[1]
    assert "training: lora" not in rows and dict(facts(comparison))["Training"] == "2 documents, 90 steps"


@pytest.mark.slow
def test_figures_table_has_errors_of_means_over_documents(comparison):
    row = dict(zip(figures_table(comparison).columns, figures_table(comparison).rows[0], strict=True))
    sums = comparison.baseline.evaluation.per_document
    error = ratio_standard_error(sums.correct, sums.tokens)
    text_error = ratio_standard_error(sums.text_loss, sums.bytes)
    assert error is not None and text_error is not None
    assert row["Accuracy"] == f"{100 * comparison.baseline.evaluation.accuracy:.2f} ± {100 * error:.2f}\xa0%"
    bits = text_error / math.log(2)
    assert row["Bits per byte"] == f"{comparison.baseline.evaluation.bits_per_byte:.4f} ± {bits:.4f}"


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


@pytest.mark.slow
def test_render_html_needs_nothing_else_and_shows_texts_as_they_are(comparison, folder):
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
    shown = re.sub("[\x00\u202e]", "\N{REPLACEMENT CHARACTER}", NASTY)
    assert page.text.count(shown) >= 4 and not re.search(
        "[\x00\u202e]", text
    )  # title, heading, prompts, names of models
    for generation in (g for result in comparison.models for g in result.generations):
        assert replace_control_characters(generation["text"]) in page.text
    for evaluation in (result.evaluation for result in comparison.models):
        assert f"{evaluation.loss:.4f}" in page.text and f"{evaluation.keras_accuracy:.4f}" in page.text


def test_render_html_is_accessible(folder):
    text = (folder / "report.html").read_text(encoding="utf-8")
    assert text.count("<table") == text.count("<caption>") == 8
    assert text.count("<figure>") == text.count("<figcaption>") == 9
    assert "prefers-color-scheme: dark" in text and "@media print" in text
    headings = [int(level) for level in re.findall(r"<h(\d)", text)]
    assert headings[0] == 1 and headings.count(1) == 1
    assert all(after <= before + 1 for before, after in itertools.pairwise(headings))


def test_render_html_pictures_take_their_colours_from_the_page(folder):
    text = (folder / "report.html").read_text(encoding="utf-8")
    for picture in re.findall(r"<svg.*?</svg>", text, re.DOTALL):
        assert not re.findall(r"#[0-9a-fA-F]{6}", picture)
        assert "DejaVu" not in picture and "<text" in picture


def luminance(colour: str) -> float:
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_style_has_contrast_in_light_and_dark(folder):
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
                "better": 3,
                "worse": 3,
            }.items():
                bright, dark = sorted(
                    (luminance(colours[name]), luminance(colours[background])), reverse=True
                )
                assert (bright + 0.05) / (dark + 0.05) >= needed, (name, background, colours)


def test_render_markdown_keeps_texts_and_figures(comparison, folder):
    text = (folder / "report.md").read_text(encoding="utf-8")
    assert text.startswith("# ") and not re.search(
        r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", text
    )  # generated text and prompts are word for word within fences, except these
    for line in text.splitlines():
        if line.startswith("| "):
            assert len(re.findall(r"(?<!\\)\|", line)) in (3, 5, 6, 7, 9, 13)
    assert all(f"{result.evaluation.loss:.4f}" in text for result in comparison.models)


def test_print_comparison_shows_every_figure(comparison):
    from rich.console import Console

    stream = io.StringIO()
    print_comparison(comparison, Console(file=stream, width=200))
    for evaluation in (result.evaluation for result in comparison.models):
        assert (
            f"{evaluation.loss:.4f}" in stream.getvalue()
            and f"{evaluation.keras_loss:.4f}" in stream.getvalue()
        )


def test_save_report_leaves_no_half_file_and_takes_surrogates(model, tmp_path, monkeypatch):
    found = compare({"a": model}, TEXTS, ["half a pair: \ud83d"], **SETTINGS)
    found.save(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert set(before) == {"report.html", "report.md", "comparison.json"}
    monkeypatch.setattr("gpt2jax.report.save.render_markdown", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        found.save(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_to_svg_names_outside_of_matplotlibs_font():
    figure, axes = new_figure()
    axes.plot([1, 2], label="日本語")
    axes.legend()
    assert "日本語" in to_svg(figure, "a")  # a warning would fail the test


def test_print_table_without_control_characters_and_markup():
    from rich.console import Console

    stream = io.StringIO()
    print_table(Table("[bold]\x1b[2J", ("\x07", "b"), [("[red]", "\x9b")]), Console(file=stream, width=80))
    shown = stream.getvalue()
    assert all(text in shown for text in (r"[bold]\x1b[2J", r"\x07", "[red]", r"\x9b"))


def test_print_table_breaks_headers_before_names_if_narrow():
    from rich.console import Console

    table = Table("", ("Model", "Test loss", "b \N{MINUS SIGN} a"), [("the first model", "1.25", "2.50")])
    for width, lines in (
        (80, ["Model Test loss b \N{MINUS SIGN} a"]),
        (33, ["Test b", "Model loss \N{MINUS SIGN} a"]),
    ):
        stream = io.StringIO()
        print_table(table, Console(file=stream, width=width))
        shown = [" ".join(line.split()) for line in stream.getvalue().splitlines()]
        assert set(lines) <= set(shown) and "the first model 1.25 2.50" in shown
