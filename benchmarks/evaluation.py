"""Evaluation of a GPT-2 beside torch and keras-hub, on the same token ids with the same number of cores.

    python benchmarks/evaluation.py --rounds 4

Each contender is loaded in its own process with random weights of a published size, and they take turns: one
round evaluates the same documents with each, loss and accuracy of every token. Prints the median of tokens per second,
the ratio to the fastest peer (median over rounds), and the largest resident memory. Contenders whose library is not
installed are named and left out.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable

import numpy as np
from contenders import (
    Answer,
    backbone,
    fastest,
    median,
    print_table,
    ratio,
    resident,
    serve,
    start_and_take_turns,
    use_cores,
)

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
    parser.add_argument("--documents", type=int, default=32)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--sequence-length", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", nargs="*", default=list(CONTENDERS), help="names as in the table")
    parser.add_argument("--child", nargs=2, metavar=("WHAT", "DTYPE"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        use_cores(options.threads)
        serve(lambda: contender(options))
        return
    contenders = {name: [*sys.argv[1:], "--child", *CONTENDERS[name]] for name in options.only}
    _, answers = start_and_take_turns(contenders, options.rounds, "evaluate")
    report(answers, options)


def report(answers: dict[str, list[Answer]], options: argparse.Namespace) -> None:
    """Prints the table."""
    tokens = options.documents * options.sequence_length
    peer = fastest(answers)
    rows = []
    for name, own in answers.items():
        speeds = [tokens / answer["seconds"] for answer in own]
        rows.append(
            (
                name,
                f"{tokens / median(own, 'seconds'):.0f}",
                f"{min(speeds):.0f}",
                f"{max(speeds):.0f}",
                "–" if peer is None else f"{ratio(own, answers[peer]):.2f}",
                f"{max(answer['peak'] for answer in own) / 1e9:.2f} GB",
                f"{own[-1]['loss']:.3f}",
            )
        )
    title = (
        f"{options.model}, {options.batch_size} x {options.sequence_length} tokens, {options.threads} cores"
    )
    columns = ("contender", "tokens/s", "from", "to", "of the fastest peer", "peak memory", "loss")
    print_table(title, columns, rows)


def contender(options: argparse.Namespace) -> tuple[Answer, Callable[[str], Answer]]:
    """Makes a contender, which evaluates once for each line that comes."""
    what, dtype = options.child
    ids = np.random.default_rng(0).integers(0, 4000, (options.documents, options.sequence_length - 1))
    make = {"gpt2jax": make_gpt2jax, "torch": make_torch}.get(what, make_keras)
    evaluate = make(options, what, dtype, ids)
    evaluate()  # compiles

    def turn(line: str) -> Answer:
        began = time.perf_counter()
        loss = evaluate()
        return {"seconds": time.perf_counter() - began, "peak": resident(), "loss": loss}

    return {"ready": what}, turn


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

    from gpt2jax.model.config import PRESETS

    torch.set_num_threads(options.threads)
    model = GPT2LMHeadModel(GPT2Config(**PRESETS[options.model].to_hf())).eval()
    inputs, labels = (torch.tensor(part) for part in rows(ids, PRESETS[options.model].vocab_size - 1))

    @torch.inference_mode()
    def run() -> float:
        loss, correct = 0.0, 0
        for first in range(0, len(inputs), options.batch_size):
            part = slice(first, first + options.batch_size)
            with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
                logits = model(inputs[part], use_cache=False).logits.flatten(0, 1)
            own = labels[part].flatten()
            loss += torch.nn.functional.cross_entropy(logits.float(), own, reduction="sum").item()
            correct += int((logits.argmax(-1) == own).sum())
        return loss / labels.numel()

    return run


def make_keras(options: argparse.Namespace, what: str, dtype: str, ids: np.ndarray) -> Callable[[], float]:
    os.environ["KERAS_BACKEND"] = what.removeprefix("keras-")
    import keras
    import keras_hub

    from gpt2jax.model.config import PRESETS

    config = PRESETS[options.model]
    model = keras_hub.models.GPT2CausalLM(
        backbone=backbone(config, dtype, max_sequence_length=options.sequence_length), preprocessor=None
    )
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
