"""Evaluation of a GPT-2 beside torch and keras-hub, on the same token ids with the same number of cores.

    python benchmarks/evaluation.py --rounds 4

Each contender is loaded in a process of its own with random weights of a published size, and they take turns: one
round evaluates the same documents with each, loss and accuracy of every token. Prints the median of tokens per second,
the ratio to the fastest peer (median over rounds), and the largest resident memory. Contenders whose library is not
installed are named and left out.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

CONTENDERS = {
    "gpt2jax float32": ("gpt2jax", "float32"),
    "gpt2jax bfloat16": ("gpt2jax", "bfloat16"),
    "torch float32": ("torch", "float32"),
    "torch bfloat16 autocast": ("torch", "bfloat16"),
    "keras-hub JAX float32": ("keras-jax", "float32"),
    "keras-hub JAX mixed_bfloat16": ("keras-jax", "mixed_bfloat16"),
    "keras-hub TF float32": ("keras-tensorflow", "float32"),
    "keras-hub TF mixed_bfloat16": ("keras-tensorflow", "mixed_bfloat16"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", default="gpt2", help="gpt2, gpt2-medium, gpt2-large, gpt2-xl, gpt2-mini")
    parser.add_argument("--documents", type=int, default=16)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--sequence-length", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", nargs="*", default=list(CONTENDERS), help="names as in the table")
    parser.add_argument("--child", nargs=2, metavar=("WHAT", "DTYPE"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        serve(options)
        return
    environment = os.environ | {"OMP_NUM_THREADS": str(options.threads), "TF_CPP_MIN_LOG_LEVEL": "3"}
    running = {}
    for name in options.only:
        command = [sys.executable, __file__, *sys.argv[1:], "--child", *CONTENDERS[name]]
        child = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=environment,
        )
        answer = ask(child)
        if "missing" in answer:
            print(f"{name} is left out: {answer['missing']}")
        else:
            running[name] = child
    results: dict[str, list[dict[str, float]]] = {name: [] for name in running}
    for _ in range(options.rounds):
        for name, child in running.items():
            results[name].append(ask(child, "round"))
    for child in running.values():
        child.communicate()
    print_table(results, options)


def ask(child: subprocess.Popen[str], line: str | None = None) -> dict[str, Any]:
    """The next answer of a contender; the lines that its libraries print are passed over."""
    assert child.stdin is not None and child.stdout is not None
    if line is not None:
        print(line, file=child.stdin, flush=True)
    for answer in child.stdout:
        if answer.startswith('{"'):
            return json.loads(answer)
    raise RuntimeError(f"{' '.join(child.args[-2:])} ended with code {child.wait()}")  # type: ignore[index]


def print_table(results: dict[str, list[dict[str, float]]], options: argparse.Namespace) -> None:
    from rich.console import Console
    from rich.table import Table

    tokens = options.documents * options.sequence_length
    title = (
        f"{options.model}, {options.batch_size} x {options.sequence_length} tokens, {options.threads} cores"
    )
    table = Table(title=title, title_justify="left")
    for column in ("contender", "tokens/s", "from", "to", "of the fastest peer", "peak memory", "loss"):
        table.add_column(column, justify="left" if column == "contender" else "right")
    speeds = {name: [tokens / row["seconds"] for row in rows] for name, rows in results.items()}
    peers = {name: values for name, values in speeds.items() if not name.startswith("gpt2jax")}
    fastest = max(peers, key=lambda name: statistics.median(peers[name])) if peers else None
    for name, values in speeds.items():
        ratio = "–"
        if fastest is not None:
            ratio = f"{statistics.median(a / b for a, b in zip(values, peers[fastest], strict=True)):.2f}"
        low, middle, high = min(values), statistics.median(values), max(values)
        peak, loss = max(row["peak"] for row in results[name]), results[name][-1]["loss"]
        table.add_row(
            name, f"{middle:.0f}", f"{low:.0f}", f"{high:.0f}", ratio, f"{peak / 1e9:.2f} GB", f"{loss:.3f}"
        )
    Console(width=130).print(table)


def serve(options: argparse.Namespace) -> None:
    """Makes a contender, then evaluates once for each line that comes."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: options.threads])
    what, dtype = options.child
    ids = np.random.default_rng(0).integers(0, 4000, (options.documents, options.sequence_length - 1))
    try:
        make = {"gpt2jax": make_gpt2jax, "torch": make_torch}.get(what, make_keras)
        evaluate = make(options, what, dtype, ids)
    except ImportError as error:
        print(json.dumps({"missing": str(error)}), flush=True)
        return
    evaluate()  # compiles
    print(json.dumps({"ready": what}), flush=True)
    for _ in sys.stdin:
        began = time.perf_counter()
        loss = evaluate()
        print(json.dumps({"seconds": time.perf_counter() - began, "peak": peak(), "loss": loss}), flush=True)


