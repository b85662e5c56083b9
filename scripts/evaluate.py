"""Loss and accuracy of a model on texts: the same as `gpt2jax evaluate`."""

from gpt2jax.cli import start

if __name__ == "__main__":
    start("evaluate")
