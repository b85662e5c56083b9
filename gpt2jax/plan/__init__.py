"""Memory and FLOPs of a training step on a device, which need not be here: compiled by XLA, or estimated."""
