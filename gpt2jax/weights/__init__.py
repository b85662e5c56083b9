"""Weights from files and back: one module and one declarative table for each format."""
