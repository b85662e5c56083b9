"""Training steps per second beside other libraries: the same shape, batches, threads and dtype class, in turns.

    python benchmarks/training.py                                # GPT-2 of 124 M parameters, 8 rows of 128 tokens
    python benchmarks/training.py --dtype bfloat16 --steps 3
    python benchmarks/training.py --lora --size tiny             # adapters, beside PEFT

Each library runs in a process of its own, which stays idle while the others take their turn; what is not installed is
named and left out. All start from random weights: how fast a step is does not depend on them. A step is forward,
backward, clipping of the global norm and AdamW, without dropout.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

Step = Callable[[], None]  # runs one step and waits for it


@dataclasses.dataclass(frozen=True)
class Shape:
    """The sizes of a GPT-2."""

    layers: int
    heads: int
    width: int
    vocab_size: int
    context: int


SIZES = {
    "gpt2": Shape(12, 12, 768, 50257, 1024),
    "gpt2-medium": Shape(24, 16, 1024, 50257, 1024),
    "mini": Shape(4, 4, 256, 4096, 256),
    "tiny": Shape(2, 2, 64, 512, 128),
}
LIBRARIES = {"gpt2jax": "gpt2jax", "torch": "transformers", "keras-jax": "keras_hub", "keras-tf": "keras_hub"}
LORA_LIBRARIES = {"gpt2jax": "gpt2jax", "torch": "peft"}
RANK = 8


def batch(shape: Shape, rows: int, length: int):
    """Tokens [B, T + 1]."""
    import numpy as np

    return np.random.default_rng(0).integers(0, shape.vocab_size, (rows, length + 1))


def gpt2jax_step(shape: Shape, rows: int, length: int, dtype: str, lora: bool) -> Step:
    import jax
    import jax.numpy as jnp
    import numpy as np

    from gpt2jax.config import GPT2Config
    from gpt2jax.lora import LoRAConfig, init_adapters
    from gpt2jax.model import init_params
    from gpt2jax.precision import precision
    from gpt2jax.train.config import FinetuneConfig
    from gpt2jax.train.optimizer import make_optimizer
    from gpt2jax.train.step import init_state, make_train_step

    config = GPT2Config(
        vocab_size=shape.vocab_size,
        n_positions=shape.context,
        n_embd=shape.width,
        n_layer=shape.layers,
        n_head=shape.heads,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        resid_pdrop=0.0,
    )
    settings = FinetuneConfig(learning_rate=1e-5, schedule="constant")
    adapters = LoRAConfig(rank=RANK) if lora else None
    params = init_params(config)
    optimizer = make_optimizer(settings, 1000)
    state = init_state(
        init_adapters(config, adapters) if adapters else params, optimizer, loss_scaling=dtype == "float16"
    )
    step = make_train_step(config, optimizer, precision(dtype), lora=adapters)
    ids = batch(shape, rows, length).astype(np.int32)
    inputs = {
        "tokens": ids[:, :-1],
        "targets": ids[:, 1:],
        "weights": np.ones((rows, length), np.float32),
    }
    inputs = jax.tree.map(jnp.asarray, inputs)
    frozen = params if lora else None

    def run() -> None:
        nonlocal state
        state, metrics = step(state, frozen, inputs)
        metrics["loss"].block_until_ready()

    return run


def torch_step(shape: Shape, rows: int, length: int, dtype: str, lora: bool) -> Step:
    import torch
    import transformers

    torch.set_num_threads(os.cpu_count() or 1)
    config = transformers.GPT2Config(
        vocab_size=shape.vocab_size,
        n_positions=shape.context,
        n_embd=shape.width,
        n_layer=shape.layers,
        n_head=shape.heads,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        resid_pdrop=0.0,
        bos_token_id=0,
        eos_token_id=0,
    )
    model = transformers.GPT2LMHeadModel(config).train()
    if lora:
        import peft

        settings = peft.LoraConfig(r=RANK, lora_alpha=16, target_modules=["c_attn"], fan_in_fan_out=True)
        model = peft.get_peft_model(model, settings)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-5)
    ids = torch.tensor(batch(shape, rows, length))
    inputs, targets = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()

    def run() -> None:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
            logits = model(inputs).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        loss.item()

    return run


def keras_step(shape: Shape, rows: int, length: int, dtype: str, lora: bool) -> Step:
    import keras
    import keras_hub
    import numpy as np

    keras.config.set_dtype_policy("mixed_bfloat16" if dtype == "bfloat16" else "float32")
    backbone = keras_hub.models.GPT2Backbone(
        vocabulary_size=shape.vocab_size,
        num_layers=shape.layers,
        num_heads=shape.heads,
        hidden_dim=shape.width,
        intermediate_dim=4 * shape.width,
        max_sequence_length=shape.context,
        dropout=0.0,
    )
    model = keras_hub.models.GPT2CausalLM(backbone, preprocessor=None)
    model.compile(
        optimizer=keras.optimizers.AdamW(1e-5, global_clipnorm=1.0),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        jit_compile="auto",
    )
    ids = batch(shape, rows, length).astype(np.int32)
    inputs = {"token_ids": ids[:, :-1], "padding_mask": np.ones((rows, length), np.int32)}

    def run() -> None:
        np.ravel(model.train_on_batch(inputs, ids[:, 1:]))  # loss and metrics, fetched

    return run


MAKERS = {"gpt2jax": gpt2jax_step, "torch": torch_step, "keras-jax": keras_step, "keras-tf": keras_step}


def work(name: str, options: argparse.Namespace) -> None:
    """A library's process: one line for the first step, then one for each line on its input."""
    start = time.perf_counter()
    step = MAKERS[name](SIZES[options.size], options.rows, options.length, options.dtype, options.lora)
    built = time.perf_counter() - start
    start = time.perf_counter()
    step()
    print(
        json.dumps({"built": built, "first": time.perf_counter() - start}), file=options.answers, flush=True
    )
    for line in sys.stdin:
        start = time.perf_counter()
        for _ in range(int(line)):
            step()
        seconds = time.perf_counter() - start
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        print(json.dumps({"seconds": seconds, "peak": peak}), file=options.answers, flush=True)


