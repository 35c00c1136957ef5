"""NVRAR, the fused all-reduce: building its libraries, binding them, torch operators. docs/nvrar.md has the design.

``csrc/nvrar.h`` is the interface of two libraries: ``cuda`` (NVSHMEM) and ``host`` (CPU ranks of one host).
"""
