from __future__ import annotations

import dataclasses
import json
import random
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import numpy as safetensors_numpy
from tiny_models import random_params

from gpt2jax.language_model import LanguageModel
from gpt2jax.loading import load_adapter
from gpt2jax.lora.adapters import init_adapters, merge_adapters
from gpt2jax.lora.config import TARGETS, LoRAConfig
from gpt2jax.model.config import GPT2Config
from gpt2jax.utils.notices import Notice
from gpt2jax.weights.peft import read_adapter, read_embeddings, write_adapter

TINY = GPT2Config(vocab_size=300, n_positions=16, n_embd=24, n_layer=3, n_head=2)
LORA = LoRAConfig(rank=4, alpha=6.0, dropout=0.1, targets=("attn.c_attn", "mlp.c_proj"))
BASE = random_params(TINY)
FILE, ROOT = "adapter_model.safetensors", "base_model.model.transformer"


def trained(lora: LoRAConfig) -> dict:
    """Adapters whose factors are all random: a fresh lora_b is zero and would hide mistakes."""
    rng = np.random.default_rng(0)
    adapters = init_adapters(TINY, lora, seed=0, params=BASE)
    return jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), jnp.float32), adapters)


@pytest.fixture
def saved(tmp_path):
    write_adapter(tmp_path / "adapter", TINY, LORA, trained(LORA))
    return tmp_path / "adapter"


def edit_config(folder, **changes) -> None:
    path = folder / "adapter_config.json"
    content = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({name: value for name, value in content.items() if value != "absent"}))


def rewrite(folder, change) -> None:
    tensors = safetensors_numpy.load_file(folder / "adapter_model.safetensors")
    change(tensors)
    safetensors_numpy.save_file(tensors, folder / "adapter_model.safetensors")


