"""The comparison of several models on the same texts and prompts."""
