"""``yalis chat``: talk to a model."""

from __future__ import annotations

import argparse
import signal
import sys
from typing import Any

from yalis.cli.engine_options import add_engine_options, engine_options
from yalis.cli.sampling_options import add_sampling_options, sampling_options

_EPILOG = """examples:
  yalis chat --model models/demo
  yalis chat --model Qwen/Qwen3-0.6B --tp 2 --system "Answer in one sentence." --max-tokens 200
  printf 'What is free software?\\n' | yalis chat --model models/demo

While it runs: /reset forgets the conversation, /stats shows where the time went, /exit (or end of input) ends.
Ctrl-C stops an answer."""

_HELP = "/reset forgets the conversation, /stats shows speed, /exit ends; Ctrl-C stops an answer"


def add_parser(subparsers: Any) -> argparse.ArgumentParser:
    """Add the subcommand's parser."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "chat",
        help="talk to a model, interactively",
        description="Talk to a model. Answers stream to stdout; questions are read from the terminal or from stdin.",
        epilog=_EPILOG,
    )
    parser.add_argument("--model", required=True, metavar="PATH", help="folder in Hugging Face layout, or a hub id")
    parser.add_argument("--system", metavar="TEXT", help="system message that opens the conversation")
    add_sampling_options(parser)
    add_engine_options(parser)
    return parser


def run(args: argparse.Namespace) -> int:
    """The conversation loop."""
    from yalis.engine.llm import LLM
    from yalis.errors import ConfigError, RequestError

    with LLM(args.model, **engine_options(args)) as llm:
        if not llm.is_root:
            raise ConfigError("chat is interactive and cannot run under a launcher; start it without torchrun or srun")
        params = llm.sampling_params({"max_tokens": 256, **sampling_options(args)})
        opening = [{"role": "system", "content": args.system}] if args.system else []
        messages = list(opening)
        interactive = sys.stdin.isatty()
        if interactive:
            sys.stderr.write(f"{llm.info['model']}: {_HELP}\n")
        while True:
            line = _read(interactive)
            if line is None or line == "/exit":
                return 0
            if line == "/reset":
                messages = list(opening)
            elif line == "/stats":
                _show_stats(llm.stats())
            elif line.startswith("/"):
                sys.stderr.write(f"unknown command {line.split()[0]}: {_HELP}\n")
            elif line:
                messages.append({"role": "user", "content": line})
                try:
                    prompt = llm.render_chat(messages)
                    answer = _answer(llm.stream(prompt, params))
                except RequestError as error:
                    sys.stderr.write(f"yalis: error: {error}\n")
                    return 1
                if answer is None:
                    messages.pop()
                else:
                    messages.append({"role": "assistant", "content": answer})


def _read(interactive: bool) -> str | None:
    """The next line, None at the end of input. Ctrl-C at the prompt ends the program, as everywhere."""
    try:
        return input("> " if interactive else "").strip()
    except EOFError:
        if interactive:
            sys.stderr.write("\n")
        return None


def _answer(outputs: Any) -> str | None:
    """Print an answer as it comes; its text, or None if it was refused. Ctrl-C keeps what has come so far."""
    shown, text = 0, ""
    with _Interrupt() as interrupt:
        for output in outputs:
            if output.error is not None:
                sys.stderr.write(f"yalis: error: {output.error}; /reset starts over\n")
                return None
            text = output.outputs[0].text
            sys.stdout.write(text[shown:])
            sys.stdout.flush()
            shown = len(text)
            if interrupt.asked:
                outputs.close()
                break
    sys.stdout.write("\n")
    return text


class _Interrupt:
    """While it is entered, the first Ctrl-C only sets ``asked``: a step of the engine is never cut in two.

    A second one raises `KeyboardInterrupt` at once.
    """

    def __init__(self) -> None:
        self.asked = False
        self._before: Any = None

    def __enter__(self) -> _Interrupt:
        self._before = signal.signal(signal.SIGINT, self._ask)
        return self

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGINT, self._before)

    def _ask(self, *_: object) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True


def _show_stats(stats: Any) -> None:
    times = stats.times
    if not times.steps:
        sys.stderr.write("no steps yet\n")
        return
    reduce_s = times.intra_s + times.inter_s + times.flat_s
    sys.stderr.write(
        f"{times.steps} steps, {1e3 * times.total_s / times.steps:.2f} ms each: "
        f"compute {1e3 * times.compute_s / times.steps:.2f}, all-reduce {1e3 * reduce_s / times.steps:.2f}, "
        f"host {1e3 * times.host_s / times.steps:.2f}; KV use {100 * stats.kv_usage:.0f}%\n"
    )
