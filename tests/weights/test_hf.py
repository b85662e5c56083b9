from __future__ import annotations

import dataclasses
import json
import random
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import numpy as safetensors_numpy

from gpt2jax.model.config import GPT2Config
from gpt2jax.model.gpt2 import abstract_params
from gpt2jax.tokenizer.bpe import Tokenizer
from gpt2jax.utils.notices import Notice
from gpt2jax.weights.formats import load_weights
from gpt2jax.weights.hf import load_hf, save_hf

TINY = GPT2Config(vocab_size=300, n_positions=16, n_embd=24, n_layer=3, n_head=2, n_inner=40)


def random_params(config: GPT2Config, seed: int = 0) -> dict:
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), jnp.float32), abstract_params(config)
    )


def assert_identical(params, others) -> None:
    assert jax.tree.structure(params) == jax.tree.structure(others)
    for ours, theirs in zip(jax.tree.leaves(params), jax.tree.leaves(others), strict=True):
        assert ours.dtype == theirs.dtype == jnp.float32
        np.testing.assert_array_equal(np.asarray(ours), np.asarray(theirs))


@pytest.fixture
def params() -> dict:
    return random_params(TINY)


@pytest.fixture
def saved(tmp_path, params) -> Path:
    save_hf(tmp_path / "model", TINY, params)
    return tmp_path / "model"


def rewrite(folder: Path, change) -> None:
    """Lets `change` edit the dict of tensors and writes them with the safetensors library."""
    tensors = safetensors_numpy.load_file(folder / "model.safetensors")
    changed = change(tensors)
    safetensors_numpy.save_file(tensors if changed is None else changed, folder / "model.safetensors")


def edit_config(folder: Path, **changes) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize("tied", [True, False])
def test_save_hf_round_trip_is_exact(tmp_path, tied):
    config = dataclasses.replace(
        TINY, tie_word_embeddings=tied, activation_function="relu", layer_norm_epsilon=2e-5
    )
    params = random_params(config)
    save_hf(tmp_path / "a", config, params)
    loaded_config, loaded = load_hf(tmp_path / "a")
    assert loaded_config == config
    assert_identical(loaded, params)
    assert_identical(load_hf(tmp_path / "a" / "model.safetensors")[1], params)


def test_save_hf_writes_the_names_of_transformers(saved, params):
    from safetensors import safe_open

    with safe_open(saved / "model.safetensors", "numpy") as file:
        assert file.metadata() == {"format": "pt"}
        names = set(file.keys())
        kernel = file.get_tensor("transformer.h.1.mlp.c_fc.weight")
    assert "lm_head.weight" not in names and len(names) == 2 + 12 * TINY.n_layer + 2
    assert all(name.startswith("transformer.") for name in names)
    np.testing.assert_array_equal(kernel, params["h"]["mlp"]["c_fc"]["kernel"][1])
    config = json.loads((saved / "config.json").read_text())
    assert config["model_type"] == "gpt2" and config["architectures"] == ["GPT2LMHeadModel"]
    assert config["dtype"] == "float32"
    assert json.loads((saved / "generation_config.json").read_text())["eos_token_id"] == 299


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_save_hf_rounds_to_16_bits(tmp_path, params, dtype):
    save_hf(tmp_path / "a", TINY, params, dtype=dtype)
    size = (tmp_path / "a" / "model.safetensors").stat().st_size
    save_hf(tmp_path / "b", TINY, params)
    assert size < 0.6 * (tmp_path / "b" / "model.safetensors").stat().st_size
    expected = jax.tree.map(lambda x: x.astype(dtype).astype(jnp.float32), params)
    assert_identical(load_hf(tmp_path / "a")[1], expected)


def test_save_hf_overflow_in_float16_leaves_nothing(tmp_path, params):
    params["wpe"]["embedding"] = params["wpe"]["embedding"] * 1e6
    with pytest.raises(ValueError, match=r"transformer\.wpe\.weight.*float16"):
        save_hf(tmp_path / "a", TINY, params, dtype="float16")
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match="dtype must be one of .*float16.*got 'int8'"):
        save_hf(tmp_path / "a", TINY, params, dtype="int8")


def test_save_hf_with_tokenizer(tmp_path, params):
    tokenizer = Tokenizer.gpt2(300)
    save_hf(tmp_path / "a", TINY, params, tokenizer)
    config, loaded, read = load_weights(tmp_path / "a")
    assert config == TINY and read is not None and read.fingerprint == tokenizer.fingerprint
    assert_identical(loaded, params)


def test_load_weights_without_tokenizer(saved):
    assert load_weights(saved)[2] is None


def test_save_hf_replaces_only_a_saved_model(saved, params):
    other = random_params(TINY, seed=1)
    save_hf(saved, TINY, other, Tokenizer.gpt2(300))
    save_hf(saved, TINY, params)
    assert_identical(load_hf(saved)[1], params)
    assert not (saved / "vocab.json").exists()
    (saved / "thesis.tex").write_text("years of work")
    with pytest.raises(FileExistsError, match=r"thesis\.tex"):
        save_hf(saved, TINY, other)
    assert_identical(load_hf(saved)[1], params)


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.transformer.", "module._orig_mod.transformer."])
def test_load_hf_strips_prefixes(saved, params, prefix):
    rewrite(saved, lambda t: {name.replace("transformer.", prefix): value for name, value in t.items()})
    assert_identical(load_hf(saved)[1], params)


