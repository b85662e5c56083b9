"""Checks of an installation: versions, devices, caches, numerics, and resuming a killed run."""
