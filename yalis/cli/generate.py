"""``yalis generate``: complete prompts."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from yalis.cli.engine_options import add_engine_options, engine_options
from yalis.cli.lost_rank import lost_rank_is_told
from yalis.cli.sampling_options import add_sampling_options, sampling_options
from yalis.errors import ConfigError

if TYPE_CHECKING:
    from yalis.engine.outputs import RequestOutput

_EPILOG = """examples:
  yalis generate --model models/demo "This program is free software" --max-tokens 40
  yalis generate --model models/demo --prompt-file prompts.txt --json --tp 2 --pp 2 --ranks-per-node 2
  torchrun --nproc-per-node 2 -m yalis generate --model models/demo --tp 2 "The licenses for most software"
  srun --nodes 2 --ntasks-per-node 4 yalis generate --model /models/Llama-3.1-70B --tp 8 "Once upon a time"
"""


def add_parser(subparsers: Any) -> argparse.ArgumentParser:
    """Add the subcommand's parser."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "generate",
        help="complete prompts from the command line or a file",
        description="Complete prompts. Text goes to stdout, everything else to stderr.",
        epilog=_EPILOG,
    )
    parser.add_argument("--model", required=True, metavar="PATH", help="folder in Hugging Face layout, or a hub id")
    parser.add_argument("prompts", nargs="*", metavar="PROMPT", help="text to continue")
    parser.add_argument("--prompt", action="append", default=[], help="one more prompt; may be repeated")
    parser.add_argument("--prompt-file", type=Path, metavar="FILE", help="one prompt per line; - reads stdin")
    parser.add_argument("--json", action="store_true", help="one JSON object per prompt, with tokens and metrics")
    parser.add_argument(
        "--profile", type=Path, metavar="DIR", help="record the first steps: a trace per rank, in Chrome's format"
    )
    add_sampling_options(parser)
    add_engine_options(parser)
    return parser


def run(args: argparse.Namespace) -> int:
    """Complete the prompts; 1 if one of them was refused."""
    prompts = _prompts(args)
    from yalis.engine.llm import LLM

    with LLM(args.model, **engine_options(args)) as llm, lost_rank_is_told():
        params = llm.sampling_params(sampling_options(args))
        plain = not args.json and args.profile is None
        if llm.is_root and len(prompts) == 1 and params.n == 1 and plain and sys.stdout.isatty():
            return _stream(llm.stream(prompts[0], params), prompts[0])
        if args.profile is not None:
            llm.start_profile(args.profile)
        outputs = llm.generate(prompts, params, use_tqdm=True)
        trace = llm.stop_profile() if args.profile is not None else ""
        if not llm.is_root:
            return 0
        if args.profile is not None:
            sys.stderr.write(f"rank 0's trace: {trace or 'could not be written, see the log'}\n")
        return _print_all(outputs, as_json=args.json)


def _prompts(args: argparse.Namespace) -> list[str]:
    prompts = [*args.prompts, *args.prompt]
    if args.prompt_file is not None:
        try:
            text = sys.stdin.read() if str(args.prompt_file) == "-" else args.prompt_file.read_text()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(
                f"--prompt-file {args.prompt_file}: {error}; name a text file with one prompt a line"
            ) from error
        lines = [line for line in text.splitlines() if line.strip()]
        if not lines:
            raise ConfigError(
                f"no prompt: --prompt-file {args.prompt_file} has no line with text; write one prompt a line"
            )
        prompts += lines
    if not prompts:
        raise ConfigError("no prompt: give one as an argument, with --prompt, or with --prompt-file")
    return prompts


def _stream(outputs: Any, prompt: str) -> int:
    sys.stdout.write(prompt)
    shown = 0
    output: RequestOutput | None = None
    for output in outputs:
        text = output.outputs[0].text
        sys.stdout.write(text[shown:])
        sys.stdout.flush()
        shown = len(text)
    sys.stdout.write("\n")
    return _report_errors([output] if output is not None else [])


def _print_all(outputs: list[RequestOutput], *, as_json: bool) -> int:
    if as_json:
        import msgspec

        for output in outputs:
            sys.stdout.write(msgspec.json.encode(output).decode() + "\n")
    else:
        served = [o for o in outputs if o.error is None]
        for output in served:
            for sample in output.outputs:
                sys.stdout.write(f"{output.prompt}{sample.text}\n")
                if len(served) > 1 or len(output.outputs) > 1:
                    sys.stdout.write("\n")
    return _report_errors(outputs)


def _report_errors(outputs: list[RequestOutput]) -> int:
    failed = [o for o in outputs if o.error is not None]
    for output in failed:
        prompt = (output.prompt or "")[:40]
        sys.stderr.write(f"yalis: error: prompt {prompt!r}: {output.error}\n")
    return 1 if failed else 0