@pytest.mark.slow
@pytest.mark.parametrize("targets", [("attn.c_attn",), ("attn.c_proj", "mlp.c_fc"), TARGETS])
@pytest.mark.parametrize("alpha", [16.0, 2.5])
def test_adapter_round_trip_is_exact(tmp_path, targets, alpha):
    lora = LoRAConfig(rank=3, alpha=alpha, dropout=0.05, targets=targets)
    adapters = trained(lora)
    write_adapter(tmp_path / "a", TINY, lora, adapters)
    read, loaded = read_adapter(tmp_path / "a", TINY)
    assert read.scale == lora.scale and (read.rank, read.dropout) == (3, 0.05)
    assert set(read.targets) == set(targets)
    assert jax.tree.structure(loaded) == jax.tree.structure(adapters)
    for ours, theirs in zip(jax.tree.leaves(loaded), jax.tree.leaves(adapters), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_write_adapter_layout_is_that_of_peft(saved):
    tensors = safetensors_numpy.load_file(saved / "adapter_model.safetensors")
    prefix = "base_model.model.transformer.h.1.attn.c_attn"
    assert tensors[f"{prefix}.lora_A.weight"].shape == (4, 24)
    assert tensors[f"{prefix}.lora_B.weight"].shape == (72, 4)
    assert len(tensors) == 2 * 2 * TINY.n_layer
    settings = json.loads((saved / "adapter_config.json").read_text())
    assert settings["fan_in_fan_out"] is True and settings["lora_alpha"] == 6


def test_read_adapter_rank_stabilised_scale(saved):
    edit_config(saved, use_rslora=True)
    lora, _ = read_adapter(saved, TINY)
    assert lora.scale == pytest.approx(6.0 / 2.0, rel=1e-12)


KINDS = {
    "rsLoRA": LoRAConfig(rank=3, alpha=5.0, targets=TARGETS, use_rslora=True),
    "DoRA": LoRAConfig(rank=3, targets=("attn.c_attn", "mlp.c_proj"), use_dora=True),
    "patterns": LoRAConfig(
        rank=3,
        targets=("attn.c_attn", "attn.c_proj", "mlp.c_fc"),
        rank_pattern={"h.1.attn.c_attn": 5, "c_attn": 2, r"h\.[02]\.mlp.*": 1},
        alpha_pattern={"attn.c_proj": 7.5, "h.2.mlp.c_fc": 2},
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("lora", KINDS.values(), ids=KINDS.keys())
def test_adapter_variants_round_trip_is_exact(tmp_path, lora):
    fresh = init_adapters(TINY, lora, params=BASE)
    # where a block's rank is less than the largest, the factors are zero and stay so
    adapters = jax.tree.map(lambda new, noise: jnp.where(new == 0, 0, noise), fresh, trained(lora))
    adapters = jax.tree.map(lambda x: x + 0.5 * (x != 0), adapters)
    write_adapter(tmp_path / "a", TINY, lora, adapters)
    read, loaded = read_adapter(tmp_path / "a", TINY)
    assert read == lora
    jax.tree.map(np.testing.assert_array_equal, loaded, adapters)
    assert jax.tree.structure(loaded) == jax.tree.structure(adapters)
    shapes = {n: t.shape for n, t in safetensors_numpy.load_file(tmp_path / "a" / FILE).items()}
    if lora.rank_pattern:
        ranks = [shapes[f"{ROOT}.h.{layer}.attn.c_attn.lora_A.weight"][0] for layer in range(3)]
        assert ranks == [2, 5, 2] and shapes[f"{ROOT}.h.2.mlp.c_fc.lora_B.weight"] == (96, 1)
        assert lora.scale_of(2, "mlp.c_fc") == 2 and lora.scale_of(1, "attn.c_proj") == 2.5
    assert any("magnitude" in name for name in shapes) == lora.use_dora


@pytest.mark.slow
def test_write_adapter_fuses_query_key_value(tmp_path):
    lora = LoRAConfig(
        rank=2, targets=("attn.q", "attn.v", "mlp.c_fc"), rank_pattern={"attn.v": 3}, use_dora=True
    )
    adapters = trained(lora)
    model = LanguageModel(TINY, BASE, adapters=adapters, lora=lora)
    write_adapter(tmp_path / "a", TINY, lora, adapters, params=BASE)
    tensors = safetensors_numpy.load_file(tmp_path / "a" / FILE)
    lora_b = tensors[f"{ROOT}.h.1.attn.c_attn.lora_B.weight"]
    assert tensors[f"{ROOT}.h.1.attn.c_attn.lora_A.weight"].shape == (5, 24) and lora_b.shape == (72, 5)
    assert not lora_b[24:48].any() and not lora_b[:24, 2:].any() and not lora_b[48:, :2].any()
    read, fused = read_adapter(tmp_path / "a", TINY)
    assert read.targets == ("attn.c_attn", "mlp.c_fc")
    again = dataclasses.replace(model, adapters=fused, lora=read)
    ids = np.arange(14)[None]
    np.testing.assert_allclose(again.logits(ids), model.logits(ids), rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="to fuse DoRA of attn.q, attn.k or attn.v, got None"):
        write_adapter(tmp_path / "b", TINY, lora, adapters)


@pytest.mark.slow
def test_read_adapter_dora_in_some_blocks(tmp_path):
    lora = LoRAConfig(rank=2, use_dora=True)
    write_adapter(tmp_path / "a", TINY, lora, trained(lora))
    rewrite(tmp_path / "a", lambda t: [t.pop(name) for name in list(t) if ".h.1." in name])
    edit_config(tmp_path / "a", layers_to_transform=[0, 2])
    with pytest.raises(ValueError, match="some blocks only"):
        read_adapter(tmp_path / "a", TINY)
    _, adapters = read_adapter(tmp_path / "a", TINY, BASE)
    merged = merge_adapters(BASE, adapters, lora)["h"]["attn"]["c_attn"]["kernel"]
    base = BASE["h"]["attn"]["c_attn"]["kernel"]
    np.testing.assert_allclose(merged[1], base[1], rtol=1e-6)
    assert np.abs(merged[2] - base[2]).max() > 0.1


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"layers_to_transform": [0, 1]}, "h.2.attn.c_attn: has tensors, but target_modules and layers_to_"),
        ({"layers_to_transform": 1}, "h.0.mlp.c_proj: has tensors"),
        ({"layers_to_transform": "0"}, "layers_to_transform must be a whole number or a list or null"),
        ({"target_modules": ["c_attn"]}, "h.1.mlp.c_proj: has tensors, but target_modules do not name it"),
        ({"target_modules": ["c_attn", "mlp.c_proj", "c_fc"]}, "h.0.mlp.c_fc: has no tensors"),
        ({"target_modules": "all-linear", "layers_to_transform": [0, 2]}, "h.1.attn.c_attn: has tensors"),
        ({"target_modules": 5}, "target_modules must be a text or a list or null, got 5"),
        ({"exclude_modules": ["h.0.mlp.c_proj"]}, "h.0.mlp.c_proj: has tensors"),
    ],
)
def test_read_adapter_refuses_contradicting_settings(saved, changes, named):
    edit_config(saved, **changes)
    with pytest.raises(ValueError, match=re.escape(named)):
        read_adapter(saved, TINY)


@pytest.mark.parametrize(
    "targets",
    [
        None,
        r".*(c_attn|mlp\.c_proj)",
        r".*h\.[0-2]\..*c_(attn|proj)",
        ["transformer.h.0.attn.c_attn", "h.1.attn.c_attn", "2.attn.c_attn", "mlp.c_proj"],
    ],
)
def test_read_adapter_settings_that_agree_or_say_nothing(saved, targets):
    edit_config(saved, target_modules=targets)
    assert read_adapter(saved, TINY)[0].targets == LORA.targets


