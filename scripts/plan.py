"""What a training run needs on a device that need not be here: the same as `gpt2jax plan`."""

from gpt2jax.cli.plan import main

if __name__ == "__main__":
    main()
