"""Our folders taken by others as they are: CTranslate2's converter, llama.cpp's names for GGUF, vLLM's settings."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from tiny_models import random_params

import gpt2jax
from gpt2jax.language_model import LanguageModel
from gpt2jax.model.config import GPT2Config
from gpt2jax.tokenizer.bpe import Tokenizer
from gpt2jax.weights.hf import save_hf
from gpt2jax.weights.safetensors_io import read_safetensors

# what these libraries say to each other
pytestmark = [
    pytest.mark.filterwarnings(f"ignore::{kind}")
    for kind in ("DeprecationWarning", "UserWarning", "FutureWarning")
]

CONFIG = GPT2Config(vocab_size=600, n_positions=96, n_embd=32, n_layer=2, n_head=4)


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    return LanguageModel(CONFIG, random_params(CONFIG, noise=0.5), Tokenizer.gpt2(600))


@pytest.fixture(params=["one file", "shards"], scope="module")
def folder(request, model, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("saved") / "model"
    if request.param == "one file":
        model.save(path)
    else:
        save_hf(path, model.config, model.params, model.tokenizer, max_shard_bytes=50_000)
        assert len(list(path.glob("model-*.safetensors"))) > 2
    return path


@pytest.mark.slow
def test_ctranslate2_continues_as_we_do(folder, model, tmp_path):
    ctranslate2 = pytest.importorskip("ctranslate2")
    pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    from ctranslate2.converters import TransformersConverter

    TransformersConverter(str(folder)).convert(str(tmp_path / "ct2"))
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    prompts = ["The model, once saved,", "import numpy as np\n", "1 2 3 4"]
    ids = [model.tokenizer.encode(prompt) for prompt in prompts]
    tokens = [tokenizer.convert_ids_to_tokens(row) for row in ids]
    theirs = ctranslate2.Generator(str(tmp_path / "ct2"), compute_type="float32").generate_batch(
        tokens, max_length=40, sampling_topk=1, include_prompt_in_result=False
    )
    ours = gpt2jax.generate(gpt2jax.load(folder), ids, max_new_tokens=40, do_sample=False)
    assert [list(out.token_ids) for out in ours] == [result.sequences_ids[0] for result in theirs]
    assert sum(len(set(out.token_ids)) for out in ours) > 20


def tensors_in(folder: Path) -> dict[str, tuple[int, ...]]:
    files = sorted(folder.glob("*.safetensors"))
    return {name: tensor.shape for file in files for name, tensor in read_safetensors(file).items()}


@pytest.mark.slow
def test_llama_cpp_knows_names_settings_and_tokens(folder, model):
    """The converter is a script and no package; what it looks up is in the package gguf, beside the settings."""
    gguf = pytest.importorskip("gguf")
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.GPT2, CONFIG.n_layer)
    found = {names.get_name(name, try_suffixes=(".weight", ".bias")) for name in tensors_in(folder)}
    wanted = {
        *("token_embd.weight", "position_embd.weight", "output_norm.weight", "output_norm.bias"),
        *(
            f"blk.{layer}.{name}.{leaf}"
            for layer in range(CONFIG.n_layer)
            for name in ("attn_norm", "attn_qkv", "attn_output", "ffn_norm", "ffn_up", "ffn_down")
            for leaf in ("weight", "bias")
        ),
    }
    assert found == wanted
    settings = json.loads((folder / "config.json").read_text())
    assert settings["architectures"] == ["GPT2LMHeadModel"]
    for name, value in {"n_layer": 2, "n_ctx": 96, "n_embd": 32, "n_head": 4, "vocab_size": 600}.items():
        assert settings[name] == value
    assert settings["layer_norm_epsilon"] == 1e-5
    vocabulary = gguf.SpecialVocab(folder, load_merges=True)
    merges = (folder / "merges.txt").read_text("utf-8").splitlines()[1:]
    assert vocabulary.merges == [merge for merge in merges if merge] and len(merges) > 300
    assert vocabulary.special_token_ids["eos"] == vocabulary.special_token_ids["bos"] == 599
    ids = json.loads((folder / "vocab.json").read_text("utf-8"))
    assert sorted(ids.values()) == list(range(600))


def test_settings_that_vllm_asks_for(folder):
    """It finds its class by `architectures`, reads the rest through transformers, and refuses three features."""
    transformers = pytest.importorskip("transformers")
    config = transformers.AutoConfig.from_pretrained(folder)
    assert config.architectures == ["GPT2LMHeadModel"] and config.model_type == "gpt2"
    assert not config.add_cross_attention
    assert not config.scale_attn_by_inverse_layer_idx and not config.reorder_and_upcast_attn
    assert config.max_position_embeddings == 96 and config.num_hidden_layers == 2 and config.hidden_size == 32
    assert config.tie_word_embeddings and str(config.dtype) == "torch.float32"
    assert all(name.startswith("transformer.") for name in tensors_in(folder))
    generation = transformers.GenerationConfig.from_pretrained(folder)
    assert generation.eos_token_id == generation.bos_token_id == 599
    if (folder / "model.safetensors.index.json").is_file():
        index = json.loads((folder / "model.safetensors.index.json").read_text())
        assert set(index["weight_map"]) == set(tensors_in(folder))
        sizes = [int(np.prod(shape)) for shape in tensors_in(folder).values()]
        assert index["metadata"]["total_size"] == 4 * sum(sizes)
