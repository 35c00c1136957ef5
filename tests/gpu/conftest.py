"""Multicast in the NVLink switch stays off for all tests and the processes that they start."""

from __future__ import annotations

import os

for _name, _value in (
    ("NCCL_NVLS_ENABLE", "0"),
    ("NVSHMEM_DISABLE_NVLS", "1"),
    ("TORCH_SYMM_MEM_DISABLE_MULTICAST", "1"),
):
    os.environ.setdefault(_name, _value)
