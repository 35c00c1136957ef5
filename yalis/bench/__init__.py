"""Benchmarks: a timing harness, the all-reduce table, the latency of the engine, a server under load."""
