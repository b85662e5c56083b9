"""Byte-level BPE, and the files in which tokenizers come."""
