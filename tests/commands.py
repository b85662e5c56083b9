"""What tests of the commands share."""

from __future__ import annotations

import pytest

from gpt2jax.cli import main


def fails(capsys, *argv: str) -> str:
    """Return the one line that a mistaken command prints."""
    with pytest.raises(SystemExit) as exit_:
        main(list(argv))
    assert exit_.value.code == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1, lines
    return lines[0]
