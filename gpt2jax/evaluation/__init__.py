"""How good a model is on texts: loss, accuracy, perplexity, bits per byte."""