def test_read_adapter_of_a_model_with_fewer_layers(saved):
    deeper = dataclasses.replace(TINY, n_layer=5)
    with pytest.raises(ValueError, match=r"h\.3\.attn\.c_attn: has no tensors, but target_modules name it"):
        read_adapter(saved, deeper)


def test_read_adapter_refuses_tensors_of_another_kind(saved):
    edit_config(saved, use_dora=True)
    with pytest.raises(ValueError, match=r"h\.0\.attn\.c_attn\.lora_magnitude_vector: missing"):
        read_adapter(saved, TINY)
    edit_config(saved, use_dora=False, rank_pattern={"h.2.attn.c_attn": 9})
    with pytest.raises(
        ValueError, match=r"h\.2\.attn\.c_attn\.lora_A\.weight: has shape \[4, 24\], expected \[9"
    ):
        read_adapter(saved, TINY)
    edit_config(saved, rank_pattern={"c_attn": 10**9})
    with pytest.raises(ValueError, match="rank of 1000000000"):
        read_adapter(saved, TINY)
    edit_config(saved, rank_pattern={"(x+x+)+y": 3})
    with pytest.raises(ValueError, match="must be simple regular expressions"):
        read_adapter(saved, TINY)


def test_read_adapter_zeros_in_blocks_without_adapter(saved):
    def change(tensors):
        for name in [name for name in tensors if ".h.1." in name]:
            del tensors[name]

    rewrite(saved, change)
    edit_config(saved, layers_to_transform=[0, 2])
    _, adapters = read_adapter(saved, TINY)
    kept = trained(LORA)["h"]["attn"]["c_attn"]["lora_b"]
    lora_b = adapters["h"]["attn"]["c_attn"]["lora_b"]
    np.testing.assert_array_equal(lora_b[1], 0)
    np.testing.assert_array_equal(lora_b[2], kept[2])


@pytest.mark.parametrize(
    "changes",
    [
        {"bias": "all"},
        {"modules_to_save": ["classifier"]},
        {"trainable_token_indices": {"wpe": [1]}},
        {"use_dora": "yes"},
        {"use_qalora": True},
        {"peft_type": "IA3"},
        {"task_type": "SEQ_CLS"},
        {"init_lora_weights": "pissa"},
        {"something_of_tomorrow": True},
        {"r": 0},
        {"r": "4"},
        {"lora_alpha": None},
        {"lora_alpha": -1},
        {"lora_dropout": 2.0},
    ],
)
def test_read_adapter_refuses_unsupported_settings(saved, changes):
    edit_config(saved, **changes)
    with pytest.raises(ValueError, match="adapter_config.json") as info:
        read_adapter(saved, TINY)
    assert next(iter(changes)).removeprefix("lora_") in str(info.value)


def test_read_adapter_names_all_problems(saved):
    first = "base_model.model.transformer.h.0.attn.c_attn"

    def change(tensors):
        del tensors[f"{first}.lora_B.weight"]
        tensors[f"{first}.lora_A.weight"] = np.zeros((5, 24), np.float32)
        tensors["base_model.model.lm_head.lora_A.weight"] = np.zeros((4, 24), np.float32)

    rewrite(saved, change)
    with pytest.raises(ValueError, match=r"adapter_model\.safetensors") as info:
        read_adapter(saved, TINY)
    for problem in (
        "h.0.attn.c_attn.lora_B.weight: missing",
        "h.0.attn.c_attn.lora_A.weight: has shape [5, 24], expected [4, 24]",
        "lm_head.lora_A.weight: unknown",
    ):
        assert problem in str(info.value)


def test_read_adapter_cut_short_anywhere(saved):
    for name in (FILE, "adapter_config.json"):
        whole = (saved / name).read_bytes()
        rng = random.Random(0)
        for length in [0, len(whole) - 2, *(rng.randrange(len(whole) - 1) for _ in range(200))]:
            (saved / name).write_bytes(whole[:length])
            with pytest.raises(ValueError, match=name):
                read_adapter(saved, TINY)
        (saved / name).write_bytes(whole)


def test_read_adapter_of_a_model_of_another_size(saved):
    small = GPT2Config(vocab_size=300, n_positions=16, n_embd=16, n_layer=3, n_head=2)
    with pytest.raises(ValueError, match=r"c_attn\.lora_A\.weight: has shape \[4, 24\], expected \[4, 16\]"):
        read_adapter(saved, small)


