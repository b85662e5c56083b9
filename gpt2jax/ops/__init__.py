"""Numerics: arrays in, arrays out, with their own gradients where that pays."""
