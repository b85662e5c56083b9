"""How long loading a model takes beside reading its file, and how much memory at most.

    python benchmarks/loading.py --model gpt2 --rounds 5

Writes random weights of a published size into a temporary folder and takes turns, each in its own process with
the file in the page cache: reading the file into memory, and `gpt2jax.load`. Prints medians. Memory is the largest
resident size above that before, as Linux counts it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

from contenders import Answer, Contender, median, resident, serve

FILE = "model.safetensors"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", default="gpt2", help="gpt2, gpt2-medium, gpt2-large, gpt2-xl, gpt2-mini")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dtype", default="float32", help="of the file: float32, float16, bfloat16")
    parser.add_argument("--child", nargs=2, metavar=("WHAT", "FOLDER"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        what, folder = options.child
        serve(lambda: (measure(what, Path(folder)), lambda line: {}))
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        largest, parameters = write_random(folder, options.model, options.dtype)
        rows: dict[str, list[Answer]] = {"read": [], "load": []}
        for _ in range(options.rounds):
            for what, results in rows.items():
                child = Contender("--child", what, name)
                answer = child.ask()
                child.close()
                if "missing" in answer:
                    raise SystemExit(f"{what}: {answer['missing']}")
                results.append(answer)
        size = (folder / FILE).stat().st_size
    ratios = [b["seconds"] / a["seconds"] for a, b in zip(rows["read"], rows["load"], strict=True)]
    peak = max(row["peak"] for row in rows["load"])
    print(f"{options.model}: {parameters:,} parameters, {size / 1e9:.2f} GB in {options.dtype}")
    print(f"  reading the file    {median(rows['read'], 'seconds'):8.3f} s")
    print(f"  loading the model   {median(rows['load'], 'seconds'):8.3f} s")
    print(
        f"  ratio               {statistics.median(ratios):8.2f}   ({min(ratios):.2f} to {max(ratios):.2f})"
    )
    print(f"  peak memory         {peak / 1e9:8.3f} GB")
    print(f"  model + largest     {(4 * parameters + largest) / 1e9:8.3f} GB")


def write_random(folder: Path, model: str, dtype: str) -> tuple[int, int]:
    """Write a Hugging Face folder; return the bytes of the largest tensor and the number of parameters."""
    import math

    import numpy as np

    from gpt2jax.model.config import PRESETS
    from gpt2jax.weights.hf import RULES
    from gpt2jax.weights.mapping import file_shapes
    from gpt2jax.weights.safetensors_io import write_safetensors

    shapes = file_shapes(PRESETS[model], RULES)
    rng = np.random.default_rng(0)
    arrays = ((name, rng.standard_normal(shape, np.float32)) for name, shape in shapes.items())
    write_safetensors(folder / FILE, arrays, dtype, {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(PRESETS[model].to_hf()))
    sizes = [math.prod(shape) for shape in shapes.values()]
    return max(sizes) * (4 if dtype == "float32" else 2), sum(sizes)


def measure(what: str, folder: Path) -> Answer:
    """Measure seconds and peak bytes of one read or load in this process."""
    if what == "load":
        import jax

        import gpt2jax

        gpt2jax.load("gpt2-mini")  # imports and the first array are not counted
    before = resident("VmRSS")
    began = time.perf_counter()
    if what == "load":
        kept = jax.block_until_ready(gpt2jax.load(folder).params)
    else:
        kept = (folder / FILE).read_bytes()
    seconds = time.perf_counter() - began
    del kept
    return {"seconds": seconds, "peak": resident() - before}


if __name__ == "__main__":
    main()
