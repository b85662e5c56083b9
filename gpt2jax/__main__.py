"""`python -m gpt2jax`: the same as the command `gpt2jax`."""

from gpt2jax.cli import start

if __name__ == "__main__":
    start()
