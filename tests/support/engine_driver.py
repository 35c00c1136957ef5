"""A program that uses `LLM` and says on stdout what happens to it, for tests that kill its ranks or the program itself.

    python -m tests.support.engine_driver '{"tensor_parallel_size": 2, ...}'

Reads commands from stdin, one a line: ``generate`` (long outputs; says ``running`` at the first tokens), ``stats``,
``close``. Prints one JSON object a line: ``{"event": "ready"}``, ``{"event": "running"}``, ``{"event": "error", "type":
"EngineDeadError", "message": ...}``, ``{"event": "done"}``. The end of input ends it without `LLM.close`.
"""

from __future__ import annotations

import json
import sys
from typing import Any

from tests.support.checkpoints import DEMO
from yalis import LLM, SamplingParams
from yalis.errors import YalisError
from yalis.utils.garbage import spare_imports


def say(event: str, **values: Any) -> None:
    print(json.dumps({"event": event, **values}), flush=True)


def main() -> None:
    try:
        llm = LLM(str(DEMO), **json.loads(sys.argv[1]))
    except YalisError as error:
        say("error", type=type(error).__name__, message=str(error))
        return
    say("ready")
    for line in sys.stdin:
        try:
            obey(llm, line.strip())
        except YalisError as error:
            say("error", type=type(error).__name__, message=str(error))
        else:
            say("done")


def obey(llm: LLM, command: str) -> None:
    if command == "generate":
        # One after the other, so that it never ends by itself within a test.
        params = SamplingParams(temperature=0.0, max_tokens=900, ignore_eos=True)
        for number in range(1000):
            for state in llm.stream("This program is free software", params):
                if number == 0 and len(state.outputs[0].token_ids) == 3:
                    say("running")
    elif command == "stats":
        llm.stats()
    elif command == "close":
        llm.close()
    else:
        raise SystemExit(f"unknown command {command!r}")


if __name__ == "__main__":
    spare_imports()
    main()
