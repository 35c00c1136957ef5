"""Messages between processes, encoded with msgspec's MessagePack: nothing here can run code when it is decoded.

Two conversations use them: rank 0 tells the other ranks what is new in a step (`StepCommand`, over
`yalis.comm.control`), and a client process talks to rank 0 (`ClientMessage`, `ServiceMessage`, over ZeroMQ).
"""

from __future__ import annotations

import msgspec

from yalis.engine.outputs import RequestOutput
from yalis.engine.sampling_params import SamplingParams


class NewRequest(msgspec.Struct, frozen=True):
    """A request that enters the scheduler of every rank in this step, with ``n`` sequences from one prompt.

    Attributes:
        seq_ids, seeds: one for each sequence.
        token_ids: the prompt, once: it may be long and ``n`` large.
        max_tokens: of each sequence.
    """

    seq_ids: list[int]
    seeds: list[int]
    token_ids: list[int]
    params: SamplingParams
    max_tokens: int


class EndSequence(msgspec.Struct, frozen=True):
    """A sequence that ends from outside: aborted by the user, or a stop string was found in its text."""

    seq_id: int
    reason: str
    stop_reason: str | int | None = None


class ProfileCommand(msgspec.Struct, frozen=True):
    """Every rank starts its profiler, or ends it and writes the trace into ``folder`` (on its own host)."""

    start: bool
    folder: str


class StepCommand(msgspec.Struct, frozen=True):
    """What is new since the step before.

    Attributes:
        new, ended: requests that enter and sequences that leave before the step is scheduled.
        profile: start or end the profilers before the step.
        results: no step follows; a collective call is over and this is what it returns on every rank.
        shutdown: no step follows; the run is over.
    """

    new: list[NewRequest] = []
    ended: list[EndSequence] = []
    profile: ProfileCommand | None = None
    results: list[RequestOutput] | None = None
    shutdown: bool = False


class AddRequest(msgspec.Struct, tag=True, frozen=True):
    """Client to rank 0: generate for one prompt (text or token ids).

    Without ``stream`` only the last state comes back: intermediate ones would take cores from the ranks at every step.
    With ``delta`` an output holds only what is new since the one before: states of long outputs would travel again and
    again. With ``checked`` the client has tried the grammar itself, so that rank 0 need not wait for a verdict.
    """

    request_id: str
    prompt: str | list[int]
    params: SamplingParams
    stream: bool = True
    delta: bool = False
    checked: bool = False


class AbortRequests(msgspec.Struct, tag=True, frozen=True):
    """Client to rank 0: these requests are not wanted any more."""

    request_ids: list[str]


class GetStats(msgspec.Struct, tag=True, frozen=True):
    """Client to rank 0: send `EngineStats`; ``reset`` starts a new interval."""

    reset: bool = False


class Shutdown(msgspec.Struct, tag=True, frozen=True):
    """Client to rank 0: end all ranks in good order."""


class Profile(msgspec.Struct, tag=True, frozen=True):
    """Client to rank 0: start or end the profilers of all ranks; `Profiled` answers."""

    command: ProfileCommand


ClientMessage = AddRequest | AbortRequests | GetStats | Profile | Shutdown


class Ready(msgspec.Struct, tag=True, frozen=True):
    """Rank 0 to client: weights are loaded and requests are welcome; ``info`` describes the engine."""

    info: dict[str, str | int | float]


class Outputs(msgspec.Struct, tag=True, frozen=True):
    """Rank 0 to client: requests that progressed in a step."""

    outputs: list[RequestOutput]


