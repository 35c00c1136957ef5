"""The examples of docs/serving.md are run as they stand there, against a server started as they say."""

from __future__ import annotations

import re
import shutil
import subprocess
import time
from pathlib import Path

import pytest

from tests.support.ranks import ROOT
from tests.support.server import Server

TEXT = (ROOT / "docs" / "serving.md").read_text()


def examples() -> list[tuple[str, str]]:
    """Commands with ``curl`` in console blocks, and the output below each."""
    found = []
    for block in re.findall(r"```console\n(.*?)```", TEXT, re.DOTALL):
        for part in re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]:
            # A command goes on while its quotes are open.
            lines = part.splitlines()
            count = next(n for n in range(1, len(lines) + 1) if "\n".join(lines[:n]).count("'") % 2 == 0)
            found.append(("\n".join(lines[:count]), "\n".join(lines[count:])))
    return [(command, output) for command, output in found if command.startswith("curl ")]


def pattern(output: str) -> str:
    """``[...]`` stands for anything; the page's line breaks are not the server's, and ``\\n\\n`` ends an event."""
    text = " ".join(output.split())
    return r"\s*".join(r".*".join(re.escape(part) for part in word.split("[...]")) for word in text.split(" "))


def test_there_are_examples() -> None:
    assert len(examples()) >= 12


@pytest.mark.skipif(shutil.which("curl") is None, reason="the examples use curl")
@pytest.mark.parametrize(("command", "output"), examples(), ids=lambda value: value[:60].replace("\n", " "))
def test_example(one: Server, profile_dir: Path, command: str, output: str) -> None:
    address = "http://127.0.0.1:8000"
    assert command.count(address) == 1
    deadline = time.monotonic() + 10.0
    while True:  # what is asked about the server's state may be of the example before, for a beat or two
        done = subprocess.run(
            ["bash", "-c", command.replace(address, one.url)], capture_output=True, text=True, timeout=30, check=True
        )
        if re.search(pattern(output), done.stdout, re.DOTALL):
            break
        assert "/state" in command, f"{done.stdout}\nis not\n{output}"
        assert time.monotonic() < deadline, f"{done.stdout}\nis not\n{output}"
        time.sleep(0.2)
    if "stop_profile" in command:
        # Other tests leave theirs there, too.
        latest = max(profile_dir.iterdir(), key=lambda path: path.stat().st_mtime)
        assert "traceEvents" in latest.read_text()