def peak() -> int:
    """Largest resident size of this process in bytes, as Linux counts it."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))


def make_gpt2jax(options: argparse.Namespace, what: str, dtype: str, ids: np.ndarray) -> Callable[[], float]:
    import gpt2jax

    model = gpt2jax.from_config(gpt2jax.PRESETS[options.model])
    texts = ids.tolist()
    settings = {"sequence_length": options.sequence_length, "batch_size": options.batch_size}

    def run() -> float:
        return gpt2jax.evaluate(model, texts, compute_dtype=dtype, **settings).loss

    return run


def rows(ids: np.ndarray, end: int) -> tuple[np.ndarray, np.ndarray]:
    """Inputs and labels [documents, T]: an end token in front of each and behind it."""
    ends = np.full((len(ids), 1), end)
    return np.concatenate([ends, ids], axis=1), np.concatenate([ids, ends], axis=1)


def make_torch(options: argparse.Namespace, what: str, dtype: str, ids: np.ndarray) -> Callable[[], float]:
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    from gpt2jax.config import PRESETS

    torch.set_num_threads(options.threads)
    model = GPT2LMHeadModel(GPT2Config(**shape(PRESETS[options.model]))).eval()
    inputs, labels = (torch.tensor(part) for part in rows(ids, PRESETS[options.model].vocab_size - 1))

    @torch.inference_mode()
    def run() -> float:
        loss, hits = 0.0, 0
        for start in range(0, len(inputs), options.batch_size):
            part = slice(start, start + options.batch_size)
            with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
                logits = model(inputs[part], use_cache=False).logits.flatten(0, 1)
            own = labels[part].flatten()
            loss += torch.nn.functional.cross_entropy(logits.float(), own, reduction="sum").item()
            hits += int((logits.argmax(-1) == own).sum())
        return loss / labels.numel()

    return run


def shape(config: Any) -> dict[str, int]:
    """A published size in the words of transformers."""
    names = ("n_layer", "n_head", "n_embd", "vocab_size", "n_positions")
    return {name: getattr(config, name) for name in names} | {
        "bos_token_id": config.vocab_size - 1,
        "eos_token_id": config.vocab_size - 1,
    }


def make_keras(options: argparse.Namespace, what: str, dtype: str, ids: np.ndarray) -> Callable[[], float]:
    os.environ["KERAS_BACKEND"] = what.removeprefix("keras-")
    import keras
    import keras_hub

    from gpt2jax.config import PRESETS

    config = PRESETS[options.model]
    backbone = keras_hub.models.GPT2Backbone(
        vocabulary_size=config.vocab_size,
        num_layers=config.n_layer,
        num_heads=config.n_head,
        hidden_dim=config.n_embd,
        intermediate_dim=config.mlp_dim,
        max_sequence_length=options.sequence_length,
        dtype=dtype,
    )
    model = keras_hub.models.GPT2CausalLM(backbone=backbone, preprocessor=None)
    model.compile(
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        weighted_metrics=[keras.metrics.SparseCategoricalAccuracy()],
    )
    inputs, labels = rows(ids, config.vocab_size - 1)
    ones = np.ones_like(inputs)

    def run() -> float:
        loss, _ = model.evaluate(
            {"token_ids": inputs, "padding_mask": ones},
            labels,
            sample_weight=ones,
            batch_size=options.batch_size,
            verbose=0,
        )
        return float(loss)

    return run


if __name__ == "__main__":
    main()
