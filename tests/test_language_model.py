"""The model as a user holds it: what it says of itself, loading by name or path, saving, adapters."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import time
from typing import Any

import jax
import numpy as np
import pytest
from tiny_models import CONFIG, TINY, encode, random_model, random_params

import gpt2jax
from gpt2jax.generation.generate import generate
from gpt2jax.language_model import LanguageModel, combine_adapters, from_config
from gpt2jax.loading import check_model_name, load, load_adapter, save_adapter
from gpt2jax.lora.adapters import init_adapters
from gpt2jax.lora.config import LoRAConfig

LORA = LoRAConfig(rank=2, alpha=5.0, targets=("attn.c_attn", "mlp.c_fc"))


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    return LanguageModel(TINY, random_params())


@pytest.fixture(scope="module")
def adapted(model) -> LanguageModel:
    adapters = jax.tree.map(lambda x: x + 0.05, init_adapters(TINY, LORA, seed=1))
    return dataclasses.replace(model, adapters=adapters, lora=LORA)


def assert_same(a, b) -> None:
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.slow
def test_what_it_says_of_itself(model, adapted):
    assert model.num_parameters() == adapted.num_parameters() == 101 * 32 + 32 * 32 + 2 * 12704 + 64
    untied = from_config(dataclasses.replace(TINY, tie_word_embeddings=False))
    assert untied.num_parameters() == model.num_parameters() + 101 * 32
    said = "2 layers, 2 heads, width 32, 101 ids, context 32"
    assert repr(model) == f"LanguageModel(unnamed: 29,728 parameters, {said})"
    assert repr(adapted).endswith("LoRA rank 2)")
    assert model.end_token_id == 100


@pytest.mark.slow
def test_logits_within_transformations(model):
    """What a user's own `jax.jit` and `jax.grad` make of them."""
    ids, mask = np.array([[1, 2, 3], [4, 5, 6]]), np.array([[0, 1, 1], [1, 1, 1]])
    want = model.logits(ids, mask)
    np.testing.assert_allclose(jax.jit(model.logits)(ids, mask), want, atol=1e-6)
    with pytest.raises(ValueError, match="token_ids has shape"):
        jax.jit(model.logits)(ids[0])
    gradient = jax.grad(lambda p: dataclasses.replace(model, params=p).logits(ids, mask).sum())(model.params)
    assert jax.tree.structure(gradient) == jax.tree.structure(model.params)
    with pytest.raises(ValueError, match="rows of different lengths"):
        model.logits([[1], [2, 3]])


def test_random_models_follow_their_seed():
    assert_same(from_config(TINY, 3).params, from_config(TINY, seed=3).params)
    first, other = (from_config(TINY, seed).params["wpe"]["embedding"] for seed in (3, 4))
    assert (first != other).any()


@pytest.mark.slow
def test_packaged_model_loads_offline_and_fast(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    began = time.perf_counter()
    model = gpt2jax.load("gpt2-mini")
    assert time.perf_counter() - began < 2
    assert model.num_parameters() == 4_273_664 and model.tokenizer is not None
    texts = gpt2jax.load_texts("python-docs", split="validation", limit=20)
    assert gpt2jax.evaluate(model, texts, sequence_length=128).loss < 3.6


@pytest.fixture(scope="module")
def narrow(model, tmp_path_factory):
    """A model loaded in bfloat16, and one in float32 with the same rounded values."""
    folder = tmp_path_factory.mktemp("narrow") / "model"
    model.save(folder)
    loaded = gpt2jax.load(folder, dtype="bfloat16")
    rounded = jax.tree.map(lambda x: x.astype("bfloat16").astype("float32"), model.params)
    return loaded, dataclasses.replace(loaded, params=rounded)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("source", ["hf-tied", "hf-relu-bfloat16", "hf-bin-zip", "keras-hub", "nanogpt-bias"])
def test_loaded_in_16_bits(source, dtype):
    path = pathlib.Path(__file__).parent / "golden" / source
    loaded = gpt2jax.load(path, dtype=dtype).params
    expected = jax.tree.map(lambda x: x.astype(dtype), gpt2jax.load(path).params)
    assert all(leaf.dtype == dtype for leaf in jax.tree.leaves(loaded))
    assert_same(loaded, expected)


@pytest.mark.slow
def test_16_bits_compute_what_their_values_do(narrow, tmp_path):
    loaded, rounded = narrow
    ids = np.arange(24).reshape(2, 12)
    np.testing.assert_array_equal(loaded.logits(ids), rounded.logits(ids))
    settings = {"max_new_tokens": 10, "do_sample": False, "stop_token_ids": []}
    outs = [gpt2jax.generate(model, [[1, 2, 3]], **settings)[0] for model in narrow]
    assert outs[0].token_ids == outs[1].token_ids
    losses = [gpt2jax.evaluate(model, [list(range(20))], sequence_length=16).loss for model in narrow]
    assert losses[0] == losses[1]
    for format in ("hf", "keras"):
        loaded.save(tmp_path / format, format=format)
        assert_same(gpt2jax.load(tmp_path / format).params, rounded.params)


@pytest.mark.slow
def test_training_from_16_bits(narrow, tmp_path):
    """All parameters become float32; under adapters they stay as they are."""
    texts = [list(range(i, i + 20)) for i in range(8)]
    settings = gpt2jax.FinetuneConfig(steps=1, batch_size=4, sequence_length=16, learning_rate=1e-3)
    runs = [gpt2jax.finetune(model, texts, settings, progress=False).model for model in narrow]
    assert_same(runs[0].params, runs[1].params)
    assert all(leaf.dtype == "float32" for leaf in jax.tree.leaves(runs[0].params))
    settings = dataclasses.replace(settings, lora=LORA)
    runs = [gpt2jax.finetune(model, texts, settings, progress=False).model for model in narrow]
    assert all(leaf.dtype == "bfloat16" for leaf in jax.tree.leaves(runs[0].params))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), runs[0].adapters, runs[1].adapters)


