"""Fine-tune a model, compare it with the one it came from, write a report: the same as `gpt2jax finetune`."""

from gpt2jax.cli.finetune import main

if __name__ == "__main__":
    main()
