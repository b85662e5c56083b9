"""Helpers that know nothing of GPT-2: validation, files, progress."""
