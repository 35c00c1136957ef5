"""Predictions kept under an id before anything is measured, and their comparison with what was measured.

The id is a hash of the content, so a stored prediction cannot be changed without losing its name.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from yalis.errors import ConfigError
from yalis.study.terms import NAMES
from yalis.utils.machine import git_commit

DEFAULT_STORE = Path(".yalis/predictions")


def save(record: Mapping[str, Any], store: Path) -> str:
    """Write a plan's record; returns its id.

    Raises:
        ConfigError: the folder cannot be written.
    """
    stored = {"time_utc": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), "commit": git_commit(), **record}
    text = json.dumps(stored, indent=1, sort_keys=True)
    name = _digest(text)
    try:
        store.mkdir(parents=True, exist_ok=True)
        (store / f"{name}.json").write_text(text)
    except OSError as error:
        raise ConfigError(f"predictions cannot be stored in {store}: {error.strerror}; use --store FOLDER") from None
    return name


def load(name: str, store: Path) -> dict[str, Any]:
    """The prediction of an id.

    Raises:
        ConfigError: there is none, or it was changed since it was stored.
    """
    path = store / f"{name}.json"
    try:
        text = path.read_text()
    except OSError:
        known = sorted(p.stem for p in store.glob("*.json")) if store.is_dir() else []
        raise ConfigError(f"prediction {name!r}: not in {store} (there: {', '.join(known) or 'none'})") from None
    if _digest(text) != name:
        raise ConfigError(f"prediction {name!r} in {store} was changed after it was stored; its numbers prove nothing")
    loaded: dict[str, Any] = json.loads(text)
    return loaded


def match(
    record: Mapping[str, Any], *, tp: int, pp: int, nodes: int, all_reduce: str, workload: Mapping[str, int]
) -> Any:
    """The stored row for one layout.

    Args:
        all_reduce: as the engine was told; ``auto`` is what the engine takes by itself, if that was planned.
        workload: ``batch``, ``input_len``, ``output_len``.

    Raises:
        ConfigError: the prediction is of another workload, or has no such layout; names what it has.
    """
    mine = record["workload"]
    for key, value in workload.items():
        if mine[key] != value:
            raise ConfigError(
                f"the prediction is for {key}={mine[key]}, the measurement for {value}; plan that workload"
            )
    aliases = {"gloo": "torch", "native": "shm"}
    wanted = aliases.get(all_reduce, all_reduce)
    rows = [r for r in record["rows"] if (r["tp"], r["pp"], r["nodes"]) == (tp, pp, nodes)]
    if tp > 1 and wanted != "auto":
        rows = [r for r in rows if r["all_reduce"] == wanted]
    if not rows:
        have = ", ".join(f"TP{r['tp']} PP{r['pp']} on {r['nodes']} ({r['all_reduce']})" for r in record["rows"])
        raise ConfigError(f"the prediction has no TP{tp} PP{pp} on {nodes} node(s) with {all_reduce}; it has: {have}")
    return next((r for r in rows if wanted == "auto" and r.get("auto")), rows[0])


def residuals(row: Mapping[str, Any], measured: Mapping[str, Any]) -> list[tuple[str, float, float | None]]:
    """Predicted and measured seconds, named: TTFT, TPOT, and the terms of TPOT.

    Args:
        row: a stored prediction. measured: ``ttft_s``, ``tpot_s`` and ``tpot_terms_s`` (`yalis.study.explain`). Terms
            that the engine cannot tell apart are summed on both sides under its name for them.

    Returns:
        (name, predicted, measured or None).
    """
    found: list[tuple[str, float, float | None]] = [
        ("TTFT", row["ttft_s"], measured.get("ttft_s")),
        ("TPOT", row["tpot_s"], measured.get("tpot_s")),
    ]
    terms = measured.get("tpot_terms_s")
    if terms is None:
        return found
    predicted = dict(row["tpot_terms_s"])
    joined = dict(measured.get("joined", {}))
    if row.get("pp", 1) > 1:
        # The engine's clock has the wait for a stage within the transfer.
        joined["pipeline and wait"] = ["pipeline_s", "wait_s"]
    for name, members in joined.items():
        found.append((name, sum(predicted.pop(m) for m in members), sum(terms.get(m, 0.0) for m in members)))
    for name, value in predicted.items():
        if value or terms.get(name):
            found.append((NAMES[name], value, terms.get(name, 0.0)))
    return found


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:12]
