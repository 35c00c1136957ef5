"""The engine: requests, scheduling, forward passes, sampling, text in and out, and the launch of ranks."""
