"""Multicast in the NVLink switch stays off, for NVSHMEM and for what it is compared with."""

from __future__ import annotations

import os

os.environ.setdefault("NVSHMEM_DISABLE_NVLS", "1")  # before anything starts them; children have these from here
os.environ.setdefault("NCCL_NVLS_ENABLE", "0")
os.environ.setdefault("TORCH_SYMM_MEM_DISABLE_MULTICAST", "1")
