"""A report that is replaced: at every moment each of its files is the old one or the new one."""

from __future__ import annotations

from killing import kill_at_each_call

KILLED = """
import json
from gpt2jax.comparison.result import Comparison
from gpt2jax.report import save

# what is under test is how files are written, which is the same for any text
save.render_html = lambda comparison, *tables_and_plots: f"<html>{comparison.command}</html>"
save.render_markdown = lambda comparison, *tables_and_plots: f"# {comparison.command}"

def write(text):
    save.save_report(Comparison([], None, {"resamples": 1, "seed": 0}, {}, {}, None, text), target)

def read():
    html, markdown = ((target / name).read_text() for name in ("report.html", "report.md"))
    text = json.loads((target / "comparison.json").read_text())["command"]
    assert html in ("<html>old</html>", "<html>new</html>") and markdown in ("# old", "# new")
    if text == "new":  # it is written last
        assert "new" in html and "new" in markdown
    return text
"""


def test_save_report_killed_at_each_system_call(tmp_path):
    kills, recovered = kill_at_each_call(KILLED, tmp_path)
    assert kills > 30 and recovered == 0
