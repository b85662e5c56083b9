"""Megabytes of text tokenized in a second, on one core and on all: into memory, into the cache, and from it.

    python benchmarks/tokenization.py                        # the built-in documentation, 4 MB
    python benchmarks/tokenization.py --data my.jsonl --rounds 5

Medians over rounds. "from the cache" is what a second run of the same texts pays: reading them for their digest.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path

from contenders import print_table

import gpt2jax
from gpt2jax.data.tokenization import tokenize_documents
from gpt2jax.model.config import PRESETS
from gpt2jax.tokenizer.bpe import Tokenizer

WAYS = ("into memory", "into the cache", "from the cache")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", default="numeric-docs", help="as --data of gpt2jax finetune")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    texts = gpt2jax.load_texts(options.data, split="all")
    size = sum(len(text.encode("utf-8", "surrogatepass")) for text in texts) / 1e6
    all_cores = sorted(os.sched_getaffinity(0))
    rows = []
    for name in ("gpt2-mini", "gpt2"):
        vocab_size = PRESETS[name].vocab_size
        tokenizer = Tokenizer.gpt2(vocab_size)
        for cores in dict.fromkeys((1, len(all_cores))):
            os.sched_setaffinity(0, all_cores[:cores])
            seconds = measure(texts, tokenizer, vocab_size, options.rounds)
            speeds = [size / seconds[way] for way in WAYS]
            rows.append((f"{name}, cores: {cores}", *(f"{speed:.1f}" for speed in speeds)))
    print_table(
        f"{options.data}: {len(texts):,} documents, {size:.1f} MB; MB/s", ("vocabulary of", *WAYS), rows
    )


def measure(texts: list[str], tokenizer: Tokenizer, vocab_size: int, rounds: int) -> dict[str, float]:
    """Median of the seconds that each way takes."""
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    for _ in range(rounds):
        with tempfile.TemporaryDirectory() as folder:
            for way in WAYS:
                cache = None if way == "into memory" else Path(folder)
                began = time.perf_counter()
                tokenize_documents(texts, tokenizer, vocab_size=vocab_size, cache=cache)
                seconds[way].append(time.perf_counter() - began)
    return {way: statistics.median(own) for way, own in seconds.items()}


if __name__ == "__main__":
    main()
