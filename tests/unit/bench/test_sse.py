"""The event-stream parser: the same events however the bytes are cut."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from yalis.bench import sse
from yalis.bench.sse import SSEError, SSEParser

TEXTS = st.lists(st.text(st.characters(exclude_characters="\r\n", exclude_categories=["Cs"]), min_size=1), max_size=6)


def parse(raw: bytes, cuts: list[int]) -> list[str]:
    parser, events, at = SSEParser(), [], 0
    for cut in [*sorted(min(c, len(raw)) for c in cuts), len(raw)]:
        events += parser.feed(raw[at:cut])
        at = cut
    return events


@given(texts=TEXTS, ends=st.data(), cuts=st.lists(st.integers(0, 400)))
def test_any_cut_any_line_end(texts: list[str], ends: st.DataObject, cuts: list[int]) -> None:
    raw = b""
    for text in texts:
        end = ends.draw(st.sampled_from([b"\n", b"\r\n", b"\r"]))
        comment = ends.draw(st.sampled_from([b"", b": ping", b"event: x", b"retry", b"id: 3"]))
        raw += (comment + end if comment else b"") + b"data: " + text.encode() + end + end
    assert parse(raw, cuts) == texts


def test_shapes_of_an_event() -> None:
    assert parse(b"data: a\ndata: b\n\n", []) == ["a\nb"]
    assert parse(b"data:a\n\ndata:  b\n\n", []) == ["a", " b"]  # one blank belongs to the field, not two
    assert parse(b"\xef\xbb\xbfdata: a\n\n", []) == ["a"]
    assert parse(b"\n\n: only a comment\n\nevent: x\n\n", []) == []
    assert parse(b"data: whole\n\ndata: half\n", []) == ["whole"]
    assert parse(b"data\n\n", []) == [""]
    assert parse(b"data: \xff\n\n", []) == ["�"]


def test_no_event_grows_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sse, "MAX_EVENT_BYTES", 100)
    with pytest.raises(SSEError, match="100 bytes"):
        SSEParser().feed(b"x" * 101)
    with pytest.raises(SSEError, match="100 bytes"):
        SSEParser().feed(b"data: 01234\n" * 30)
