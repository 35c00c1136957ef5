"""Requests that come while others run, for an engine of this process."""

from __future__ import annotations

from dataclasses import dataclass

from yalis.engine.handle import LocalEngine
from yalis.engine.outputs import RequestOutput
from yalis.engine.sampling_params import SamplingParams


@dataclass(frozen=True)
class Arrival:
    """A request that comes before the engine's step number ``turn``, counted from 0."""

    turn: int
    prompt: list[int]
    params: SamplingParams


def serve(engine: LocalEngine, arrivals: list[Arrival]) -> list[RequestOutput]:
    """What becomes of ``arrivals``, in order of ``turn``; the engine has nothing else to do."""
    done: dict[str, RequestOutput] = {}
    came = turn = 0
    while came < len(arrivals) or engine.engine.has_unfinished_requests:
        while came < len(arrivals) and arrivals[came].turn <= turn:
            engine.submit(str(came), arrivals[came].prompt, arrivals[came].params, stream=False)
            came += 1
        done |= {output.request_id: output for output in engine.poll()}
        turn += 1
    return [done[str(number)] for number in range(len(arrivals))]
