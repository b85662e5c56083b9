"""Continue prompts: the same as `gpt2jax generate`."""

from gpt2jax.cli.generate import main

if __name__ == "__main__":
    main()
