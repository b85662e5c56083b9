"""Every reader of files: how to write a tiny valid file for it, and how to read that file."""

from __future__ import annotations

import bz2
import contextlib
import dataclasses
import gzip
import json
import lzma
import shutil
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import h5py
import numpy as np
import pyarrow
import pyarrow.feather
import pyarrow.parquet
from flax import serialization
from safetensors.numpy import load_file

import gpt2jax
from gpt2jax import loading
from gpt2jax.cli.generate import Options, read_rows
from gpt2jax.data.sources import Texts
from gpt2jax.data.token_cache import cached_documents, read_tokens
from gpt2jax.evaluation.accumulators import Breakdown, DocumentSums
from gpt2jax.evaluation.resume import State, read_state, write_state
from gpt2jax.generation.file_settings import find_file_settings
from gpt2jax.tokenizer.bpe import Tokenizer
from gpt2jax.tokenizer.files import load_tokenizer, save_tokenizer
from gpt2jax.train.config import FinetuneConfig
from gpt2jax.train.run_folder import RunFolder
from gpt2jax.weights import tf_checkpoint
from gpt2jax.weights.hf import save_hf

GOLDEN = Path(__file__).parent.parent / "golden"
TEXT = "  Hello world, it's\n\n naïve 日本 😀 <|endoftext|> 1234"
ROWS = [
    {"id": i, "text": text}
    for i, text in enumerate(["first", 'the "second",\nand', "", "日本語 😀", None, "  "])
]
VOCAB_SIZE = 300


@dataclasses.dataclass(frozen=True)
class Reader:
    """A reader of files.

    Attributes:
        write: writes valid files into an empty folder.
        read: reads the files in a folder.
        damaged: a pattern of the names of the files to damage.
    """

    write: Callable[[Path], Any]
    read: Callable[[Path], Any]
    damaged: str = "*"


def _copy(name: str, *files: str) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        for file in (GOLDEN / name).iterdir():
            is_test = file.name in ("expected.json", "logits.npy")
            if not is_test and (not files or file.name in files):
                shutil.copy(file, folder)

    return write


# ---- weights ----


def _tensors() -> dict[str, np.ndarray]:
    """Return the weights of tests/golden/hf-tied by their names without wrapper."""
    found = load_file(GOLDEN / "hf-tied" / "model.safetensors")
    return {
        name.removeprefix("transformer."): values for name, values in found.items() if "lm_head" not in name
    }


def _write_flax(folder: Path) -> None:
    _copy("hf-tied", "config.json")(folder)
    tree: dict[str, Any] = {}
    for name, values in _tensors().items():
        *parents, leaf = name.split(".")
        node = tree
        for part in parents:
            node = node.setdefault(part, {})
        kind = "embedding" if parents[-1] in ("wte", "wpe") else "scale" if "ln_" in parents[-1] else "kernel"
        leaf = leaf if leaf == "bias" else kind
        node[leaf] = np.ascontiguousarray(values.T) if leaf == "kernel" else values
    (folder / "flax_model.msgpack").write_bytes(serialization.msgpack_serialize({"transformer": tree}))


def _write_tf_h5(folder: Path) -> None:
    _copy("hf-tied", "config.json")(folder)
    with h5py.File(folder / "tf_model.h5", "w") as file:
        for name, values in _tensors().items():
            *parents, leaf = name.split(".")
            if parents[-1].startswith("ln_"):
                leaf = {"weight": "gamma", "bias": "beta"}[leaf]
            if parents[0] == "h":
                parents[:2] = [f"h_._{parents[1]}"]
            place = "/".join(["transformer/tfgp_t2lm_head_model/transformer", *parents, f"{leaf}:0"])
            file[place] = values[None] if leaf == "bias" else values


def _write_llmc(folder: Path) -> None:
    tensors = _tensors()
    vocab_size, width = tensors["wte.weight"].shape
    length, layers = len(tensors["wpe.weight"]), sum(name.endswith("ln_1.bias") for name in tensors)
    header = np.zeros(256, np.int32)
    header[:8] = 20240326, 1, length, vocab_size, layers, 2, width, vocab_size
    parts = [tensors["wte.weight"], tensors["wpe.weight"]]
    for part in ("ln_1", "attn.c_attn", "attn.c_proj", "ln_2", "mlp.c_fc", "mlp.c_proj"):
        for leaf in ("weight", "bias"):
            parts += [tensors[f"h.{layer}.{part}.{leaf}"].T for layer in range(layers)]
    parts += [tensors["ln_f.weight"], tensors["ln_f.bias"]]
    values = np.concatenate([np.ravel(part) for part in parts]).astype(np.float32)
    (folder / "model.bin").write_bytes(header.tobytes() + values.tobytes())


