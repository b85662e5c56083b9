"""The formats of weights that can be read: one entry each in `FORMATS`, chosen by the files at a path."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from pathlib import Path

from gpt2jax.model.config import GPT2Config
from gpt2jax.model.gpt2 import Params
from gpt2jax.tokenizer.bpe import Tokenizer
from gpt2jax.tokenizer.files import load_tokenizer
from gpt2jax.tokenizer.vocabulary import VOCABULARY_FILES
from gpt2jax.utils.notices import enumerate_names
from gpt2jax.utils.stand_ins import describe_stand_in
from gpt2jax.weights.flax_msgpack import is_flax, open_flax
from gpt2jax.weights.hf import INDEX, WEIGHT_FILES, open_hf
from gpt2jax.weights.keras import is_keras, is_keras_checkpoint, open_keras, open_keras_checkpoint
from gpt2jax.weights.llmc import is_llmc, open_llmc
from gpt2jax.weights.mapping import WeightSource
from gpt2jax.weights.nanogpt import is_nanogpt, open_nanogpt
from gpt2jax.weights.openai import is_openai, open_openai
from gpt2jax.weights.tf_checkpoint import checkpoint_names
from gpt2jax.weights.tf_h5 import is_tf_h5, open_tf_h5


@dataclasses.dataclass(frozen=True)
class Format:
    """A format of weights that can be read.

    Attributes:
        name: for messages.
        expects: the files at a path of this format, for messages.
        matches: returns True if a path looks like it.
        open: returns the weights at a path, no value read.
    """

    name: str
    expects: str
    matches: Callable[[Path], bool]
    open: Callable[[Path], WeightSource]


def _is_hf(path: Path) -> bool:
    if path.is_dir():
        return any((path / name).is_file() for name in WEIGHT_FILES)
    return path.suffix in (".safetensors", ".bin") or path.name.endswith(INDEX)


_BINARY = (".safetensors", ".bin", ".pt", ".pth", ".h5", ".msgpack", ".index")

# the first that matches reads
FORMATS = (
    Format("llm.c", "a model's .bin file", is_llmc, open_llmc),
    Format(
        "Hugging Face",
        "a folder with config.json and model.safetensors or pytorch_model.bin, in one file or as an index "
        "and its shards, or such a file",
        _is_hf,
        open_hf,
    ),
    Format("TensorFlow of transformers", "a folder with config.json and tf_model.h5", is_tf_h5, open_tf_h5),
    Format("Flax of transformers", "a folder with config.json and flax_model.msgpack", is_flax, open_flax),
    Format(
        "OpenAI",
        "a folder with hparams.json and model.ckpt.*, or the prefix or index of a checkpoint in it",
        is_openai,
        open_openai,
    ),
    Format("Keras", "a preset folder with model.weights.h5, or a *.weights.h5 file", is_keras, open_keras),
    Format("nanoGPT", "a ckpt.pt, or a folder with one", is_nanogpt, open_nanogpt),
    Format(
        "Keras TensorFlow checkpoint",
        "its prefix, for which PREFIX.index and PREFIX.data-* exist, or its folder",
        is_keras_checkpoint,
        open_keras_checkpoint,
    ),
)


def load_weights(path: Path, dtype: str = "float32") -> tuple[GPT2Config, Params, Tokenizer | None]:
    """Load weights of any known format, and the tokenizer beside them.

    Args:
        path: folder, file or prefix.
        dtype: of the parameters: "float32", "bfloat16" or "float16".

    Returns:
        (config, params, tokenizer); the tokenizer is None if no file of one is there.

    Raises:
        FileNotFoundError: nothing lies at the path.
        ValueError: the files there are of no known format, or damaged.
    """
    config, params = open_weights(path)[1].load(dtype)
    return config, params, read_tokenizer_beside(path)


def open_weights(path: Path) -> tuple[str, WeightSource]:
    """Return the name of the format at a path, and its weights, no value read; raises as `load_weights`."""
    if not path.exists() and not is_keras_checkpoint(path):  # a checkpoint's prefix is not a file
        raise FileNotFoundError(f"there are no weights at {path}")
    refuse_stand_ins(path)
    for kind in FORMATS:
        if kind.matches(path):
            return kind.name, kind.open(path)
    if (path / "adapter_config.json").is_file() or path.name.endswith(".lora.h5"):
        raise ValueError(
            f"{path} holds adapters; load the model that they are for, then load_adapter(model, path)"
        )
    if others := _other_names_in(path):
        raise ValueError(
            f"{path} holds no model.safetensors or pytorch_model.bin, but {enumerate_names(others)}; give the path of "
            f"the file, such as {path / others[0]}"
        )
    if checkpoints := _checkpoints_in(path):
        names = enumerate_names(checkpoints, most=10)
        raise ValueError(
            f"{path} holds several checkpoints: {names}; name one, such as {path / checkpoints[-1]}"
        )
    expected = "; or ".join(f"{kind.expects} ({kind.name})" for kind in FORMATS)
    raise ValueError(f"{path} holds no weights of a known format; expected {expected}")


def refuse_stand_ins(path: Path) -> None:
    """Raise ValueError if a file of weights at a path only stands for them: a Git LFS pointer, a page of a site."""
    for file in sorted(path.iterdir()) if path.is_dir() else [path]:
        if file.is_file() and (file == path or file.suffix in _BINARY or ".ckpt" in file.name):
            with open(file, "rb") as stream:
                reason = describe_stand_in(stream.read(512))
            if reason is not None:
                raise ValueError(f"{file} {reason}")


def _other_names_in(path: Path) -> list[str]:
    """Return the names of files of weights in a folder, such as model.fp16.safetensors."""
    is_other = re.compile(r".*\.safetensors|(pytorch_)?model.*\.bin").fullmatch
    files = [entry for entry in path.iterdir() if entry.is_file()] if path.is_dir() else []
    names = [file.name for file in files if is_other(file.name) or is_llmc(file)]
    return sorted(name for name in names if not name.startswith("adapter_"))


def _checkpoints_in(path: Path) -> list[str]:
    """Return the names of the checkpoints in a folder: TensorFlow's prefixes, folders of Trainer, files of nanoGPT."""
    if not path.is_dir():
        return []
    names = checkpoint_names(path) or [
        entry.name
        for entry in path.iterdir()
        if (entry.suffix == ".pt" and entry.is_file()) or (entry.is_dir() and _is_hf(entry))
    ]
    # by the number of the step
    return sorted(names, key=lambda name: [int(part) for part in re.findall(r"\d+", name)])


def read_tokenizer_beside(weights: Path, end_token: str | int | None = None) -> Tokenizer | None:
    """Return the tokenizer in the folder of some weights, or None if no file of one is there; see `load_tokenizer`."""
    folder = weights if weights.is_dir() else weights.parent
    names = ["tokenizer.json", *(name for pair in VOCABULARY_FILES for name in pair)]
    if not any((folder / name).is_file() for name in names):
        return None
    return load_tokenizer(folder, end_token=end_token)
