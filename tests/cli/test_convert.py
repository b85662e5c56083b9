"""The convert command: every source into every format, what it tells, and one line for a mistake."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import h5py
import jax
import numpy as np
import pytest
from tiny_models import TINY, random_model, random_params

import gpt2jax
from gpt2jax.cli import main
from gpt2jax.language_model import LanguageModel
from gpt2jax.lora.adapters import init_adapters
from gpt2jax.lora.config import LoRAConfig
from gpt2jax.weights.safetensors_io import read_safetensors

GOLDEN = Path(__file__).parents[1] / "golden"
SOURCES = {
    "hf-tied": "Hugging Face",
    "hf-bin-legacy": "Hugging Face",
    "keras-nlp/cp.ckpt": "Keras TensorFlow checkpoint",
    "keras-nlp/whole.weights.h5": "Keras",
    "keras-hub": "Keras",
    "openai": "OpenAI",
    "nanogpt-bias": "nanoGPT",
    "nanogpt-plain": "nanoGPT",
}


def convert(capsys, *argv: object, code: int = 0) -> str:
    """What the command prints; with an exit code, its one line of error."""
    if not code:
        main(["convert", *map(str, argv)])
        return capsys.readouterr().out
    with pytest.raises(SystemExit) as exit_:
        main(["convert", *map(str, argv)])
    assert exit_.value.code == code
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("gpt2jax convert: error: ")
    return lines[0]


def assert_same(a, b) -> None:
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.slow
@pytest.mark.parametrize("source", SOURCES)
def test_convert_every_source_to_hugging_face(capsys, tmp_path, source):
    shown = convert(capsys, GOLDEN / source, "--out", tmp_path / "out", "--verify")
    before, after = gpt2jax.load(GOLDEN / source), gpt2jax.load(tmp_path / "out")
    assert_same(before.params, after.params)
    assert before.config == after.config
    # Keras has a kernel and a bias each for query, key and value; nanoGPT may have no biases at all
    count = 36 if "keras" in source else 15 if source == "nanogpt-plain" else 28
    assert SOURCES[source] in shown and f"{count} (float32)" in shown and "(tied)" in shown
    assert f"{before.num_parameters():,}" in shown and "all identical, bit for bit" in shown
    assert "at most 0 from the source's" in shown


@pytest.mark.slow
def test_convert_through_keras_and_back(capsys, tmp_path):
    model = random_model(3)
    model.save(tmp_path / "a")
    shown = convert(capsys, tmp_path / "a", "--format", "keras", "--out", tmp_path / "b", "--verify")
    assert "300 ids" in shown
    convert(capsys, tmp_path / "b", "--out", tmp_path / "c", "--verify")
    again = gpt2jax.load(tmp_path / "c")
    assert_same(again.params, model.params)
    assert again.tokenizer is not None and model.tokenizer is not None
    assert again.tokenizer.fingerprint == model.tokenizer.fingerprint


@pytest.mark.slow
def test_convert_dtypes(capsys, tmp_path):
    def dtypes(name):
        tensors = read_safetensors(tmp_path / name / "model.safetensors").values()
        return {tensor.dtype for tensor in tensors}

    shown = convert(capsys, GOLDEN / "hf-untied-float16", "--out", tmp_path / "a", "--verify")
    assert dtypes("a") == {"float16"} and "its own (not tied)" in shown and "float16" in shown
    assert_same(gpt2jax.load(tmp_path / "a").params, gpt2jax.load(GOLDEN / "hf-untied-float16").params)
    shown = convert(capsys, GOLDEN / "hf-tied", "--out", tmp_path / "b", "--dtype", "bfloat16", "--verify")
    assert dtypes("b") == {"bfloat16"} and "once rounded to bfloat16" in shown
    assert "at most 0 from" not in shown


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory) -> Path:
    """A run that trained adapters, as finetune leaves it."""
    folder = tmp_path_factory.mktemp("run")
    lora = LoRAConfig(rank=2, targets=("attn.c_attn", "mlp.c_fc"), use_rslora=True)
    adapters = jax.tree.map(lambda x: x + 0.05, init_adapters(TINY, lora))
    base = LanguageModel(TINY, random_params())
    base.save(folder / "base")
    gpt2jax.save_adapter(dataclasses.replace(base, adapters=adapters, lora=lora), folder / "adapter")
    (folder / "run.json").write_text(json.dumps({"base_model": None}))
    return folder


@pytest.mark.slow
def test_convert_a_run_with_adapters(capsys, tmp_path, run_folder):
    model = gpt2jax.load(run_folder)
    assert model.source == str(run_folder) and model.adapters is not None
    shown = convert(capsys, run_folder, "--format", "peft", "--out", tmp_path / "peft", "--verify")
    assert "rsLoRA, rank 2, on attn.c_attn, mlp.c_fc" in shown
    settings = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == str(run_folder / "base")
    assert_same(gpt2jax.load_adapter(model, tmp_path / "peft").adapters, model.adapters)
    convert(capsys, run_folder, "--out", tmp_path / "merged", "--verify")
    assert_same(gpt2jax.load(tmp_path / "merged").params, model.merge_adapter().params)
    again = ["--adapter", run_folder / "adapter", "--out", tmp_path / "twice", "--verify"]
    convert(capsys, tmp_path / "merged", *again)
    twice = gpt2jax.load_adapter(model, run_folder / "adapter").merge_adapter()
    assert_same(gpt2jax.load(tmp_path / "twice").params, twice.params)


@pytest.mark.slow
def test_convert_keras_adapter_to_peft(capsys, tmp_path, run_folder):
    with h5py.File(tmp_path / "a.lora.h5", "w") as file:
        file["lora/vars/rank"] = 1
        file["lora/9/vars/lora_kernel_a"] = np.ones((32, 2, 1), np.float32)
        file["lora/9/vars/lora_kernel_b"] = np.ones((1, 16), np.float32)
    options = ["--adapter", tmp_path / "a.lora.h5", "--format", "peft", "--out", tmp_path / "out", "--verify"]
    assert "on attn.v" in convert(capsys, run_folder / "base", *options)


@pytest.mark.parametrize(
    ("source", "options", "message"),
    [
        ("gpt3", [], "there is no model 'gpt3'; did you mean 'gpt2'"),
        (GOLDEN / "nothing", [], "there is no model at"),
        (GOLDEN / "tokenizer.json", [], "no weights of a known format"),
        (GOLDEN / "peft", [], "load the model that they are for"),
        (GOLDEN / "hf-tied", ["--format", "peft"], "has no adapters"),
        (
            GOLDEN / "hf-tied",
            ["--format", "keras", "--dtype", "float16"],
            "dtype must be float32 for",
        ),
        (
            GOLDEN / "hf-relu-bfloat16",
            ["--format", "keras"],
            "activation_function must be 'gelu_new' in",
        ),
        (GOLDEN / "hf-tied", ["--adapter", "nowhere"], "no adapter folder at nowhere"),
        (GOLDEN / "hf-tied", ["--adapter", GOLDEN / "hf-tied"], "is not a PEFT folder"),
    ],
)
def test_convert_mistakes_are_one_line_and_leave_nothing(capsys, tmp_path, source, options, message):
    assert message in convert(capsys, source, "--out", tmp_path / "out", *options, code=2)
    assert not (tmp_path / "out").exists()


def test_convert_overwrites_only_if_told(capsys, tmp_path):
    source, out = GOLDEN / "hf-tied", tmp_path / "out"
    shutil.copytree(GOLDEN / "keras-hub", out)
    before = sorted(path.name for path in out.iterdir())
    assert "--overwrite" in convert(capsys, source, "--out", out, code=2)
    assert "not part of a saved model" in convert(capsys, source, "--out", out, "--overwrite", code=2)
    assert sorted(path.name for path in out.iterdir()) == before
    shutil.rmtree(out)
    convert(capsys, GOLDEN / "openai", "--out", out)
    convert(capsys, source, "--out", out, "--overwrite")
    assert_same(gpt2jax.load(out).params, gpt2jax.load(source).params)


@pytest.mark.parametrize("name", ["h.mlp.c_fc.kernel", "ln_f.bias"])
def test_convert_verify_notices_one_bit(capsys, tmp_path, monkeypatch, name):
    save = LanguageModel.save

    def damaging(self, path, *args, **kwargs):
        save(self, path, *args, **kwargs)
        file = Path(path) / "model.safetensors"
        tensors = list(read_safetensors(file))  # in the order of the data
        wanted = {"h.mlp.c_fc.kernel": "transformer.h.1.mlp.c_fc.weight"}.get(name, "transformer.ln_f.bias")
        behind = [read_safetensors(file)[n] for n in tensors[tensors.index(wanted) :]]
        content = bytearray(file.read_bytes())
        content[-sum(int(np.prod(tensor.shape)) * 4 for tensor in behind)] ^= 1
        file.write_bytes(content)

    monkeypatch.setattr(LanguageModel, "save", damaging)
    line = convert(capsys, GOLDEN / "hf-tied", "--out", tmp_path / "out", "--verify", code=1)
    assert f"1 tensors are not the source's in float32, the first one {name}" in line


@pytest.mark.parametrize(
    ("arguments", "message"),
    [([], "SOURCE and --out must be given; see"), (["gpt2"], "--out must be given; see")],
)
def test_convert_names_what_is_missing(capsys, arguments, message):
    with pytest.raises(SystemExit) as end:
        main(["convert", *arguments])
    assert end.value.code == 2 and f"error: {message}" in capsys.readouterr().err
