"""``tools/setup_venv.sh`` on a machine that is not as it should be; a stand-in for Python says what it was asked."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.support.ranks import ROOT

# What the script asks of the machine's Python: its version, whether there is a CUDA build of torch, ensurepip, a venv.
_PYTHON = """#!/bin/bash
echo "python $*" >> "$CALLS"
case "$*" in
    "-c import ensurepip") exit "$NO_ENSUREPIP" ;;
    "-c import torch"*) exit 1 ;;
    "-m venv"*) mkdir -p .venv/bin && printf '#!/bin/bash\\necho "venv $*" >> "$CALLS"\\n' > .venv/bin/python &&
        chmod +x .venv/bin/python ;;
esac
"""


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """As much of the repository as the script reads, and the stand-in."""
    (tmp_path / "tools").mkdir()
    shutil.copy(ROOT / "tools" / "setup_venv.sh", tmp_path / "tools")
    shutil.copy(ROOT / "requirements-lock.txt", tmp_path)
    (tmp_path / "python").write_text(_PYTHON)
    (tmp_path / "python").chmod(0o755)
    return tmp_path


def leave(checkout: Path, python: str) -> None:
    (checkout / ".venv" / "bin").mkdir(parents=True)
    (checkout / ".venv" / "bin" / "python").write_text(f"#!/bin/bash\n{python}\n")
    (checkout / ".venv" / "bin" / "python").chmod(0o755)
    (checkout / ".venv" / "leftover").touch()


def set_up(checkout: Path, *, ensurepip: bool = True) -> tuple[subprocess.CompletedProcess[str], list[str]]:
    calls = checkout / "calls"
    calls.touch()
    done = subprocess.run(
        ["bash", "tools/setup_venv.sh", str(checkout / "python")],
        capture_output=True,
        text=True,
        cwd=checkout,
        env=os.environ | {"CALLS": str(calls), "NO_ENSUREPIP": str(int(not ensurepip))},
        timeout=60,
    )
    return done, calls.read_text().splitlines()


def test_a_venv_without_pip_is_made_anew(checkout: Path) -> None:
    leave(checkout, 'echo "No module named pip" >&2; exit 1')
    done, calls = set_up(checkout)
    assert done.returncode == 0, done.stderr
    assert any(call.startswith("python -m venv") for call in calls)
    assert not (checkout / ".venv" / "leftover").exists()
    assert "venv -m pip --disable-pip-version-check install --quiet -r requirements-lock.txt" in calls


def test_a_whole_venv_is_kept(checkout: Path) -> None:
    leave(checkout, 'echo "venv $*" >> "$CALLS"')
    done, calls = set_up(checkout, ensurepip=False)
    assert done.returncode == 0, done.stderr
    assert not any(call.startswith("python -m venv") for call in calls)
    assert (checkout / ".venv" / "leftover").exists()


def test_without_ensurepip_one_line_says_what_to_install(checkout: Path) -> None:
    done, calls = set_up(checkout, ensurepip=False)
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("error: ")
    assert "apt-get install python3-venv" in done.stderr
    assert not any("venv" in call for call in calls)
