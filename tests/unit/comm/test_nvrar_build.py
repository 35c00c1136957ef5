"""Building the native libraries: cache, concurrency, prebuilt folders, and what is said when something is missing."""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from yalis.cli.main import main
from yalis.comm.nvrar import build, library
from yalis.comm.nvrar.link import chosen_options
from yalis.errors import BuildError, CommError, ConfigError
from yalis.utils import native
from yalis.utils.native import Recipe

needs_cxx = pytest.mark.skipif(native.cxx_compiler() is None, reason="no C++ compiler; install g++ or set CXX")


@pytest.fixture(autouse=True)
def _fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    for function in (build.library_path, build.find_nvcc, build.find_nvshmem, native.compiler_version):
        function.cache_clear()
    monkeypatch.delenv(build.DIRECTORY_VARIABLE, raising=False)


def fake_compiler(folder: Path, body: str) -> Path:
    program = folder / "cc"
    program.write_text(f'#!/bin/sh\n[ "$1" = --version ] && echo "cc ${{FAKE_VERSION:-1}}" && exit 0\n{body}\n')
    program.chmod(0o755)
    return program


_COPY = 'while [ "$1" != -o ]; do shift; done; sleep 0.3; echo built >> "$(dirname "$3")/log"; cp "$3" "$2"'


def _recipe(folder: Path, *flags: str, key: tuple[str, ...] = ()) -> Recipe:
    source = folder / "x.c"
    if not source.exists():
        source.write_text("int x;\n")
    compiler = folder / "cc"
    return Recipe("x", (str(compiler), *flags), (source,), key=key)


_BUILD = """
import sys
from pathlib import Path
from yalis.utils import native

folder = Path(sys.argv[1])
print(native.build(native.Recipe("x", (str(folder / "cc"),), (folder / "x.c",)), folder / "cache"))
"""


def test_one_of_many_processes_builds(tmp_path: Path) -> None:
    fake_compiler(tmp_path, _COPY)
    (tmp_path / "x.c").write_text("int x;\n")
    command = [sys.executable, "-c", _BUILD, str(tmp_path)]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(6)]
    paths = {process.communicate(timeout=60)[0] for process in processes}
    assert [process.returncode for process in processes] == [0] * 6
    assert len(paths) == 1
    assert (tmp_path / "log").read_text() == "built\n"


def test_the_key_covers_sources_flags_version_and_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_compiler(tmp_path, "")
    names = {_recipe(tmp_path).file_name(), _recipe(tmp_path, "-O2").file_name()}
    names.add(_recipe(tmp_path, key=("2",)).file_name())
    (tmp_path / "x.h").write_text("#pragma once\n")
    names.add(_recipe(tmp_path).file_name())
    (tmp_path / "x.cuh").write_text("#pragma once\n")
    names.add(_recipe(tmp_path).file_name())
    (tmp_path / "x.c").write_text("int y;\n")
    names.add(_recipe(tmp_path).file_name())
    monkeypatch.setenv("FAKE_VERSION", "2")
    native.compiler_version.cache_clear()
    names.add(_recipe(tmp_path).file_name())
    assert len(names) == 7
    assert _recipe(tmp_path).file_name() in names


def test_waits_for_a_compiler_or_another_process_end(tmp_path: Path) -> None:
    fake_compiler(tmp_path, "sleep 30")
    start = time.monotonic()
    with pytest.raises(BuildError, match="no end after 0.3 s"):
        native.build(_recipe(tmp_path), tmp_path / "cache", timeout_s=0.3)
    lock = tmp_path / "cache" / f".{_recipe(tmp_path).file_name()}.lock"
    with lock.open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)  # of another open file than the builder's: as another process would hold it
        with pytest.raises(BuildError, match="another process has been building"):
            native.build(_recipe(tmp_path), tmp_path / "cache", timeout_s=0.3)
    assert time.monotonic() - start < 10
    assert [p.name for p in (tmp_path / "cache").iterdir() if not p.name.startswith(".")] == []


def test_a_refusal_carries_command_and_words(tmp_path: Path) -> None:
    fake_compiler(tmp_path, 'echo "x.c:1: error: no" >&2; exit 1')
    with pytest.raises(BuildError, match=r"cc -o(.|\n)*error: no"):
        native.build(_recipe(tmp_path), tmp_path / "cache")


