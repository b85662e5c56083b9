"""Training steps per second beside other libraries: the same shape, batches, threads and dtype class, in turns.

    python benchmarks/training.py                                # GPT-2 of 124 M parameters, 8 rows of 128 tokens
    python benchmarks/training.py --dtype bfloat16 --steps 3
    python benchmarks/training.py --lora --size tiny             # adapters, beside PEFT
    python benchmarks/training.py --lora --only gpt2jax --base-dtype int8    # on a base of one byte a weight
    python benchmarks/training.py --only gpt2jax dense-loss      # beside a loss that holds the logits of all tokens

Each library runs in its own process, which stays idle while the others take their turn; what is not installed is
named and left out. All start from random weights: how fast a step is does not depend on them. A step is forward,
backward, clipping of the global norm and AdamW, without dropout; the first of each turn does not count. Peak memory is
that from the first step on.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
import time
from collections.abc import Callable

from contenders import (
    Answer,
    backbone,
    forget_peak,
    median,
    print_table,
    ratio,
    resident,
    serve,
    start_and_take_turns,
)

from gpt2jax.model.config import PRESETS, GPT2Config

Step = Callable[[], None]  # runs one step and waits for it

SIZES = {
    "gpt2": PRESETS["gpt2"],
    "gpt2-medium": PRESETS["gpt2-medium"],
    "mini": PRESETS["gpt2-mini"],
    "tiny": GPT2Config(vocab_size=512, n_positions=128, n_embd=64, n_layer=2, n_head=2),
}
BACKENDS = {"keras-jax": "jax", "keras-tf": "tensorflow"}
WITH_LORA = ("gpt2jax", "torch")
RANK = 8


def batch(config: GPT2Config, rows: int, length: int):
    """Tokens [B, T + 1]."""
    import numpy as np

    return np.random.default_rng(0).integers(0, config.vocab_size, (rows, length + 1))


def gpt2jax_step(
    config: GPT2Config, rows: int, length: int, dtype: str, lora: bool, base_dtype: str | None = None
) -> Step:
    import jax
    import jax.numpy as jnp
    import numpy as np

    from gpt2jax.lora.adapters import cast_base, init_adapters
    from gpt2jax.lora.config import LoRAConfig
    from gpt2jax.model.gpt2 import init_params
    from gpt2jax.ops.precision import Precision
    from gpt2jax.train.config import FinetuneConfig
    from gpt2jax.train.optimizer import make_optimizer
    from gpt2jax.train.step import init_state, make_train_step
    from gpt2jax.train.unrolled import should_unroll, unstack_layers

    adapters = LoRAConfig(RANK, 16.0, targets=("attn.c_attn",)) if lora else None
    settings = FinetuneConfig(
        learning_rate=1e-5,
        schedule="constant",
        lora=adapters,
        batch_size=rows,
        compute_dtype=dtype,  # pyright: ignore[reportArgumentType]  # the class checks it
    )
    params = init_params(config)
    optimizer = make_optimizer(settings, 1000)
    state = init_state(
        init_adapters(config, adapters) if adapters else params, optimizer, loss_scaling=dtype == "float16"
    )
    if should_unroll(config, settings, length, jax.default_backend(), 1):
        state = unstack_layers(state)
    step = make_train_step(config, optimizer, Precision.for_device(dtype), lora=adapters)
    ids = batch(config, rows, length).astype(np.int32)
    inputs = {
        "tokens": ids[:, :-1],
        "targets": ids[:, 1:],
        "loss_mask": np.ones((rows, length), np.float32),
    }
    inputs = jax.tree.map(jnp.asarray, inputs)
    frozen = cast_base(params, base_dtype) if lora else None
    # what is made is made: it is no part of the first step's time and memory
    jax.block_until_ready((state, frozen))

    def run() -> None:
        nonlocal state
        state, metrics = step(state, frozen, inputs)
        metrics["loss"].block_until_ready()

    return run


def dense_loss_step(config: GPT2Config, *arguments) -> Step:
    """gpt2jax's step with a plain loss instead of its own."""
    import gpt2jax.train.step

    gpt2jax.train.step.cross_entropy = dense_loss
    return gpt2jax_step(config, *arguments)


def dense_loss(hidden, head, targets, weights, precision, **_):
    """What `gpt2jax.ops.cross_entropy.cross_entropy` gives, from the logits of all tokens at once."""
    import jax.numpy as jnp
    import optax

    narrow = precision.compute_dtype
    logits = (hidden.astype(narrow) @ head.astype(narrow).T).astype(jnp.float32)
    nll = (optax.softmax_cross_entropy_with_integer_labels(logits, targets) * weights).sum()
    correct = ((logits.argmax(-1) == targets) * weights).sum()
    return nll, {"nll": nll, "tokens": weights.sum(), "correct": correct}


