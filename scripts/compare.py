"""Compare models on the same texts: the same as `gpt2jax compare`."""

from gpt2jax.cli import start

if __name__ == "__main__":
    start("compare")
