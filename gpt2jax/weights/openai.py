"""OpenAI's release of GPT-2: a TensorFlow checkpoint, hparams.json, encoder.json and vocab.bpe in one folder.

Source: model.py and download_model.py of github.com/openai/gpt-2; its linears are convolutions of width one.
"""

from __future__ import annotations

import os
from pathlib import Path

from gpt2jax.model.config import GPT2Config
from gpt2jax.model.gpt2 import Params
from gpt2jax.utils.json_files import read_json
from gpt2jax.weights.mapping import ParamRule, WeightSource
from gpt2jax.weights.tf_checkpoint import checkpoint_names, checkpoint_prefix, read_checkpoint

HPARAMS = "hparams.json"
CONFIG_MAP = {
    "n_vocab": "vocab_size",
    "n_ctx": "n_positions",
    "n_embd": "n_embd",
    "n_head": "n_head",
    "n_layer": "n_layer",
}
LINEARS = (
    ("attn/c_attn", "h.attn.c_attn"),
    ("attn/c_proj", "h.attn.c_proj"),
    ("mlp/c_fc", "h.mlp.c_fc"),
    ("mlp/c_proj", "h.mlp.c_proj"),
)
RULES = (
    ParamRule("model/wte", "wte.embedding"),
    ParamRule("model/wpe", "wpe.embedding"),
    *(ParamRule(f"model/h{{layer}}/{norm}/g", f"h.{norm}.scale") for norm in ("ln_1", "ln_2")),
    *(ParamRule(f"model/h{{layer}}/{norm}/b", f"h.{norm}.bias") for norm in ("ln_1", "ln_2")),
    *(ParamRule(f"model/h{{layer}}/{name}/w", f"{path}.kernel", "leading_one") for name, path in LINEARS),
    *(ParamRule(f"model/h{{layer}}/{name}/b", f"{path}.bias") for name, path in LINEARS),
    ParamRule("model/ln_f/g", "ln_f.scale"),
    ParamRule("model/ln_f/b", "ln_f.bias"),
)


def load_openai(folder: str | os.PathLike[str]) -> tuple[GPT2Config, Params]:
    """Load a folder of OpenAI's release, or a checkpoint in one by its prefix or index.

    Returns:
        (config, params), blocks stacked.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: the folder is of another kind or damaged; the message names the file and all tensors that do not
            fit.
    """
    return open_openai(folder).load()


def open_openai(folder: str | os.PathLike[str]) -> WeightSource:
    """Return the weights that `load_openai` loads, no value read; raises as it does, except about values."""
    path = Path(folder)
    prefix = checkpoint_prefix(path)
    folder = path if path.is_dir() or prefix is None else prefix.parent
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder {folder}")
    config = _read_hparams(folder / HPARAMS)
    if prefix is None:
        if names := checkpoint_names(folder):
            raise ValueError(
                f"{folder} holds several checkpoints: {', '.join(names)}; name one, such as {folder / names[-1]}"
            )
        raise ValueError(
            f"{folder} has no checkpoint; expected model.ckpt.index and model.ckpt.data-00000-of-00001"
        )
    return WeightSource(config, RULES, read_checkpoint(prefix), str(prefix))


def is_openai(path: Path) -> bool:
    """Return True if a path looks like a folder of OpenAI's release, or a checkpoint in one."""
    is_checkpoint = not path.is_dir() and checkpoint_prefix(path) is not None
    return ((path.parent if is_checkpoint else path) / HPARAMS).is_file()


def _read_hparams(path: Path) -> GPT2Config:
    if not path.is_file():
        raise ValueError(f"{path.parent} has no {HPARAMS} with the architecture of the weights")
    content = read_json(path, dict.fromkeys(CONFIG_MAP, int))
    try:
        settings = {ours: content[theirs] for theirs, ours in CONFIG_MAP.items()}
        return GPT2Config(**settings, **GPT2Config.published_end_token(settings["vocab_size"]))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: {error}") from None
