from __future__ import annotations

import os
import subprocess
import sys
import time
import types

import pytest

import yalis
from yalis.cli import main as cli
from yalis.errors import ConfigError


@pytest.fixture
def command(monkeypatch) -> types.ModuleType:
    """A subcommand ``probe`` with one option; the test sets what its ``run`` does."""
    module = types.ModuleType("probe_command")

    def add_parser(subparsers):
        parser = subparsers.add_parser("probe", help="for tests")
        parser.add_argument("--tensor-parallel-size", type=int, default=1)
        return parser

    module.add_parser = add_parser
    module.run = lambda args: 0
    monkeypatch.setitem(sys.modules, "probe_command", module)
    monkeypatch.setattr(cli, "COMMANDS", {"probe": ("probe_command", "for tests"), "absent": ("no_module", "absent")})
    return module


def usage_error(capsys, *argv: str) -> str:
    with pytest.raises(SystemExit) as exit_info:
        cli.main(argv)
    assert exit_info.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("yalis: error: ")
    assert error.count("\n") == 1
    return error


def test_run_gets_its_arguments_and_gives_the_exit_code(command) -> None:
    command.run = lambda args: args.tensor_parallel_size
    assert cli.main(["probe", "--tensor-parallel-size", "7"]) == 7


def test_version(capsys) -> None:
    with pytest.raises(SystemExit) as exit_info:
        cli.main(["--version"])
    assert exit_info.value.code == 0
    assert capsys.readouterr().out == f"yalis {yalis.__version__}\n"


def test_wrong_usage_is_one_line(command, capsys) -> None:
    assert "did you mean --tensor-parallel-size?" in usage_error(capsys, "probe", "--tensor-paralel-size=2")
    assert "'stray'" in usage_error(capsys, "probe", "stray")
    assert "unrecognized" in usage_error(capsys, "probe", "--tensor", "2")  # no abbreviations
    assert "invalid int value: 'x'" in usage_error(capsys, "probe", "--tensor-parallel-size", "x")
    assert "invalid choice: 'proby'" in usage_error(capsys, "proby")
    assert "use one of probe" in usage_error(capsys)
    assert "--nonsense" in usage_error(capsys, "--nonsense")


def test_named_errors_are_one_line_and_1(command, capsys) -> None:
    def fail(args):
        raise ConfigError("tp=3: does not divide 8 heads; use 1, 2, 4 or 8")

    command.run = fail
    assert cli.main(["probe"]) == 1
    assert capsys.readouterr().err == "yalis: error: tp=3: does not divide 8 heads; use 1, 2, 4 or 8\n"


def test_other_errors_are_not_hidden(command) -> None:
    def fail(args):
        raise ZeroDivisionError

    command.run = fail
    with pytest.raises(ZeroDivisionError):
        cli.main(["probe"])


def test_broken_pipe_of_a_socket_is_not_hidden(command) -> None:
    def fail(args):
        raise BrokenPipeError("from a peer")

    command.run = fail
    with pytest.raises(BrokenPipeError, match="from a peer"):
        cli.main(["probe"])


def test_interrupt_is_130(command, capsys) -> None:
    def interrupt(args):
        raise KeyboardInterrupt

    command.run = interrupt
    assert cli.main(["probe"]) == 130
    assert capsys.readouterr().err == "yalis: interrupted\n"


def shell(script: str) -> subprocess.CompletedProcess[str]:
    # Without coverage's start-up hook, which is not what these tests are about.
    env = {k: v for k, v in os.environ.items() if not k.startswith(("COV", "PYTHONUNBUFFERED"))} | {
        "PY": sys.executable
    }
    return subprocess.run(["bash", "-c", script], capture_output=True, text=True, timeout=60, env=env)


def test_reader_that_goes_away_is_141_and_silent() -> None:
    # Far more than a pipe holds, and then (--help) less than one buffer.
    script = (
        "import sys, types; from yalis.cli import main as cli\n"
        "m = types.ModuleType('m'); m.add_parser = lambda s: s.add_parser('p')\n"
        "m.run = lambda args: [print('x' * 1000) for _ in range(1000)] and 0\n"
        "sys.modules['m'] = m; cli.COMMANDS = {'p': ('m', '')}\n"
        "sys.exit(cli.main(['p']))"
    )
    done = shell(f'"$PY" -c "{script}" | head -n 1 > /dev/null; echo "${{PIPESTATUS[0]}}"')
    assert (done.stdout, done.stderr) == ("141\n", "")
    done = shell('{ sleep 0.3; "$PY" -m yalis --help; echo "$?" >&2; } | true')
    assert done.stderr == "141\n"


def test_help_is_quick_and_imports_no_torch() -> None:
    code = (
        "import sys, contextlib; from yalis.cli.main import main\n"
        "with contextlib.suppress(SystemExit): main(['--help'])\n"
        "heavy = {'torch', 'numpy', 'transformers', 'rich', 'msgspec'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = shell(f'"$PY" -c "{code}"')
    assert done.returncode == 0, done.stderr
    assert all(name in done.stdout for name in cli.COMMANDS)
    fastest = 9.0
    for _ in range(5):
        start = time.perf_counter()
        assert shell('"$PY" -m yalis --help').returncode == 0
        fastest = min(fastest, time.perf_counter() - start)
    assert fastest < 0.3


@pytest.mark.parametrize("name", list(cli.COMMANDS))
def test_help_of_every_command_needs_no_torch(name) -> None:
    code = (
        "import sys, contextlib; from yalis.cli.main import main\n"
        f"with contextlib.suppress(SystemExit): main(['{name}', '--help'])\n"
        "assert 'torch' not in sys.modules"
    )
    done = shell(f'"$PY" -c "{code}"')
    assert done.returncode == 0, done.stderr
    assert f"usage: yalis {name}" in done.stdout
    assert "example" in done.stdout


def test_import_is_quick() -> None:
    """`import yalis` takes under 0.2 s: the median of several, beyond what Python itself takes to start."""
    code = "import time; start = time.perf_counter(); import yalis; print(time.perf_counter() - start)"
    times = sorted(float(shell(f'"$PY" -c "{code}"').stdout) for _ in range(5))
    assert times[2] < 0.2, times