class Worker:
    """A library's process, seen from here."""

    def __init__(self, name: str, arguments: list[str]):
        backend = {"keras-jax": "jax", "keras-tf": "tensorflow"}.get(name, "")
        environment = {**os.environ, "KERAS_BACKEND": backend, "TF_CPP_MIN_LOG_LEVEL": "3"}
        command = [sys.executable, __file__, *arguments, "--worker", name]
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(
            command, stdin=pipe, stdout=pipe, stderr=pipe, text=True, env=environment
        )

    def answer(self) -> dict[str, float] | None:
        """The next line of it; None where it has died."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        return json.loads(line) if line else None

    def ask(self, steps: int) -> None:
        """Lets it run so many steps."""
        assert self.process.stdin is not None
        self.process.stdin.write(f"{steps}\n")
        self.process.stdin.flush()

    def close(self) -> str:
        """Ends it and returns the last line it complained with."""
        _, errors = self.process.communicate()
        lines = errors.strip().splitlines()
        return lines[-1] if lines else f"ended with code {self.process.returncode}"


def compare(options: argparse.Namespace, arguments: list[str]) -> None:
    """Runs the libraries in turns and prints a table."""
    import importlib.util

    from rich.console import Console
    from rich.table import Table

    console = Console()
    known = LORA_LIBRARIES if options.lora else LIBRARIES
    names = [name for name in known if not options.only or name in options.only]
    workers, first = {}, {}
    for name in names:
        if importlib.util.find_spec(known[name]) is None:
            console.print(f"{name}: left out, {known[name]} is not installed")
            continue
        worker = Worker(name, arguments)
        answer = worker.answer()
        if answer is None:
            console.print(f"{name}: left out, {worker.close()}", markup=False)
            continue
        workers[name], first[name] = worker, answer["first"]
    seconds: dict[str, list[float]] = {name: [] for name in workers}
    peaks: dict[str, float] = {}
    for round_ in range(options.rounds):
        # every other round backwards, so that none always follows the same one
        for name in list(workers)[:: 1 if round_ % 2 == 0 else -1]:
            workers[name].ask(options.steps)
            answer = workers[name].answer()
            if answer is None:
                raise SystemExit(f"{name}: {workers[name].close()}")
            seconds[name].append(answer["seconds"] / options.steps)
            peaks[name] = answer["peak"]
    for worker in workers.values():
        worker.close()
    tokens = options.rows * options.length
    kind = f"LoRA rank {RANK}" if options.lora else "all parameters"
    title = f"{options.size}, {options.rows} x {options.length} tokens, {options.dtype}, {kind}"
    table = Table(title=title)
    for heading in ("library", "tokens/s", "spread", "gpt2jax is", "peak memory, GB", "first step, s"):
        table.add_column(heading, justify="left" if heading == "library" else "right")
    for name, times in seconds.items():
        # rounds are compared with each other, since the machine's speed changes between them
        ours = seconds.get("gpt2jax", times)
        ratio = statistics.median(theirs / mine for theirs, mine in zip(times, ours, strict=True))
        table.add_row(
            name,
            f"{tokens / statistics.median(times):,.0f}",
            f"{tokens / max(times):,.0f} to {tokens / min(times):,.0f}",
            f"{ratio:.2f} x",
            f"{peaks[name] / 1e9:.2f}",
            f"{first[name]:.1f}",
        )
    console.print(table)


def main(argv: list[str] | None = None) -> None:
    """Parses the options; with --worker it is one library's process."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", choices=SIZES, default="gpt2")
    parser.add_argument("--rows", type=int, default=8, help="rows of a batch")
    parser.add_argument("--length", type=int, default=128, help="tokens of a row")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--lora", action="store_true", help=f"adapters of rank {RANK} on c_attn, beside PEFT")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each library")
    parser.add_argument("--steps", type=int, default=2, help="steps of a turn")
    parser.add_argument("--only", nargs="*", help="these libraries only")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    arguments = sys.argv[1:] if argv is None else argv
    options = parser.parse_args(arguments)
    if options.worker is None:
        compare(options, arguments)
        return
    # what libraries print goes elsewhere
    options.answers, sys.stdout = sys.stdout, sys.stderr
    work(options.worker, options)


if __name__ == "__main__":
    main()