def test_values_too_large_for_16_bits(model, tmp_path):
    params = {**model.params, "wpe": {"embedding": model.params["wpe"]["embedding"] * 1e6}}
    dataclasses.replace(model, params=params).save(tmp_path / "large")
    with pytest.raises(ValueError, match=r"wpe\.weight holds values that are not finite numbers in float16"):
        gpt2jax.load(tmp_path / "large", dtype="float16")
    with pytest.raises(ValueError, match="dtype must be one of float32, .*got 'int8'"):
        gpt2jax.load(tmp_path / "large", dtype="int8")


@pytest.mark.parametrize("format", ["hf", "keras"])
def test_saved_and_loaded(tmp_path, format):
    model = random_model(0)
    model.save(tmp_path / "saved", format=format)
    again = gpt2jax.load(tmp_path / "saved")
    jax.tree.map(np.testing.assert_array_equal, model.params, again.params)
    assert encode(again, "the end") == encode(model, "the end")
    assert again.config.n_embd == CONFIG.n_embd


@pytest.mark.slow
def test_adapters_are_merged_into_what_is_saved(tmp_path):
    lora = gpt2jax.LoRAConfig(rank=2)
    adapters = jax.tree.map(lambda x: x + 0.1, init_adapters(TINY, lora))
    model = LanguageModel(TINY, random_params(), adapters=adapters, lora=lora)
    model.save(tmp_path / "merged")
    gpt2jax.save_adapter(model, tmp_path / "adapter")
    plain = LanguageModel(TINY, random_params())
    ids = np.arange(12)[None]
    np.testing.assert_allclose(gpt2jax.load(tmp_path / "merged").logits(ids), model.logits(ids), atol=1e-5)
    adapted = gpt2jax.load_adapter(plain, tmp_path / "adapter")
    np.testing.assert_allclose(adapted.logits(ids), model.logits(ids), atol=1e-6)


def test_save_and_save_adapter_write_tokenizer_and_model_card(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    lora, base = gpt2jax.LoRAConfig(rank=2), random_model(0)
    model = dataclasses.replace(base, adapters=init_adapters(base.config, lora), lora=lora)
    for source, shown in (("gpt2", 'base_model: "openai-community/gpt2"'), (f"{tmp_path}/one", "`~/one`")):
        save_adapter(dataclasses.replace(model, source=source), tmp_path / "adapter")
        card = (tmp_path / "adapter" / "README.md").read_text()
        assert card.startswith("---\nlibrary_name: peft\n") and "- lora\n" in card
        assert shown in card and str(tmp_path) not in card
    tokenizer = gpt2jax.load_tokenizer(tmp_path / "adapter")
    assert base.tokenizer and tokenizer.encode("the end") == base.tokenizer.encode("the end")
    base.save(tmp_path / "model")
    base.save(tmp_path / "model")
    assert (tmp_path / "model" / "README.md").read_text().startswith("---\nlibrary_name: transformers\n")
    (tmp_path / "model" / "README.md").write_text("# written by hand")
    with pytest.raises(FileExistsError, match=r"README.md that gpt2jax did not write"):
        base.save(tmp_path / "model")


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("gpt3", ValueError, "there is no model 'gpt3'; did you mean 'gpt2'.*hub id"),
        ("./nothing/here", FileNotFoundError, "nothing/here"),
        ("a/b/c", FileNotFoundError, "there is no model at a/b/c"),
        ("runs/mine", FileNotFoundError, "there is no model at runs/mine"),
        ("docs/mine", FileNotFoundError, "there is no model at docs/mine"),
        ("weights.safetensors", FileNotFoundError, "weights.safetensors"),
        ("", ValueError, "name must be a name or a path, and not empty, got ''"),
        (None, ValueError, "name must be a name or a path, and not empty, got None"),
        ("a\0b", ValueError, "name must be a name or a path, and not empty, got 'a.x00b'"),
    ],
)
def test_names_that_are_none(name, error, message, monkeypatch):
    monkeypatch.chdir(pathlib.Path(__file__).parents[1])
    for find in (gpt2jax.load, check_model_name):
        with pytest.raises(error, match=message):
            find(name)


