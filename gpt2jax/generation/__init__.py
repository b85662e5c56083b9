"""Text generation: requests, compiled decoding, and the ways to choose tokens."""
