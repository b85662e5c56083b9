"""Loss and accuracy of a model on texts: the same as `gpt2jax evaluate`."""

from gpt2jax.cli.evaluate import main

if __name__ == "__main__":
    main()
