"""Low-rank adapters: settings, initialisation, merging, combining."""