def test_load_hf_skips_mask_buffers(saved, params):
    def add(tensors):
        for layer in range(TINY.n_layer):
            tensors[f"transformer.h.{layer}.attn.bias"] = np.tril(np.ones((1, 1, 16, 16), np.uint8))
            tensors[f"transformer.h.{layer}.attn.masked_bias"] = np.array(-1e4, np.float32)

    rewrite(saved, add)
    assert_identical(load_hf(saved)[1], params)


@pytest.mark.parametrize("keep", ["both", "head only"])
def test_load_hf_tied_head_in_the_file(saved, params, keep):
    def change(tensors):
        tensors["lm_head.weight"] = tensors["transformer.wte.weight"].copy()
        if keep == "head only":
            del tensors["transformer.wte.weight"]

    rewrite(saved, change)
    assert_identical(load_hf(saved)[1], params)


def test_load_hf_refuses_tied_heads_that_differ(saved):
    def change(tensors):
        tensors["lm_head.weight"] = tensors["transformer.wte.weight"] + 1

    rewrite(saved, change)
    with pytest.raises(ValueError, match=r"lm_head\.weight differs.*tie_word_embeddings"):
        load_hf(saved)


def test_load_hf_refuses_untied_without_head(saved):
    edit_config(saved, tie_word_embeddings=False)
    with pytest.raises(ValueError, match=r"lm_head\.weight: missing, expected \[300, 24\]"):
        load_hf(saved)


def test_load_hf_names_all_problems(saved):
    def change(tensors):
        del tensors["transformer.h.0.ln_1.bias"]
        tensors["transformer.h.3.ln_1.bias"] = np.zeros(24, np.float32)
        tensors["score.weight"] = np.zeros((2, 24), np.float32)
        tensors["transformer.wpe.weight"] = np.zeros((15, 24), np.float32)
        tensors["transformer.ln_f.bias"] = np.zeros(24, np.int8)

    rewrite(saved, change)
    with pytest.raises(ValueError) as info:
        load_hf(saved)
    message = str(info.value)
    for problem in (
        "h.0.ln_1.bias: missing, expected [24]",
        "h.3.ln_1.bias: unknown, [24]",
        "score.weight: unknown, [2, 24]",
        "wpe.weight: has shape [15, 24], expected [16, 24]",
        "ln_f.bias: is int8",
        "model.safetensors",
    ):
        assert problem in message
    assert "\n" not in message


def test_load_hf_refuses_a_tensor_under_two_names(saved):
    def change(tensors):
        tensors["wpe.weight"] = tensors["transformer.wpe.weight"].copy()

    rewrite(saved, change)
    with pytest.raises(ValueError, match=r"has tensor wpe\.weight twice"):
        load_hf(saved)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_load_hf_names_values_that_are_not_finite(saved, value):
    def change(tensors):
        tensors["transformer.h.2.mlp.c_proj.weight"][3, 5] = value

    rewrite(saved, change)
    with pytest.warns(
        Notice, match=r"model.safetensors: 1 of \d+ tensors .* not finite numbers: h\.2\.mlp\.c_proj"
    ):
        params = load_hf(saved)[1]
    np.testing.assert_array_equal(params["h"]["mlp"]["c_proj"]["kernel"][2, 3, 5], value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "llama"}, "model_type.*'llama'"),
        ({"add_cross_attention": True}, "add_cross_attention"),
        ({"pruned_heads": {"1": [0]}}, "pruned_heads"),
        ({"quantization_config": {"bits": 8}}, "quantization_config"),
        ({"n_head": 7}, "n_head.*7"),
        ({"n_layer": 2**31 - 1}, f"n_layer={2**31 - 1}"),
        ({"n_embd": "24"}, "n_embd.*'24'"),
        ({"activation_function": "mish"}, "mish"),
    ],
)
def test_read_config_refuses_unsupported_settings(saved, changes, message):
    edit_config(saved, **changes)
    with pytest.raises(ValueError, match=message):
        load_hf(saved)


@pytest.mark.parametrize("content", ["", "[]", "{", "[" * 100_000])
def test_read_config_damaged(saved, content):
    (saved / "config.json").write_text(content)
    with pytest.raises(ValueError, match=r"config\.json"):
        load_hf(saved)
    (saved / "config.json").unlink()
    with pytest.raises(ValueError, match=r"no config\.json"):
        load_hf(saved)


def test_load_weights_paths_without_weights(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        load_weights(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"model\.safetensors"):
        load_weights(tmp_path)
    (tmp_path / "notes.txt").write_text("no weights")
    with pytest.raises(ValueError, match=r"notes\.txt"):
        load_weights(tmp_path / "notes.txt")


def test_read_safetensors_cut_short_anywhere(saved):
    file = saved / "model.safetensors"
    whole = file.read_bytes()
    rng = random.Random(0)
    for length in [0, 1, 7, 8, 9, len(whole) - 1, *(rng.randrange(len(whole)) for _ in range(200))]:
        file.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"model\.safetensors"):
            load_hf(saved)


