"""Continue prompts: the same as `gpt2jax generate`."""

from gpt2jax.cli import start

if __name__ == "__main__":
    start("generate")