def test_check_model_name_takes_what_may_be_there(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models" / "one").mkdir(parents=True)
    for name in ("gpt2", "gpt2-mini", "owner/name", "models/one"):
        check_model_name(name)


def test_what_is_no_configuration_or_seed_is_named():
    with pytest.raises(ValueError, match="config must be a GPT2Config, got 'gpt2'"):
        gpt2jax.from_config("gpt2")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="seed must be a whole number.*, got 1.5"):
        gpt2jax.from_config(TINY, 1.5)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="tokenizer must be a Tokenizer, or None, got 'gpt2'"):
        gpt2jax.from_config(TINY, tokenizer="gpt2")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="vocab_size must be a whole number from 257 to 50257, got '300'"):
        gpt2jax.Tokenizer.gpt2("300")  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: gpt2jax.load_adapter("gpt2-mini", "adapter"),  # pyright: ignore[reportArgumentType]
            "model must be a LanguageModel, got 'gpt2-mini'",
        ),
        (
            lambda: gpt2jax.save_adapter("gpt2-mini", "adapter"),  # pyright: ignore[reportArgumentType]
            "model must be a LanguageModel, got 'gpt2-mini'",
        ),
        (
            lambda: gpt2jax.combine_adapters(None),  # pyright: ignore[reportArgumentType]
            "models must be a list of models, got None",
        ),
        (
            lambda: gpt2jax.combine_adapters(["one"]),  # pyright: ignore[reportArgumentType]
            r"models\[0\] must be a LanguageModel, got 'one'",
        ),
    ],
)
def test_what_is_no_model_with_adapters_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_a_revision_of_what_is_not_on_the_hub(tmp_path):
    random_model(0).save(tmp_path / "one")
    for name in ("gpt2-mini", tmp_path / "one"):
        with pytest.raises(ValueError, match="which is not on the hub, got 'main'"):
            gpt2jax.load(name, revision="main")
    with pytest.raises(ValueError, match="revision must be a text that is not empty, or None, got 5"):
        gpt2jax.load("gpt2", revision=5)  # pyright: ignore[reportArgumentType]


def test_adapters_whose_base_is_gone(tmp_path):
    (tmp_path / "adapter").mkdir()
    (tmp_path / "run.json").write_text('{"base_model": "./models/one"}')
    with pytest.raises(
        FileNotFoundError, match="holds adapters of a model that can't be found: .*models/one"
    ):
        gpt2jax.load(tmp_path)
    (tmp_path / "run.json").write_text('{"base_mo')
    with pytest.raises(ValueError, match="run.json is damaged: it is not JSON"):
        gpt2jax.load(tmp_path)


def test_what_is_no_model_is_told_in_one_line(tmp_path):
    with pytest.raises(
        ValueError, match=r"holds no weights of a known format; expected .*\(OpenAI\); or"
    ) as info:
        gpt2jax.load(tmp_path)
    assert "\n" not in str(info.value)


def test_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    random_model(0).save("~/models/one")
    assert (tmp_path / "models" / "one" / "config.json").is_file()
    assert gpt2jax.load("~/models/one").source == "~/models/one"
    with pytest.raises(FileNotFoundError, match="~nobody/model"):
        gpt2jax.load("~nobody/model")


def test_unknown_format_and_name(tmp_path):
    with pytest.raises(ValueError, match="format must be one of hf, keras, got 'gguf'"):
        random_model(0).save(tmp_path / "x", format="gguf")
    with pytest.raises(AttributeError, match="no attribute 'laod'"):
        gpt2jax.laod  # pyright: ignore  # noqa: B018
    assert set(gpt2jax.__all__) <= set(dir(gpt2jax))
    assert all(getattr(gpt2jax, name) is not None for name in gpt2jax.__all__)


