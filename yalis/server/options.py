"""What an operator may decide about the server itself; the engine's options are `yalis.config.EngineConfig`."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass
from pathlib import Path

from yalis.errors import ConfigError
from yalis.server.tools import FAMILIES

MIN_KEY_CHARACTERS = 8


@dataclass(frozen=True, kw_only=True)
class ServerOptions:
    """Options of the API process.

    Args:
        host: interface to listen on.
        port: port there; 0 takes a free one.
        served_model_names: names that requests may use; the first is reported. Empty: the model as given.
        api_keys: any of them opens the interface; empty leaves it open to everybody who can connect.
        allowed_origins: origins that browsers may call from (CORS); none by default.
        chat_template: source of the chat template in place of the checkpoint's.
        tool_call_parser: family of the template's tool calls; None finds out by the template.
        max_queued_requests: requests (prompts times ``n``) that may wait beyond those that run; more get 429.
        max_body_bytes: largest request body.
        body_timeout_s: longest time for a request's head, and for its body, to arrive.
        drain_timeout_s: after SIGTERM, how long requests may finish.
        restarts: how often the engine is started again after a loss.
        profile_dir: where traces go; None refuses ``/start_profile``.
        log_requests: log prompts and parameters; off by default.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    served_model_names: tuple[str, ...] = ()
    api_keys: tuple[str, ...] = ()
    allowed_origins: tuple[str, ...] = ()
    chat_template: str | None = None
    tool_call_parser: str | None = None
    max_queued_requests: int = 1024
    max_body_bytes: int = 16 << 20
    body_timeout_s: float = 30.0
    drain_timeout_s: float = 30.0
    restarts: int = 0
    profile_dir: str | None = None
    log_requests: bool = False

    def __post_init__(self) -> None:
        if self.tool_call_parser is not None and self.tool_call_parser not in FAMILIES:
            raise ConfigError(f"tool_call_parser={self.tool_call_parser!r}: known ones are {', '.join(FAMILIES)}")
        if not 0 <= self.port < 65536:
            raise ConfigError(f"port={self.port}: must be 0 to 65535")
        for name, low in (("max_queued_requests", 0), ("max_body_bytes", 1024), ("restarts", 0)):
            if getattr(self, name) < low:
                raise ConfigError(f"{name}={getattr(self, name)}: must be at least {low}")
        for name in ("body_timeout_s", "drain_timeout_s"):
            if not 0.0 <= getattr(self, name) < float("inf"):
                raise ConfigError(f"{name}={getattr(self, name)}: must be a number of seconds, 0 or more")
        for key in self.api_keys:
            if len(key) < MIN_KEY_CHARACTERS or not key.isascii() or not key.isprintable() or " " in key:
                raise ConfigError(
                    f"an API key must have at least {MIN_KEY_CHARACTERS} printable ASCII characters without blanks; "
                    "make one with: openssl rand -hex 16"
                )

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine can connect."""
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False


def read_api_keys(path: str) -> tuple[str, ...]:
    """Keys of a file, one per line; blank lines and lines that start with ``#`` do not count.

    Raises:
        ConfigError: the file cannot be read or holds no key.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"api_key_file={path}: {error}") from error
    keys = tuple(line.strip() for line in lines if line.strip() and not line.startswith("#"))
    if not keys:
        raise ConfigError(f"api_key_file={path} holds no key; write one per line")
    return keys


def read_template(text_or_path: str) -> str:
    """A chat template: a file's content, or the text itself where it has template markup.

    Raises:
        ConfigError: neither.
    """
    if "{" in text_or_path:
        return text_or_path
    try:
        return Path(text_or_path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"chat_template={text_or_path}: {error}") from error
