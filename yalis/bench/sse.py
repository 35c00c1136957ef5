"""A parser of server-sent events that does not care how the bytes were cut on their way."""

from __future__ import annotations

from yalis.errors import YalisError

MAX_EVENT_BYTES = 32 << 20


class SSEError(YalisError):
    """The stream is none of server-sent events: one event is larger than any answer could be."""


class SSEParser:
    """Feed bytes, get the ``data`` of complete events.

    Lines end with LF, CRLF or CR; an empty line ends an event; several ``data`` lines of one event are joined with LF;
    comments (``:``) and other fields are skipped. What is left without an empty line behind it when the stream ends
    is no event, so that half an event is never taken for a whole one.
    """

    def __init__(self) -> None:
        self._rest = bytearray()
        self._data: list[str] = []
        self._size = 0
        self._after_cr = False

    def feed(self, chunk: bytes) -> list[str]:
        """Data of the events that ``chunk`` completes, in order.

        Raises:
            SSEError: an event grew beyond `MAX_EVENT_BYTES`.
        """
        events: list[str] = []
        if self._after_cr and chunk[:1] == b"\n":
            chunk = chunk[1:]  # second half of a CRLF whose first half ended the chunk before
        if chunk:
            self._after_cr = chunk[-1:] == b"\r"
        self._rest += chunk
        if b"\n" not in chunk and b"\r" not in chunk:
            self._check(len(self._rest))
            return events
        # `bytes.splitlines` knows exactly these three line ends, unlike `str.splitlines`.
        lines = bytes(self._rest).splitlines(keepends=True)
        self._rest.clear()
        if not lines[-1].endswith((b"\n", b"\r")):
            self._rest += lines.pop()
        for line in lines:
            data = self._take(line.rstrip(b"\r\n"))
            if data is not None:
                events.append(data)
        self._check(len(self._rest))
        return events

    def _take(self, line: bytes) -> str | None:
        if not line:
            data = "\n".join(self._data) if self._data else None
            self._data.clear()
            self._size = 0
            return data
        name, _, value = line.partition(b":")
        if name.removeprefix(b"\xef\xbb\xbf") == b"data":
            value = value.removeprefix(b" ")
            self._size += len(value)
            self._data.append(value.decode("utf-8", "replace"))
        return None

    def _check(self, pending: int) -> None:
        if self._size + pending > MAX_EVENT_BYTES:
            raise SSEError(f"one event of the stream is larger than {MAX_EVENT_BYTES} bytes; is this an event stream?")
