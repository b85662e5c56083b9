"""Generation with a GPT-2 beside other libraries: random weights of a published size, plain top-k 5 sampling.

    python benchmarks/generation.py                          batch 1, 8 and 32, every library that is installed
    python benchmarks/generation.py --batches 1 --only "gpt2jax int8" "CTranslate2 int8"
    python benchmarks/generation.py --lookup                 prompt-lookup speculative decoding beside plain decoding
    python benchmarks/generation.py --startup                first call of a process, compilation cache cold and warm

Each contender runs in its own process on the same cores, loads the same folder of weights where it can (keras-hub
makes its own), and continues the same prompts by the same number of tokens, which is checked; they take turns. Speeds
are new tokens by the seconds of the whole call, the prompt's included. "load" is imports and weights, "first call" the
first continuation behind it, compilation included; "first token" is a later call for one token.

The bound is what the memory allows at batch 1, where each weight is read once a token: the bandwidth that this command
measures, divided by the bytes of the weights of matrix products in the contender's dtype.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
from contenders import (
    Answer,
    Contender,
    fastest,
    median,
    print_table,
    ratio,
    resident,
    serve,
    start,
    take_turns,
    use_cores,
)
from generation_makers import BYTES, CONTENDERS, LOADERS, write_folders

from gpt2jax.model.config import PRESETS, GPT2Config


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="gpt2", help="gpt2, gpt2-medium, gpt2-large, gpt2-xl, gpt2-mini")
    parser.add_argument("--batches", type=int, nargs="*", default=[1, 8, 32])
    parser.add_argument("--prompt-tokens", type=int, default=32)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", nargs="*", default=list(CONTENDERS), help="names as in the table")
    parser.add_argument(
        "--against", default="CTranslate2 float32", help="the peer to compare with, beside the fastest"
    )
    parser.add_argument("--lookup", action="store_true", help="time prompt lookup instead")
    parser.add_argument("--startup", action="store_true", help="time first calls of gpt2jax instead")
    parser.add_argument("--child", nargs=2, metavar=("NAME", "FOLDER"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    for name in options.only:
        if name not in CONTENDERS:
            parser.error(f"--only: {name!r} is not known; known: {', '.join(CONTENDERS)}")
    if options.child:
        use_cores(options.threads)
        name, folder = options.child
        kind = {"write": write, "lookup": lookup}.get(name, contender)
        serve(lambda: kind(options, name, Path(folder)))
        return
    with tempfile.TemporaryDirectory() as folder:
        answer = one_answer("write", folder)
        for what in answer["left out"]:
            print(what)
        if options.lookup:
            compare_lookup(options, folder)
        elif options.startup:
            compare_startup(options, folder)
        else:
            compare(options, folder)


def one_answer(name: str, folder: str, environment: dict[str, str] | None = None) -> Answer:
    """Of a process that ends with it."""
    child = Contender(*sys.argv[1:], "--child", name, folder, environment=environment)
    answer = child.ask()
    child.close()
    if "missing" in answer:
        raise SystemExit(f"{name}: {answer['missing']}")
    return answer


def write(options: argparse.Namespace, name: str, folder: Path):
    """The folders that contenders load."""
    return {"left out": write_folders(folder, PRESETS[options.model], options.only)}, lambda line: {}


# ---- every library ----


def compare(options: argparse.Namespace, folder: str) -> None:
    """Runs the contenders in turns and prints two tables."""
    bandwidth = read_bandwidth(options.threads)
    running, first = start({name: [*sys.argv[1:], "--child", name, folder] for name in options.only})
    token = take_turns(running, options.rounds, "1 1")
    speeds = {
        batch: take_turns(running, options.rounds, f"{batch} {options.new_tokens}")
        for batch in options.batches
    }
    for child in running.values():
        child.close()
    columns, rows = ["tokens/s"], [[name] for name in running]
    for batch, answers in speeds.items():
        peers = {"fastest": fastest(answers)} | (
            {options.against: options.against} if options.against in answers else {}
        )
        columns += [f"batch {batch}", *(f"of {title}" for title in peers)]
        for row in rows:
            own = answers.get(row[0])
            row.append("–" if own is None else f"{batch * options.new_tokens / median(own, 'seconds'):.1f}")
            row += [
                "–" if own is None or peer is None else f"{ratio(own, answers[peer]):.2f}"
                for peer in peers.values()
            ]
    title = f"{options.model}, {options.prompt_tokens} + {options.new_tokens} tokens, top-k 5, {options.threads} cores"
    print_table(title, columns, rows)
    rows = []
    for name in running:
        dtype = CONTENDERS[name][1]
        bound = bandwidth / weight_bytes(PRESETS[options.model], dtype)
        alone = speeds.get(1, {}).get(name)
        fraction = "–" if alone is None else f"{options.new_tokens / median(alone, 'seconds') / bound:.0%}"
        every = [answer for answers in (token, *speeds.values()) for answer in answers.get(name, [])]
        rows.append(
            (
                name,
                f"{first[name]['load']:.1f}",
                f"{first[name]['first']:.1f}",
                f"{1000 * median(token[name], 'seconds'):.0f}" if name in token else "–",
                f"{bound:.0f}",
                fraction,
                f"{max(answer['peak'] for answer in every) / 1e9:.2f}" if every else "–",
            )
        )
    columns = (
        "batch 1",
        "load, s",
        "first call, s",
        "first token, ms",
        "bound, tokens/s",
        "fraction of it",
        "peak, GB",
    )
    print_table(f"memory is read at {bandwidth / 1e9:.1f} GB/s", columns, rows)


def read_bandwidth(threads: int) -> float:
    """Bytes a second that so many cores read from memory: best of ten passes over 512 MB."""
    parts = np.ones((threads, 2**26 // threads), np.int64)
    best = float("inf")
    for _ in range(10):
        readers = [threading.Thread(target=np.bitwise_or.reduce, args=(part,)) for part in parts]
        began = time.perf_counter()
        for reader in readers:
            reader.start()
        for reader in readers:
            reader.join()
        best = min(best, time.perf_counter() - began)
    return parts.nbytes / best


def weight_bytes(config: GPT2Config, dtype: str) -> float:
    """Of the matrices that each token is multiplied with; all else is a thousandth of it."""
    block = 4 * config.n_embd**2 + 2 * config.n_embd * config.mlp_dim
    return (config.n_layer * block + config.vocab_size * config.n_embd) * BYTES[dtype]


def random_prompts(options: argparse.Namespace, batch: int) -> list[list[int]]:
    rng = np.random.default_rng(batch)
    return rng.integers(0, PRESETS[options.model].vocab_size - 1, (batch, options.prompt_tokens)).tolist()


def contender(options: argparse.Namespace, name: str, folder: Path):
    """Loads a contender and calls it once; "8 128" then continues 8 prompts by 128 tokens."""
    began = time.perf_counter()
    library, dtype = CONTENDERS[name]
    generate = LOADERS[library](options, folder, dtype)
    load = time.perf_counter() - began
    warm = set()

    def call(batch: int, count: int) -> float:
        prompts = random_prompts(options, batch)
        began = time.perf_counter()
        rows = generate(prompts, count)
        seconds = time.perf_counter() - began
        lengths = [len(row) for row in rows]
        assert lengths == [count] * batch, f"{lengths} new tokens instead of {count} in each of {batch} rows"
        warm.add((batch, count))
        return seconds

    first = call(1, options.new_tokens)

    def turn(line: str) -> Answer:
        batch, count = (int(word) for word in line.split())
        if (batch, count) not in warm:
            call(batch, count)  # compiles where a library does
        return {"seconds": call(batch, count), "peak": resident()}

    return {"load": load, "first": first}, turn


# ---- speculative decoding ----


def compare_lookup(options: argparse.Namespace, folder: str) -> None:
    rows = [
        (
            case["text"],
            f"{case['plain']:.1f}",
            f"{case['lookup']:.1f}",
            f"{case['ratio']:.2f}",
            f"{case['accepted']} of {case['drafted']}",
        )
        for case in one_answer("lookup", folder)["cases"]
    ]
    columns = ("batch 1, tokens/s", "plain", "prompt lookup", "ratio", "drafts accepted")
    print_table(f"prompt lookup, {options.new_tokens} new tokens, {options.threads} cores", columns, rows)


def lookup(options: argparse.Namespace, name: str, folder: Path):
    """Times plain decoding and prompt lookup in turns, on text that repeats and on text that does not.

    Random weights whose blocks and positions add nothing say the last token again and again, at the cost of any other
    weights; sampled from random weights, hardly anything comes twice. The packaged model's prose lies between.
    """
    import dataclasses

    import gpt2jax

    model, mini = gpt2jax.load(folder / "hf"), gpt2jax.load("gpt2-mini")
    params = {**model.params, "h": {**model.params["h"]}}
    params["wpe"] = {"embedding": 0 * params["wpe"]["embedding"]}
    for part in ("attn", "mlp"):
        silent = {"c_proj": {name: 0 * x for name, x in params["h"][part]["c_proj"].items()}}
        params["h"][part] = params["h"][part] | silent
    parrot = dataclasses.replace(model, params=params)
    prompt = random_prompts(options, 1)[0]
    prose = "The function returns a new list of all the items in the queue. If the optional argument is not given,"
    greedy, drawn = {"do_sample": False}, {"top_k": 5}
    cases: list[tuple] = [
        (f"{options.model} {dtype}, {text}", which, prompt, {"dtype": dtype, **settings})
        for dtype in ("float32", "int8")
        for text, which, settings in (("repeats", parrot, greedy), ("free", model, drawn))
    ]
    cases.append(("gpt2-mini float32, greedy prose", mini, prose, greedy))
    return {"cases": [time_lookup(options, *case) for case in cases]}, lambda line: {}


def time_lookup(options: argparse.Namespace, text: str, model, prompt, settings: dict) -> Answer:
    import gpt2jax

    settings = {"max_new_tokens": options.new_tokens, "stop_token_ids": [], **settings}
    seconds: dict[int, list[float]] = {0: [], NUM_DRAFT: []}
    outputs = {}
    for _ in range(1 + options.rounds):  # the first one compiles
        for num_draft, times in seconds.items():
            began = time.perf_counter()
            [outputs[num_draft]] = gpt2jax.generate(
                model, prompt, prompt_lookup_num_tokens=num_draft, **settings
            )
            times.append(time.perf_counter() - began)
            assert len(outputs[num_draft].token_ids) == options.new_tokens
    if settings.get("do_sample") is False:
        assert outputs[0].token_ids == outputs[NUM_DRAFT].token_ids, (
            f"{text}: prompt lookup changed the tokens"
        )
    plain, drafted = seconds[0][1:], seconds[NUM_DRAFT][1:]
    return {
        "text": text,
        "plain": options.new_tokens / statistics.median(plain),
        "lookup": options.new_tokens / statistics.median(drafted),
        "ratio": statistics.median(a / b for a, b in zip(plain, drafted, strict=True)),
        "accepted": outputs[NUM_DRAFT].accepted,
        "drafted": outputs[NUM_DRAFT].drafted,
    }


# ---- first calls ----


def compare_startup(options: argparse.Namespace, folder: str) -> None:
    rows = []
    for name in (name for name in options.only if CONTENDERS[name][0] == "gpt2jax"):
        kinds: dict[str, list[Answer]] = {"cold": [], "warm": []}
        for _ in range(options.rounds):
            with tempfile.TemporaryDirectory() as cache:
                environment = {
                    "JAX_COMPILATION_CACHE_DIR": cache,
                    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
                    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
                }
                for answers in kinds.values():
                    answers.append(one_answer(name, folder, environment))
        for kind, answers in kinds.items():
            rows.append(
                (f"{name}, cache {kind}", *(f"{median(answers, field):.2f}" for field in ("load", "first")))
            )
    columns = ("first call of a process, seconds", "imports and weights", f"{options.new_tokens} tokens")
    print_table(f"{options.model}, batch 1, {options.threads} cores", columns, rows)


NUM_DRAFT = 7  # at a time: with the row before them eight rows, which a product takes nearly as fast as two


if __name__ == "__main__":
    main()
