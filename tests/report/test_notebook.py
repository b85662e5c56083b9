from __future__ import annotations

import base64
import dataclasses
import sys
import xml.etree.ElementTree

import numpy as np
import pytest
from comparisons import HISTORY, NASTY
from test_report import Page

from gpt2jax.generation.outputs import Generation
from gpt2jax.train.trainer import Run
from gpt2jax.utils.progress import is_interactive


def check_html(html: str) -> Page:
    """Check that the elements match and that no text became an element or an attribute."""
    page = Page(html)
    assert page.open == [] and "\x00" not in html
    assert {tag for tag, _, _ in page.attributes}.isdisjoint({"script", "link", "iframe", "svg", "style"})
    assert not any(name.startswith("on") for _, name, _ in page.attributes)
    assert all(value.startswith("data:image/svg") for _, name, value in page.attributes if name == "src")
    return page


@pytest.mark.slow
def test_comparison_html_shows_figures_and_texts(comparison):
    page = check_html(comparison._repr_html_())
    for model in comparison.models:
        assert f"{model.evaluation.loss:.4f}" in page.text
    assert page.text.count(NASTY.replace("\x00", "\N{REPLACEMENT CHARACTER}")) >= 4
    assert "token ids 5 6 7" in page.text


@pytest.mark.slow
def test_evaluation_html_shows_figures(comparison):
    evaluation = comparison.baseline.evaluation
    page = check_html(evaluation._repr_html_())
    assert f"{evaluation.loss:.4f} ± {comparison.baseline.loss_standard_error:.4f}" in page.text
    assert f"{evaluation.keras_loss:.4f}" in page.text


@pytest.mark.slow
def test_to_frame_has_a_row_for_each_model(comparison):
    frame = comparison.to_frame()
    assert list(frame.index) == [model.name for model in comparison.models]
    assert frame.loc["flat", "loss"] == comparison["flat"].evaluation.loss
    assert frame.loc["flat", "loss_difference"] == comparison.differences["flat"].difference
    assert frame["loss_difference"].isna().tolist() == [True, False, False]


@pytest.mark.slow
def test_to_frame_without_pandas_says_what_to_install(comparison, monkeypatch):
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ModuleNotFoundError, match="pip install pandas"):
        comparison.to_frame()


@pytest.mark.slow
def test_run_html_shows_last_figures_and_curve(model, tmp_path):
    page = check_html(Run(model, HISTORY, tmp_path)._repr_html_())
    assert f"{HISTORY[-1]['loss']:.4f}" in page.text and "3.5000" in page.text and str(tmp_path) in page.text
    [image] = [value for _, name, value in page.attributes if name == "src"]
    svg = base64.b64decode(image.partition(",")[2]).decode()
    xml.etree.ElementTree.fromstring(svg)
    assert "var(" not in svg and "validation" in svg


def test_plot_loss_draws_both_curves(model):
    figure = Run(model, HISTORY, None).plot_loss()
    [axes] = figure.axes
    drawn = {str(line.get_label()): np.asarray(line.get_xydata()).tolist() for line in axes.lines}
    assert drawn["training"] == [[entry["step"], entry["loss"]] for entry in HISTORY]
    assert drawn["validation"] == [[40, 3.5], [80, 3.5]]
    assert not Run(model, [], None).plot_loss().axes[0].lines


def test_plot_losses_draws_each_model_on_each_list_of_texts(comparison):
    [axes] = comparison.plot_losses().axes
    expected = [(model.evaluation.loss, index) for index, model in enumerate(comparison.models)]
    assert [tuple(np.asarray(points[0].get_xydata())[0]) for points in axes.containers] == expected
    several = dataclasses.replace(comparison, by_texts={"a": comparison, "b": comparison})
    assert len(several.plot_losses().axes) == 2


def test_run_html_without_history(model):
    page = check_html(Run(model, [], None)._repr_html_())
    assert not any(tag == "img" for tag, _, _ in page.attributes)


def test_generation_html_escapes_prompt_and_text():
    page = check_html(Generation("<b>prompt", NASTY, [1, 2], [], [3], "length")._repr_html_())
    assert "<b>prompt" in page.text and NASTY.replace("\x00", "\N{REPLACEMENT CHARACTER}") in page.text
    assert "2 tokens" in page.text


@pytest.mark.parametrize("has_widgets", [True, False])
def test_is_interactive_in_a_notebook_needs_ipywidgets(monkeypatch, has_widgets):
    monkeypatch.setattr("rich.console._is_jupyter", lambda: True)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object() if has_widgets else None)
    assert is_interactive() is has_widgets
