"""`gpt2jax convert`: weights of any source into a folder of any format, and proof that they are the same."""

from __future__ import annotations

import collections
import dataclasses
import pathlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from gpt2jax.cli.common import fail, run_command, say

if TYPE_CHECKING:
    import jax

    from gpt2jax.language_model import LanguageModel

# logits of the same float32 weights, computed twice; relative to the largest one
TOLERANCE = 1e-5


@dataclasses.dataclass(frozen=True)
class Options:
    """Convert weights from one format into another.

    Attributes:
        source: gpt2-mini, gpt2, gpt2-medium, gpt2-large, gpt2-xl, a hub id, or a path: a Hugging Face folder or file,
            a Keras preset, *.weights.h5 or TensorFlow checkpoint, OpenAI's folder, nanoGPT's ckpt.pt, a run folder.
        out: the folder to make.
        format: "hf" (for transformers, CTranslate2, vLLM, llama.cpp), "keras" (a preset of keras-hub), or "peft" (the
            source's adapters alone).
        adapter: a PEFT folder or *.lora.h5 file to put on the source first; "hf" and "keras" get it merged.
        dtype: of the weights in the new files; "same" is that of the source, and float32 where it has several, where
            an adapter was merged, or where the format has no other.
        revision: commit, tag or branch of a hub id.
        overwrite: replace a model that the folder holds.
        verify: load the result and compare it with the source, tensor by tensor and by logits.
        seed: of the tokens whose logits are compared.
    """

    source: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="SOURCE")]
    out: pathlib.Path
    format: Literal["hf", "keras", "peft"] = "hf"
    adapter: pathlib.Path | None = None
    dtype: Literal["same", "float32", "float16", "bfloat16"] = "same"
    revision: str | None = None
    overwrite: bool = False
    verify: bool = False
    seed: int = 0


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of the command."""
    run_command("convert", Options, run, argv)


def run(options: Options) -> None:
    """Loads, tells what was read, writes, compares."""
    from rich.console import Console

    from gpt2jax.language_model import LanguageModel
    from gpt2jax.loading import load_adapter, locate, save_adapter
    from gpt2jax.weights.formats import open_weights, read_tokenizer_beside

    if options.out.is_dir() and any(options.out.iterdir()) and not options.overwrite:
        raise FileExistsError(f"{options.out} is not empty; choose another folder with --out, or --overwrite")
    place = locate(options.source, revision=options.revision)
    if options.format == "peft" and place.adapter is None and options.adapter is None:
        raise ValueError(
            f"{options.source} has no adapters to write as a PEFT folder; name some with --adapter"
        )
    kind, source = open_weights(place.weights)
    dtypes = collections.Counter(tensor.dtype for tensor in source.tensors.values() if tensor.file)
    dtype = _target_dtype(options, list(dtypes), plain=place.adapter is None and options.adapter is None)
    config, params = source.load()
    beside = place.weights if place.weights.is_dir() else place.weights.parent
    model = LanguageModel(config, params, read_tokenizer_beside(beside), source=place.name)
    for adapter in (place.adapter, options.adapter):
        model = model if adapter is None else load_adapter(model, adapter)
    console = Console()
    read = {"format": kind, "tensors": f"{dtypes.total()} ({_counted(dtypes)})", **_about(model)}
    _print(console, options.source, read)
    if options.format == "peft":
        save_adapter(model, options.out)
    else:
        model.save(options.out, options.format, dtype=dtype)
    files = [path for path in options.out.rglob("*") if path.is_file()]
    size = sum(path.stat().st_size for path in files)
    written = {"format": options.format, "dtype": dtype, "files": f"{len(files)} ({size / 1e6:,.1f} MB)"}
    if options.verify:
        written |= _verify(options, model, dtype)
    _print(console, str(options.out), written)
    say(console, "wrote", str(options.out))


def _target_dtype(options: Options, dtypes: list[str], *, plain: bool) -> str:
    """The dtype to write."""
    if options.format == "hf":
        known = plain and len(dtypes) == 1 and dtypes[0] in ("float16", "bfloat16")
        return options.dtype if options.dtype != "same" else dtypes[0] if known else "float32"
    if options.dtype not in ("same", "float32"):
        raise ValueError(f"dtype={options.dtype!r}: the format {options.format!r} is written in float32")
    return "float32"


def _about(model: LanguageModel) -> dict[str, str]:
    c, lora = model.config, model.lora
    about = {
        "parameters": f"{model.num_parameters():,}",
        "shape": f"{c.n_layer} layers, {c.n_head} heads, width {c.n_embd}, {c.vocab_size:,} ids, "
        f"context {c.n_positions}",
        "output head": "the token embedding (tied)" if c.tie_word_embeddings else "its own (not tied)",
        "tokenizer": "none" if model.tokenizer is None else f"{model.tokenizer.vocab_size:,} ids",
    }
    if lora is not None:
        kind = ("rs" if lora.use_rslora else "") + ("DoRA" if lora.use_dora else "LoRA")
        about["adapter"] = f"{kind}, rank {lora.rank}, on {', '.join(lora.targets)}"
    return about


def _counted(dtypes: collections.Counter[str]) -> str:
    return ", ".join(name if len(dtypes) == 1 else f"{count} {name}" for name, count in dtypes.most_common())


def _print(console: Any, title: str, rows: dict[str, str]) -> None:
    from rich.table import Table
    from rich.text import Text

    table = Table(title=Text(title), title_justify="left", show_header=False)
    for row in rows.items():
        table.add_row(*map(Text, row))
    console.print(table)


def _verify(options: Options, model: LanguageModel, dtype: str) -> dict[str, str]:
    """Loads what was written; ends the program with exit code 1 where it is not the model."""
    import numpy as np

    from gpt2jax.loading import load, load_adapter

    if options.format == "peft":
        base = dataclasses.replace(model, adapters=None, lora=None)
        again, expected = load_adapter(base, options.out), model
        tensors = "the adapters' own"
    else:
        again = load(options.out)
        merged = model.merge_adapter()
        different = different_tensors(merged.params, again.params, dtype)
        if different:
            problem = (
                f"{len(different)} tensors are not the source's in {dtype}, the first one {different[0]}"
            )
            fail("convert", f"{options.out} is not the same model: {problem}", code=1)
        tokenizers = [m.tokenizer and m.tokenizer.fingerprint for m in (model, again)]
        if tokenizers[0] != tokenizers[1]:
            fail("convert", f"{options.out} is not the same model: its tokenizer is another one", code=1)
        expected = dataclasses.replace(merged, params=again.params)
        tensors = f"all identical, bit for bit{'' if dtype == 'float32' else f', once rounded to {dtype}'}"
    length = min(64, model.config.n_positions)
    ids = np.random.default_rng(options.seed).integers(0, model.config.vocab_size, (1, length))
    wanted, found = np.asarray(expected.logits(ids)), np.asarray(again.logits(ids))
    largest = float(np.abs(wanted - found).max())
    if not largest <= TOLERANCE * max(1.0, float(np.abs(wanted).max())):
        fail("convert", f"{options.out} is not the same model: its logits differ by {largest:.3g}", code=1)
    original = float(np.abs(np.asarray(model.logits(ids)) - found).max())
    return {"tensors": tensors, "logits": f"at most {original:.3g} from the source's, over {length} tokens"}


def different_tensors(params: dict[str, Any], others: dict[str, Any], dtype: str) -> list[str]:
    """Names of the parameters of `others` that are not those of `params` rounded to `dtype`."""
    import jax
    import numpy as np

    from gpt2jax.weights.mapping import numpy_dtype

    def leaves(tree: dict[str, Any]) -> dict[str, jax.Array]:
        flat = jax.tree_util.tree_flatten_with_path(tree)[0]
        return {".".join(entry.key for entry in path): leaf for path, leaf in flat}

    ours, theirs = leaves(params), leaves(others)
    return sorted(
        name
        for name in ours.keys() | theirs.keys()
        if name not in ours
        or name not in theirs
        or not np.array_equal(
            np.asarray(ours[name]).astype(numpy_dtype(dtype)).astype(np.float32), np.asarray(theirs[name])
        )
    )
