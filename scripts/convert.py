"""Convert weights from one format into another: the same as `gpt2jax convert`."""

from gpt2jax.cli import start

if __name__ == "__main__":
    start("convert")
