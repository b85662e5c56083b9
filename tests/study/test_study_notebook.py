"""The notebook of the study runs from its first cell to its last."""

from __future__ import annotations

import pathlib

import pytest

nbformat = pytest.importorskip("nbformat", reason="needs the extra test")
nbclient = pytest.importorskip("nbclient", reason="needs the extra test")

NOTEBOOK = pathlib.Path(__file__).parents[2] / "docs" / "study.ipynb"
SMALL = """
DOCUMENTS, STAGES, EPOCHS, LENGTH, MAX_LENGTH, PROMPTS = 10, 1, 1, 32, 24, ("Return the",)
"""


@pytest.mark.slow
@pytest.mark.thorough
def test_notebook_runs_and_shows_results(tmp_path):
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    assert not any(cell.outputs for cell in notebook.cells if cell.cell_type == "code")
    [settings] = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", ())]
    settings.source += SMALL
    nbclient.NotebookClient(
        notebook, timeout=120, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
    ).execute()
    pages = [
        output.data["text/html"]
        for cell in notebook.cells
        if cell.cell_type == "code"
        for output in cell.outputs
        if "text/html" in output.get("data", {})
    ]
    shown = [
        "Keras loss",
        "finish_reason",
        "stage 1",
        "iframe srcdoc",
        "Paired difference",
        "loss_difference",
    ]
    for word in shown:
        assert any(word in page for page in pages), word
    assert (tmp_path / "study-folder" / "report.html").exists()