def torch_step(config: GPT2Config, rows: int, length: int, dtype: str, lora: bool) -> Step:
    import torch
    import transformers

    torch.set_num_threads(os.cpu_count() or 1)
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**config.to_hf())).train()
    if lora:
        import peft

        settings = peft.LoraConfig(r=RANK, lora_alpha=16, target_modules=["c_attn"], fan_in_fan_out=True)
        model = peft.get_peft_model(model, settings)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-5)
    ids = torch.tensor(batch(config, rows, length))
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


def keras_step(config: GPT2Config, rows: int, length: int, dtype: str, lora: bool) -> Step:
    import keras
    import keras_hub
    import numpy as np

    policy = "mixed_bfloat16" if dtype == "bfloat16" else "float32"
    keras.config.set_dtype_policy(policy)
    model = keras_hub.models.GPT2CausalLM(backbone(config, policy, dropout=0.0), preprocessor=None)
    model.compile(
        optimizer=keras.optimizers.AdamW(1e-5, global_clipnorm=1.0),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        jit_compile="auto",
    )
    ids = batch(config, rows, length).astype(np.int32)
    inputs = {"token_ids": ids[:, :-1], "padding_mask": np.ones((rows, length), np.int32)}

    def run() -> None:
        np.ravel(model.train_on_batch(inputs, ids[:, 1:]))  # loss and metrics, fetched

    return run


MAKERS = {
    "gpt2jax": gpt2jax_step,
    "torch": torch_step,
    "keras-jax": keras_step,
    "keras-tf": keras_step,
    "dense-loss": dense_loss_step,
}
WHEN_NAMED = ("dense-loss",)  # in --only


def contender(options: argparse.Namespace) -> tuple[Answer, Callable[[str], Answer]]:
    """Makes a library's step; it runs as many as each line that comes says."""
    began = time.perf_counter()
    config = dataclasses.replace(SIZES[options.size], embd_pdrop=0.0, attn_pdrop=0.0, resid_pdrop=0.0)
    base = {"base_dtype": options.base_dtype} if options.worker == "gpt2jax" else {}
    step = MAKERS[options.worker](config, options.rows, options.length, options.dtype, options.lora, **base)
    built = time.perf_counter() - began
    forget_peak()  # making random weights can take more memory than training
    began = time.perf_counter()
    step()
    first = time.perf_counter() - began

    def turn(line: str) -> Answer:
        step()  # not counted: while others work, a virtual machine gives free memory back to its host
        began = time.perf_counter()
        for _ in range(int(line)):
            step()
        return {"seconds": (time.perf_counter() - began) / int(line), "peak": resident()}

    return {"built": built, "first": first}, turn


def compare(options: argparse.Namespace, arguments: list[str]) -> None:
    """Runs the libraries in turns and prints a table."""
    peers = WITH_LORA if options.lora else [name for name in MAKERS if name not in WHEN_NAMED]
    names = [name for name in MAKERS if name in (options.only or peers)]
    contenders = {name: [*arguments, "--worker", name] for name in names}
    first, answers = start_and_take_turns(contenders, options.rounds, str(options.steps))
    tokens = options.rows * options.length
    rows = []
    for name, own in answers.items():
        speeds = [tokens / answer["seconds"] for answer in own]
        rows.append(
            (
                name,
                f"{tokens / median(own, 'seconds'):,.0f}",
                f"{min(speeds):,.0f} to {max(speeds):,.0f}",
                f"{ratio(answers.get('gpt2jax', own), own):.2f} x",
                f"{own[-1]['peak'] / 1e9:.2f}",
                f"{first[name]['first']:.1f}",
            )
        )
    kind = f"LoRA rank {RANK}" if options.lora else "all parameters"
    if options.base_dtype is not None:
        kind += f" on a base of {options.base_dtype}"
    title = f"{options.size}, {options.rows} x {options.length} tokens, {options.dtype}, {kind}"
    columns = ("library", "tokens/s", "spread", "gpt2jax is", "peak memory, GB", "first step, s")
    print_table(title, columns, rows)


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
    parser.add_argument(
        "--base-dtype",
        choices=("float32", "bfloat16", "int8"),
        help="with --lora: of gpt2jax's frozen parameters",
    )
    parser.add_argument("--rounds", type=int, default=3, help="turns of each library")
    parser.add_argument("--steps", type=int, default=2, help="steps of a turn")
    parser.add_argument("--only", nargs="*", help="these libraries only")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    arguments = sys.argv[1:] if argv is None else argv
    options = parser.parse_args(arguments)
    if options.base_dtype is not None and not options.lora:
        parser.error("--base-dtype is for --lora")
    if options.worker is None:
        compare(options, arguments)
        return
    os.environ["KERAS_BACKEND"] = BACKENDS.get(options.worker, "")
    serve(lambda: contender(options))


if __name__ == "__main__":
    main()