def _write_shards(folder: Path) -> None:
    model = gpt2jax.load(GOLDEN / "hf-tied")
    save_hf(folder / "a", model.config, model.params, max_shard_bytes=20_000)
    for file in (folder / "a").iterdir():
        file.rename(folder / file.name)
    (folder / "a").rmdir()


def _load(folder: Path) -> None:
    model = gpt2jax.load(folder)
    find_file_settings(model, {})
    if model.tokenizer is not None:
        _use(model.tokenizer)


def _load_file(name: str) -> Callable[[Path], Any]:
    return lambda folder: gpt2jax.load(folder / name)


def _load_unchecked(folder: Path) -> None:
    """Read a TensorFlow checkpoint whose checksums count as right, so that damage gets further."""
    with mock.patch.object(tf_checkpoint, "masked_crc32c", return_value=mock.ANY):
        gpt2jax.load(folder)


def _load_adapter(base: str, file: str = "") -> Callable[[Path], Any]:
    return lambda folder: gpt2jax.load_adapter(gpt2jax.load(GOLDEN / base), folder / file)


# ---- tokenizers, runs, evaluations ----


def _write_tokenizer(*keep: str) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        tokenizer = Tokenizer.gpt2(VOCAB_SIZE).with_end_token("<end>")
        save_tokenizer(tokenizer, folder, max_length=64)
        (folder / "added_tokens.json").write_text('{"<pad>": 301, "<sep>": 302}')
        for file in folder.iterdir():
            if keep and file.name not in keep:
                file.unlink()

    return write


def _use(tokenizer: Tokenizer) -> None:
    for parse in (False, True):
        tokenizer.decode(tokenizer.encode(TEXT, allow_special=parse))
    assert tokenizer.fingerprint and repr(tokenizer)


def _read_tokenizer(folder: Path) -> None:
    _use(load_tokenizer(folder))


def _write_run(folder: Path) -> None:
    data = {"source": "texts.txt", "split": "train", "documents": 3, "tokens": 40, "sha256": "0" * 64}
    run = {
        "format": "gpt2jax run",
        "version": 2,
        "base_model": str(GOLDEN / "hf-tied"),
        "base_sha256": "0" * 64,
    }
    run |= {
        "model_config": {"n_layer": 2},
        "finetune": {"epochs": 1, "batch_size": 4, "optimizer": {"lr": 1.0}},
    }
    (folder / "run.json").write_text(json.dumps(run | {"data": data}))
    lines = [{"step": step, "train_loss": 2.0, "time": 0.5} for step in range(5)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "adapter").mkdir()
    _copy("peft")(folder / "adapter")


def _read_run(folder: Path) -> None:
    from gpt2jax.cli.options import DataOptions, warn_if_trained_on

    warn_if_trained_on(str(folder), DataOptions(data="texts.txt"), "all")
    run = RunFolder(folder, resume=True)
    run.read_metrics(up_to=3)
    with contextlib.suppress(ValueError):  # most runs differ from this one
        run._check_same({"finetune": {}, "data": {}}, FinetuneConfig(), lambda config: config.steps)
    gpt2jax.load(folder)


def _write_checkpoint(folder: Path) -> None:
    config = dataclasses.asdict(gpt2jax.load(GOLDEN / "hf-tied").config)
    finetune = {"lora": None, "freeze": [], "steps": 3}
    content = {"finetune": finetune, "base_model": None, "model_config": config, "base_sha256": "0" * 64}
    (folder / "state").mkdir()
    (folder / "run").mkdir()
    (folder / "run" / "metadata").write_text(json.dumps(content))


def _read_checkpoint(folder: Path) -> None:
    """Read the description of a checkpoint; the arrays, which have checksums, count as read."""
    with mock.patch.object(loading, "restore_trained", return_value=gpt2jax.load(GOLDEN / "hf-tied").params):
        gpt2jax.load(folder)


def _write_state(folder: Path) -> None:
    def fill(kind: type) -> Any:
        return kind(**{field.name: np.ones(3, np.int64) for field in dataclasses.fields(kind)})

    write_state(
        folder / "state.npz", State(fill(DocumentSums), fill(Breakdown), "0" * 64, 5, 1.0), {"model": "m"}
    )
    file = folder / "state.npz"
    file.write_bytes(file.read_bytes()[:-16])  # without its checksum, so that damage gets further


def _write_tokens(folder: Path) -> None:
    cached_documents(["ab", "cde", ""], Tokenizer.gpt2(300), vocab_size=300, cache=folder)
    next(folder.iterdir()).rename(folder / "texts.tokens")


# ---- texts ----


