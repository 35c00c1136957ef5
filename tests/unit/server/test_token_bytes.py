"""Bytes of tokens: joined they are the text, however its characters were cut."""

from __future__ import annotations

import tokenizers
from tokenizers import decoders, models

from tests.support.checkpoints import DEMO
from tests.unit.engine.test_detokenizer import byte_fallback, byte_level
from yalis.engine.tokenizer import Tokenizer
from yalis.server.token_bytes import TokenBytes

TEXT = "naïve 世界 🙂, the end\n\x00\x7f\xad"


def joined(tokenizer: Tokenizer, text: str) -> bytes:
    ids = tokenizer.encode(text, add_special_tokens=False)
    return b"".join(TokenBytes(tokenizer).of(token) for token in ids)


def test_byte_level() -> None:
    tokenizer = Tokenizer.from_pretrained(DEMO)
    ids = tokenizer.encode("世", add_special_tokens=False)
    assert [TokenBytes(tokenizer).of(token) for token in ids] == [b"\xe4", b"\xb8", b"\x96"]
    for some in (tokenizer, byte_level()):
        assert joined(some, TEXT) == TEXT.encode()
    assert tokenizer.bos_token is not None and tokenizer.bos_token_id is not None
    assert TokenBytes(tokenizer).of(tokenizer.bos_token_id) == tokenizer.bos_token.encode()
    assert TokenBytes(tokenizer).of(10**6) == b""


def test_byte_fallback() -> None:
    tokenizer = byte_fallback()
    assert TokenBytes(tokenizer).of(3 + 0xE6) == b"\xe6"
    assert joined(tokenizer, TEXT) == b" " + TEXT.encode()  # the blank that its normalizer puts in front
    assert TokenBytes(tokenizer).of(1) == b"<s>"


def test_other_vocabularies_give_the_text() -> None:
    backend = tokenizers.Tokenizer(models.WordPiece({"[UNK]": 0, "free": 1, "##dom": 2}, unk_token="[UNK]"))
    backend.decoder = decoders.WordPiece()
    assert TokenBytes(Tokenizer(backend)).of(1) == b"free"
    backend.decoder = None
    assert TokenBytes(Tokenizer(backend)).of(1) == b"free"
