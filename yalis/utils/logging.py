"""Logging: one logger per module under ``yalis``, the rank in front once it is known."""

from __future__ import annotations

import logging
import os
import sys

_ROOT = "yalis"


class _RankFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        rank = os.environ.get("RANK")
        record.rank = f" r{rank}" if rank is not None else ""
        return super().format(record)


def get_logger(name: str) -> logging.Logger:
    """Logger for module ``name``; handlers are attached by `setup_logging`, never at import."""
    return logging.getLogger(name if name.startswith(_ROOT) else f"{_ROOT}.{name}")


def setup_logging(level: str | None = None) -> None:
    """Attach one stderr handler to the ``yalis`` logger (idempotent).

    Args:
        level: a logging level name; default ``$YALIS_LOG_LEVEL`` or ``WARNING``.
    """
    root = logging.getLogger(_ROOT)
    root.setLevel((level or os.environ.get("YALIS_LOG_LEVEL") or "WARNING").upper())
    if not root.handlers:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(
            _RankFormatter("%(levelname).1s %(asctime)s yalis%(rank)s %(name)s: %(message)s", "%H:%M:%S")
        )
        root.addHandler(handler)
        root.propagate = False


def log_once(logger: logging.Logger, level: int, message: str, *, _seen: set[str] = set()) -> None:  # noqa: B006
    """Log ``message`` the first time it occurs in this process (fallbacks, chosen backends)."""
    if message not in _seen:
        _seen.add(message)
        logger.log(level, message)
