"""Paged KV cache bookkeeping: which blocks belong to whom. No device work, no tensors."""