class StepTimes(msgspec.Struct, frozen=True):
    """Where the time of ``steps`` steps went on this rank, in seconds. The parts add up to ``total_s``.

    Attributes:
        compute_s: forward pass and sampling less the collectives inside; on a GPU with the transfers between stages and
            the wait for them.
        intra_s, inter_s: all-reduce time inside a node and between nodes; ``flat_s`` where the algorithm does not
            tell the two apart.
        pipeline_s: waiting for and sending hidden states and tokens between stages; on a GPU only the host's share.
        host_s: scheduling, batch preparation, side channel, detokenization; on a GPU only what the device's own work
            does not hide.
        device_idle_s: seconds in which a GPU stood still between one step and the next; no part of the sum. On a GPU
            the other parts come from its clock, and all-reduce is within ``compute_s``.
        decode_s: the part of ``compute_s`` and the all-reduce inside that went into decode steps of fixed size.
        decode_steps, padded_steps, other_steps: decode steps of fixed sizes and padded ones with prompts (CUDA graphs
            where captured), and all others.
        sampled_apart: decode steps whose sampling needed more than temperature and seed, so ran outside of the graph.
        wait_intra_s, wait_inter_s: of the collectives' time, waiting for late ranks inside the node (shared memory, any
            collective) and between nodes (``rd``); no part of the sum, and 0 where nobody measures it.
        front_s: between the end of a step and the start of the next while there was work: on rank 0 the front end
            (tokens out, commands in); no part of the sum.
    """

    steps: int = 0
    total_s: float = 0.0
    compute_s: float = 0.0
    intra_s: float = 0.0
    inter_s: float = 0.0
    flat_s: float = 0.0
    pipeline_s: float = 0.0
    host_s: float = 0.0
    device_idle_s: float = 0.0
    decode_s: float = 0.0
    decode_steps: int = 0
    padded_steps: int = 0
    other_steps: int = 0
    sampled_apart: int = 0
    wait_intra_s: float = 0.0
    wait_inter_s: float = 0.0
    front_s: float = 0.0


class EngineStats(msgspec.Struct, tag=True, frozen=True):
    """Rank 0 to client: counters since the last reset. ``decode_times``: of the steps that only decoded."""

    times: StepTimes
    num_preemptions: int
    prefix_queries: int
    prefix_hits: int
    kv_usage: float
    num_running: int
    num_waiting: int
    decode_times: StepTimes = StepTimes()


class Profiled(msgspec.Struct, tag=True, frozen=True):
    """Rank 0 to client: done; ``path`` is rank 0's trace, empty after a start. ``error``: why not."""

    path: str = ""
    error: str = ""


class EngineFailed(msgspec.Struct, tag=True, frozen=True):
    """Rank 0 to client: the engine ends; ``message`` is the error or the verdict on a lost rank."""

    message: str


ServiceMessage = Ready | Outputs | EngineStats | Profiled | EngineFailed


class RankState(msgspec.Struct, frozen=True):
    """What the liveness monitor knows of one rank.

    Attributes:
        state: ``working``, ``idle``, what it waits in, ``left`` or ``lost``.
        step: its step number, -1 before the first.
        beat_age_s: seconds since it was last heard.
    """

    rank: int
    host: str
    pid: int
    state: str
    step: int
    beat_age_s: float


class CollectiveStats(msgspec.Struct, frozen=True):
    """Totals of one kind of collective work on rank 0 since its start.

    Attributes:
        group: ``tp`` or ``pp``.
        tier: ``intra``, ``inter`` or ``flat``; see `yalis.comm.stats.CommStats`.
        algorithms: names of the group's all-reduce algorithms.
    """

    group: str
    tier: str
    algorithms: str
    seconds: float
    calls: int
    bytes: int


class AllReduceStats(msgspec.Struct, frozen=True):
    """Which algorithm served how many all-reduces of a group on rank 0 since its start."""

    group: str
    algorithm: str
    calls: int
    bytes: int


class Status(msgspec.Struct, frozen=True):
    """Rank 0's status thread to client, a few times a second, whatever the step loop does.

    Attributes:
        ranks: every rank, as rank 0 sees it.
        verdict: who was lost and why; empty while nobody is.
        turn_age_s: seconds since the step loop last turned.
        stats: counters since the start.
        step_tokens: tokens of each step since the status before.
        collectives: where communication time went.
        all_reduces: which algorithms served.
        waited_s: by group, seconds of waiting for late ranks; only groups that measure it.
    """

    ranks: list[RankState]
    verdict: str
    turn_age_s: float
    stats: EngineStats
    step_tokens: list[int]
    collectives: list[CollectiveStats] = []
    all_reduces: list[AllReduceStats] = []
    waited_s: dict[str, float] = {}
