"""Entry point of ``yalis``: picks the subcommand, imports only its module, turns errors into one line and an exit code.

Exit codes: 0 done, 1 an error that yalis names, 2 wrong usage, 70 a rank of this launch was lost, 130 interrupted,
141 the reader of stdout went away.
"""

from __future__ import annotations

import argparse
import difflib
import importlib
import os
import select
import sys
from collections.abc import Iterator, Sequence
from typing import Any, NoReturn

from yalis import __version__
from yalis.errors import YalisError
from yalis.utils.garbage import spare_imports
from yalis.utils.logging import setup_logging

# Each module has ``add_parser(subparsers) -> ArgumentParser`` and ``run(args) -> int``. The summaries stand here so
# that `yalis --help` imports none of them.
COMMANDS = {
    "generate": ("yalis.cli.generate", "complete prompts from the command line or a file"),
    "chat": ("yalis.cli.chat", "talk to a model, interactively"),
    "serve": ("yalis.cli.serve", "serve a model over HTTP with OpenAI's interface"),
    "bench": ("yalis.cli.bench", "measure the engine, all-reduce, or a server under load"),
    "build": ("yalis.cli.build", "compile the all-reduce libraries ahead of time"),
    "tune": ("yalis.cli.tune", "measure the all-reduce here and keep the best choice per size"),
    "calibrate": ("yalis.cli.calibrate", "measure this machine and describe it for plan"),
    "plan": ("yalis.cli.plan", "predict layouts of a model on a cluster and recommend one"),
    "explain": ("yalis.cli.explain", "a record's time per token as a sum; for two records, what changed"),
    "study": ("yalis.cli.study", "run a grid of measurements and report it on one page"),
    "doctor": ("yalis.cli.doctor", "look at this machine, say what is wrong and how to mend it"),
    "demo": ("yalis.cli.demo", "run the small demo model on 2 x 2 ranks and show where the time goes"),
}

_EPILOG = """examples:
  yalis demo
  yalis generate --model models/demo --prompt "This program is free software" --max-tokens 40
  yalis bench allreduce --help
  yalis doctor

Log messages: YALIS_LOG_LEVEL=INFO or DEBUG. Help on one command: yalis COMMAND --help"""


class _Parser(argparse.ArgumentParser):
    """argparse with errors of one line, and no abbreviated options (an abbreviation breaks when an option is added)."""

    def __init__(self, **kwargs: Any):
        kwargs.setdefault("allow_abbrev", False)
        kwargs.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(**kwargs)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"yalis: error: {' '.join(message.split())}; see {self.prog} --help\n")


def build_parser(command: str | None) -> argparse.ArgumentParser:
    """The parser with the options of ``command`` only; the other commands are names and summaries."""
    parser = _Parser(
        prog="yalis",
        description="Run one language model over many ranks, and see where the time goes.",
        epilog=_EPILOG,
    )
    parser.add_argument("--version", action="version", version=f"yalis {__version__}")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", title="commands")
    for name, (module, summary) in COMMANDS.items():
        if name == command:
            importlib.import_module(module).add_parser(subparsers)
        else:
            subparsers.add_parser(name, help=summary, add_help=False)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``yalis`` with ``argv`` (default: the process's arguments) and return its exit code.

    Raises:
        SystemExit: after ``--help``, ``--version`` and wrong usage, as argparse does.
    """
    if argv is None:  # else the process is somebody else's
        spare_imports()
    arguments = list(sys.argv[1:] if argv is None else argv)
    setup_logging()
    try:
        try:
            return _dispatch(arguments)
        finally:
            sys.stdout.flush()  # here, so that a reader that went away is noticed here and not at exit
    except YalisError as error:
        print(f"yalis: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("yalis: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        if not _stdout_is_broken():
            raise
        # The interpreter flushes once more at exit; give that flush somewhere to go.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141


def _dispatch(arguments: Sequence[str]) -> int:
    command = next((a for a in arguments if not a.startswith("-")), None)
    parser = build_parser(command)
    args, unknown = parser.parse_known_args(arguments)
    if unknown:
        _refuse_unknown(parser, args.command, unknown)
    if args.command is None:
        parser.error(f"no command given: use one of {', '.join(COMMANDS)}")
    code: int = importlib.import_module(COMMANDS[args.command][0]).run(args)
    return code


def _refuse_unknown(parser: argparse.ArgumentParser, command: str | None, unknown: Sequence[str]) -> NoReturn:
    word = unknown[0]
    hint = ""
    if word.startswith("-"):
        close = difflib.get_close_matches(word.split("=", 1)[0], sorted(set(_options(parser))), n=1)
        hint = f"; did you mean {close[0]}?" if close else ""
    where = f"yalis {command}" if command else "yalis"
    parser.exit(2, f"yalis: error: unrecognized argument {word!r}{hint}; see {where} --help\n")


def _options(parser: argparse.ArgumentParser) -> Iterator[str]:
    for action in parser._actions:
        yield from action.option_strings
        if isinstance(action, argparse._SubParsersAction):
            for child in action.choices.values():
                yield from _options(child)


def _stdout_is_broken() -> bool:
    """Whether nobody reads stdout any more (``yalis ... | head``), as opposed to some connection of ours that broke."""
    try:
        poll = select.poll()
        poll.register(sys.stdout.fileno(), select.POLLOUT)
    except (OSError, ValueError):  # stdout was replaced by an object without a descriptor
        return False
    return any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))
