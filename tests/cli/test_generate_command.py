"""The generate command as a user meets it."""

from __future__ import annotations

import io
import json

import pytest
from commands import fails

import gpt2jax
from gpt2jax.cli import main


@pytest.mark.slow
def test_generate(tmp_path, capsys, monkeypatch):
    settings = ["--max-new-tokens", "8", "--seed", "3"]
    main(["generate", "Return the", *settings])
    shown = capsys.readouterr().out
    expected = gpt2jax.generate(gpt2jax.load("gpt2-mini"), "Return the", max_new_tokens=8, seed=3)[0]
    assert shown == str(expected) + "\n"
    (tmp_path / "prompts.txt").write_text("Return the\nclass\n")
    file, out = str(tmp_path / "prompts.txt"), tmp_path / "out.jsonl"
    main(["generate", "--file", file, *settings, "--out", str(out)])
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert rows[0]["text"] == expected.text and [row["prompt"] for row in rows] == ["Return the", "class"]
    monkeypatch.setattr("sys.stdin", io.StringIO("Return the\n"))
    capsys.readouterr()
    main(["generate", *settings])
    assert capsys.readouterr().out == str(expected) + "\n"


@pytest.mark.slow
def test_generate_by_search(small, capsys):
    model, settings = gpt2jax.load(small), ["--model", small, "--max-new-tokens", "8"]
    main(["generate", "Return the", *settings, "--num-beams", "3", "--num-return-sequences", "2"])
    [beams] = gpt2jax.beam_search(model, "Return the", num_beams=3, num_return_sequences=2, max_new_tokens=8)
    shown = capsys.readouterr()
    assert shown.out == f"--- text 1 of 2 ---\n{beams[0]}\n\n--- text 2 of 2 ---\n{beams[1]}\n"
    assert "tokens in" in shown.err
    main(["generate", "Return the", *settings, "--penalty-alpha", "0.6", "--top-k", "4"])
    [output] = gpt2jax.generate(model, "Return the", max_new_tokens=8, penalty_alpha=0.6, top_k=4)
    assert capsys.readouterr().out == f"{output}\n"


@pytest.mark.slow
def test_generate_takes_a_draft_model_and_every_kind_of_option(small, capsys):
    model = gpt2jax.load(small)
    words = (
        f"--model {small} --no-do-sample --top-k None --stop-token-ids 1 2 --bad-words x --max-new-tokens 6"
    )
    main(["generate", "Return the", *words.split(), "--draft-model", small, "--num-draft-tokens", "3"])
    settings = {"do_sample": False, "stop_token_ids": [1, 2], "bad_words": ["x"], "max_new_tokens": 6}
    assert capsys.readouterr().out == f"{gpt2jax.generate(model, 'Return the', **settings)[0]}\n"
    assert "num_beams=2 does not go with draft_model" in fails(
        capsys, "generate", "a", "--num-beams", "2", "--draft-model", small
    )


def test_generate_names_the_nearest_option(capsys):
    assert "--temperature" in fails(capsys, "generate", "a", "--tempeature", "1")
    assert "there is no option --prompts; see" in fails(capsys, "generate", "--prompts", "a")


@pytest.mark.slow
def test_generate_without_standard_input_and_into_the_home_folder(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", None)
    assert "there is no prompt" in fails(capsys, "generate")
    assert "is a folder" in fails(capsys, "generate", "a", "--out", str(tmp_path))
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    prompt = b"\xff".decode(errors="surrogateescape")  # as an argument that is no UTF-8 comes
    main(["generate", prompt, "--max-new-tokens", "1", "--seed", "1", "--out=~/x.jsonl"])
    assert json.loads((tmp_path / "x.jsonl").read_text())["prompt"] == prompt


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--num-beams 2 --temperature 0.5 --top-k 7", "num_beams=2 does not go with temperature, top_k"),
        ("--length-penalty 2", "length_penalty=2.0 needs beam search; give num_beams above 1"),
    ],
)
def test_generate_refuses_options_without_effect(capsys, options, message):
    line = fails(capsys, "generate", "a", *options.split())
    assert line == f"gpt2jax generate: error: {message}; see gpt2jax generate --help"
