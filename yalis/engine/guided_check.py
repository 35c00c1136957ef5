"""Tries a grammar in a process of its own first, because compiling one can take forever or overflow the stack.

The library's limits stop neither: a schema of a few kilobytes can keep it busy for hours, and rules that refer to each
other thousands of times end the process. The process that tries has a deadline, a small stack and bounded memory; what
it survives, the ranks survive too.

This file is also the program of that process. It must import nothing but the standard library and llguidance, so that
it starts quickly.
"""

from __future__ import annotations

import contextlib
import json
import resource
import select
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Sequence
from typing import Any

# Of the processor's time: a busy machine is no reason to refuse a grammar. Sensible ones take milliseconds, the largest
# that we tried 0.5 s.
COMPILE_LIMIT_S = 1.0
# By the clock: whoever waits for the answer does nothing else.
WAIT_LIMIT_S = 5.0
# A tokenizer of 152,064 tokens takes 2 s on a quiet core.
START_LIMIT_S = 60.0
# Half of what threads have by default, so that no grammar gets through that needs more than the ranks have.
_STACK_BYTES = 4 * 2**20
_MEMORY_BYTES = 4 * 2**30


class GrammarChecker:
    """A process that compiles grammars; started when first asked, and again after a grammar has ended it.

    Args:
        setup: ``tokenizer`` (text of tokenizer.json), ``vocab_size``, ``eos_token_ids``, ``added_tokens`` (ids by
            text) and ``limits``, as JSON values.
    """

    def __init__(self, setup: dict[str, Any]):
        self._setup = setup
        self._process: subprocess.Popen[bytes] | None = None
        self._stop: weakref.finalize[..., Any] | None = None
        self._special: list[str] | None = None  # known when the process is ready

    def start(self) -> None:
        """Start the process without waiting until it is ready."""
        if self._process is not None:
            return
        # -P: this file's folder has modules with names of the standard library.
        command = [sys.executable, "-P", __file__]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        )
        self._stop = weakref.finalize(self, _end, self._process)
        # It reads before it writes anything, so this cannot block for good.
        self._send(self._setup)

    def error(self, grammar: str, texts: Sequence[str] = ()) -> str:
        """Why a grammar (in llguidance's own JSON) cannot be used; empty if it can.

        Waits for `WAIT_LIMIT_S` at most, and the first time for `START_LIMIT_S`.

        Args:
            texts: what the grammar spells out; special tokens in there are refused.
        """
        self.start()
        try:
            if self._special is None:
                ready = self._receive(START_LIMIT_S)
                if ready["error"]:
                    self.close()
                    return f"guided decoding does not work with this model's tokenizer: {ready['error']}"
                self._special = ready["special"]
            for text in texts:
                if any(special in text for special in self._special):
                    return f"{text!r:.80} holds a special token, which is no text; leave it out"
            self._send({"grammar": grammar})
            return str(self._receive(WAIT_LIMIT_S)["error"])
        except TimeoutError:
            self.close()
            return f"compiling it takes longer than {COMPILE_LIMIT_S:g} s; use a simpler one"
        except (OSError, EOFError):
            self.close()
            return "it is too deep, too large or too slow to compile; use fewer rules that refer to each other"

    def close(self) -> None:
        """End the process. Idempotent; the next `error` starts another."""
        if self._stop is not None:
            self._stop()
        self._process = self._stop = self._special = None

    def _send(self, message: dict[str, Any]) -> None:
        assert self._process is not None and self._process.stdin is not None
        self._process.stdin.write(json.dumps(message).encode() + b"\n")
        self._process.stdin.flush()

    def _receive(self, seconds: float) -> dict[str, Any]:
        assert self._process is not None and self._process.stdout is not None
        # The process ends itself in time even if this one is gone; half a second more is for its last word.
        deadline = time.monotonic() + seconds + 0.5
        line = b""
        while not line.endswith(b"\n"):
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([self._process.stdout], [], [], left)[0]:
                raise TimeoutError
            piece = self._process.stdout.read1(65536)  # type: ignore[attr-defined]
            if not piece:
                ended_by = -self._process.wait(timeout=5)
                raise TimeoutError if ended_by in (signal.SIGALRM, signal.SIGPROF) else EOFError
            line += piece
        answer: dict[str, Any] = json.loads(line)
        return answer


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait(timeout=5)
    for stream in (process.stdin, process.stdout):
        if stream is not None:
            with contextlib.suppress(OSError):  # what was still to be sent has nobody to read it
                stream.close()


# ---- the process ------------------------------------------------------------------------------------------------


def main() -> None:
    """Answer the grammars on stdin with ``{"error": ...}``, one a line each, until it ends.

    The first line is the setup; its answer also has ``special``, the texts of the tokens that are no text.
    """
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY_BYTES, _MEMORY_BYTES))
    threading.stack_size(_STACK_BYTES)
    signal.setitimer(signal.ITIMER_REAL, START_LIMIT_S)
    setup = json.loads(sys.stdin.readline())
    import llguidance

    try:
        tokenizer = llguidance.LLTokenizer(
            setup["tokenizer"], n_vocab=setup["vocab_size"], eos_token=setup["eos_token_ids"]
        )
    except Exception as error:  # the library raises several kinds for tokenizers that it does not know
        print(json.dumps({"error": str(error)}), flush=True)
        return
    limits = llguidance.LLParserLimits(**setup["limits"])
    signal.setitimer(signal.ITIMER_REAL, 0)
    # To the library, tokens with names like <think> are special too.
    special = [text for text, number in setup["added_tokens"].items() if tokenizer.is_special_token(number)]
    print(json.dumps({"error": "", "special": special}), flush=True)
    for line in sys.stdin:
        grammar = json.loads(line)["grammar"]
        found: list[str] = []

        def attempt(grammar: str = grammar, found: list[str] = found) -> None:
            matcher = llguidance.LLMatcher(tokenizer, grammar, log_level=0, limits=limits)
            if not matcher.is_error():
                matcher.compute_bitmask()  # grammars that can never yield a token show here
            found.append(matcher.get_error())

        # The default action of both ends the process, whatever the library is doing.
        signal.setitimer(signal.ITIMER_PROF, COMPILE_LIMIT_S)
        signal.setitimer(signal.ITIMER_REAL, WAIT_LIMIT_S)
        thread = threading.Thread(target=attempt)
        thread.start()
        thread.join()
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)
        print(json.dumps({"error": found[0]}), flush=True)


if __name__ == "__main__":
    main()