@pytest.mark.slow
@pytest.mark.thorough
def test_read_safetensors_flipped_header_bits(saved, params):
    file = saved / "model.safetensors"
    whole = file.read_bytes()
    end = 8 + int.from_bytes(whole[:8], "little")
    rng = random.Random(0)
    refused = 0
    for _ in range(300):
        damaged = bytearray(whole)
        damaged[rng.randrange(end)] ^= 1 << rng.randrange(8)
        file.write_bytes(damaged)
        try:
            loaded = load_hf(saved)[1]
        except ValueError as error:
            assert "model.safetensors" in str(error)
            refused += 1
        else:  # a bit of the metadata, or of white space
            assert_identical(loaded, params)
    assert refused > 250


def header(entries: dict) -> bytes:
    raw = json.dumps(entries).encode()
    return len(raw).to_bytes(8, "little") + raw


@pytest.mark.parametrize(
    "content",
    [
        header({"wte.weight": {"dtype": "F32", "shape": [2], "data_offsets": [0, 10**15]}}) + bytes(8),
        header({"wte.weight": {"dtype": "F32", "shape": [2**62, 4], "data_offsets": [0, 8]}}) + bytes(8),
        header({"wte.weight": {"dtype": "F32", "shape": [2], "data_offsets": [4, 12]}}) + bytes(12),
        header({"wte.weight": {"dtype": "X9", "shape": [2], "data_offsets": [0, 8]}}) + bytes(8),
        header({"wte.weight": {"dtype": "F8_E4M3", "shape": [8], "data_offsets": [0, 8]}}) + bytes(8),
        header({}) + bytes(8),
        b"not weights at all",
    ],
)
def test_read_safetensors_damaged_header(saved, content):
    """The library finds the faults; they become one line that names the file."""
    (saved / "model.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match=r"model\.safetensors") as info:
        load_hf(saved)
    assert "\n" not in str(info.value)


def test_load_hf_params_do_not_depend_on_the_file_afterwards(saved, params):
    loaded = load_hf(saved)[1]
    file = saved / "model.safetensors"
    file.write_bytes(bytes(file.stat().st_size))
    assert_identical(loaded, params)


@pytest.fixture
def sharded(tmp_path, params) -> Path:
    save_hf(tmp_path / "sharded", TINY, params, Tokenizer.gpt2(300), max_shard_bytes=20_000)
    return tmp_path / "sharded"


def test_save_hf_shards_round_trip(sharded, params):
    shards = sorted(sharded.glob("model-*.safetensors"))
    assert len(shards) > 3 and shards[0].name == f"model-00001-of-{len(shards):05}.safetensors"
    # one tensor may be larger than the limit; no shard with several is
    assert all(
        shard.stat().st_size < 22_000 or "wte" in shard.read_bytes()[:200].decode("latin1")
        for shard in shards
    )
    assert not (sharded / "model.safetensors").exists()
    assert_identical(load_weights(sharded)[1], params)
    assert_identical(load_weights(sharded / "model.safetensors.index.json")[1], params)
    save_hf(sharded, TINY, params)  # replaces shards and index
    assert not list(sharded.glob("model-*")) and not (sharded / "model.safetensors.index.json").exists()


def edit_index(folder: Path, change) -> None:
    path = folder / "model.safetensors.index.json"
    content = json.loads(path.read_text())
    change(content["weight_map"])
    path.write_text(json.dumps(content))


NAME = "transformer.h.1.ln_1.bias"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda places: places.pop(NAME), rf"{NAME} is there, but not in the index"),
        (lambda places: places.update({NAME: "model-00001-of-00009.safetensors"}), "not beside it"),
        (lambda places: places.update({NAME: "../../../etc/passwd"}), "must be a name without folders"),
        (
            lambda places: places.update({NAME: "model.safetensors.index.json"}),
            "must be a name without folders",
        ),
        (lambda places: places.update({"more": places[NAME]}), "more is missing"),
        (lambda places: places.update({"more": 5}), "'5'"),
    ],
)
def test_load_hf_refuses_a_wrong_index(sharded, change, message):
    edit_index(sharded, change)
    with pytest.raises(ValueError, match=message):
        load_hf(sharded)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"weight_map": 5}', '{"weight_map": [1]}'])
def test_load_hf_damaged_index(sharded, content):
    (sharded / "model.safetensors.index.json").write_text(content)
    with pytest.raises(ValueError, match=r"index\.json"):
        load_hf(sharded)


def test_load_hf_absent_and_damaged_shards(sharded):
    shard = sorted(sharded.glob("model-*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(ValueError, match=rf"{shard.name} is cut short"):
        load_hf(sharded)
    shard.unlink()
    with pytest.raises(ValueError, match=rf"{shard.name}.*fetch it again"):
        load_hf(sharded)
