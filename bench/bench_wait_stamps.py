"""What telling waiting from moving costs: `rd` between two nodes of one rank, with its stamps and without.

    torchrun --nproc-per-node 2 bench/bench_wait_stamps.py [--calls 200]
    torchrun --nproc-per-node 2 bench/bench_wait_stamps.py --model bench/shapes/llama-254m --input-len 128

With: as `Group.swap` does it, with the search for marks, the looks at the clock, and between long messages a mark of
some bytes. Without: the same messages, begun and waited for. The two take turns, and which is first takes turns, too.

Of calls the longer time of both ranks counts, in microseconds: 10th percentile and median of each kind, and the median
of the differences within a turn. With ``--model`` (random weights) the same of steps that compute one prompt, in
milliseconds: wall-clock time, and processor time of both ranks, which other work on the machine disturbs less.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Sequence
from functools import partial
from time import perf_counter, process_time

import torch

from yalis.bench.harness import percentile
from yalis.comm import Communicator, init_distributed
from yalis.comm.group import Group
from yalis.comm.topology import from_environment

SIZES = (2 << 10, 8 << 10, 64 << 10, 128 << 10, 256 << 10, 1 << 20, 4 << 20)
WARMUP = 5
Messages = Sequence[tuple[torch.Tensor, int]]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calls", type=int, default=200, help="timed calls or steps of each kind (default: 200)")
    parser.add_argument("--model", default="", metavar="DIR", help="measure steps of this model, not calls")
    parser.add_argument("--input-len", type=int, default=128, help="tokens of the prompt (default: 128)")
    args = parser.parse_args()
    if args.model:
        steps(args.model, args.input_len, args.calls)
        return
    topology = from_environment(os.environ, ranks_per_node=1)
    init_distributed(topology)
    with Communicator.create(topology, range(topology.world_size), algorithm="rd") as comm:
        if comm.rank == 0:
            print(f"{'bytes':>8} {HEADER}")
        for nbytes in SIZES:
            x = torch.ones(nbytes // 4)

            def call(x: torch.Tensor = x) -> tuple[float, ...]:
                x.fill_(1.0)
                comm.barrier()
                start = perf_counter()
                comm.all_reduce(x, out=x)
                return (perf_counter() - start,)

            off, on = (over_ranks(comm, times)[:, :, 0].amax(0).tolist() for times in in_turn(comm, call, args.calls))
            if comm.rank == 0:
                print(f"{nbytes:8d} {words(off, on, 1e6)}", flush=True)


def steps(model: str, input_len: int, calls: int) -> None:
    """Measure steps that compute a prompt."""
    from yalis.config import EngineConfig
    from yalis.engine.handle import LocalEngine, follow
    from yalis.engine.sampling_params import SamplingParams
    from yalis.engine.start import start_rank

    rank = start_rank(
        EngineConfig(
            model,
            load_format="dummy",
            tensor_parallel_size=int(os.environ["WORLD_SIZE"]),
            ranks_per_node=1,
            enable_prefix_caching=False,
            max_num_seqs=1,
            max_model_len=input_len + 1,
        )
    )
    comm = rank.core.runner.tp
    engine = LocalEngine(rank) if rank.ranks.is_root else None
    prompt = torch.randint(3, 1000, (input_len,), generator=torch.Generator().manual_seed(0)).tolist()
    params = SamplingParams(max_tokens=1, temperature=0.0, ignore_eos=True, detokenize=False)

    def generate() -> None:
        if engine is None:
            follow(rank)
            return
        engine.submit("0", prompt, params, stream=False)
        outputs = []
        while not outputs:
            outputs = engine.poll()
        assert outputs[0].error is None, outputs[0].error
        engine.publish_results(outputs)

    def step() -> tuple[float, ...]:
        comm.barrier()
        wall, processor = perf_counter(), process_time()
        generate()
        return perf_counter() - wall, process_time() - processor

    times = [over_ranks(comm, found) for found in in_turn(comm, step, calls)]
    if comm.rank == 0:
        print(f"{'':>9} {HEADER}")
        print(f"{'wall':>9} {words(*(found[:, :, 0].amax(0).tolist() for found in times), 1e3)}")
        print(f"{'processor':>9} {words(*(found[:, :, 1].sum(0).tolist() for found in times), 1e3)}")
    rank.close()


def in_turn(
    comm: Communicator, call: Callable[[], tuple[float, ...]], calls: int
) -> tuple[list[tuple[float, ...]], list[tuple[float, ...]]]:
    """What ``call`` returns on this rank, without stamps and with."""
    without: list[tuple[float, ...]] = []
    with_stamps: list[tuple[float, ...]] = []
    bare = partial(exchange, comm.group)
    for turn in range(calls + WARMUP):
        for samples in (without, with_stamps) if turn % 2 else (with_stamps, without):
            if samples is without:
                vars(comm.group)["swap"] = bare  # in the way of the method
            found = call()
            vars(comm.group).pop("swap", None)
            if turn >= WARMUP:
                samples.append(found)
    return without, with_stamps


def exchange(group: Group, sends: Messages, recvs: Messages, tag: int, *, answer: bool = False) -> None:
    """What `Group.swap` does for CPU ranks if nobody asks who waited."""
    works = [group.backend.recv([t], peer, tag) for t, peer in recvs if t.numel()]
    works += [group.backend.send([t], peer, tag) for t, peer in sends if t.numel()]
    for work in works:
        work.wait()


def over_ranks(comm: Communicator, times: list[tuple[float, ...]]) -> torch.Tensor:
    """[ranks, calls, values]."""
    return comm.all_gather(torch.tensor([times], dtype=torch.float64), dim=0)


HEADER = (
    f"{'p10: off':>9} {'on':>9} {'cost':>8} {'p50: off':>9} {'on':>9} {'cost':>8} "
    f"{'within a turn: p25':>18} {'p50':>8} {'p75':>8}"
)


def words(off: list[float], on: list[float], scale: float) -> str:
    """A line of the table."""
    found = []
    for share in (0.1, 0.5):
        without, with_stamps = (scale * percentile(times, share) for times in (off, on))
        found.append(f"{without:9.2f} {with_stamps:9.2f} {with_stamps - without:+8.2f}")
    turns = [scale * (b - a) for a, b in zip(off, on, strict=True)]
    low, middle, high = (percentile(turns, share) for share in (0.25, 0.5, 0.75))
    return f"{' '.join(found)} {low:+18.2f} {middle:+8.2f} {high:+8.2f}"


if __name__ == "__main__":
    main()
