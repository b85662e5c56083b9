"""The study that the project reproduces, from beginning to end."""
