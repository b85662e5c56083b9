from __future__ import annotations

import io

import pytest

from gpt2jax.utils.notices import printable, terminal_text

HOSTILE = "a\x1b[31m\x07\x9b2J\u202eé日😀\xa0\t\n\ud800"


def test_printable_escapes_what_a_terminal_obeys():
    assert printable(HOSTILE) == r"a\x1b[31m\x07\x9b2J\u202eé日😀" + "\xa0" + r"\t\n\ud800"
    assert printable("[bold] gpt2jax[cuda]") == "[bold] gpt2jax[cuda]"


@pytest.mark.parametrize("is_terminal", [True, False])
def test_terminal_text_is_word_for_word_elsewhere(monkeypatch, is_terminal):
    stream = io.StringIO()
    monkeypatch.setattr(stream, "isatty", lambda: is_terminal)
    monkeypatch.setattr("sys.stdout", stream)
    shown = terminal_text(HOSTILE)
    assert shown == (r"a\x1b[31m\x07\x9b2J\u202eé日😀" + "\xa0\t\n" + r"\ud800" if is_terminal else HOSTILE)
