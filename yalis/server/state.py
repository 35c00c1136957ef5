"""``GET /state``: everything that the page shows, as of the latest status."""

from __future__ import annotations

import time
from typing import Any

import msgspec

from yalis import __version__
from yalis.server.frontend import Frontend


def server_state(frontend: Frontend) -> dict[str, Any]:
    """See docs/serving.md."""
    client = frontend.client
    status = client.status if client is not None else None
    extra = client.status_age_s if client is not None else 0.0
    dead = client is not None and client.failure is not None
    ranks = []
    for rank in status.ranks if status is not None else ():
        entry = msgspec.structs.asdict(rank)
        entry["beat_age_s"] = round(rank.beat_age_s + extra, 3)
        if rank.rank == 0 and client is not None and client.root_lost:
            entry["state"] = "lost"  # it cannot say so itself
        ranks.append(entry)
    info = client.info if client is not None else {}
    stats = status.stats if status is not None else None
    return {
        "model": frontend.model_names[0],
        "status": "dead" if dead and frontend.phase in ("ready", "draining") else frontend.phase,
        "message": None if frontend.phase == "ready" and not dead else frontend.trouble,
        "version": __version__,
        "uptime_s": round(time.monotonic() - frontend.started, 3),
        "restarts": frontend.restarts,
        "ranks": ranks,
        "kv": {
            "usage": stats.kv_usage if stats is not None else 0.0,
            "num_blocks": info.get("num_kv_blocks", 0),
            "block_size": info.get("block_size", 0),
        },
        "running": stats.num_running if stats is not None else 0,
        "waiting": stats.num_waiting if stats is not None else 0,
        "open_requests": frontend.num_admitted,
        "preemptions": stats.num_preemptions if stats is not None else 0,
        "tokens_per_s": frontend.pace.tokens_per_s,
        "step_ms": frontend.pace.step_ms,
        "engine": info,
    }
