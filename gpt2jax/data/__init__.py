"""Texts and what becomes of them on the way to the model: sources, tokenized documents, batches."""
