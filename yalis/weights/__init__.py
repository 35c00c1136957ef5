"""Checkpoints: resolve, index and stream them; every rank reads only its own slices."""