def test_what_is_missing_is_named_with_the_remedy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(build, "cxx_compiler", lambda: None)
    with pytest.raises(BuildError, match=r"install g\+\+ or set CXX"):
        build.recipe("host")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.delenv("CUDACXX", raising=False)
    with pytest.raises(BuildError, match="install the CUDA toolkit"):
        build.find_nvcc()
    monkeypatch.setattr(build.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(BuildError, match="pip install nvidia-nvshmem-cu13"):
        build.find_nvshmem()
    empty = type("Spec", (), {"submodule_search_locations": [str(tmp_path)]})
    monkeypatch.setattr(build.importlib.util, "find_spec", lambda name: empty)
    with pytest.raises(BuildError, match="lacks include/nvshmem.h"):
        build.find_nvshmem()


def nvshmem(folder: Path) -> Path:
    """Something that looks like the wheel."""
    for name in ("include/nvshmem.h", "lib/libnvshmem_device.a", "lib/libnvshmem_host.so.3"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("")
    return folder


def test_the_cuda_command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    wheel = nvshmem(tmp_path / "nvshmem")
    spec = type("Spec", (), {"submodule_search_locations": [str(wheel)]})
    monkeypatch.setattr(build.importlib.util, "find_spec", lambda name: spec)
    monkeypatch.setattr(build, "_nvshmem_version", lambda: "nvidia-nvshmem-cu13 3.4.5")
    monkeypatch.setenv("CUDACXX", str(fake_compiler(tmp_path, _COPY.replace("sleep 0.3; ", ""))))
    plan = build.recipe("cuda", (90, 100))
    assert plan.command[0] == str(tmp_path / "cc")
    assert "arch=compute_90,code=sm_90" in plan.command and "arch=compute_100,code=sm_100" in plan.command
    assert "-rdc=true" in plan.command and "--split-compile=0" in plan.command
    assert plan.libraries[1:3] == ("-lnvshmem_device", "-l:libnvshmem_host.so.3")
    assert plan.digest() != build.recipe("cuda", (90,)).digest()
    monkeypatch.setattr(build, "_nvshmem_version", lambda: "nvidia-nvshmem-cu13 3.4.6")
    build.find_nvshmem.cache_clear()
    assert build.recipe("cuda", (90, 100)).digest() != plan.digest()


@pytest.mark.parametrize(("text", "archs"), [("80,90,100", (80, 90, 100)), ("sm_90", (90,)), ("100, 80,80", (80, 100))])
def test_architectures(text: str, archs: tuple[int, ...]) -> None:
    assert build.parse_architectures(text) == archs


@pytest.mark.parametrize("text", ["", "hopper", "9.0", "75", "90;80"])
def test_impossible_architectures(text: str) -> None:
    with pytest.raises(ConfigError, match="architecture"):
        build.parse_architectures(text)


def test_build_command_and_prebuilt_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "out"
    copy = 'while [ "$1" != -o ]; do shift; done; cp "$3" "$2"'
    monkeypatch.setattr(build, "cxx_compiler", lambda: str(fake_compiler(tmp_path, copy)))
    monkeypatch.setenv("YALIS_CACHE_DIR", str(tmp_path / "unused"))
    assert main(["build", "--library", "host", "--output", str(folder)]) == 0
    assert capsys.readouterr().out.splitlines() == [str(folder / "libnvrar_host.so")]
    assert sorted(p.name for p in folder.iterdir()) == ["libnvrar_host.so", "nvrar.json"]
    monkeypatch.setenv(build.DIRECTORY_VARIABLE, str(folder))
    assert build.library_path("host") == folder / "libnvrar_host.so"
    assert not (tmp_path / "unused").exists()

    manifest = json.loads((folder / "nvrar.json").read_text())
    build.library_path.cache_clear()
    with pytest.raises(BuildError, match="holds no libnvrar_cuda.so"):
        build.library_path("cuda", 90)
    (folder / "libnvrar_cuda.so").write_text("")
    for change, words in (
        ({"sources": "0"}, "other sources"),
        ({"archs": [80]}, "this device is 90"),
        ({"archs": [90], "nvshmem": "old"}, "made with old, installed is"),
    ):
        (folder / "nvrar.json").write_text(json.dumps(manifest | {"compilers": {"cuda": "x"}} | change))
        monkeypatch.setattr(build, "find_nvshmem", lambda: build.Nvshmem(folder, folder, folder, "new"))
        with pytest.raises(BuildError, match=words):
            build.library_path("cuda", 90)
    (folder / "nvrar.json").write_text("{")
    with pytest.raises(BuildError, match="no readable nvrar.json"):
        build.library_path("host")


def test_build_command_refuses_what_it_cannot(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(build, "cxx_compiler", lambda: None)
    assert main(["build", "--library", "host"]) == 1
    assert "install g++" in capsys.readouterr().err
    assert main(["build", "--arch", "75"]) == 1
    assert "the least is 80" in capsys.readouterr().err


@needs_cxx
def test_the_library_refuses_by_name(tmp_path: Path) -> None:
    options = library.Options(1, 1, 0, 0, 1.0)
    with pytest.raises(CommError, match="at least two ranks"):
        library.host_bytes(options)
    with pytest.raises(CommError, match="relay"):
        library.host_bytes(library.Options(2, 1, 0, 0, 1.0, relay=True))
    with pytest.raises(CommError, match="host_memory"):
        library.Handle("host", 0, library.Options(2, 1, 0, 0, 1.0), b"")
    assert library.host_bytes(library.Options(2, 2, 0, 0, 1.0)) > 1 << 20
    assert len(library.unique_id("host")) == library.UNIQUE_ID_BYTES
    assert library.unique_id("host") != library.unique_id("host")


@needs_cxx
def test_one_process_as_two_ranks(tmp_path: Path) -> None:
    """The binding by itself: bad arguments, a peer that never opens, limits."""
    import ctypes
    import mmap
    import threading

    size = library.host_bytes(library.Options(2, 1, 0, 0, 1.0, max_bytes=4096))
    memory = mmap.mmap(-1, size)
    base = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    with pytest.raises(CommError, match="rank 1 did not come"):
        library.Handle("host", 0, library.Options(2, 1, 0, 0, 0.2, max_bytes=4096), b"", base)
    memory = mmap.mmap(-1, size)
    base = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    handles: dict[int, library.Handle] = {}

    def join(rank: int) -> None:
        options = library.Options(2, 1, rank, 0, 5.0, max_bytes=4096)
        handles[rank] = library.Handle("host", 0, options, b"", base)

    other = threading.Thread(target=join, args=(1,))
    other.start()
    join(0)
    other.join()
    one = handles[0]
    assert (one.info.ranks, one.info.rank, one.info.max_bytes, one.info.formats) == (2, 0, 4096, library.FORMATS)
    x = (ctypes.c_float * 2048)()
    at = ctypes.addressof(x)
    good = library.Plan("doubling", "cells", 1, 1)
    for words, count, dtype, plan in (
        ("too large", 2048, 2, good),
        ("dtype 3", 4, 3, good),
        ("grid", 4, 2, library.Plan("doubling", "cells", 2, 1)),
        ("takes 1", 4, 2, library.Plan("doubling", "cells", 1, 32)),
    ):
        with pytest.raises(CommError, match=words):
            one.all_reduce(at, at, count, dtype, library.raw_plan(plan), 0)
    with pytest.raises(CommError, match="overlap"):
        one.all_reduce(at, at + 8, 4, 2, library.raw_plan(good), 0)
    for residual, weight in ((at, at + 128), (at + 64, at + 32), (at + 64, at + 80)):
        with pytest.raises(CommError, match="overlaps"):
            one.all_reduce_rmsnorm(at, residual, weight, at, 1, 16, 1e-5, 2, library.raw_plan(good), 0)
    assert one.failure() is None, "a refused call leaves the communicator as it was"
    one.abort()
    failure = handles[1].failure()
    assert failure is not None and (failure.rank, failure.reason, failure.phase) == (0, "aborted", "between calls")
    with pytest.raises(library.NvrarFailed, match="aborted"):
        handles[1].all_reduce(at, at, 4, 2, library.raw_plan(good), 0)
    assert all(value != value for value in x[:4])
    for handle in handles.values():
        handle.close()
        handle.close()


def test_options_by_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("YALIS_NVRAR_OPTIONS", "whole_cells, ordinary_launch")
    assert chosen_options() == ["whole_cells", "ordinary_launch"]
    raw = library.Options(2, 1, 0, 0, 1.0, **dict.fromkeys(chosen_options(), True)).raw()
    assert (raw.relay, raw.whole_cells, raw.ordinary_launch) == (0, 1, 1)
    monkeypatch.setenv("YALIS_NVRAR_OPTIONS", "fast")
    with pytest.raises(ConfigError, match="'fast' is none of relay"):
        chosen_options()


def test_interface_version_matches_the_header() -> None:
    text = (build.CSRC / "nvrar.h").read_text()
    assert f"#define NVRAR_ABI_VERSION {library.ABI_VERSION}\n" in text
    assert f"#define NVRAR_UNIQUE_ID_BYTES {library.UNIQUE_ID_BYTES}\n" in text
    assert os.environ.get(build.DIRECTORY_VARIABLE) is None