def _write_texts(name: str) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        file = folder / name
        table = pyarrow.table({"id": [row["id"] for row in ROWS], "text": [row["text"] for row in ROWS]})
        lines = "".join(json.dumps(row) + "\n" for row in ROWS)
        cells = "".join(
            f'{row["id"]},"{(row["text"] or "").replace(chr(34), chr(34) * 2)}"\n' for row in ROWS
        )
        contents = {
            ".jsonl": lines,
            ".json": json.dumps({"data": ROWS, "version": 1}),
            ".csv": f"id,text\n{cells}",
        }
        contents |= {".tsv": f"id\ttext\n{cells.replace(',', chr(9))}", ".txt": f"{TEXT}\n\nmore\r\n text"}
        if file.suffix == ".parquet":
            pyarrow.parquet.write_table(table, file, row_group_size=3)
        elif file.suffix == ".feather":
            pyarrow.feather.write_feather(table, str(file), compression="lz4")
        elif file.suffix == ".arrow":
            with pyarrow.ipc.new_stream(str(file), table.schema) as sink:
                sink.write_table(table)
        elif file.suffix == ".zip":
            with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
                archive.writestr("a/train.jsonl", lines)
                archive.writestr("a/test.csv", contents[".csv"])
        else:
            content = contents[Path(name).with_suffix("").suffix or file.suffix].encode()
            packers: dict[str, Callable[[bytes], Any]] = {".gz": gzip.compress, ".bz2": bz2.compress}
            packers |= {
                ".xz": lzma.compress,
                ".zst": lambda data: pyarrow.compress(data, "zstd", asbytes=True),
            }
            file.write_bytes(packers.get(file.suffix, bytes)(content))

    return write


def _read_texts(name: str) -> Callable[[Path], Any]:
    def read(folder: Path) -> None:
        field = "data" if name.endswith(".json") else None
        for text in Texts(str(folder / name), "all", records_field=field):
            assert isinstance(text, str)

    return read


def _write_prompts(folder: Path) -> None:
    lines = [{"prompt": text, "text": "more", "token_ids": [1, 2]} for text in ("a", "b\n", TEXT)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def _iter_readers() -> Iterator[tuple[str, Reader]]:
    for name in ("hf-tied", "hf-untied-float16", "keras-hub", "keras-nlp"):
        yield name, Reader(_copy(name), _load)
    for name in ("hf-bin-zip", "hf-bin-legacy"):
        yield name, Reader(_copy(name), _load, "*.bin")
    for name in ("nanogpt-bias", "nanogpt-plain"):
        yield name, Reader(_copy(name), _load)
    yield "hf-shards", Reader(_write_shards, _load, "*.json")
    yield "openai", Reader(_copy("openai"), _load)
    yield "openai-unchecked", Reader(_copy("openai"), _load_unchecked, "*.ckpt.*")
    yield "keras-unchecked", Reader(_copy("keras-nlp"), _load_unchecked, "*.ckpt.*")
    yield "flax", Reader(_write_flax, _load)
    yield "tf-h5", Reader(_write_tf_h5, _load)
    yield "llm.c", Reader(_write_llmc, _load_file("model.bin"))
    yield "peft", Reader(_copy("peft"), _load_adapter("hf-tied"))
    yield "peft-dora", Reader(_copy("peft-dora"), _load_adapter("hf-tied"))
    yield "keras-lora", Reader(_copy("keras-lora"), _load_adapter("keras-hub", "adapter.lora.h5"))
    yield "tokenizer", Reader(_write_tokenizer(), _read_tokenizer)
    yield "tokenizer-fast", Reader(_write_tokenizer("tokenizer.json"), _read_tokenizer)
    yield "tokenizer-slow", Reader(_write_tokenizer("vocab.json", "merges.txt"), _read_tokenizer)
    yield "run", Reader(_write_run, _read_run)
    yield "checkpoint", Reader(_write_checkpoint, _read_checkpoint, "metadata")
    yield "state", Reader(_write_state, lambda folder: read_state(folder / "state.npz", {"model": "m"}))
    yield "token-cache", Reader(_write_tokens, lambda folder: read_tokens(folder / "texts.tokens", 300))
    yield (
        "prompts",
        Reader(_write_prompts, lambda folder: read_rows(Options(file=folder / "prompts.jsonl"))),
    )
    formats = ["jsonl", "json", "csv", "tsv", "txt", "parquet", "arrow", "feather", "zip"]
    for end in (*formats, "jsonl.gz", "csv.bz2", "txt.xz", "jsonl.zst"):
        yield f"texts-{end}", Reader(_write_texts(f"a.{end}"), _read_texts(f"a.{end}"))


READERS = dict(_iter_readers())
