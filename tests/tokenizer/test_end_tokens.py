"""The end token and the stop tokens of models whose files agree, disagree, or name none."""

from __future__ import annotations

import dataclasses
import json
import warnings
from pathlib import Path
from typing import Any

import pytest
from tiny_models import random_params

import gpt2jax
from gpt2jax.generation.requests import make_request, stop_ids
from gpt2jax.language_model import LanguageModel
from gpt2jax.loading import load
from gpt2jax.model.config import GPT2Config
from gpt2jax.tokenizer.bpe import END_TOKEN, Tokenizer
from gpt2jax.tokenizer.end_tokens import choose_end_tokens
from gpt2jax.tokenizer.files import save_tokenizer
from gpt2jax.utils.notices import Notice
from gpt2jax.weights.hf import save_hf
from gpt2jax.weights.saved_settings import SavedSettings

CONFIG = GPT2Config(vocab_size=330, n_positions=16, n_embd=8, n_layer=1, n_head=2)
TOKENIZER = Tokenizer.gpt2(300)  # ends texts with 299


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.fixture(scope="module")
def params() -> Any:
    return random_params(CONFIG)


def save(
    folder: Path, params: Any, config: Any = 329, generation: Any = None, tokenizer: Any = TOKENIZER
) -> Path:
    """Save a model whose files name these end tokens; None: there is no such file."""
    save_hf(folder, CONFIG, params, tokenizer)
    edit(folder / "config.json", eos_token_id=config)
    if generation is None:
        (folder / "generation_config.json").unlink()
    else:
        (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": generation}))
    return folder


def end_and_stops(folder: Path, notice: str | None = None, **options: Any) -> tuple[int | None, list[int]]:
    """Load a model; return its end token and its stop tokens."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = load(folder, **options)
    told = [str(one.message) for one in caught if issubclass(one.category, Notice)]
    assert len(told) == (notice is not None) and (notice or "") in "".join(told), told
    end = None if model.tokenizer is None and model.config.eos_token_id is None else model.end_token_id
    return end, stop_ids(model, None)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("config", "generation", "stops", "notice"),
    [
        (299, 299, [299], None),
        ([299, 7], None, [299, 7], None),
        (299, [299, 198], [299, 198], None),
        (299, [5, 6], [299, 5, 6], "generation_config.json says 5 '&' and 6"),
        (
            7,
            None,
            [299],
            "the tokenizer says 299 '<|endoftext|>'; config.json says 7 '(': texts begin and end",
        ),
        (50256, None, [299], "config.json says 50256, outside the vocabulary of 330 ids"),
        ([50256, 299], None, [299], "50256, outside"),
        (None, None, [299], None),
        (None, 299, [299], None),
        (
            320,
            None,
            [299, 320],
            "config.json says 320: texts begin and end with 299, generation stops at 299 and 320",
        ),
    ],
)
def test_end_token_is_the_tokenizers(tmp_path, params, config, generation, stops, notice):
    assert end_and_stops(save(tmp_path, params, config, generation), notice) == (299, stops)


@pytest.mark.parametrize(
    ("config", "generation", "end", "stops", "notice"),
    [
        (329, 329, 329, [329], None),
        ([7, 8], None, 7, [7, 8], None),
        (None, [5, 6], 5, [5, 6], None),
        (7, 8, 7, [7, 8], "config.json says 7; generation_config.json says 8: texts begin and end with 7"),
        (50256, 8, 8, [8], "config.json says 50256, outside the vocabulary of 330 ids"),
        (50256, None, None, [], "the model has no end token; name one with end_token=... (--end-token)"),
        (None, None, None, [], None),
        (-1, None, None, [], None),
    ],
)
def test_end_token_without_tokenizer_is_that_of_the_files(
    tmp_path, params, config, generation, end, stops, notice
):
    folder = save(tmp_path, params, config, generation, tokenizer=None)
    assert end_and_stops(folder, notice) == (end, stops)


@pytest.mark.parametrize(("tokenizer", "end"), [(None, None), (TOKENIZER, 299)])
def test_end_token_that_no_file_names(tmp_path, params, tokenizer, end):
    """GPT-2's 50256, which transformers takes then, is outside the vocabulary: the last ordinary token is not meant."""
    folder = save(tmp_path / "a", params, tokenizer=tokenizer)
    config = json.loads((folder / "config.json").read_text())
    del config["eos_token_id"], config["bos_token_id"]
    (folder / "config.json").write_text(json.dumps(config))
    assert end_and_stops(folder) == (end, [] if end is None else [end])
    load(folder).save(tmp_path / "b")
    assert json.loads((tmp_path / "b" / "config.json").read_text())["eos_token_id"] == end


def test_save_says_that_a_keras_preset_does_not_keep_the_end_token(tmp_path, params):
    pytest.importorskip("h5py")
    kept = LanguageModel(CONFIG, params, TOKENIZER)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        kept.save(tmp_path / "kept", format="keras")
    assert load(tmp_path / "kept").end_token_id == 299
    other = dataclasses.replace(kept, tokenizer=TOKENIZER.with_end_token("<s>"))
    with pytest.warns(Notice, match=r"does not keep the end token 300; name it .* \(--end-token\)"):
        other.save(tmp_path / "other", format="keras")
    assert load(tmp_path / "other", end_token="<s>").end_token_id == 300


def test_end_token_survives_load_and_save(tmp_path, params):
    with pytest.warns(Notice, match="50256, outside"):
        model = load(save(tmp_path / "a", params, 50256, [299, 198]))
    model.save(tmp_path / "b")
    assert json.loads((tmp_path / "b" / "config.json").read_text())["eos_token_id"] == 299
    assert json.loads((tmp_path / "b" / "generation_config.json").read_text())["eos_token_id"] == [299, 198]
    assert end_and_stops(tmp_path / "b") == (299, [299, 198])


def test_end_token_of_a_damaged_file_is_named(tmp_path, params):
    with pytest.raises(
        ValueError, match=r"generation_config.json: eos_token_id must be a token id, .*got '<s>'"
    ):
        load(save(tmp_path, params, generation="<s>"))


def test_model_without_end_token_says_so_where_it_matters(tmp_path, params):
    model = load(save(tmp_path, params, None, tokenizer=None))
    with pytest.raises(
        ValueError, match=r"the model has no end token to begin.*330 ids; name one with .*--end-token"
    ):
        gpt2jax.evaluate(model, [[1, 2, 3]])
    with pytest.raises(ValueError, match="the model has no end token to begin and to separate texts"):
        gpt2jax.finetune(
            model, [[1, 2, 3]] * 9, gpt2jax.FinetuneConfig(steps=1, batch_size=1, sequence_length=8)
        )
    with pytest.raises(ValueError, match="no end token for prompt 1, which is empty, to begin with"):
        make_request(model, [[1], []], None, {})
    assert make_request(model, [[1]], None, {}).stop_ids == []
    model.save(tmp_path / "again")
    assert json.loads((tmp_path / "again" / "config.json").read_text())["eos_token_id"] is None


def test_end_token_argument(tmp_path, params):
    folder = save(tmp_path / "none", params, None, tokenizer=None)
    assert end_and_stops(folder, end_token=7) == (7, [7])
    with pytest.raises(
        ValueError, match="end_token must be a token of the model, which has ids 0 to 329, got 330"
    ):
        load(folder, end_token=330)
    with pytest.raises(ValueError, match="got '<s>'; there is no tokenizer to give it an id"):
        load(folder, end_token="<s>")
    folder = save(tmp_path / "other", params, 50256)
    assert end_and_stops(folder, end_token="(") == (7, [7])
    assert end_and_stops(folder, "'<s>' is not a token yet", end_token="<s>") == (300, [300])
    with pytest.raises(ValueError, match="got '<s>'; the tokenizer gives it id 330"):
        load(save(tmp_path / "full", params, None, tokenizer=Tokenizer.gpt2(330)), end_token="<s>")


def test_tokenizer_argument(tmp_path, params):
    folder = save(tmp_path / "weights", params, None, tokenizer=None)
    save_tokenizer(TOKENIZER, tmp_path / "tokenizer")
    for tokenizer in (TOKENIZER, tmp_path / "tokenizer", str(tmp_path / "tokenizer" / "tokenizer.json")):
        model = load(folder, tokenizer=tokenizer)
        assert model.tokenizer is not None and model.tokenizer.fingerprint == TOKENIZER.fingerprint
        assert model.end_token_id == 299
    with pytest.raises(
        ValueError, match=r"tokenizer must be one of the model's 330 ids, got one of 50257 \(gpt2\)"
    ):
        load(folder, tokenizer="gpt2")
    with pytest.raises(
        FileNotFoundError, match="there is no tokenizer at gtp2; expected a folder, a file, or gpt2"
    ):
        load(folder, tokenizer="gtp2")
    # damaged files beside the weights do not matter
    broken = save(tmp_path / "broken", params, 299)
    (broken / "tokenizer.json").write_text("{")
    assert load(broken, tokenizer=TOKENIZER).end_token_id == 299


def test_load_parses_special_tokens_if_asked(tmp_path, params):
    folder = save(tmp_path, params, 299)
    text = f"a{END_TOKEN}"
    for mode, ids in (("parse", [64, 299]), ("text", TOKENIZER.encode(text))):
        model = load(folder, special_tokens=mode)  # pyright: ignore[reportArgumentType]
        assert model.tokenizer is not None and model.tokenizer.encode(text) == ids


def test_unused_settings_survive_load_and_save(tmp_path, params):
    folder = save(tmp_path / "a", params, 299)
    extra = {"pad_token_id": 5, "task_specific_params": {"x": {"max_length": 50}}, "id2label": {"0": "a"}}
    edit(folder / "config.json", **extra, torch_dtype="float16", transformers_version="4.1")
    (folder / "generation_config.json").write_text(
        '{"pad_token_id": 5, "temperature": 0.7, "eos_token_id": 299}'
    )
    load(folder).save(tmp_path / "b")
    config = json.loads((tmp_path / "b" / "config.json").read_text())
    assert {name: config.get(name) for name in extra} == extra and "torch_dtype" not in config
    generation = json.loads((tmp_path / "b" / "generation_config.json").read_text())
    assert generation == {"pad_token_id": 5, "temperature": 0.7, "eos_token_id": 299, "bos_token_id": 329}


def test_choose_end_tokens_special_token_of_config_stops():
    chat = dataclasses.replace(CONFIG)
    tokenizer = Tokenizer(TOKENIZER.merges, special_tokens={END_TOKEN: 299, "<|im_end|>": 300})
    with pytest.warns(Notice, match=r"config.json says 300 '<\|im_end\|>': texts begin and end with 299"):
        found = choose_end_tokens(chat.vocab_size, tokenizer, {"config.json": [300]})
    assert found.end == 299 and found.stops == (299, 300)


def test_save_hf_without_settings_is_derived_from_the_config(tmp_path, params):
    save_hf(tmp_path, CONFIG, params, saved=SavedSettings())
    assert json.loads((tmp_path / "generation_config.json").read_text())["_from_model_config"] is True
