"""`gpt2jax convert`: write the weights of any source as a folder of any format, and verify them."""

from __future__ import annotations

import collections
import dataclasses
import pathlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Literal, NoReturn

import tyro
from tyro.conf import OmitArgPrefixes, arg

from gpt2jax.cli.common import exit_with_error, print_line, run_command
from gpt2jax.cli.options import TokenizerOptions
from gpt2jax.utils.notices import printable
from gpt2jax.utils.validation import must_be

if TYPE_CHECKING:
    import jax
    from rich.console import Console

    from gpt2jax.language_model import LanguageModel
    from gpt2jax.model.gpt2 import Params

# two computations of logits from the same float32 weights; relative to the largest logit
TOLERANCE = 1e-5


@dataclasses.dataclass(frozen=True)
class Options:
    """Convert weights from one format into another.

    $ gpt2jax convert runs/mine --out mine-hf --verify
    $ gpt2jax convert gpt2 --adapter my-adapter --out merged --format keras

    Attributes:
        source: gpt2-mini, gpt2, gpt2-medium, gpt2-large, gpt2-xl, a hub id, or a path: a Hugging Face folder or file,
            a Keras preset, *.weights.h5 or TensorFlow checkpoint, OpenAI's folder, nanoGPT's ckpt.pt, a run folder.
        out: the folder to make.
        format: "hf" (for transformers, CTranslate2, vLLM, llama.cpp), "keras" (a preset of keras-hub), or "peft" (the
            source's adapters alone).
        adapter: a PEFT folder or *.lora.h5 file to put on the source first; "hf" and "keras" get it merged.
        dtype: of the weights in the new files. "same" is that of the source; it is float32 if the source has several,
            if an adapter is merged, or if the format has no other.
        revision: commit, tag or branch of a hub id.
        overwrite: replace a saved model in the folder.
        verify: load the result and compare it with the source, tensor by tensor and by logits.
        seed: of the tokens whose logits are compared.
        text: how texts become tokens.
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
    text: Annotated[TokenizerOptions, OmitArgPrefixes, arg(name="tokenizer")] = TokenizerOptions()


@dataclasses.dataclass(frozen=True)
class Source:
    """What is converted: the model, the format and the dtypes of its files (dtype -> number of tensors)."""

    model: LanguageModel
    format: str
    dtypes: collections.Counter[str]


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    run_command("convert", Options, run, argv)


def run(options: Options) -> None:
    """Read the source, print what it is, write it, and compare both if asked to."""
    from rich.console import Console

    from gpt2jax.loading import save_adapter

    if options.out.is_dir() and any(options.out.iterdir()) and not options.overwrite:
        raise FileExistsError(f"{options.out} is not empty; choose another folder with --out, or --overwrite")
    console = Console()
    source = _read_source(options)
    model, dtype = source.model, _target_dtype(options, source)
    tensors = f"{source.dtypes.total()} ({_format_counts(source.dtypes)})"
    _print(console, options.source, {"format": source.format, "tensors": tensors, **_describe(model)})
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
    print_line(console, "wrote", str(options.out))


def _read_source(options: Options) -> Source:
    from gpt2jax.loading import build_model, load_adapter, locate
    from gpt2jax.weights.formats import open_weights

    place = locate(options.source, revision=options.revision)
    if options.format == "peft" and place.adapter is None and options.adapter is None:
        raise ValueError(
            f"{options.source} has no adapters to write as a PEFT folder; add some with --adapter"
        )
    _check_dtype(options)
    kind, weights = open_weights(place.weights)
    dtypes = collections.Counter(tensor.dtype for tensor in weights.tensors.values() if tensor.file)
    model = build_model(
        *weights.load(), place.weights, options.text.tokenizer, options.text.named_end_token()
    )
    model = dataclasses.replace(model, source=place.name)
    for adapter in (place.adapter, options.adapter):
        model = model if adapter is None else load_adapter(model, adapter)
    return Source(model, kind, dtypes)


def _check_dtype(options: Options) -> None:
    if options.format != "hf" and options.dtype not in ("same", "float32"):
        raise ValueError(must_be("dtype", f"float32 for the format {options.format!r}", options.dtype))


def _target_dtype(options: Options, source: Source) -> str:
    """Return the dtype to write."""
    if options.dtype != "same" or options.format != "hf" or source.model.adapters is not None:
        return options.dtype if options.dtype != "same" else "float32"
    (dtype, *others) = source.dtypes
    return dtype if dtype in ("float16", "bfloat16") and not others else "float32"


def _describe(model: LanguageModel) -> dict[str, str]:
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


def _format_counts(dtypes: collections.Counter[str]) -> str:
    return ", ".join(name if len(dtypes) == 1 else f"{count} {name}" for name, count in dtypes.most_common())


def _print(console: Console, title: str, rows: dict[str, str]) -> None:
    from rich.table import Table
    from rich.text import Text

    table = Table(title=Text(printable(title)), title_justify="left", show_header=False)
    for row in rows.items():
        table.add_row(*(Text(printable(cell)) for cell in row))
    console.print(table)


def _verify(options: Options, model: LanguageModel, dtype: str) -> dict[str, str]:
    """Load the result; end the program with exit code 1 if it is not the same model."""
    import numpy as np

    from gpt2jax.loading import load, load_adapter

    if options.format == "peft":
        base = dataclasses.replace(model, adapters=None, lora=None)
        result, expected = load_adapter(base, options.out), model
        tensors = "the adapters' own"
    else:
        result, merged = load(options.out), model.merge_adapter()
        different = different_tensors(merged.params, result.params, dtype)
        if different:
            _fail(
                options,
                f"{len(different)} tensors are not the source's in {dtype}, the first one {different[0]}",
            )
        tokenizers = [m.tokenizer and m.tokenizer.fingerprint for m in (model, result)]
        if tokenizers[0] != tokenizers[1]:
            _fail(options, "its tokenizer is another one")
        expected = dataclasses.replace(merged, params=result.params)
        tensors = f"all identical, bit for bit{'' if dtype == 'float32' else f', once rounded to {dtype}'}"
    length = min(64, model.config.n_positions)
    ids = np.random.default_rng(options.seed).integers(0, model.config.vocab_size, (1, length))
    wanted, found = np.asarray(expected.logits(ids)), np.asarray(result.logits(ids))
    largest = float(np.abs(wanted - found).max())
    if not largest <= TOLERANCE * max(1.0, float(np.abs(wanted).max())):
        _fail(options, f"its logits differ by {largest:.3g}")
    from_source = float(np.abs(np.asarray(model.logits(ids)) - found).max())
    return {
        "tensors": tensors,
        "logits": f"at most {from_source:.3g} from the source's, over {length} tokens",
    }


def _fail(options: Options, problem: str) -> NoReturn:
    exit_with_error("convert", f"{options.out} is not the same model: {problem}", code=1)


def different_tensors(params: Params, others: Params, dtype: str) -> list[str]:
    """Return the names of the parameters of `others` that are not those of `params` rounded to `dtype`."""
    import jax
    import numpy as np

    from gpt2jax.weights.mapping import numpy_dtype

    def leaves(tree: Params) -> dict[str, jax.Array]:
        flat = jax.tree_util.tree_flatten_with_path(tree)[0]
        return {".".join(entry.key for entry in path): leaf for path, leaf in flat}

    def is_same(value: jax.Array, other: jax.Array) -> bool:
        rounded = np.asarray(value).astype(numpy_dtype(dtype)).astype(np.float32)
        return np.array_equal(rounded, np.asarray(other))

    ours, theirs = leaves(params), leaves(others)
    both = ours.keys() & theirs.keys()
    return sorted(
        (ours.keys() ^ theirs.keys()) | {name for name in both if not is_same(ours[name], theirs[name])}
    )