def test_adapters_saved_and_loaded(model, adapted, tmp_path):
    save_adapter(adapted, tmp_path / "adapter")
    again = load_adapter(model, tmp_path / "adapter")
    assert again.lora == LORA
    assert_same(again.adapters, adapted.adapters)
    assert_same(again.params, model.params)
    ids = np.arange(24).reshape(2, 12)
    np.testing.assert_array_equal(again.logits(ids), adapted.logits(ids))
    # those that were there are merged first: both act
    both = load_adapter(adapted, tmp_path / "adapter")
    assert_same(both.params, adapted.merge_adapter().params)
    with pytest.raises(ValueError, match=r"no adapters to save"):
        save_adapter(model, tmp_path / "none")


def test_merged_and_taken_out(model, adapted, tmp_path):
    merged = adapted.merge_adapter()
    save_adapter(adapted, tmp_path / "adapter")
    again = load_adapter(merged, tmp_path / "adapter").unmerge_adapter()
    assert again.adapters is None and again.unmerge_adapter() is again
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-7), again.params, model.params)


SEVERAL = {
    "of other ranks and linears": (LORA, LoRAConfig(rank=3, targets=("attn.c_attn", "*.c_proj"))),
    "slices": (LORA, LoRAConfig(rank=1, targets=("attn.q", "attn.v"), use_rslora=True)),
    "patterns": (LORA, LoRAConfig(targets=("mlp.c_fc",), rank_pattern={"h.1.*": 2}, alpha_pattern={"h.0.*": 3})),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("settings", SEVERAL.values(), ids=SEVERAL.keys())
def test_several_adapters_together(model, settings, tmp_path):
    weights, single, expected = (1.5, -0.25), [], jax.tree.map(np.array, model.params)
    for weight, lora in zip(weights, settings, strict=True):
        adapters = jax.tree.map(
            lambda x: np.where(x == 0, 0.02, x), init_adapters(TINY, lora, seed=lora.rank)
        )
        single.append(dataclasses.replace(model, adapters=adapters, lora=lora))
        added = jax.tree.map(np.subtract, single[-1].merge_adapter().params, model.params)
        expected = jax.tree.map(lambda total, x, w=weight: total + w * x, expected, added)
    both = combine_adapters(single, weights)
    assert both.params is model.params  # nothing of the base is copied
    ids = np.arange(24).reshape(2, 12)
    assert np.abs(both.logits(ids) - combine_adapters(single).logits(ids)).max() > 0.1
    merged = both.merge_adapter()
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), merged.params, expected)
    np.testing.assert_allclose(both.logits(ids), merged.logits(ids), atol=2e-5)
    save_adapter(both, tmp_path / "both")
    again = load_adapter(model, tmp_path / "both")
    np.testing.assert_allclose(again.logits(ids), both.logits(ids), atol=1e-6)


def test_adapters_that_do_not_go_together(model, adapted):
    dora = LoRAConfig(targets=("attn.q",), use_dora=True)
    fresh = init_adapters(TINY, dora, params=model.params)
    other = dataclasses.replace(adapted, params=random_params(seed=1))
    cases: tuple[tuple[list[LanguageModel], Any, str], ...] = (
        ([adapted], ["much"], r"weights must be a finite number .*, got \['much'\]"),
        ([adapted, adapted], [1.0], r"weights must be a finite number for each of 2 models, got \[1\.0\]"),
        ([adapted], [float("nan")], "finite number"),
        ([], None, "each of 0 models"),
        ([adapted, model], None, "a model has no adapters"),
        ([adapted, other], None, "the adapters are on different models"),
        (
            [adapted, dataclasses.replace(model, adapters=fresh, lora=dora)],
            None,
            "DoRA adapters cannot be combined",
        ),
    )
    for models, weights, message in cases:
        with pytest.raises(ValueError, match=message):
            combine_adapters(models, weights)


@pytest.mark.parametrize(
    ("source", "written"), [(None, None), ("gpt2", "openai-community/gpt2"), ("owner/name", "owner/name")]
)
def test_adapters_name_their_base(adapted, tmp_path, source, written):
    save_adapter(dataclasses.replace(adapted, source=source), tmp_path / "adapter")
    settings = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == written


@pytest.mark.slow
def test_language_model_has_the_names_of_transformers(model, tmp_path):
    model.save_pretrained(tmp_path / "model", dtype="float32")
    loaded = LanguageModel.from_pretrained(tmp_path / "model", dtype="float32")
    jax.tree.map(np.testing.assert_array_equal, loaded.params, model.params)
    jax.tree.map(np.testing.assert_array_equal, loaded.params, load(tmp_path / "model").params)
    settings: dict[str, Any] = {"max_new_tokens": 2, "do_sample": False}
    assert model.generate([[1, 2]], **settings) == generate(model, [[1, 2]], **settings)
