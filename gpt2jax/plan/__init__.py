"""What a training run needs on a device that need not be here: memory by kind, FLOPs, tokens per second."""