def test_read_adapter_paths_without_adapter(tmp_path, saved):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        read_adapter(tmp_path / "nowhere", TINY)
    with pytest.raises(ValueError, match=r"adapter_config\.json"):
        read_adapter(tmp_path, TINY)
    (saved / "adapter_config.json").write_text("{")
    with pytest.raises(ValueError, match=r"adapter_config\.json is damaged: it is not JSON"):
        read_adapter(saved, TINY)
    (saved / "other.txt").write_text("mine")
    with pytest.raises(FileExistsError, match=r"other\.txt"):
        write_adapter(saved, TINY, LORA, trained(LORA))


def test_read_adapter_names_values_that_are_not_finite(saved):
    def change(tensors):
        tensors["base_model.model.transformer.h.2.mlp.c_proj.lora_A.weight"][0, 0] = np.nan

    rewrite(saved, change)
    with pytest.warns(
        Notice, match=r"1 of 12 tensors .* not finite numbers: h\.2\.mlp\.c_proj\.lora_A\.weight"
    ):
        adapters = read_adapter(saved, TINY)[1]
    assert np.isnan(adapters["h"]["mlp"]["c_proj"]["lora_a"][2, 0, 0])


def test_read_adapter_names_other_types_of_peft(saved):
    (saved / "adapter_config.json").write_text('{"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 8}')
    with pytest.raises(
        ValueError, match="peft_type must be LORA, the only type that can be read, got 'PROMPT_TUNING'"
    ):
        read_adapter(saved, TINY)


TABLE = np.random.default_rng(1).normal(size=(303, 24)).astype(np.float32)


@pytest.mark.parametrize("head", ["same", "apart"])
def test_load_adapter_with_a_resized_vocabulary(saved, head):
    def change(tensors):
        tensors[f"{ROOT}.wte.weight"] = TABLE
        tensors["base_model.model.lm_head.weight"] = TABLE + (head == "apart")

    rewrite(saved, change)
    model = load_adapter(LanguageModel(TINY, BASE), saved)
    assert model.config.vocab_size == 303 and model.config.tie_word_embeddings == (head == "same")
    np.testing.assert_array_equal(model.params["wte"]["embedding"], TABLE)
    if head == "apart":
        np.testing.assert_array_equal(model.params["lm_head"]["kernel"], TABLE + 1)
    assert model.lora is not None and set(model.lora.targets) == set(LORA.targets)
    assert model.adapter_embeddings == {"wte": None, "lm_head": None}
    assert model.merge_adapter().adapter_embeddings == {}


@pytest.mark.parametrize(
    "settings",
    [
        {"modules_to_save": ["transformer.wte"]},
        {"trainable_token_indices": [3]},
        {"modules_to_save": ["lm_head", "wte"]},
    ],
)
def test_read_embeddings_that_are_named_and_not_there(saved, settings):
    edit_config(saved, **settings)
    with pytest.raises(
        ValueError, match="has no tensor of .*wte, which adapter_config.json says are trained"
    ):
        read_embeddings(saved, TINY, BASE)


def test_read_embeddings_of_the_tokens_alone_leave_the_head_as_it_was(saved):
    rewrite(saved, lambda t: t.update({f"{ROOT}.wte.weight": TABLE[:300]}))
    edit_config(saved, modules_to_save=["wte"])
    config, params, found = read_embeddings(saved, TINY, BASE)
    assert not config.tie_word_embeddings and found == {"wte": None}
    np.testing.assert_array_equal(params["lm_head"]["kernel"], BASE["wte"]["embedding"])
    rewrite(saved, lambda t: t.update({f"{ROOT}.wte.weight": TABLE}))
    with pytest.raises(ValueError, match="has 303 tokens in wte, and no lm_head for as many"):
        read_embeddings(saved, TINY, BASE)


@pytest.mark.parametrize("indices", [[7, 2], {"wte": [7, 2]}, {"transformer.wte": [7, 2], "lm_head": [7, 2]}])
def test_read_embeddings_of_trainable_tokens(saved, indices):
    rows = np.full((2, 24), 0.5, np.float32) * [[1], [2]]
    rewrite(saved, lambda t: t.update({f"{ROOT}.wte.token_adapter.trainable_tokens_delta": np.float32(rows)}))
    edit_config(saved, trainable_token_indices=indices)
    config, params, found = read_embeddings(saved, TINY, BASE)
    expected = np.array(BASE["wte"]["embedding"])
    expected[[7, 2]] = rows
    assert config == TINY and found == {"wte": (7, 2)}
    np.testing.assert_array_equal(params["wte"]["embedding"], expected)
    edit_config(saved, trainable_token_indices=[7, 300])
    with pytest.raises(ValueError, match="trainable_token_indices must be below 300, got 300"):
        read_embeddings(saved, TINY, BASE)
