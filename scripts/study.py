"""Repeat the whole study on texts and write one report: the same as `gpt2jax study`."""

from gpt2jax.cli import start

if __name__ == "__main__":
    start("study")
