"""The bytes that a token stands for, also where they are only a part of a character.

The text of half a character is U+FFFD, from which nobody can put the character together again; its bytes do.
"""

from __future__ import annotations

import json
import re
from typing import Any

from yalis.engine.tokenizer import Tokenizer

_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def _alphabet() -> dict[str, int]:
    """Byte by the character that stands for it in byte-level vocabularies (GPT-2's table, which everybody shares)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + at): byte for at, byte in enumerate(others)}


_ALPHABET = _alphabet()


class TokenBytes:
    """Bytes of the tokens of one tokenizer."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._added = frozenset(tokenizer.added_tokens.values())
        steps = _steps(tokenizer.backend.decoder)
        kinds = {step.get("type") for step in steps}
        self._byte_level = "ByteLevel" in kinds
        self._fallback = "ByteFallback" in kinds
        # How vocabularies with byte tokens write blanks, such as U+2581.
        self._replaced = [
            (step["pattern"]["String"], step["content"])
            for step in steps
            if step.get("type") == "Replace" and "String" in step["pattern"]
        ] + [(step["replacement"], " ") for step in steps if step.get("type") == "Metaspace"]

    def of(self, token_id: int) -> bytes:
        """Bytes of a token; none where the id is no token (padding of the model's matrices)."""
        token = self._tokenizer.backend.id_to_token(token_id)
        if token is None:
            return b""
        if token_id in self._added:
            return token.encode()
        if self._byte_level:
            return b"".join(bytes([_ALPHABET[c]]) if c in _ALPHABET else c.encode() for c in token)
        if self._fallback:
            if match := _BYTE.fullmatch(token):
                return bytes([int(match[1], 16)])
            for mark, text in self._replaced:
                token = token.replace(mark, text)
            return token.encode()
        return self._tokenizer.decode([token_id], skip_special_tokens=False).encode()


def _steps(decoder: Any) -> list[dict[str, Any]]:
    """What a decoder does, step by step, as ``tokenizer.json`` describes it."""
    if decoder is None:
        return []
    described = json.loads(decoder.__getstate__())
    return described["decoders"] if described.get("type") == "Sequence" else [described]
