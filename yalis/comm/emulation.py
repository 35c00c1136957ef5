"""An emulated network between declared nodes on one host: latency, bandwidth, loss, late ranks.

For CPU ranks whose nodes are declared. It shows how an algorithm's time grows with nodes and bytes, and lets a fit be
checked against what was put in. It says nothing about any real network, so whoever measures over it must say so.

It lives inside the transport: a message between nodes arrives ``alpha_s + bytes * s_per_byte`` after both ends are
ready for it (gloo's transfers are a rendezvous), or when it really arrives, whichever is later. Switched on by
``YALIS_EMULATED_FABRIC``, alike on all ranks:

    YALIS_EMULATED_FABRIC="alpha_s=0.002,bytes_per_s=1e8"
    YALIS_EMULATED_FABRIC="alpha_s=0.002,loss=0.01,retransmit_s=0.02,late=3:0.05"
"""

from __future__ import annotations

import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from yalis.errors import ConfigError

VARIABLE = "YALIS_EMULATED_FABRIC"
_SPIN_S = 200e-6
_NAMES = ("alpha_s", "bytes_per_s", "loss", "retransmit_s", "late", "seed")
# Stands alone: the nodes are network namespaces, and the kernel keeps the rate (`yalis.study.netns`).
NAMESPACES = "netns"


@dataclass(frozen=True)
class EmulatedFabric:
    """What lies between nodes.

    Args:
        alpha_s: latency of a message in seconds.
        s_per_byte: seconds for each byte of it.
        loss: share of messages that are lost and sent again, 0 to below 1; each time costs ``retransmit_s`` seconds.
        late: world rank -> seconds by which it enters every exchange between nodes late.
        seed: of the losses; every rank draws its own.
        namespaces: bytes travel between network namespaces at ``s_per_byte``; nothing is added for them here.

    Raises:
        ConfigError: a number is out of range.
    """

    alpha_s: float = 0.0
    s_per_byte: float = 0.0
    loss: float = 0.0
    retransmit_s: float = 0.0
    late: Mapping[int, float] = field(default_factory=dict)
    seed: int = 0
    namespaces: bool = False

    def __post_init__(self) -> None:
        for name in ("alpha_s", "s_per_byte", "retransmit_s"):
            if not 0.0 <= getattr(self, name) <= 10.0:
                raise ConfigError(f"emulated fabric: {name}={getattr(self, name)}: must be 0 to 10 seconds")
        if not 0.0 <= self.loss <= 0.9:
            raise ConfigError(f"emulated fabric: loss={self.loss}: must be 0 to 0.9")
        for rank, delay_s in self.late.items():
            if rank < 0 or not 0.0 <= delay_s <= 10.0:
                raise ConfigError(f"emulated fabric: late={rank}:{delay_s}: must be RANK:SECONDS, at most 10 seconds")

    def __str__(self) -> str:
        rate = f"{1 / self.s_per_byte / 1e6:g} MB/s" if self.s_per_byte else "no limit on bytes"
        loss = f", {self.loss:.2%} lost" if self.loss else ""
        late = f", late ranks {dict(self.late)}" if self.late else ""
        kind = "emulated network (network namespaces)" if self.namespaces else "emulated network"
        return f"{kind}: {self.alpha_s * 1e6:g} us, {rate}{loss}{late}"

    @classmethod
    def parse(cls, text: str) -> EmulatedFabric:
        """Read ``alpha_s=...,bytes_per_s=...,loss=...,retransmit_s=...,late=RANK:SECONDS+...,seed=...,netns``.

        Raises:
            ConfigError: unknown name or bad number.
        """
        found: dict[str, float] = {}
        late: dict[int, float] = {}
        words = [word for word in text.split(",") if word]
        for word in words:
            if word == NAMESPACES:
                continue
            name, _, value = word.partition("=")
            if name not in _NAMES:
                raise ConfigError(f"{VARIABLE}: {name!r} is unknown; known: {', '.join((*_NAMES, NAMESPACES))}")
            try:
                if name == "late":
                    late = {int(r): float(s) for r, s in (pair.split(":") for pair in value.split("+"))}
                else:
                    found[name] = float(value)
            except ValueError:
                raise ConfigError(f"{VARIABLE}: {word!r} is no number (late: RANK:SECONDS, several with +)") from None
        rate = found.pop("bytes_per_s", 0.0)
        if rate < 0:
            raise ConfigError(f"{VARIABLE}: bytes_per_s={rate:g}: must be above 0, or 0 for no limit")
        seed = int(found.pop("seed", 0))
        s_per_byte = 1 / rate if rate else 0.0
        return cls(**found, s_per_byte=s_per_byte, late=late, seed=seed, namespaces=NAMESPACES in words)

    @classmethod
    def from_environment(cls, env: Mapping[str, str]) -> EmulatedFabric | None:
        """What `VARIABLE` says; None where it is unset or empty."""
        return cls.parse(env[VARIABLE]) if env.get(VARIABLE) else None


class FabricEnd:
    """One rank's end of an emulated fabric.

    Args:
        fabric: what lies in between. rank: this world rank.
    """

    def __init__(self, fabric: EmulatedFabric, rank: int):
        self.fabric = fabric
        self._late_s = fabric.late.get(rank, 0.0)
        self._random = random.Random(fabric.seed * 65537 + rank)

    def enter(self) -> None:
        """Come late, if this rank does."""
        if self._late_s:
            time.sleep(self._late_s)

    def arrive(self, sizes: Sequence[int], ready_s: float) -> None:
        """Return when messages whose ends were ready at ``ready_s`` (perf_counter) have all arrived.

        Args:
            sizes: bytes of each; they travel at the same time.
        """
        if self.fabric.namespaces:
            ready_s = time.perf_counter()  # the bytes have travelled already, and the latency comes on top
        due_s = max((ready_s + self._delay_s(nbytes) for nbytes in sizes), default=ready_s)
        # A sleep ends late by 50 us and more.
        while (left_s := due_s - time.perf_counter()) > 0:
            if left_s > _SPIN_S:
                time.sleep(left_s - _SPIN_S)

    def _delay_s(self, nbytes: int) -> float:
        fabric = self.fabric
        delay_s = fabric.alpha_s + (0.0 if fabric.namespaces else nbytes * fabric.s_per_byte)
        while fabric.loss and self._random.random() < fabric.loss:
            delay_s += fabric.retransmit_s
        return delay_s
