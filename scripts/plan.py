"""What a training run needs on a device that need not be here: the same as `gpt2jax plan`."""

from gpt2jax.cli import start

if __name__ == "__main__":
    start("plan")
