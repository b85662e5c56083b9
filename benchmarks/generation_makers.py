"""The libraries that benchmarks/generation.py compares: how each loads a model and continues prompts.

A loader takes the options, the folder of `write_folders` and a dtype, and returns a function: prompts (lists of ids,
all as long) and a number of tokens -> the new ids of each row.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from contenders import backbone

from gpt2jax.model.config import PRESETS, GPT2Config

Prompts = list[list[int]]
Generate = Callable[[Prompts, int], Sequence[Sequence[int]]]

CONTENDERS = {
    "gpt2jax float32": ("gpt2jax", "float32"),
    "gpt2jax bfloat16": ("gpt2jax", "bfloat16"),
    "gpt2jax int8": ("gpt2jax", "int8"),
    "transformers float32": ("transformers", "float32"),
    "transformers bfloat16": ("transformers", "bfloat16"),
    "keras-hub JAX float32": ("keras-jax", "float32"),
    "keras-hub TF float32": ("keras-tensorflow", "float32"),
    "CTranslate2 float32": ("ctranslate2", "float32"),
    "CTranslate2 int8": ("ctranslate2", "int8"),
    "llama.cpp f32": ("llama.cpp", "F32"),
    "llama.cpp bf16": ("llama.cpp", "BF16"),
    "llama.cpp Q8_0": ("llama.cpp", "Q8_0"),
}
# of a weight; Q8_0 has a scale of two bytes for 32 of them
BYTES = {"float32": 4, "bfloat16": 2, "int8": 1, "F32": 4, "BF16": 2, "Q8_0": 34 / 32}
TOP_K = 5


# ---- weights ----


def write_folders(folder: Path, config: GPT2Config, names: Sequence[str]) -> list[str]:
    """Random weights as a Hugging Face folder, and made of it what other libraries load; what could not be made."""
    import gpt2jax

    tokenizer = gpt2jax.Tokenizer.gpt2(config.vocab_size)
    gpt2jax.from_config(config, tokenizer=tokenizer).save(folder / "hf")
    wanted = {CONTENDERS[name][0] for name in names}
    failed = []
    for library, write in {"ctranslate2": write_ctranslate2, "llama.cpp": write_gguf}.items():
        if library in wanted:
            try:
                write(folder, config)
            except ImportError as error:
                failed.append(f"{library} has no weights: {error}")
    return failed


def write_ctranslate2(folder: Path, config: GPT2Config) -> None:
    import ctranslate2

    ctranslate2.converters.TransformersConverter(str(folder / "hf")).convert(str(folder / "ctranslate2"))


def write_gguf(folder: Path, config: GPT2Config) -> None:
    """What llama.cpp's own converter writes for a GPT-2, which is a script and no package."""
    import gguf
    import llama_cpp  # noqa: F401  nothing to write without it
    from safetensors.numpy import load_file

    tensors = load_file(folder / "hf" / "model.safetensors")
    merges = (folder / "hf" / "merges.txt").read_text("utf-8").splitlines()
    ids = json.loads((folder / "hf" / "vocab.json").read_text("utf-8"))
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.GPT2, config.n_layer)
    for dtype in ("F32", "BF16", "Q8_0"):
        kind = gguf.GGMLQuantizationType[dtype]
        writer = gguf.GGUFWriter(folder / f"{dtype}.gguf", "gpt2")
        writer.add_block_count(config.n_layer)
        writer.add_context_length(config.n_positions)
        writer.add_embedding_length(config.n_embd)
        writer.add_feed_forward_length(config.mlp_dim)
        writer.add_head_count(config.n_head)
        writer.add_layer_norm_eps(config.layer_norm_epsilon)
        writer.add_file_type(gguf.LlamaFileType[{"F32": "ALL_F32"}.get(dtype, f"MOSTLY_{dtype}")])
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("gpt-2")
        writer.add_token_list(sorted(ids, key=lambda token: ids[token]))
        normal, control = gguf.TokenType.NORMAL, gguf.TokenType.CONTROL
        writer.add_token_types(
            [control if i == config.eos_token_id else normal for i in range(config.vocab_size)]
        )
        writer.add_token_merges([merge for merge in merges[1:] if merge])
        writer.add_bos_token_id(config.bos_token_id)
        writer.add_eos_token_id(config.eos_token_id)
        for name, array in tensors.items():
            if array.ndim == 2 and ".h." in name:
                array = array.T  # [in, out] in the folder
            own = names.get_name(name, try_suffixes=(".weight", ".bias"))
            whole = array.ndim == 1 or name.endswith("wpe.weight")
            stored = gguf.GGMLQuantizationType.F32 if whole else kind
            data = gguf.quants.quantize(np.ascontiguousarray(array, np.float32), stored)
            writer.add_tensor(own, data, raw_dtype=stored)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()


