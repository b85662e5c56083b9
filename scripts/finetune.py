"""Fine-tune a model, compare it with the one it came from, write a report: the same as `gpt2jax finetune`."""

from gpt2jax.cli import start

if __name__ == "__main__":
    start("finetune")
