"""What narrow products and adapters cost in quality, on the default job of `finetune`.

    python benchmarks/training_quality.py precision      # 200 steps in float32, bfloat16 and float16, their losses
    python benchmarks/training_quality.py lora           # the gain in held-out loss with --lora beside the full one
    python benchmarks/training_quality.py lora --lora.rank 8 --lora.targets attn.c_attn

Options behind the name of the table are those of `finetune`. The runs are kept in --folder: what was stopped goes on
there, and a second call prints the table only.
"""

from __future__ import annotations

import argparse
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import tyro
from contenders import print_table

import gpt2jax
from gpt2jax.cli.finetune import Options, finetune_config, imply_lora
from gpt2jax.model.gpt2 import count_parameters
from gpt2jax.ops.precision import COMPUTE_DTYPES

REACHED = 0.90  # of the full gain, which --lora is to reach
DEVIATION = 0.01  # of float32's loss, which narrow products are to stay within


def finetune_options(words: Sequence[str]) -> Options:
    """Options of the command."""
    return tyro.cli(Options, args=imply_lora("finetune", words))


def train(options: Options, folder: pathlib.Path) -> gpt2jax.Run:
    """A run as the command does it, or what is left to do of one that was stopped."""
    return gpt2jax.finetune(
        gpt2jax.load(options.model),
        options.source.texts("train"),
        finetune_config(options),
        validation_texts=options.source.texts("validation", limit=options.eval_documents),
        output=folder,
        resume=True,
    )


def precision_table(folder: pathlib.Path, words: Sequence[str]) -> None:
    """The loss of every step of the narrow runs beside float32's."""
    histories = {}
    for dtype in COMPUTE_DTYPES:
        options = finetune_options(["--steps", "200", "--log-every", "1", *words, "--compute-dtype", dtype])
        histories[dtype] = train(options, folder / dtype).history
    float32 = {name: column(histories["float32"], name) for name in ("loss", "validation_loss")}
    rows = []
    for dtype, history in histories.items():
        deviations = np.abs(column(history, "loss") / float32["loss"] - 1)
        validation = column(history, "validation_loss")
        rows.append(
            (
                dtype,
                f"{history[0]['loss']:.4f}",
                f"{history[-1]['loss']:.4f}",
                f"{validation[-1]:.4f}",
                f"{deviations.max():.3%} in step {deviations.argmax() + 1}",
                f"{deviations.mean():.3%}",
                f"{np.abs(validation / float32['validation_loss'] - 1).max():.3%}",
                f"{history[-1].get('skipped', 0):.0f}",
                "yes" if deviations.max() <= DEVIATION else "no",
            )
        )
    columns = (
        "products in",
        "first loss",
        "last",
        "validation",
        "largest deviation",
        "mean",
        "of validation",
    )
    columns += ("skipped steps", f"within {DEVIATION:.0%}")
    print_table(f"loss of {len(float32['loss'])} steps beside float32's", columns, rows)


def column(history: Sequence[dict[str, float]], name: str) -> np.ndarray:
    """The values that a history has of a name."""
    return np.asarray([entry[name] for entry in history if name in entry])


def lora_table(folder: pathlib.Path, words: Sequence[str]) -> None:
    """Held-out loss before and after, with all parameters and with adapters."""
    options = finetune_options([])
    held_out = options.source.texts("test", limit=options.eval_documents)

    def loss(model: Any) -> float:
        return gpt2jax.evaluate(model, held_out, sequence_length=min(model.config.n_positions, 1024)).loss

    before = loss(gpt2jax.load(options.model))
    rows, improvements = [], []
    for name, own in (("all parameters", []), ("--lora", ["--lora", *words])):
        run = train(finetune_options(own), folder / name.strip("-").replace(" ", "-"))
        after = loss(run.model)
        improvements.append(before - after)
        fraction = improvements[-1] / improvements[0]
        rows.append(
            (
                " ".join(own) or name,
                f"{count_parameters(run.model.adapters or run.model.params):,}",
                f"{before:.4f}",
                f"{after:.4f}",
                f"{improvements[-1]:.4f}",
                f"{fraction:.1%}",
                f"{run.history[-1]['seconds']:.0f}",
                "yes" if fraction >= REACHED else "no",
            )
        )
    columns = ("trained", "parameters", "loss before", "after", "gain", "of the full gain", "seconds")
    print_table("the default job", (*columns, f"reaches {REACHED:.0%}"), rows)


TABLES = {"precision": precision_table, "lora": lora_table}


def main() -> None:
    """Parses the name of the table; what else there is are options of `finetune`."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("table", choices=TABLES)
    parser.add_argument("--folder", type=pathlib.Path, default=pathlib.Path("runs/training-quality"))
    options, words = parser.parse_known_args()
    TABLES[options.table](options.folder, words)


if __name__ == "__main__":
    main()