# ---- libraries ----


def load_gpt2jax(options: argparse.Namespace, folder: Path, dtype: str) -> Generate:
    import gpt2jax

    model = gpt2jax.load(folder / "hf")

    def generate(prompts: Prompts, count: int):
        outputs = gpt2jax.generate(
            model,
            prompts,
            batch_size=len(prompts),
            max_new_tokens=count,
            top_k=TOP_K,
            stop_token_ids=[],
            dtype=dtype,
        )
        return [output.token_ids for output in outputs]

    return generate


def load_transformers(options: argparse.Namespace, folder: Path, dtype: str) -> Generate:
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(options.threads)
    model = AutoModelForCausalLM.from_pretrained(folder / "hf", dtype=getattr(torch, dtype)).eval()
    model.generation_config.eos_token_id = None

    @torch.inference_mode()
    def generate(prompts: Prompts, count: int):
        ids = torch.tensor(prompts)
        settings = {"max_new_tokens": count, "do_sample": True, "top_k": TOP_K, "pad_token_id": 0}
        rows = model.generate(ids, attention_mask=torch.ones_like(ids), **settings)
        return rows[:, ids.shape[1] :].tolist()

    return generate


def load_keras(backend: str) -> Callable[[argparse.Namespace, Path, str], Generate]:
    def load(options: argparse.Namespace, folder: Path, dtype: str) -> Generate:
        os.environ["KERAS_BACKEND"] = backend
        import keras_hub

        body = backbone(PRESETS[options.model], dtype)
        model = keras_hub.models.GPT2CausalLM(backbone=body, preprocessor=None)
        model.compile(sampler=keras_hub.samplers.TopKSampler(k=TOP_K))

        def generate(prompts: Prompts, count: int):
            empty = ((0, 0), (0, count))
            mask = np.pad(np.ones_like(prompts, np.int32), empty)
            inputs = {"token_ids": np.pad(np.array(prompts, np.int32), empty), "padding_mask": mask}
            found = model.generate(inputs, stop_token_ids=None)
            ids, made = np.asarray(found["token_ids"]), np.asarray(found["padding_mask"], bool)
            length = len(prompts[0])
            return [row[length:][true[length:]].tolist() for row, true in zip(ids, made, strict=True)]

        return generate

    return load


def load_ctranslate2(options: argparse.Namespace, folder: Path, dtype: str) -> Generate:
    import ctranslate2

    generator = ctranslate2.Generator(
        str(folder / "ctranslate2"), compute_type=dtype, inter_threads=1, intra_threads=options.threads
    )
    tokens = json.loads((folder / "ctranslate2" / "vocabulary.json").read_text("utf-8"))

    def generate(prompts: Prompts, count: int):
        results = generator.generate_batch(
            [[tokens[i] for i in prompt] for prompt in prompts],
            sampling_topk=TOP_K,
            min_length=count,
            max_length=count,
            end_token=[],
            include_prompt_in_result=False,
        )
        return [result.sequences_ids[0] for result in results]

    return generate


def load_llama_cpp(options: argparse.Namespace, folder: Path, dtype: str) -> Generate:
    import llama_cpp

    model = llama_cpp.Llama(
        str(folder / f"{dtype}.gguf"),
        n_ctx=PRESETS[options.model].n_positions,
        n_threads=options.threads,
        n_threads_batch=options.threads,
        verbose=False,
    )

    def generate(prompts: Prompts, count: int):
        if len(prompts) > 1:
            raise ValueError("llama-cpp-python runs one row at a time")
        model.reset()  # or it would keep the prompt from the last call
        plain = {"top_k": TOP_K, "top_p": 1.0, "min_p": 0.0, "temp": 1.0, "repeat_penalty": 1.0}
        pieces = model.generate(prompts[0], **plain)
        return [[token for token, _ in zip(pieces, range(count), strict=False)]]

    return generate


LOADERS: dict[str, Callable[[argparse.Namespace, Path, str], Generate]] = {
    "gpt2jax": load_gpt2jax,
    "transformers": load_transformers,
    "keras-jax": load_keras("jax"),
    "keras-tensorflow": load_keras("tensorflow"),
    "ctranslate2": load_ctranslate2,
    "llama.cpp": load_llama_cpp,
}
