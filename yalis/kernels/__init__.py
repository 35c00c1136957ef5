"""Compute kernels behind plain functions on torch tensors (`yalis.kernels.ops`)."""
