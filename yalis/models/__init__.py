"""Architectures: a config parser, a lazy registry, and one short file per architecture."""
