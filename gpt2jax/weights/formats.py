"""The formats of weights that can be read: one entry each in `FORMATS`, chosen by the files at a path."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

from gpt2jax.model.config import GPT2Config
from gpt2jax.model.gpt2 import Params
from gpt2jax.tokenizer.bpe import Tokenizer
from gpt2jax.tokenizer.files import VOCABULARY_FILES, load_tokenizer
from gpt2jax.weights.hf import INDEX, WEIGHT_FILES, open_hf
from gpt2jax.weights.keras import is_keras, is_keras_checkpoint, open_keras, open_keras_checkpoint
from gpt2jax.weights.mapping import WeightSource
from gpt2jax.weights.nanogpt import is_nanogpt, open_nanogpt
from gpt2jax.weights.openai import is_openai, open_openai


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


# the first that matches reads
FORMATS = (
    Format(
        "Hugging Face",
        "a folder with config.json and model.safetensors or pytorch_model.bin, in one file or as an index "
        "and its shards, or such a file",
        _is_hf,
        open_hf,
    ),
    Format("OpenAI", "a folder with hparams.json and model.ckpt.*", is_openai, open_openai),
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
    for kind in FORMATS:
        if kind.matches(path):
            return kind.name, kind.open(path)
    if (path / "adapter_config.json").is_file() or path.name.endswith(".lora.h5"):
        raise ValueError(
            f"{path} holds adapters; load the model that they are for, then load_adapter(model, path)"
        )
    expected = "; or ".join(f"{kind.expects} ({kind.name})" for kind in FORMATS)
    raise ValueError(f"{path} holds no weights of a known format; expected {expected}")


def read_tokenizer_beside(weights: Path, end_token: str | int | None = None) -> Tokenizer | None:
    """Return the tokenizer in the folder of some weights, or None if no file of one is there; see `load_tokenizer`."""
    folder = weights if weights.is_dir() else weights.parent
    names = ["tokenizer.json", *(name for pair in VOCABULARY_FILES for name in pair)]
    if not any((folder / name).is_file() for name in names):
        return None
    return load_tokenizer(folder, end_token=end_token)
